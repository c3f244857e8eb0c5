"""One training step of a model captured, planned under a byte budget, and ready to run; `compile` keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from splitkern import _core
from splitkern.memory.accounting import Accounting, accounting_of
from splitkern.memory.capture import CapturedStep, capture
from splitkern.memory.compression import CompressionReport, compression_report, measure_compression, with_compression
from splitkern.memory.cost_model import CostModel
from splitkern.memory.draws import SAMPLED_DRAWS, Drawing, DrawnSteps, capture_family, decide, drawing_split_of
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from splitkern.memory.family import Family
from splitkern.memory.graphs import require_graphs
from splitkern.memory.profile import DurationCache, measure_link, measure_step, measure_workspaces
from splitkern.memory.report import bytes_text
from splitkern.memory.step_functions import run_step

__all__ = ["BudgetError", "CompileOptions", "CompiledPlan", "PlannedStep"]

#: What is tried where a strategy finds no plan: operations that are run again may allocate more beside the arena, when
#: gradients are there already, than recomputation saves in it.
_INSTEAD_OF = {"default": ("hmms-paper", "layerwise")}


class BudgetError(ValueError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was given.
        smallest_bytes: the smallest budget that would do, with otherwise the same arguments.
        is_of_device: whether `budget` is too small; else `host_budget`.
    """

    def __init__(self, text: str, budget_bytes: int, smallest_bytes: int, *, is_of_device: bool = True) -> None:
        super().__init__(text)
        self.is_of_device = is_of_device
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
    compress: bool
    execution: ExecutorOptions


@dataclass(frozen=True)
class CompiledPlan:
    """The plan that a compiled model runs, as `model.plan`.

    Attributes:
        graph: of the step.
        plan: of the graph.
        accounting: what lies on the device beside the arena.
        arena_bytes: device memory for one step's activations; more than the plan needs where patch boundaries are drawn
            afresh in every step: graph and plan are then those of the even boundaries.
    """

    graph: _core.Graph
    plan: _core.Plan
    accounting: Accounting
    arena_bytes: int

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPlan:
        return self  # nothing in it ever changes

    @property
    def host_bytes(self) -> int:
        """Host memory, pinned on CUDA, for what one step offloads."""
        return self.plan.predicted.host_peak_bytes

    @property
    def reserve_bytes(self) -> int:
        """Most that an operation allocates beside the arena, as measured, and what the model returns."""
        return self.accounting.reserve_bytes

    @property
    def peak_bytes(self) -> int:
        """Device bytes of training by this plan: what the budget is compared with."""
        return self.accounting.budget_for(self.arena_bytes)

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
        done = f"{len(self.plan.copies)} copies, {recomputed} operations recomputed"
        parts = self.accounting
        arenas = f"arena {bytes_text(self.arena_bytes)}" + (f" x {parts.in_flight}" if parts.in_flight > 1 else "")
        return (
            f"{'left alone: it fits' if self.is_left_alone else done}; {bytes_text(self.peak_bytes)} predicted at the "
            f"peak: {arenas}, parameters and inputs {bytes_text(parts.given_bytes)}, gradients "
            f"{bytes_text(parts.gradient_bytes)}, reserve {bytes_text(parts.reserve_bytes)}, optimizer and the "
            f"like {bytes_text(parts.beside_bytes)}; host {bytes_text(self.host_bytes)}; "
            f"{self.predicted_step_ms:.1f} ms predicted"
        )

    def summary(self) -> dict[str, Any]:
        """Its figures, for JSON: bytes, milliseconds, counts."""
        return {
            "peak_bytes": self.peak_bytes,
            "arena_bytes": self.arena_bytes,
            "given_bytes": self.accounting.given_bytes,
            "gradient_bytes": self.accounting.gradient_bytes,
            "reserve_bytes": self.reserve_bytes,
            "beside_bytes": self.accounting.beside_bytes,
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


class PlannedStep:
    """One captured step with its plan and its executors.

    Attributes:
        step: as captured, with durations.
        workspace_bytes: what each of its operations allocates beside the arena, as measured.
        plan: what the model shows.
        executors: one per step in flight; none between `release` and `make_ready`.
        draws: where patch boundaries are drawn afresh in every step.

    Args:
        model: to capture, with the forward that is to be captured.
        args: of its forward.
        options: of `compile`.

    Raises:
        BudgetError, CaptureError, RuntimeError: see `compile`.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], options: CompileOptions) -> None:
        step, family, drawing = _capture(model, args, options)
        step, workspaces, rates = _on_machine(step, options)
        graph = _core.Graph.from_json(step.graph_json())
        self.draws: DrawnSteps | None = None
        self._make_draws: Callable[[], DrawnSteps] | None = None
        if family is not None and drawing is not None:
            family = family.with_base(step)
            workspaces = _of_largest(workspaces, step, family.step(family.largest(drawing.ranges)))
            numbers = [family.numbers(draw) for draw in drawing.samples(SAMPLED_DRAWS)]
            samples = [_core.with_sizes(graph, family.graph_numbers(one)) for one in numbers]
            plan, accounting = _plan(step, graph, workspaces, rates, options, samples)
            most = None if options.budget is None else accounting.arena_under(options.budget)
            self._make_draws = partial(DrawnSteps, drawing, family, graph, plan, options.execution, most)
        else:
            plan, accounting = _plan(step, graph, workspaces, rates, options)
            if options.compress:
                # By the plain plan, within the budget; its arenas go before those of the compressed plan come.
                execution = replace(options.execution, cuda_graphs=False)
                measured = measure_compression(StepExecutor(step, graph, plan, execution), *_tensors_of(model, args))
                graph = with_compression(graph, measured)
                plan, accounting = _plan(step, graph, workspaces, rates, options)
        assert step.structure is not None
        self.step = step
        self.workspace_bytes = workspaces
        self._options, self._graph, self._plan = options, graph, plan
        self._structure = step.structure
        self._differentiable = step.differentiable
        self.executors: list[StepExecutor] = []
        self._drawn: StepExecutor | None = None
        self.make_ready()
        self.plan = CompiledPlan(graph, plan, accounting, self.executors[0].arenas.device.numel())

    def make_ready(self) -> None:
        """Makes the executors, and with them the arenas, where there are none.

        Raises:
            RuntimeError: memory for the arenas cannot be had.
        """
        if self.executors:
            return
        if self._make_draws is None:
            made = (self.step, self._graph, self._plan, self._options.execution)
            self.executors = [StepExecutor(*made) for _ in range(self._options.in_flight)]
        else:
            self.draws = self._make_draws()
            self.executors = [self.draws.even]
            self._drawn = self.draws.even

    def release(self) -> int:
        """Lets go of the executors and their arenas; a step under way keeps its own.

        Returns:
            How many steps are under way.
        """
        executors = self.executors if self.draws is None else self.draws.executors()
        under_way = sum(one.next_part is not None for one in executors)
        for one in executors:
            one.retire()
        self.executors, self.draws, self._drawn = [], None, None
        return under_way

    @property
    def compression(self) -> CompressionReport:
        """How far offloads are compressed: by the plan, and in the steps that were counted since."""
        return compression_report(self.plan.plan, [one.copied for one in self.executors])

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> Any:
        tensors, inputs = _tensors_of(model, args)
        outputs = run_step(self._next(), tensors, inputs, self._differentiable, kept=len(self.executors))
        if self.draws is not None:
            self.draws.look_ahead()
        return tree_unflatten(outputs, self._structure)

    def _next(self) -> StepExecutor:
        """Of the step that begins: one that is free; else the one whose forward pass is the oldest gives it up."""
        if self.draws is None:
            return min(self.executors, key=lambda one: (one.next_part is not None, one.begun_at))
        executor = self.draws.take()
        # All draws run in the same arenas.
        if self._drawn is not None:
            self._drawn.give_up(self._drawn.number)
        self._drawn = executor
        return executor


def _capture(
    model: nn.Module, args: tuple[Any, ...], options: CompileOptions
) -> tuple[CapturedStep, Family | None, Drawing | None]:
    """The step; where boundaries are drawn, that of the even ones, with how it depends on them."""
    split = drawing_split_of(model)
    execution = options.execution
    if split is None:
        step = capture(model, args, given_gradients=True)
        if execution.cuda_graphs:
            require_graphs(step.device, debug=execution.debug)
        return step, None, None
    for name, given in (
        ("in_flight above 1", options.in_flight > 1),
        ("cuda_graphs", execution.cuda_graphs),
        ("compress", options.compress),
    ):
        if given:
            raise ValueError(
                f'{name} is not possible for a model split with boundary="stochastic", whose steps differ and share '
                'one arena; leave it out, or split with boundary="zero"'
            )
    family, drawing = capture_family(split, lambda: capture(model, args, given_gradients=True))
    return family.base, family, drawing


def _of_largest(workspace_bytes: list[int], base: CapturedStep, largest: CapturedStep) -> list[int]:
    """What operations allocate at the largest boundaries, from what they did at the base's: by their tensors' sizes."""

    def touched(step: CapturedStep, index: int) -> int:
        operation = step.operations[index]
        return sum(math.prod(step.tensors[place].sizes) for place in (*operation.reads, *operation.writes))

    return [
        math.ceil(size * max(1.0, touched(largest, index) / max(touched(base, index), 1)))
        for index, size in enumerate(workspace_bytes)
    ]


def _tensors_of(model: nn.Module, args: tuple[Any, ...]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Parameters and buffers by name, and inputs, as an executor takes them."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return tensors, [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


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


def _plan(
    step: CapturedStep,
    graph: _core.Graph,
    workspace_bytes: list[int],
    rates: dict[str, float],
    options: CompileOptions,
    samples: Sequence[_core.Graph] = (),
) -> tuple[_core.Plan, Accounting]:
    """The plan, whose decisions fit the samples too, and what lies beside its arena."""

    def account(plan: _core.Plan) -> Accounting:
        return accounting_of(
            step,
            plan,
            workspace_bytes,
            in_flight=options.in_flight,
            optimizer_bytes=options.optimizer_bytes,
            accumulate=options.accumulate,
            cuda_graphs=options.execution.cuda_graphs,
        )

    kept = _core.plan(graph, _core.Limits(), strategy="none")
    if options.budget is None:
        return kept, account(kept)
    parameters_bytes = kept.predicted.parameters_peak_bytes

    def plan_under(budget: int, strategy: str) -> tuple[_core.Plan, Accounting]:
        accounting = account(kept)
        while True:
            limits = _core.Limits(
                device_bytes=max(accounting.arena_under(budget) + parameters_bytes, 0),
                host_bytes=options.host_budget,
                offload_gbps=rates.get("offload_gbps", 0.0),
                prefetch_gbps=rates.get("prefetch_gbps", 0.0),
                copy_latency_us=rates.get("copy_latency_us", 0.0),
            )
            try:
                plan = decide(graph, samples, limits, strategy)
            except _core.Infeasible as error:
                raise _budget_error(error, budget, parameters_bytes, accounting, options) from error
            found = account(plan)
            # Draws of boundaries may use all that the limits leave to the arena.
            allowed = accounting.arena_under(budget) if samples else plan.predicted.device_peak_bytes
            if found.budget_for(max(allowed, 0)) <= budget:
                return plan, found
            # What is recomputed allocates when more gradients are there than in the step as captured.
            accounting = replace(found, outside_bytes=max(found.outside_bytes, accounting.outside_bytes + 1))

    refusals: list[BudgetError] = []
    for strategy in (options.strategy, *_INSTEAD_OF.get(options.strategy, ())):
        try:
            return plan_under(options.budget, strategy)
        except BudgetError as error:
            found = error
        while found.is_of_device:
            # The budget that the error names is tried: its plan may need more beside the arena than was counted.
            try:
                plan_under(found.smallest_bytes, strategy)
                break
            except BudgetError as error:
                found = error
        refusals.append(found)
    alike = (one for one in refusals if one.is_of_device == refusals[0].is_of_device)
    found = min(alike, key=lambda one: one.smallest_bytes)
    raise _with_budget(found, options.budget)


def _budget_error(
    error: _core.Infeasible, budget: int, parameters_bytes: int, accounting: Accounting, options: CompileOptions
) -> BudgetError:
    if error.pool != "device":
        return BudgetError(
            f"host_budget={bytes_text(options.host_budget)} is too small: {error}",
            error.budget_bytes,
            error.smallest_feasible_bytes,
            is_of_device=False,
        )
    arena_bytes = error.smallest_feasible_bytes - parameters_bytes
    smallest = accounting.budget_for(arena_bytes)
    arenas = f"{accounting.in_flight} x " if accounting.in_flight > 1 else ""
    return BudgetError(
        f"the smallest that would do is {bytes_text(smallest)} ({smallest} bytes): activations "
        f"{arenas}{bytes_text(arena_bytes)}, parameters and inputs {bytes_text(accounting.given_bytes)}, gradients "
        f"{bytes_text(accounting.gradient_bytes)}, reserve {bytes_text(accounting.reserve_bytes)}, optimizer and "
        f"the like {bytes_text(accounting.beside_bytes)}; "
        "use a smaller batch, a larger budget, or split_ with a finer grid",
        budget,
        smallest,
    )


def _with_budget(error: BudgetError, budget: int) -> BudgetError:
    if not error.is_of_device:
        return error
    return BudgetError(
        f"budget={bytes_text(budget)} ({budget} bytes) is too small for a step of this model: {error}",
        budget,
        error.smallest_bytes,
    )
