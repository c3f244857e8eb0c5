"""Runs a captured step by its plan: operations on views of a device arena, copies beside them.

What the plan's parameters pool holds (parameters, buffers, inputs, gradients of parameters) lies outside: it is the
caller's, or is handed to the caller. On the CPU ordinary memory stands for the device's, and threads for its copy
engines, so that everything here runs for real anywhere.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from splitkern import _core, _library
from splitkern.memory.arenas import Arenas, current_stream
from splitkern.memory.bound_calls import Bound, BoundCall, StandIns, tensor_of
from splitkern.memory.capture import CapturedOperation, CapturedStep, share_memory
from splitkern.memory.graphs import PieceGraphs
from splitkern.memory.outside_tensors import OutsideTensors
from splitkern.memory.report import bytes_text
from splitkern.memory.rewrite import Call
from splitkern.memory.step_layout import OUTSIDE, BackwardPart, StepLayout


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


class Observer(Protocol):
    """Told of every instance that runs, by its number, when its memory is bound and its copies have been waited for."""

    def instance(self, number: int) -> AbstractContextManager[object]:
        """Entered before the instance is run, left behind it."""


class StepExecutor:
    """Runs one captured step by one plan, step after step.

    One step at a time: `forward`, then `backward_part` for every part in order, or `give_up`. One thread at a time, but
    any may call `give_up`.

    Attributes:
        layout: of the step under the plan.
        taken: by instance, the gradients, as places, that are handed out as their operations return them.
        begun_at: when the last forward pass began, by the clock `time.monotonic`; 0 before the first.
        observer: told of every instance, where there is one.

    Args:
        step: captured with ``given_gradients=True``.
        graph: of the step.
        plan: for that graph; it is validated here.
        options: of copies and checks.
        arenas: to run in, of at least the plan's sizes; allocated here unless given.
        layout: of a step and a plan that differ from these in sizes and addresses alone; found here unless given.

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
        layout: StepLayout | None = None,
    ) -> None:
        if step.loss >= 0:
            raise ValueError("step must be captured with given_gradients=True, got one with its loss inside")
        _core.validate(graph, plan)
        self.step, self.plan = step, plan
        self.options = ExecutorOptions() if options is None else options
        self.observer: Observer | None = None
        self.begun_at = 0.0
        predicted = plan.predicted
        self.arenas = arenas or Arenas(predicted.device_peak_bytes, predicted.host_peak_bytes, step.device)
        self.layout = StepLayout(step, plan) if layout is None else layout
        self._outside = OutsideTensors(step, plan, self.layout, stay=self.options.cuda_graphs)
        # Graphs write to memory that stays.
        self.taken = {} if self.options.cuda_graphs else self.layout.taken
        self._views = self._bind_views()
        self._instances = self._bind_instances()
        # Results whose gradients were given, and the instances that get none.
        self._given = frozenset[int]()
        self._zeros_at = frozenset[int]()
        self._stream = current_stream(step.device)
        self._process = os.getpid()
        self._pipeline = self._make_pipeline()
        self._graphs = PieceGraphs(plan, self._run_call, step.device) if self.options.cuda_graphs else None
        # Reentrant: while it is held the garbage collector may end the very step that is being given up.
        self._lock = threading.RLock()
        self._busy = threading.Lock()
        self._next_part: int | None = None
        self._is_retired = False
        self._number = 0
        self._versions: dict[str, tuple[Tensor, int, int]] = {}

    @property
    def parts(self) -> list[BackwardPart]:
        """Of the backward pass, in order."""
        return self.layout.parts

    def _bind_views(self) -> list[Bound]:
        tensors, residencies = self.step.tensors, list(self.plan.residencies)
        return [
            self._outside.slot(place)
            if residency == OUTSIDE
            else self.arenas.view(tensors[place], residencies[residency].offset_bytes)
            for place, residency in self.layout.views
        ]

    def _bind_instances(self) -> list[BoundCall]:
        layout, views, bound = self.layout, self._views, list[BoundCall]()
        for number, accumulates in enumerate(layout.accumulates):
            position = layout.operations[number]
            operation, stand_ins = self.step.operations[position], layout.stand_ins[position]
            call = operation.best_call
            if accumulates:
                call = _accumulating(operation, call)
            elif operation.is_taken and number not in self.taken:
                assert operation.out_call is not None
                call, stand_ins = operation.out_call, StandIns.of(operation.out_call)
            reads = [views[view] for view in layout.reads[number]]
            writes = [views[view] for view in layout.writes[number]]
            bound.append(BoundCall(call, stand_ins, reads, writes, self.step.device))
        return bound

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
        if self._process != os.getpid():  # a forked process has none of the threads that copy
            self._process, self._pipeline = os.getpid(), self._make_pipeline()
        stream = current_stream(self.step.device)
        self.arenas.follow(stream)
        if stream != self._stream:
            if stream is not None:
                self._outside.follow(stream)
            self._stream = stream
            self._pipeline = self._make_pipeline()

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

    def touch(self, number: int) -> None:
        """Notes what an instance uses of the device arena."""
        for view in (*self.layout.reads[number], *self.layout.writes[number]):
            if self.layout.views[view][1] != OUTSIDE:
                self.arenas.touch(tensor_of(self._views[view]))

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
            self._bind_given(parameters, inputs)
            outputs: dict[int, Tensor] = {}
            begin = 0
            for last, written in sorted(self.layout.outputs.items()):
                self._run(begin, last + 1)
                begin = last + 1
                for position, view in written:
                    outputs[position] = tensor_of(self._views[view]).clone()
            self._run(begin, self.layout.begin_of_backward)
            for number in self.layout.changed_inputs:
                self._outside.return_to(self.step.inputs[f"input.{number}"], inputs[number].detach())
        except BaseException:
            self._abort()
            raise
        late = ((name, self._outside.bound(storage), last) for name, storage, last in self.layout.late)
        self._versions = {name: (value, value._version, last) for name, value, last in late}
        self._next_part = 0
        return [outputs[position] for position in range(len(outputs))]

    def _bind_given(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> None:
        for number in self.layout.changed_inputs:
            for other, value in enumerate(inputs):
                if other != number and share_memory(inputs[number], value):
                    raise ValueError(
                        f"input.{number}, which the step changes in place, shares memory with input.{other}; give each "
                        "memory of its own (clone)"
                    )
        for name, place in self.step.parameters.items():
            if self._outside.bind_parameter(place, parameters[name]) and self._graphs is not None:
                self._graphs.clear()
        for number, value in enumerate(inputs):
            name = f"input.{number}"
            if name in self.step.inputs:
                self._outside.bind(self.step.inputs[name], value.detach())
        for place, value in self.step.constants.items():
            # A scalar that the model holds on the CPU takes part on a GPU, as in eager execution.
            self._outside.bind(place, value.detach().to(self.step.device))

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
        begin = self.layout.parts[part].begin
        for name, (value, version, last) in self._versions.items():
            if last >= begin and value._version != version:
                raise RuntimeError(
                    f"{name} was changed in place between the forward and the backward pass, which needs it as it was"
                )
        planned = self.layout.parts[part]
        is_last = part == len(self.layout.parts) - 1
        try:
            if part == 0:
                self._given = frozenset(i for i, gradient in enumerate(grad_outputs) if gradient is not None)
                self._zeros_at = self._without_gradient()
            for number, gradient in enumerate(grad_outputs):
                place = self.step.inputs[f"grad_output.{number}"]
                self._outside.bind(place, self._zeros(place) if gradient is None else gradient.detach())
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
        layout, found, storages = self.layout, dict[str, Tensor](), set[int]()
        for name in names:
            if not layout.causes[name] & self._given:
                continue
            gradient = tensor_of(self._views[layout.gradients[name]])
            storage = layout.storage_of(self.step.gradients[name])
            is_own = storage in layout.made and not self._outside.is_static(storage) and storage not in storages
            found[name] = gradient if is_own else gradient.clone()
            storages.add(storage)
        self._outside.unbind({layout.storage_of(self.step.gradients[name]) for name in names})
        return found

    def _zeros(self, place: int) -> Tensor:
        tensor = self.step.tensors[place]
        zeros = torch.empty_strided(tensor.sizes, tensor.strides, dtype=tensor.dtype, device=self.step.device)
        return zeros.zero_()

    def give_up(self, number: int) -> None:
        """Ends a step whose backward pass will not come.

        Args:
            number: of its forward pass; without effect where another one has begun since, or between steps.
        """
        with self._lock:
            if self._next_part is not None and number == self._number:
                self._abort()

    def retire(self) -> None:
        """Lets go of the arenas, at once or when the step under way ends. There is no forward pass after that; who
        holds a result of the last one holds this executor, but no longer its arenas.
        """
        with self._lock:
            self._is_retired = True
            if self._next_part is None and not self._busy.locked():
                self._let_go()

    def _let_go(self) -> None:
        self._pipeline = self._graphs = None
        self._views, self._instances = [], []
        self.__dict__.pop("arenas", None)

    def _abort(self) -> None:
        if self._pipeline is not None:
            self._pipeline.abort()
        self._release()

    def _release(self) -> None:
        self._outside.release()
        self._versions = {}
        self._next_part = None
        if self._is_retired:
            self._let_go()

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
                zeros_at = frozenset(one for one in self._zeros_at if first <= one < last)
                self._graphs.run_piece(first, last, zeros_at)

    def _begin_instance(self, number: int) -> None:
        """Passes the boundary before an instance, and makes memory for gradients that it is the first to write."""
        if self._pipeline is not None:
            self._pipeline.at_boundary(number)
        if number not in self.taken:
            for storage in self.layout.made_at.get(number, ()):
                self._outside.make(storage)

    def _run_call(self, number: int) -> None:
        if number in self._zeros_at:
            return self._run_to_zero(number)
        try:
            if self.observer is None:
                returned = self._instances[number].run()
            else:
                with self.observer.instance(number):
                    returned = self._instances[number].run()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            operation = self.step.operations[self.plan.instances[number].operation]
            raise type(error)(
                f"{operation.name} ({operation.target}) found no memory beside the arena of "
                f"{bytes_text(self.plan.predicted.device_peak_bytes)}: {_first_line(error)}; "
                "give compile a smaller budget, which leaves more to the allocator, or free what else is on the device"
            ) from error
        if number in self.taken:
            self._outside.take(self.taken[number], returned)

    def _without_gradient(self) -> frozenset[int]:
        """Instances of the backward pass whose results depend on no gradient that was given, and so are zero. They do
        not run: some of what they read may be infinite, which times zero is not zero.
        """
        if len(self._given) == len(self.step.differentiable):
            return frozenset()
        return frozenset(
            number for number, causes in enumerate(self.layout.causes_of) if causes and not causes & self._given
        )

    def _run_to_zero(self, number: int) -> None:
        operation = self.step.operations[self.layout.operations[number]]
        for storage in self.layout.made_at.get(number, ()) if number in self.taken else ():
            self._outside.make(storage)
        for position, view in enumerate(self.layout.writes[number]):
            if position not in operation.mutates and not self.layout.accumulates[number]:
                tensor_of(self._views[view]).zero_()


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _accumulating(operation: CapturedOperation, call: Call) -> Call:
    """The same call, adding to what its destination holds."""
    if call is not operation.out_call or operation.target != "conv2d_weight_grad":
        raise RuntimeError(f"{operation.name}: cannot add to its destination")
    return Call(call.overload, (*call.args[:-1], True), call.kwargs)
