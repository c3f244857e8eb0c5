"""What a compiled model's step takes, beside what its plan says: time and bytes of every operation, and their sums."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from splitkern import _core
from splitkern.memory.allocated_bytes import AllocatedBytes
from splitkern.memory.compile import compiled_forward_of
from splitkern.memory.executor import StepExecutor
from splitkern.memory.planned_step import PlannedStep
from splitkern.memory.report import bytes_text

__all__ = ["OperationRow", "Pair", "StepReport", "step_report"]


@dataclass(frozen=True)
class Pair:
    """A figure as the plan has it, and as measured."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured to predicted; not a number where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else float("nan")


@dataclass(frozen=True)
class OperationRow:
    """One operation instance of the plan.

    Attributes:
        name, target, module: of the operation.
        patch: of a split region; -1 outside.
        is_backward, is_recomputation: where it stands.
        duration_us: of the operation alone.
        allocated_bytes: beside the arena, while it ran.
    """

    name: str
    target: str
    module: str
    patch: int
    is_backward: bool
    is_recomputation: bool
    duration_us: Pair
    allocated_bytes: Pair


@dataclass(frozen=True)
class StepReport:
    """A step measured.

    Attributes:
        operations: one per instance of the plan, in its order.
        step_ms: forward and backward pass together; measured: median of `repeats`.
        host_ms: time until the calls of the step have returned, which a GPU may outlast; waits included.
        waits_ms: of `step_ms`, for copies.
        arena_bytes: predicted: of the plan's places; measured: highest byte that an operation touched.
        reserve_bytes: beside the arena, at most; measured: most that one operation allocated, and what is returned.
        total_bytes: of the device, at most; measured by the allocator's own events, with what was there before.
        offloaded_bytes, prefetched_bytes: copied in a step.
        costs: where the predicted durations come from.
        repeats: how many steps were timed.
    """

    operations: Sequence[OperationRow]
    step_ms: Pair
    host_ms: float
    waits_ms: Pair
    arena_bytes: Pair
    reserve_bytes: Pair
    total_bytes: Pair
    offloaded_bytes: Pair
    prefetched_bytes: Pair
    costs: str
    repeats: int

    def to_json(self) -> str:
        """Everything, as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_json`."""
        Path(path).write_text(self.to_json() + "\n")

    def __str__(self) -> str:
        def line(name: str, pair: Pair, text: Callable[[float], str]) -> str:
            ratio = f"{pair.ratio:9.3f}" if pair.predicted else " " * 8 + "-"
            return f"{name:28}{text(pair.predicted):>12}{text(pair.measured):>12}{ratio}"

        def size(value: float) -> str:
            return bytes_text(round(value))

        def ms(value: float) -> str:
            return f"{value:.1f} ms"

        lines = [f"{'':28}{'predicted':>12}{'measured':>12}{'ratio':>9}"]
        lines += [
            line("arena", self.arena_bytes, size),
            line("reserve", self.reserve_bytes, size),
            line("total", self.total_bytes, size),
            line("offloaded", self.offloaded_bytes, size),
            line("prefetched", self.prefetched_bytes, size),
            line("step", self.step_ms, ms),
            f"{'  of which on the host':28}{'':12}{ms(self.host_ms):>12}",
            line("  of which waits", self.waits_ms, ms),
        ]
        by_target: dict[str, list[OperationRow]] = {}
        for row in self.operations:
            by_target.setdefault(row.target + (" again" if row.is_recomputation else ""), []).append(row)
        sums = {
            target: Pair(
                sum(row.duration_us.predicted for row in rows) / 1e3,
                sum(row.duration_us.measured for row in rows) / 1e3,
            )
            for target, rows in by_target.items()
        }
        for target, pair in sorted(sums.items(), key=lambda item: -item[1].measured)[:12]:
            lines.append(line(f"{len(by_target[target])} {target}"[:27], pair, ms))
        lines.append(f"durations of the plan: {self.costs}; measured: median of {self.repeats} steps")
        return "\n".join(lines)


class _Durations:
    """Times instances: on CUDA by events, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: dict[int, tuple[Any, Any]] = {}
        self._us: dict[int, float] = {}

    @contextmanager
    def instance(self, number: int) -> Iterator[None]:
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events[number] = begin, end
        else:
            began = time.perf_counter()
            yield
            self._us[number] = (time.perf_counter() - began) * 1e6

    def us(self) -> dict[int, float]:
        """By instance; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        return self._us | {number: begin.elapsed_time(end) * 1e3 for number, (begin, end) in self._events.items()}


class _Allocations:
    """Names the instances to the allocator's meter, and notes what they touch of the arena."""

    def __init__(self, executor: StepExecutor, allocated: AllocatedBytes) -> None:
        self._executor, self._allocated = executor, allocated

    @contextmanager
    def instance(self, number: int) -> Iterator[None]:
        self._executor.touch(number)
        with self._allocated.label(str(number)):
            yield


def step_report(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, repeats: int = 5) -> StepReport:
    """Measures the step of a compiled model and sets it beside its plan.

    Runs forward and backward passes on the inputs, with ones for the gradients of what the model returns. Parameters,
    buffers, gradients and random state are afterwards what they were before.

    Args:
        model: compiled, in training mode.
        example_inputs: a batch, or the tuple of the model's arguments.
        repeats: steps to time; two more come before them.

    Raises:
        ValueError: the model is not compiled, in evaluation mode, or draws its boundaries in every step; `repeats` is
            less than 1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> from splitkern import compile
        >>> report = step_report(compile(model, images, budget=None, costs="paper"), images)
        >>> report.arena_bytes.measured <= report.arena_bytes.predicted
        True
    """
    forward = compiled_forward_of(model)
    if forward is None:
        raise ValueError(f"this {type(model).__name__} is not compiled; call compile first")
    if not model.training:
        raise ValueError(
            f"this {type(model).__name__} is in evaluation mode, in which no plan runs; call train() first"
        )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with _put_back(model, args):
        planned = forward.planned(args)
        if planned.draws is not None:
            raise ValueError(
                'steps of a model split with boundary="stochastic" differ: there is no one plan to compare'
            )
        executor = planned.executors[0]
        try:
            return _measure(model, args, planned, executor, repeats)
        finally:
            for one in planned.executors:
                one.observer = None


def _step(model: nn.Module, args: tuple[Any, ...]) -> None:
    outputs = [out for out in tree_leaves(model(*args)) if isinstance(out, Tensor) and out.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def _measure(
    model: nn.Module, args: tuple[Any, ...], planned: PlannedStep, executor: StepExecutor, repeats: int
) -> StepReport:
    device = executor.step.device
    _step(model, args)
    _clear(model)
    executor.arenas.reset_touched()
    with AllocatedBytes(device) as allocated:
        allocations = _Allocations(executor, allocated)
        for one in planned.executors:
            one.observer = allocations
        _step(model, args)
    _clear(model)
    beside = {int(name): size for name, size in allocated.peak_in}
    for number, place in executor.taken.items():
        beside[number] -= executor.step.storages[executor.step.tensors[place].storage].size_bytes
    timed, steps_ms, host_ms, waits_ms = [], [], [], []
    for _ in range(repeats):
        for one in planned.executors:
            one.observer = None
        waited = _waited_us(planned)
        _wait(device)
        began = time.perf_counter()
        _step(model, args)
        host_ms.append((time.perf_counter() - began) * 1e3)
        _wait(device)
        steps_ms.append((time.perf_counter() - began) * 1e3)
        waits_ms.append((_waited_us(planned) - waited) / 1e3)
        _clear(model)
        durations = _Durations(device)
        for one in planned.executors:
            one.observer = durations
        _step(model, args)
        timed.append(durations.us())
        _clear(model)
    plan = planned.plan
    predicted = plan.plan.predicted
    copied = [one.copied for one in planned.executors if one.copied is not None]
    steps = sum(one.steps for one in copied)
    accounting = plan.accounting
    returned = plan.reserve_bytes - max(planned.workspace_bytes, default=0)
    there = _bytes_there(model, args) + plan.arena_bytes * accounting.in_flight
    return StepReport(
        operations=[
            _row(planned, number, [times[number] for times in timed], beside[number])
            for number in range(len(plan.plan.instances))
        ],
        step_ms=Pair(plan.predicted_step_ms, statistics.median(steps_ms)),
        host_ms=statistics.median(host_ms),
        waits_ms=Pair(predicted.stall_us / 1e3, statistics.median(waits_ms)),
        arena_bytes=Pair(plan.arena_bytes, executor.arenas.touched_bytes),
        reserve_bytes=Pair(plan.reserve_bytes, max(beside.values(), default=0) + returned),
        total_bytes=Pair(plan.peak_bytes - accounting.beside_bytes, there + allocated.peak_bytes),
        offloaded_bytes=Pair(
            _copied_bytes(planned, _core.CopyKind.OFFLOAD), sum(one.offloaded_bytes for one in copied) / max(steps, 1)
        ),
        prefetched_bytes=Pair(
            _copied_bytes(planned, _core.CopyKind.PREFETCH), sum(one.prefetched_bytes for one in copied) / max(steps, 1)
        ),
        costs=executor.step.durations_from,
        repeats=repeats,
    )


def _row(planned: PlannedStep, number: int, times_us: Sequence[float], allocated_bytes: int) -> OperationRow:
    instance = planned.plan.plan.instances[number]
    operation = planned.step.operations[instance.operation]
    return OperationRow(
        name=operation.name,
        target=operation.target,
        module=operation.module,
        patch=operation.patch,
        is_backward=operation.is_backward,
        is_recomputation=instance.is_recomputation,
        duration_us=Pair(operation.duration_us, statistics.median(times_us)),
        allocated_bytes=Pair(planned.workspace_bytes[instance.operation], allocated_bytes),
    )


def _copied_bytes(planned: PlannedStep, kind: _core.CopyKind) -> int:
    plan = planned.plan.plan
    return sum(plan.storages[copy.storage].size_bytes for copy in plan.copies if copy.kind == kind)


def _waited_us(planned: PlannedStep) -> float:
    return sum(one.copied.host_wait_us for one in planned.executors if one.copied is not None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _bytes_there(model: nn.Module, args: tuple[Any, ...]) -> int:
    """Parameters, buffers and inputs, each storage once."""
    tensors = [*model.parameters(), *model.buffers(), *(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def _put_back(model: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """Buffers, gradients and random state, afterwards as before."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    leaves = [*model.parameters(), *(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))]
    gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.is_leaf]
    devices = sorted({leaf.device.index for leaf in leaves if leaf.is_cuda})
    with torch.random.fork_rng(devices):
        for leaf, _ in gradients:
            leaf.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for leaf, gradient in gradients:
                leaf.grad = gradient
