"""Runs a captured step by its plan: operations on views of a device arena, copies beside them.

What the plan's parameters pool holds (parameters, buffers, inputs, gradients of parameters) lies outside: it is the
caller's, or is handed to the caller. On the CPU ordinary memory stands for the device's, and threads for its copy
engines, so that everything here runs for real anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitkern import _core
from splitkern.memory.capture import CapturedOperation, CapturedStep
from splitkern.memory.record import Read, Write
from splitkern.memory.rewrite import Blank, Call

_ALIGNMENT_BYTES = 512


@dataclass(frozen=True)
class ExecutorOptions:
    """How copies run, and what is checked.

    Attributes:
        chunk_bytes: largest piece of a copy.
        copies_in_flight: pieces of one direction that are under way at a time.
        debug: compare every offloaded storage on its way back with what left, and fill freed bytes with NaN.
        max_delay_us: on the CPU, every action of a copy rests for a random time up to this, to shake the order.
        seed: of these delays.
    """

    chunk_bytes: int = 16 << 20
    copies_in_flight: int = 2
    debug: bool = False
    max_delay_us: int = 0
    seed: int = 0


@dataclass(frozen=True)
class _Outside:
    """A tensor of the step that is bound anew in every step: place of its storage, and the view of it."""

    place: int
    tensor: int


class _Instance:
    """An operation with everything bound that stays the same from step to step."""

    def __init__(
        self,
        call: Call,
        reads: Sequence[Tensor | _Outside],
        writes: Sequence[Tensor | _Outside],
    ) -> None:
        self.overload = call.overload
        self.reads, self.writes = reads, writes
        self.preload = call.preload
        self.results = call.results
        self.call = call
        is_fixed = not any(isinstance(tensor, _Outside) for tensor in (*reads, *writes))
        self.arguments: tuple[Any, Any] | None = self._bind(reads, writes) if is_fixed else None

    def _bind(self, reads: Sequence[Any], writes: Sequence[Any]) -> tuple[Any, Any]:
        device = next((tensor.device for tensor in (*reads, *writes) if isinstance(tensor, Tensor)), None)
        return _filled(self.call.args, reads, writes, device), _filled(self.call.kwargs, reads, writes, device)

    def run(self, bind: Callable[[_Outside], Tensor]) -> None:
        reads, writes = self.reads, self.writes
        arguments = self.arguments
        if arguments is None:
            reads = [bind(tensor) if isinstance(tensor, _Outside) else tensor for tensor in reads]
            writes = [bind(tensor) if isinstance(tensor, _Outside) else tensor for tensor in writes]
            arguments = self._bind(reads, writes)
        for read, write in self.preload:
            writes[write].copy_(reads[read])  # type: ignore[union-attr, arg-type]
        returned = self.overload(*arguments[0], **arguments[1])
        if not self.results:
            return
        values = returned if isinstance(returned, (tuple, list)) else (returned,)
        for value, place in zip(values, self.results, strict=False):
            # A gradient that nobody asked for is None, though its shape rule says otherwise.
            if place is not None and value is not None:
                writes[place].copy_(value)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Arenas:
    """The memory of a plan's device and host pools, as bytes."""

    device: Tensor
    host: Tensor

    @classmethod
    def allocate(cls, device_bytes: int, host_bytes: int, device: torch.device) -> Arenas:
        """Fresh memory; pinned on the host where the device is a GPU."""
        host = _arena(host_bytes, torch.device("cpu"), pinned=device.type == "cuda")
        return cls(_arena(device_bytes, device), host)


class StepExecutor:
    """Runs one captured step by one plan, step after step.

    The arenas are allocated once and kept until the executor goes. One step at a time: `forward`, then `backward` or
    `abort`. Not thread-safe.

    Args:
        step: captured with ``given_gradients=True``.
        graph: of the step.
        plan: for that graph; it is validated here.
        options: of copies and checks.
        arenas: memory to run in, at least as large as the plan's pools; several executors may share it where one step
            has ended before the next begins. Its own unless given.

    Raises:
        splitkern._core.InvalidPlan: the plan is wrong for the graph.
        ValueError: the step has its loss inside.
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
        self.options = options = ExecutorOptions() if options is None else options
        self._storage_of = [0] * len(step.storages)
        for number, storage in enumerate(plan.storages):
            for member in storage.members:
                self._storage_of[member] = number
        predicted = plan.predicted
        if arenas is None:
            arenas = Arenas.allocate(predicted.device_peak_bytes, predicted.host_peak_bytes, step.device)
        self.arenas = arenas
        # A tensor at an address is one view, whichever instances use it.
        self._typed: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[int, int], Tensor] = {}
        self._bound: dict[int, Tensor] = {}
        self._sources = self._outside_storages()
        operations = [step.operations[instance.operation] for instance in plan.instances]
        self._instances = self._bind_instances()
        given = {step.tensors[place].storage for name, place in step.inputs.items() if name.startswith("grad_output.")}
        self._begin_of_backward = next(
            (
                number
                for number, (instance, operation) in enumerate(zip(plan.instances, operations, strict=True))
                if instance.is_recomputation
                or operation.is_backward
                or any(step.tensors[read].storage in given for read in operation.reads)
            ),
            len(operations),
        )
        read_late = {
            step.tensors[read].storage
            for operation in operations[self._begin_of_backward :]
            for read in operation.reads
        }
        # Whose values backward needs as forward left them.
        self._read_in_backward = [
            (name, self._storage_of[step.tensors[place].storage])
            for name, place in (*step.parameters.items(), *step.inputs.items())
            if step.tensors[place].storage in read_late and not name.startswith("grad_output.")
        ]
        self._may_be_made = {
            self._storage_of[number] for number, storage in enumerate(step.storages) if storage.kind == "gradient"
        }
        self._outputs = self._bind_outputs()
        self._pipeline = self._make_pipeline()
        self._is_between = False
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
        }
        device = self.step.device
        if device.type == "cpu":
            return _core.CopyPipeline.on_host(
                self.plan, **arenas, **common, seed=options.seed, max_delay_us=options.max_delay_us
            )
        stream = torch.cuda.current_stream(device)
        return _core.CopyPipeline.on_cuda(
            self.plan, **arenas, **common, device_index=stream.device_index, compute_stream=stream.cuda_stream
        )

    # --- what is bound once --------------------------------------------------------------------------------------

    def _outside_storages(self) -> set[int]:
        """The planned storages that lie outside the arena: the plan's parameters pool and what the caller gives."""
        step = self.step
        given = (*step.parameters.values(), *step.inputs.values(), *step.constants)
        found = {self._storage_of[step.tensors[place].storage] for place in given}
        parameters = _core.PoolKind.PARAMETERS
        return found | {residency.storage for residency in self.plan.residencies if residency.pool == parameters}

    def _view(self, offset_bytes: int, place: int) -> Tensor:
        view = self._views.get((place, offset_bytes))
        if view is None:
            tensor = self.step.tensors[place]
            item = tensor.element_bytes
            typed = self._typed.get(tensor.dtype)
            if typed is None:
                arena = self.arenas.device
                typed = arena[: arena.numel() // item * item].view(tensor.dtype)
                self._typed[tensor.dtype] = typed
            offset = typed.storage_offset() + (offset_bytes + tensor.offset_bytes) // item
            view = self._views[place, offset_bytes] = typed.as_strided(tensor.sizes, tensor.strides, offset)
        return view

    def _view_at(self, place: int, boundary: int) -> Tensor | _Outside:
        """The tensor where the plan has it when the instance behind a boundary runs."""
        storage = self._storage_of[self.step.tensors[place].storage]
        if storage in self._sources:
            return _Outside(storage, place)
        for begin, end, offset_bytes in self._residencies.get(storage, ()):
            if begin <= boundary < end:
                return self._view(offset_bytes, place)
        raise AssertionError(f"a valid plan has storage {storage} on the device at boundary {boundary}")

    def _bind_instances(self) -> list[_Instance]:
        # On the device, by storage: begin, end, offset. Attributes of the plan are slow to read.
        self._residencies: dict[int, list[tuple[int, int, int]]] = {}
        device = _core.PoolKind.DEVICE
        for residency in self.plan.residencies:
            if residency.storage >= 0 and residency.pool == device:
                self._residencies.setdefault(residency.storage, []).append(
                    (residency.begin, residency.end, residency.offset_bytes)
                )
        bound = []
        for number, instance in enumerate(self.plan.instances):
            operation = self.step.operations[instance.operation]
            call = operation.call if operation.out_call is None else operation.out_call
            reads = [self._view_at(place, number) for place in operation.reads]
            writes = [self._view_at(place, number) for place in operation.writes]
            if instance.accumulate:
                call = _accumulating(operation, call)
            bound.append(_Instance(call, reads, writes))
        return bound

    def _bind_outputs(self) -> dict[int, list[tuple[int, Tensor | _Outside]]]:
        """What the model returns, by the instance of the forward part that writes it last: it may leave after that."""
        found: dict[int, list[tuple[int, Tensor | _Outside]]] = {}
        for position, place in enumerate(self.step.outputs):
            storage = self.step.tensors[place].storage
            writers = [
                number
                for number, instance in enumerate(self.plan.instances[: self._begin_of_backward])
                if any(self.step.tensors[w].storage == storage for w in self.step.operations[instance.operation].writes)
            ]
            last = writers[-1] if writers else self._begin_of_backward - 1
            found.setdefault(last, []).append((position, self._view_at(place, last)))
        return found

    # --- a step ---------------------------------------------------------------------------------------------------

    @property
    def is_between(self) -> bool:
        """Whether a forward pass has run whose backward pass has not."""
        return self._is_between

    @property
    def number(self) -> int:
        """Counts the forward passes."""
        return self._number

    def forward(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the forward part. An earlier forward pass whose backward pass has not run is given up.

        Args:
            parameters: parameters and buffers by qualified name; buffers are updated in place.
            inputs: as captured.

        Returns:
            What the model returns, in memory of its own.

        Raises:
            splitkern._core.CopyFailed: an offload or prefetch failed; the executor is ready for the next step.
        """
        if self._is_between:
            self.abort()
        self._bound, self._versions = {}, {}
        self._number += 1
        for name, place in self.step.parameters.items():
            self._bind(place, parameters[name].detach(), copies=False)
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
                outputs[position] = self._resolve(view).clone()
        self._run(begin, self._begin_of_backward)
        self._versions = {
            name: (self._bound[place], self._bound[place]._version) for name, place in self._read_in_backward
        }
        self._is_between = True
        return [outputs[position] for position in range(len(outputs))]

    def backward(self, grad_outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Runs the rest.

        Args:
            grad_outputs: gradients of what `forward` returned and can have one, in order.

        Returns:
            Gradients by name of the parameter or input, in memory of their own.
        """
        if not self._is_between:
            raise RuntimeError("backward must follow a forward pass whose backward pass has not run")
        for name, (value, version) in self._versions.items():
            if value._version != version:
                raise RuntimeError(
                    f"{name} was changed in place between the forward and the backward pass, which needs it as it was"
                )
        for number, gradient in enumerate(grad_outputs):
            self._bind(self.step.inputs[f"grad_output.{number}"], gradient.detach())
        self._run(self._begin_of_backward, len(self._instances))
        if self._pipeline is not None:
            self._pipeline.at_boundary(len(self._instances))
            # A copy that failed is reported late: no gradient of a step leaves before all of its copies have arrived.
            self._pipeline.synchronize()
        gradients = {
            name: self._resolve(self._view_at(place, len(self._instances)))
            for name, place in self.step.gradients.items()
        }
        self._bound = {}
        self._is_between = False
        return gradients

    def abort(self) -> None:
        """Gives up a step whose backward pass will not come; without effect between steps."""
        if self._pipeline is not None:
            self._pipeline.abort()
        self._bound = {}
        self._is_between = False

    def _run(self, begin: int, end: int) -> None:
        pipeline, resolve = self._pipeline, self._resolve
        try:
            # What was captured lies below autocast: its casts are operations.
            with torch.no_grad(), torch.autocast(self.step.device.type, enabled=False):
                for number in range(begin, end):
                    if pipeline is not None:
                        pipeline.at_boundary(number)
                    self._instances[number].run(resolve)
        except BaseException:
            self.abort()
            raise

    def _bind(self, place: int, value: Tensor, *, copies: bool = True) -> None:
        """Takes a caller's tensor for a storage; one of another layout is copied."""
        tensor = self.step.tensors[place]
        if tuple(value.shape) != tensor.sizes or value.dtype != tensor.dtype or value.device != self.step.device:
            raise ValueError(
                f"{tensor.name} must be of shape {list(tensor.sizes)}, type {tensor.dtype}, on {self.step.device}, "
                f"got {list(value.shape)}, {value.dtype}, on {value.device}"
            )
        if not _same_strides(value, tensor.strides):
            if not copies:
                raise ValueError(f"{tensor.name} must have strides {list(tensor.strides)}, got {list(value.stride())}")
            value = torch.empty_strided(tensor.sizes, tensor.strides, dtype=value.dtype, device=value.device).copy_(
                value
            )
        self._bound[self._storage_of[tensor.storage]] = value

    def _resolve(self, tensor: Tensor | _Outside) -> Tensor:
        if isinstance(tensor, Tensor):
            return tensor
        captured = self.step.tensors[tensor.tensor]
        value = self._bound.get(tensor.place)
        if value is None:
            if tensor.place not in self._may_be_made:
                raise RuntimeError(f"{captured.name} is used before it is given")
            # A gradient is made at its first write, and handed out at the end.
            size_bytes = self.plan.storages[tensor.place].size_bytes
            item = captured.element_bytes
            value = torch.empty(-(-size_bytes // item), dtype=captured.dtype, device=self.step.device)
            self._bound[tensor.place] = value
        if value.dtype != captured.dtype:
            raise RuntimeError(f"{captured.name}: storage of type {value.dtype} read as {captured.dtype}")
        offset = value.storage_offset() + captured.offset_bytes // captured.element_bytes
        return value.as_strided(captured.sizes, captured.strides, offset)


def _filled(value: Any, reads: Sequence[Any], writes: Sequence[Any], device: torch.device | None) -> Any:
    """Arguments of a call with tensors in their places; `tree_map` takes many times as long."""
    kind = type(value)
    if kind is Read:
        return reads[value.position]
    if kind is Write:
        return writes[value.position]
    if kind is tuple or kind is list:
        return kind([_filled(one, reads, writes, device) for one in value])
    if kind is dict:
        return {name: _filled(one, reads, writes, device) for name, one in value.items()}
    if kind is Blank:
        # Only its shape matters: one element serves all.
        return torch.zeros((), dtype=value.dtype, device=device).expand(value.sizes)
    return value


def _arena(size_bytes: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Bytes at an aligned address."""
    whole = torch.empty(size_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
    skipped = -whole.data_ptr() % _ALIGNMENT_BYTES
    return whole[skipped : skipped + size_bytes]


def _same_strides(value: Tensor, strides: Sequence[int]) -> bool:
    return all(size <= 1 or own == other for size, own, other in zip(value.shape, value.stride(), strides, strict=True))


def _accumulating(operation: CapturedOperation, call: Call) -> Call:
    """The same call, adding to what its destination holds."""
    if call is not operation.out_call or operation.target != "conv2d_weight_grad":
        raise RuntimeError(f"{operation.name}: cannot add to its destination")
    return Call(call.overload, (*call.args[:-1], True), call.kwargs)
