"""One training step of a model captured, planned under a byte budget, and ready to run; `compile` keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from splitkern import _core
from splitkern.memory.capture import CapturedStep, capture
from splitkern.memory.cost_model import CostModel
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from splitkern.memory.profile import DurationCache, measure_link, measure_step, measure_workspaces
from splitkern.memory.report import bytes_text
from splitkern.memory.step_functions import run_step

__all__ = ["BudgetError", "CompileOptions", "CompiledPlan", "PlannedStep"]


class BudgetError(ValueError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was given.
        smallest_bytes: the smallest budget that would do, with otherwise the same arguments.
    """

    def __init__(self, text: str, budget_bytes: int, smallest_bytes: int) -> None:
        super().__init__(text)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class CompileOptions:
    """What `compile` was told. Bytes; gigabytes per second."""

    budget: int | None
    host_budget: int | None
    strategy: str
    costs: CostModel | str
    link_gbps: float | None
    optimizer_bytes: int
    accumulate: bool
    in_flight: int
    strict: bool
    execution: ExecutorOptions


@dataclass(frozen=True)
class CompiledPlan:
    """The plan that a compiled model runs, as `model.plan`.

    Attributes:
        graph: of the step.
        plan: of the graph.
        in_flight: how many steps can be under way, each with an arena of its own.
        reserve_bytes: most that operations allocate beside the arena, as measured, and what the model returns.
        input_bytes: inputs of a step, also counted in the plan's parameters pool.
        beside_bytes: what else the budget has to hold: the optimizer's state, gradients that are accumulated.
    """

    graph: _core.Graph
    plan: _core.Plan
    in_flight: int
    reserve_bytes: int
    input_bytes: int
    beside_bytes: int

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPlan:
        return self  # nothing in it ever changes

    @property
    def arena_bytes(self) -> int:
        """Device memory for one step's activations."""
        return self.plan.predicted.device_peak_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory, pinned on CUDA, for what one step offloads."""
        return self.plan.predicted.host_peak_bytes

    @property
    def parameters_bytes(self) -> int:
        """Parameters, buffers, their gradients, and inputs of one step."""
        return self.plan.predicted.parameters_peak_bytes

    @property
    def peak_bytes(self) -> int:
        """Device bytes of training by this plan: what the budget is compared with."""
        return _budget_of(self.arena_bytes + self.parameters_bytes, self)

    @property
    def is_left_alone(self) -> bool:
        """Whether nothing is copied or recomputed: the model fits as it is."""
        return not self.plan.copies and not any(instance.is_recomputation for instance in self.plan.instances)

    @property
    def predicted_step_ms(self) -> float:
        """Time of a step, by the durations that the plan was made with."""
        return self.plan.predicted.step_us / 1000

    def __str__(self) -> str:
        recomputed = sum(instance.is_recomputation for instance in self.plan.instances)
        copies = len(self.plan.copies)
        done = f"{copies} copies, {recomputed} operations recomputed"
        return (
            f"{'left alone: it fits' if self.is_left_alone else done}; {bytes_text(self.peak_bytes)} predicted: "
            f"arena {bytes_text(self.arena_bytes)}{f' x {self.in_flight}' if self.in_flight > 1 else ''}, "
            f"parameters, gradients and inputs {bytes_text(self.parameters_bytes)}, "
            f"reserve {bytes_text(self.reserve_bytes)}, beside {bytes_text(self.beside_bytes)}; "
            f"{self.predicted_step_ms:.1f} ms predicted"
        )

    def summary(self) -> dict[str, Any]:
        """Its figures, for JSON: bytes, milliseconds, counts."""
        return {
            "peak_bytes": self.peak_bytes,
            "arena_bytes": self.arena_bytes,
            "parameters_bytes": self.parameters_bytes,
            "reserve_bytes": self.reserve_bytes,
            "beside_bytes": self.beside_bytes,
            "host_bytes": self.host_bytes,
            "predicted_step_ms": self.predicted_step_ms,
            "copies": len(self.plan.copies),
            "recomputed": sum(instance.is_recomputation for instance in self.plan.instances),
            "is_left_alone": self.is_left_alone,
        }

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(self.plan.to_json())

    def plot(self, path: str | Path) -> None:
        """Draws the plan as a PNG: time across, address up."""
        from splitkern.memory.picture import scene_of_plan
        from splitkern.memory.picture_png import write_png
        from splitkern.memory.report import PlanView
        from splitkern.memory.timeline import Timeline

        timeline = Timeline.of(_core.simulate(self.graph, self.plan))
        write_png(Path(path), scene_of_plan(PlanView(self.graph, self.plan), timeline))


@dataclass(frozen=True)
class _Beside:
    """What a budget holds beside one arena, in bytes."""

    in_flight: int
    reserve_bytes: int
    input_bytes: int
    beside_bytes: int
    parameters_bytes: int


def _budget_of(planned_bytes: int, beside: CompiledPlan | _Beside) -> int:
    """The budget under which a plan has so many bytes for one arena and the parameters pool."""
    more = beside.in_flight - 1
    arena_bytes = planned_bytes - beside.parameters_bytes
    return planned_bytes + more * (arena_bytes + beside.input_bytes) + beside.reserve_bytes + beside.beside_bytes


def _planned_of(budget: int, beside: _Beside) -> int:
    """The other way: largest such number of bytes under a budget; not negative."""
    left = budget - _budget_of(beside.parameters_bytes, beside)
    return max(beside.parameters_bytes + left // beside.in_flight if left >= 0 else beside.parameters_bytes + left, 0)


class PlannedStep:
    """One captured step with its plan and its executors.

    Attributes:
        step: as captured, with durations.
        workspace_bytes: what each of its operations allocates beside the arena, as measured.
        plan: what the model shows.
        executors: one per step in flight.

    Args:
        model: to capture, with the forward that is to be captured.
        args: of its forward.
        options: of `compile`.

    Raises:
        BudgetError, CaptureError, RuntimeError: see `compile`.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], options: CompileOptions) -> None:
        step = capture(model, args, given_gradients=True)
        step, workspaces, rates = _on_machine(step, options)
        graph = _core.Graph.from_json(step.graph_json())
        beside = _beside(step, graph, max(workspaces, default=0), options)
        plan = _plan(graph, rates, options, beside)
        self.executors = [StepExecutor(step, graph, plan, options.execution) for _ in range(options.in_flight)]
        self.plan = CompiledPlan(
            graph, plan, options.in_flight, beside.reserve_bytes, beside.input_bytes, beside.beside_bytes
        )
        assert step.structure is not None
        self.step = step
        self.workspace_bytes = workspaces
        self._structure = step.structure
        self._differentiable = step.differentiable

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> Any:
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        # One that is free; else the one whose forward pass is the oldest gives it up.
        executor = min(self.executors, key=lambda one: (one.next_part is not None, one.begun_at))
        outputs = run_step(executor, tensors, inputs, self._differentiable, kept=len(self.executors))
        return tree_unflatten(outputs, self._structure)


def _on_machine(step: CapturedStep, options: CompileOptions) -> tuple[CapturedStep, list[int], dict[str, float]]:
    """The step with durations, what its operations allocate, and the machine's link."""
    costs = options.costs
    if isinstance(costs, CostModel):
        durations, label = costs.durations_us(step.operations), costs.label
        workspaces = measure_workspaces(step)
        rates = {
            "offload_gbps": costs.offload_gbps,
            "prefetch_gbps": costs.prefetch_gbps,
            "copy_latency_us": costs.copy_latency_us,
        }
    else:
        profile = measure_step(step, cache=DurationCache())
        durations, label, workspaces = profile.durations_us, profile.label, profile.workspace_bytes
        rates = {}
        if options.link_gbps is None and options.budget is not None:
            link = measure_link(step.device, size_bytes=32 << 20)
            rates = {"offload_gbps": link.offload_computing_gbps, "prefetch_gbps": link.prefetch_computing_gbps}
    if options.link_gbps is not None:
        rates |= {"offload_gbps": options.link_gbps, "prefetch_gbps": options.link_gbps}
    # The graph has no workspaces: planned ones would lie in the arena, and PyTorch's allocator serves these.
    return step.with_durations(durations, label), workspaces, rates


def _beside(step: CapturedStep, graph: _core.Graph, workspace_bytes: int, options: CompileOptions) -> _Beside:
    parameters_bytes = _core.plan(graph, _core.Limits(), strategy="none").predicted.parameters_peak_bytes
    returned_bytes = sum(_dense_bytes(step, place) for place in step.outputs)
    accumulated_bytes = sum(_dense_bytes(step, place) for place in step.gradients.values()) if options.accumulate else 0
    given = (place for name, place in step.inputs.items() if name.startswith("input."))
    return _Beside(
        in_flight=options.in_flight,
        reserve_bytes=workspace_bytes + options.in_flight * returned_bytes,
        input_bytes=sum(_dense_bytes(step, place) for place in given),
        beside_bytes=options.optimizer_bytes + accumulated_bytes,
        parameters_bytes=parameters_bytes,
    )


def _dense_bytes(step: CapturedStep, place: int) -> int:
    tensor = step.tensors[place]
    return math.prod(tensor.sizes) * tensor.element_bytes


def _plan(graph: _core.Graph, rates: dict[str, float], options: CompileOptions, beside: _Beside) -> _core.Plan:
    if options.budget is None:
        return _core.plan(graph, _core.Limits(), strategy="none")
    limits = _core.Limits(
        device_bytes=_planned_of(options.budget, beside),
        host_bytes=options.host_budget,
        offload_gbps=rates.get("offload_gbps", 0.0),
        prefetch_gbps=rates.get("prefetch_gbps", 0.0),
        copy_latency_us=rates.get("copy_latency_us", 0.0),
    )
    try:
        return _core.plan(graph, limits, strategy=options.strategy)
    except _core.Infeasible as error:
        if error.pool != "device":
            raise BudgetError(
                f"host_budget={bytes_text(options.host_budget)} is too small: {error}",
                error.budget_bytes,
                error.smallest_feasible_bytes,
            ) from error
        smallest = _budget_of(error.smallest_feasible_bytes, beside)
        parts = f"reserve {bytes_text(beside.reserve_bytes)}, optimizer {bytes_text(options.optimizer_bytes)}"
        if options.accumulate:
            parts += f", accumulated gradients {bytes_text(beside.beside_bytes - options.optimizer_bytes)}"
        raise BudgetError(
            f"budget={bytes_text(options.budget)} ({options.budget} bytes) is too small for a step of this model: "
            f"the smallest that would do is {bytes_text(smallest)} ({smallest} bytes), of which "
            f"{bytes_text(beside.reserve_bytes + beside.beside_bytes)} lie beside the plan ({parts}); "
            "use a smaller batch, a larger budget, or split_ with a finer grid",
            options.budget,
            smallest,
        ) from error
