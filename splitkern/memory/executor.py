"""Runs a captured step by its plan: operations on views of a device arena, copies beside them.

What the plan's parameters pool holds (parameters, buffers, inputs, gradients of parameters) lies outside: it is the
caller's, or is handed to the caller. On the CPU ordinary memory stands for the device's, and threads for its copy
engines, so that everything here runs for real anywhere.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from splitkern import _core, _library
from splitkern.memory.bound_calls import Bound, BoundCall, Slot, tensor_of
from splitkern.memory.capture import CapturedOperation, CapturedStep
from splitkern.memory.graphs import PieceGraphs
from splitkern.memory.report import bytes_text
from splitkern.memory.rewrite import Call

_ALIGNMENT_BYTES = 512
#: A part of the backward pass ends once this many bytes of gradients are final: a bucket of DistributedDataParallel.
_PART_BYTES = 25 << 20


@dataclass(frozen=True)
class ExecutorOptions:
    """How copies run, and what is checked.

    Attributes:
        chunk_bytes: largest piece of a copy.
        copies_in_flight: pieces of one direction that are under way at a time.
        debug: compare every offloaded storage on its way back with what left, and fill freed bytes with NaN.
        max_delay_us: on the CPU, every action of a copy rests for a random time up to this, to shake the order.
        seed: of these delays.
        count_every: steps; in the first of so many, what compressed copies put on the link is counted.
        cuda_graphs: launch every stretch of operations without copies as one CUDA graph. Inputs and gradients are then
            copied, to and from memory that stays.
    """

    chunk_bytes: int = 16 << 20
    copies_in_flight: int = 2
    debug: bool = False
    max_delay_us: int = 0
    seed: int = 0
    count_every: int = 64
    cuda_graphs: bool = False


@dataclass(frozen=True)
class BackwardPart:
    """A stretch of the backward pass after which some gradients are final.

    Attributes:
        begin, end: instances.
        gradients: names of those that are final at its end.
    """

    begin: int
    end: int
    gradients: tuple[str, ...]


class Observer(Protocol):
    """Told of every instance that runs, by its number, when its memory is bound and its copies have been waited for."""

    def instance(self, number: int) -> AbstractContextManager[object]:
        """Entered before the instance is run, left behind it."""


class Arenas:
    """The memory that a plan's offsets count from.

    Args:
        device_bytes, host_bytes: sizes.
        device: of the step.

    Raises:
        RuntimeError: the device or pinned host memory cannot be had; the text says what to do.
    """

    def __init__(self, device_bytes: int, host_bytes: int, device: torch.device) -> None:
        self.device = _arena(device_bytes, device)
        pinned = device.type == "cuda"
        try:
            self.host = _arena(host_bytes, torch.device("cpu"), pinned=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            raise RuntimeError(
                f"{bytes_text(host_bytes)} of {kind} for what is offloaded cannot be had: "
                f"{_first_line(error)}; give a smaller host_budget, or close what holds host memory"
            ) from error
        self._stream = _current_stream(device)

    def follow(self, stream: torch.cuda.Stream | None) -> None:
        """Moves to another stream, behind all that was launched on the one before, whichever executor did.

        Args:
            stream: of the step that begins; None on the CPU.
        """
        if stream is None or stream == self._stream:
            return
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self.device.record_stream(stream)
        self._stream = stream


@dataclass(frozen=True)
class _Kept:
    """A parameter as it was bound. It may go while the executor stays."""

    tensor: weakref.ref[Tensor]
    address: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor) -> _Kept:
        return cls(weakref.ref(value), value.data_ptr(), value.stride())

    def is_still(self, value: Tensor) -> bool:
        return value is self.tensor() and value.data_ptr() == self.address and value.stride() == self.strides


class StepExecutor:
    """Runs one captured step by one plan, step after step.

    One step at a time: `forward`, then `backward_part` for every part in order, or `give_up`. One thread at a time, but
    any may call `give_up`.

    Attributes:
        parts: of the backward pass, in order.
        begun_at: when the last forward pass began, by the clock `time.monotonic`; 0 before the first.
        observer: told of every instance, where there is one.

    Args:
        step: captured with ``given_gradients=True``.
        graph: of the step.
        plan: for that graph; it is validated here.
        options: of copies and checks.
        arenas: to run in, of at least the plan's sizes; allocated here unless given.

    Raises:
        splitkern._core.InvalidPlan: the plan is wrong for the graph.
        ValueError: the step has its loss inside.
        RuntimeError: memory for the arenas cannot be had.
    """

    def __init__(
        self,
        step: CapturedStep,
        graph: _core.Graph,
        plan: _core.Plan,
        options: ExecutorOptions | None = None,
        *,
        arenas: Arenas | None = None,
    ) -> None:
        if step.loss >= 0:
            raise ValueError("step must be captured with given_gradients=True, got one with its loss inside")
        _core.validate(graph, plan)
        self.step, self.plan = step, plan
        self.options = ExecutorOptions() if options is None else options
        self.observer: Observer | None = None
        self.begun_at = 0.0
        self._storage_of = [0] * len(step.storages)
        for number, storage in enumerate(plan.storages):
            for member in storage.members:
                self._storage_of[member] = number
        predicted = plan.predicted
        self.arenas = arenas or Arenas(predicted.device_peak_bytes, predicted.host_peak_bytes, step.device)
        self._typed: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[int, int], Tensor] = {}
        self._sources = self._outside_storages()
        # By storage outside the arena: the slots of its tensors, and what is bound.
        self._slots: dict[int, dict[int, Slot]] = {storage: {} for storage in self._sources}
        self._bound: dict[int, Tensor] = {}
        self._kept: dict[int, _Kept] = {}
        # Bound once for good: what CUDA graphs point to.
        self._static = set[int]()
        operations = [step.operations[instance.operation] for instance in plan.instances]
        self._instances = self._bind_instances()
        self._made_at = self._first_writes(operations)
        self._made = {storage for made in self._made_at.values() for storage in made}
        self._begin_of_backward = self._find_backward(operations)
        self._late = self._read_in_backward(operations)
        self._outputs = self._bind_outputs(operations)
        self.parts = self._divide_backward(operations)
        self._causes = self._find_causes()
        self._given = frozenset[int]()
        self._gradients = {name: self._view_at(place, len(operations)) for name, place in step.gradients.items()}
        self._stream = _current_stream(step.device)
        self._pipeline = self._make_pipeline()
        self._graphs = PieceGraphs(plan, self._run_call) if self.options.cuda_graphs else None
        # Reentrant: while it is held the garbage collector may end the very step that is being given up.
        self._lock = threading.RLock()
        self._busy = threading.Lock()
        self._next_part: int | None = None
        self._number = 0
        self._versions: dict[str, tuple[Tensor, int]] = {}

    def _make_pipeline(self) -> _core.CopyPipeline | None:
        if not self.plan.copies and not self.options.debug:
            return None
        options = self.options
        arenas: dict[str, Any] = {
            "device": self.arenas.device.data_ptr(),
            "device_bytes": self.arenas.device.numel(),
            "host": self.arenas.host.data_ptr(),
            "host_bytes": self.arenas.host.numel(),
        }
        common: dict[str, Any] = {
            "chunk_bytes": options.chunk_bytes,
            "max_in_flight": options.copies_in_flight,
            "checksums": options.debug,
            "poison": options.debug,
            "count_every": options.count_every,
        }
        device = self.step.device
        if device.type == "cpu":
            return _core.CopyPipeline.on_host(
                self.plan, **arenas, **common, seed=options.seed, max_delay_us=options.max_delay_us
            )
        assert self._stream is not None
        return _core.CopyPipeline.on_cuda(
            self.plan,
            **arenas,
            **common,
            device_index=self._stream.device_index,
            compute_stream=self._stream.cuda_stream,
            copy_slots=_library.copy_slots_address() if any(copy.compressed for copy in self.plan.copies) else 0,
        )

    def _follow_stream(self) -> None:
        """Moves to the caller's stream: the arenas, which executors may share, and then the pipeline."""
        stream = _current_stream(self.step.device)
        self.arenas.follow(stream)
        if stream != self._stream:
            self._stream = stream
            self._pipeline = self._make_pipeline()

    # --- what is bound once --------------------------------------------------------------------------------------

    def _outside_storages(self) -> set[int]:
        """The planned storages that lie outside the arena: the plan's parameters pool and what the caller gives."""
        step = self.step
        given = (*step.parameters.values(), *step.inputs.values(), *step.constants)
        found = {self._storage_of[step.tensors[place].storage] for place in given}
        parameters = _core.PoolKind.PARAMETERS
        return found | {residency.storage for residency in self.plan.residencies if residency.pool == parameters}

    def _view(self, offset_bytes: int, place: int) -> Tensor:
        """A tensor at an address of the device arena: one view, whichever instances use it."""
        view = self._views.get((place, offset_bytes))
        if view is None:
            tensor = self.step.tensors[place]
            item = tensor.element_bytes
            typed = self._typed.get(tensor.dtype)
            if typed is None:
                arena = self.arenas.device
                typed = self._typed[tensor.dtype] = arena[: arena.numel() // item * item].view(tensor.dtype)
            offset = typed.storage_offset() + (offset_bytes + tensor.offset_bytes) // item
            view = self._views[place, offset_bytes] = typed.as_strided(tensor.sizes, tensor.strides, offset)
        return view

    def _view_at(self, place: int, boundary: int) -> Bound:
        """The tensor where the plan has it when the instance behind a boundary runs."""
        storage = self._storage_of[self.step.tensors[place].storage]
        if storage in self._sources:
            return self._slots[storage].setdefault(place, Slot(place))
        for begin, end, offset_bytes in self._residencies.get(storage, ()):
            if begin <= boundary < end:
                return self._view(offset_bytes, place)
        raise AssertionError(f"a valid plan has storage {storage} on the device at boundary {boundary}")

    def _bind_instances(self) -> list[BoundCall]:
        # On the device, by storage: begin, end, offset. Attributes of a plan are slow to read.
        self._residencies: dict[int, list[tuple[int, int, int]]] = {}
        device = _core.PoolKind.DEVICE
        for residency in self.plan.residencies:
            if residency.storage >= 0 and residency.pool == device:
                found = residency.begin, residency.end, residency.offset_bytes
                self._residencies.setdefault(residency.storage, []).append(found)
        bound = []
        for number, instance in enumerate(self.plan.instances):
            operation = self.step.operations[instance.operation]
            call = operation.call if operation.out_call is None else operation.out_call
            reads = [self._view_at(place, number) for place in operation.reads]
            writes = [self._view_at(place, number) for place in operation.writes]
            if instance.accumulate:
                call = _accumulating(operation, call)
            bound.append(BoundCall(call, reads, writes, self.step.device))
        return bound

    def _first_writes(self, operations: Sequence[CapturedOperation]) -> dict[int, list[int]]:
        """By instance, the gradients outside the arena that it is the first to write: they are made then."""
        gradients = {
            self._storage_of[number]
            for number, storage in enumerate(self.step.storages)
            if storage.kind == "gradient" and self._storage_of[number] in self._sources
        }
        found: dict[int, list[int]] = {}
        for number, operation in enumerate(operations):
            for place in operation.writes:
                storage = self._storage_of[self.step.tensors[place].storage]
                if storage in gradients:
                    gradients.remove(storage)
                    found.setdefault(number, []).append(storage)
        return found

    def _find_backward(self, operations: Sequence[CapturedOperation]) -> int:
        """The first instance that needs a gradient that the step is given, or belongs to the backward pass."""
        step = self.step
        given = {step.tensors[place].storage for name, place in step.inputs.items() if name.startswith("grad_output.")}
        return next(
            (
                number
                for number, (instance, operation) in enumerate(zip(self.plan.instances, operations, strict=True))
                if instance.is_recomputation
                or operation.is_backward
                or any(step.tensors[read].storage in given for read in operation.reads)
            ),
            len(operations),
        )

    def _find_causes(self) -> dict[str, set[int]]:
        """For every gradient, the outputs whose gradients it is computed from."""
        step = self.step
        causes: dict[int, set[int]] = {}
        for name, place in step.inputs.items():
            if name.startswith("grad_output."):
                causes[step.tensors[place].storage] = {int(name.removeprefix("grad_output."))}
        for operation in step.operations:
            found = set[int]().union(*(causes.get(step.tensors[read].storage, ()) for read in operation.reads))
            for write in operation.writes if found else ():
                causes.setdefault(step.tensors[write].storage, set()).update(found)
        return {name: causes.get(step.tensors[place].storage, set()) for name, place in step.gradients.items()}

    def _read_in_backward(self, operations: Sequence[CapturedOperation]) -> list[tuple[str, int]]:
        """Parameters and inputs, by name and storage, whose values backward needs as forward left them."""
        step = self.step
        late = {
            step.tensors[read].storage
            for operation in operations[self._begin_of_backward :]
            for read in operation.reads
        }
        return [
            (name, self._storage_of[step.tensors[place].storage])
            for name, place in (*step.parameters.items(), *step.inputs.items())
            if step.tensors[place].storage in late and not name.startswith("grad_output.")
        ]

    def _bind_outputs(self, operations: Sequence[CapturedOperation]) -> dict[int, list[tuple[int, Bound]]]:
        """What the model returns, by the instance of the forward part that writes it last: it may leave after that."""
        found: dict[int, list[tuple[int, Bound]]] = {}
        for position, place in enumerate(self.step.outputs):
            last = self._last_touch(place, operations[: self._begin_of_backward], reads=False)
            last = self._begin_of_backward - 1 if last is None else last
            found.setdefault(last, []).append((position, self._view_at(place, last)))
        return found

    def _last_touch(self, place: int, operations: Sequence[CapturedOperation], *, reads: bool) -> int | None:
        """The last of these instances that writes, or also reads, the planned storage of a tensor."""
        storage = self._storage_of[self.step.tensors[place].storage]
        for number in reversed(range(len(operations))):
            touched = (*operations[number].writes, *(operations[number].reads if reads else ()))
            if any(self._storage_of[self.step.tensors[place].storage] == storage for place in touched):
                return number
        return None

    def _divide_backward(self, operations: Sequence[CapturedOperation]) -> list[BackwardPart]:
        """Cuts where enough gradients are final, and where the backward pass enters the split region."""
        final: dict[int, list[str]] = {}
        parts: list[BackwardPart] = []
        begin, names, final_bytes = self._begin_of_backward, list[str](), 0
        seen = set[int]()
        for name, place in self.step.gradients.items():
            parameter = self.step.parameters.get(name)
            if parameter in seen:
                continue  # another name of a parameter that has its gradient already
            if parameter is not None:
                seen.add(parameter)
            last = self._last_touch(place, operations, reads=True)
            if last is None or last < begin:
                names.append(name)
            else:
                final.setdefault(last, []).append(name)
        in_region = False
        for number in range(begin, len(operations)):
            enters = operations[number].patch >= 0 and not in_region
            in_region = in_region or enters
            if names and (enters or final_bytes >= _PART_BYTES):
                parts.append(BackwardPart(begin, number, tuple(names)))
                begin, names, final_bytes = number, [], 0
            for name in final.get(number, ()):
                names.append(name)
                final_bytes += self.step.storages[self.step.tensors[self.step.gradients[name]].storage].size_bytes
        if parts and not names:
            last_part = parts.pop()
            begin, names = last_part.begin, list(last_part.gradients)
        return [*parts, BackwardPart(begin, len(operations), tuple(names))]

    # --- a step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "another thread is in the middle of a step of this compiled model: one thread at a time trains it"
            )
        try:
            yield
        finally:
            self._busy.release()

    @property
    def next_part(self) -> int | None:
        """Which part of the backward pass is to come; None between steps."""
        return self._next_part

    @property
    def number(self) -> int:
        """Counts the forward passes."""
        return self._number

    @property
    def copied(self) -> _core.CopyStatistics | None:
        """What the copies have done since the executor was made; None where the plan has none."""
        return None if self._pipeline is None else self._pipeline.statistics

    def arena_end(self, number: int) -> int:
        """Behind the last byte of the device arena that an instance touches; 0 where it touches none."""
        instance = self._instances[number]
        begin = self.arenas.device.data_ptr()
        ends = [
            tensor.data_ptr() - begin + _extent_bytes(tensor)
            for tensor in (*instance.reads, *instance.writes)
            if isinstance(tensor, Tensor)
        ]
        return max(ends, default=0)

    def forward(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the forward part. An earlier forward pass whose backward pass has not run is given up.

        Args:
            parameters: parameters and buffers by qualified name; buffers are updated in place.
            inputs: as captured.

        Returns:
            What the model returns, in memory of its own.

        Raises:
            splitkern._core.CopyFailed: an offload or prefetch failed; the executor is ready for the next step.
            RuntimeError: another thread is inside.
        """
        with self._turn():
            return self._forward(parameters, inputs)

    def _forward(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        with self._lock:
            if self._next_part is not None:
                self._abort()
            self._number += 1
            self.begun_at = time.monotonic()
        try:
            self._follow_stream()
            for name, place in self.step.parameters.items():
                self._bind_parameter(place, parameters[name])
            for number, value in enumerate(inputs):
                name = f"input.{number}"
                if name in self.step.inputs:
                    self._bind(self.step.inputs[name], value.detach())
            for place, value in self.step.constants.items():
                self._bind(place, value.detach())
            outputs: dict[int, Tensor] = {}
            begin = 0
            for last, written in sorted(self._outputs.items()):
                self._run(begin, last + 1)
                begin = last + 1
                for position, view in written:
                    outputs[position] = tensor_of(view).clone()
            self._run(begin, self._begin_of_backward)
        except BaseException:
            self._abort()
            raise
        self._versions = {name: (self._bound[place], self._bound[place]._version) for name, place in self._late}
        self._next_part = 0
        return [outputs[position] for position in range(len(outputs))]

    def backward_part(self, part: int, grad_outputs: Sequence[Tensor | None] = ()) -> dict[str, Tensor]:
        """Runs the next part of the backward pass.

        Args:
            part: position in `parts`.
            grad_outputs: for the first part, gradients of what `forward` returned and can have one, in order; None
                where the loss does not depend on it.

        Returns:
            Gradients that are final now, by name of the parameter or input, in memory of their own. As in eager
            training there is none where the loss does not depend on the parameter or input.

        Raises:
            RuntimeError: out of turn, or something that backward needs was changed in place since `forward`.
            splitkern._core.CopyFailed: an offload or prefetch failed; the executor is ready for the next step.
        """
        with self._turn():
            return self._backward_part(part, grad_outputs)

    def _backward_part(self, part: int, grad_outputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        if part != self._next_part:
            raise RuntimeError(f"part {part} of the backward pass comes out of turn: the next is {self._next_part}")
        for name, (value, version) in self._versions.items():
            if value._version != version:
                raise RuntimeError(
                    f"{name} was changed in place between the forward and the backward pass, which needs it as it was"
                )
        planned = self.parts[part]
        is_last = part == len(self.parts) - 1
        try:
            if part == 0:
                self._given = frozenset(i for i, gradient in enumerate(grad_outputs) if gradient is not None)
            for number, gradient in enumerate(grad_outputs):
                place = self.step.inputs[f"grad_output.{number}"]
                self._bind(place, self._zeros(place) if gradient is None else gradient.detach())
            self._run(planned.begin, planned.end)
            if self._pipeline is not None and is_last:
                self._pipeline.at_boundary(planned.end)
            if self._pipeline is not None and (is_last or self.options.debug):
                # A copy that failed is reported late: a step ends only when all of its copies have arrived.
                self._pipeline.synchronize()
            gradients = self._hand_out(planned.gradients)
        except BaseException:
            self._abort()
            raise
        if is_last:
            self._release()
        else:
            self._next_part = part + 1
        return gradients

    def _hand_out(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Final gradients. The executor lets go of them, so that autograd takes them over instead of copying them."""
        found: dict[str, Tensor] = {}
        storages = set[int]()
        for name in names:
            if not self._causes[name] & self._given:
                continue
            gradient = self._gradients[name]
            storage = self._storage_of[self.step.tensors[self.step.gradients[name]].storage]
            is_own = storage in self._made - self._static and storage not in storages
            found[name] = tensor_of(gradient) if is_own else tensor_of(gradient).clone()
            storages.add(storage)
        storages = {self._storage_of[self.step.tensors[self.step.gradients[name]].storage] for name in names}
        for storage in storages - self._static:
            self._unbind(storage)
        return found

    def _zeros(self, place: int) -> Tensor:
        tensor = self.step.tensors[place]
        zeros = torch.empty_strided(tensor.sizes, tensor.strides, dtype=tensor.dtype, device=self.step.device)
        return zeros.zero_()

    def _unbind(self, storage: int) -> None:
        self._bound.pop(storage, None)
        for slot in self._slots.get(storage, {}).values():
            slot.bind(None)

    def give_up(self, number: int) -> None:
        """Ends a step whose backward pass will not come.

        Args:
            number: of its forward pass; without effect where another one has begun since, or between steps.
        """
        with self._lock:
            if self._next_part is not None and number == self._number:
                self._abort()

    def _abort(self) -> None:
        if self._pipeline is not None:
            self._pipeline.abort()
        self._release()

    def _release(self) -> None:
        """Lets go of what the step was given and has made; parameters stay bound, for the next step."""
        for storage in self._bound.keys() - self._kept.keys() - self._static:
            self._unbind(storage)
        self._versions = {}
        self._next_part = None

    def _run(self, begin: int, end: int) -> None:
        with ExitStack() as held:
            held.enter_context(torch.no_grad())
            if torch.is_autocast_enabled(self.step.device.type):
                # What was captured lies below autocast: its casts are operations.
                held.enter_context(torch.autocast(self.step.device.type, enabled=False))
            if self._graphs is None or self.observer is not None:
                for number in range(begin, end):
                    self._begin_instance(number)
                    self._run_call(number)
                return
            for first, last in self._graphs.pieces(begin, end):
                for number in range(first, last):
                    self._begin_instance(number)
                self._graphs.run_piece(first, last)

    def _begin_instance(self, number: int) -> None:
        """Passes the boundary before an instance, and makes memory for the gradients that it is the first to write."""
        if self._pipeline is not None:
            self._pipeline.at_boundary(number)
        for storage in self._made_at.get(number, ()):
            self._make(storage)

    def _run_call(self, number: int) -> None:
        try:
            if self.observer is None:
                self._instances[number].run()
            else:
                with self.observer.instance(number):
                    self._instances[number].run()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            operation = self.step.operations[self.plan.instances[number].operation]
            raise type(error)(
                f"{operation.name} ({operation.target}) found no memory beside the arena of "
                f"{bytes_text(self.plan.predicted.device_peak_bytes)}: {_first_line(error)}; "
                "give compile a smaller budget, which leaves more to the allocator, or free what else is on the device"
            ) from error

    def _make(self, storage: int) -> None:
        """Memory for a gradient, of its own, because it is handed out."""
        if storage in self._static:
            return
        slots = self._slots[storage]
        item = self.step.tensors[next(iter(slots))].element_bytes
        dtype = self.step.tensors[next(iter(slots))].dtype
        size_bytes = self.plan.storages[storage].size_bytes
        self._put(storage, torch.empty(-(-size_bytes // item), dtype=dtype, device=self.step.device))
        if self._graphs is not None:
            self._static.add(storage)

    def _bind_parameter(self, place: int, value: Tensor) -> None:
        """Binds a parameter or buffer, once for as long as it is the same tensor in the same memory."""
        storage = self._storage_of[self.step.tensors[place].storage]
        kept = self._kept.get(storage)
        if kept is not None and kept.is_still(value):
            return
        # `detach` shares the version counter, by which a change in place is seen.
        self._bind(place, value.detach(), copies=False)
        self._kept[storage] = _Kept.of(value)
        if self._graphs is not None:
            self._graphs.clear()

    def _bind(self, place: int, value: Tensor, *, copies: bool = True) -> None:
        """Takes a caller's tensor for a storage; one of another layout is copied."""
        tensor = self.step.tensors[place]
        if tuple(value.shape) != tensor.sizes or value.dtype != tensor.dtype or value.device != self.step.device:
            raise ValueError(
                f"{tensor.name} must be of shape {list(tensor.sizes)}, type {tensor.dtype}, on {self.step.device}, "
                f"got {list(value.shape)}, {value.dtype}, on {value.device}"
            )
        storage = self._storage_of[tensor.storage]
        if storage in self._static:
            self._bound[storage].copy_(value)
            return
        is_static = copies and self._graphs is not None
        if is_static or not _same_strides(value, tensor.strides):
            if not copies:
                raise ValueError(f"{tensor.name} must have strides {list(tensor.strides)}, got {list(value.stride())}")
            value = torch.empty_strided(tensor.sizes, tensor.strides, dtype=value.dtype, device=value.device).copy_(
                value
            )
        self._put(storage, value, tensor.offset_bytes)
        if is_static:
            self._static.add(storage)

    def _put(self, storage: int, value: Tensor, begin_bytes: int = 0) -> None:
        """Binds a tensor, whose memory begins so many bytes behind the storage, to all slots of a storage."""
        self._bound[storage] = value
        for place, slot in self._slots[storage].items():
            tensor = self.step.tensors[place]
            if value.dtype != tensor.dtype:
                raise RuntimeError(f"{tensor.name}: storage of type {value.dtype} read as {tensor.dtype}")
            offset = value.storage_offset() + (tensor.offset_bytes - begin_bytes) // tensor.element_bytes
            slot.bind(value.as_strided(tensor.sizes, tensor.strides, offset))


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _arena(size_bytes: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Bytes at an aligned address."""
    whole = torch.empty(size_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
    skipped = -whole.data_ptr() % _ALIGNMENT_BYTES
    return whole[skipped : skipped + size_bytes]


def _extent_bytes(tensor: Tensor) -> int:
    """From its first element to behind its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _same_strides(value: Tensor, strides: Sequence[int]) -> bool:
    return all(size <= 1 or own == other for size, own, other in zip(value.shape, value.stride(), strides, strict=True))


def _accumulating(operation: CapturedOperation, call: Call) -> Call:
    """The same call, adding to what its destination holds."""
    if call is not operation.out_call or operation.target != "conv2d_weight_grad":
        raise RuntimeError(f"{operation.name}: cannot add to its destination")
    return Call(call.overload, (*call.args[:-1], True), call.kwargs)
