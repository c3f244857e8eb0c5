"""`compile`: a model instance whose training step runs in a byte budget, inside an ordinary training loop.

The instance's ``forward`` is replaced, as a split's is; class, parameters and ``state_dict`` stay. In training, with
gradients enabled, a forward pass runs the first part of the planned step, and autograd's backward pass the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from splitkern import _core
from splitkern.memory.capture import CapturedStep, capture
from splitkern.memory.cost_model import CostModel, cost_model
from splitkern.memory.draws import SAMPLED_DRAWS, DrawnSteps, capture_family, decide, drawing_split_of
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from splitkern.memory.profile import DurationCache, measure_link, measure_step
from splitkern.memory.report import bytes_text, parse_bytes

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["BudgetError", "CompiledPlan", "compile", "compiled_forward_of", "uncompile_"]


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
    strict: bool
    execution: ExecutorOptions


@dataclass(frozen=True)
class CompiledPlan:
    """The plan that a compiled model runs, as `model.plan`.

    Attributes:
        graph: of the step.
        plan: of the graph.
        reserve_bytes: most that an operation without an ``.out`` form allocates beside the arena, by the plan.
        arena_bytes: of the device arena; more than the plan needs where patch boundaries are drawn afresh in every
            step: then graph and plan are those of the even boundaries.
    """

    graph: _core.Graph
    plan: _core.Plan
    reserve_bytes: int
    arena_bytes: int

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPlan:
        return self  # nothing in it ever changes

    @property
    def peak_bytes(self) -> int:
        """Device bytes of a step: arena, parameters, buffers, inputs, gradients of parameters, and the reserve."""
        return self.arena_bytes + self.plan.predicted.parameters_peak_bytes + self.reserve_bytes

    @property
    def predicted_step_ms(self) -> float:
        """Time of a step, by the durations that the plan was made with."""
        return self.plan.predicted.step_us / 1000

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


class CompiledForward:
    """The ``forward`` of a compiled model.

    Copies and pickles with its model; plans are made again where needed. One step at a time.

    Attributes:
        replans: how often a forward pass came with shapes or settings that no plan was there for.
        redraws: how often stochastic boundaries were drawn again because those drawn did not fit the budget; until the
            first of them the boundaries are those of the model that is not compiled.
    """

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        self.model = model
        self.options = options
        # What the instance had before, such as the forward of a split; None: the class's own.
        self.inner: Callable[..., Any] | None = model.__dict__.get("forward")
        self.replans = 0
        self._redraws = 0  # under earlier plans
        self._steps: dict[Any, _PlannedStep] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self.options, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.replans, self._redraws, self._steps = 0, 0, {}

    @property
    def redraws(self) -> int:
        return self._redraws + sum(step.redraws for step in self._steps.values())

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computed before it was compiled."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not self.model.training:
            return self.original(*args, **kwargs)
        if kwargs:
            raise TypeError(f"a compiled model takes its inputs by position in training, got {sorted(kwargs)} by name")
        planned = self._steps.get(self._key(args))
        if planned is None:
            if self.options.strict and self._steps:
                raise ValueError(
                    f"strict=True: the model was compiled for {_shapes(next(iter(self._steps)))}, "
                    f"got {_shapes(self._key(args))} (or other types, devices, strides, training flags, "
                    "requires_grad or autocast)"
                )
            planned = self.prepare(args)
            self.replans += 1
        return planned(self.model, args)

    def prepare(self, args: tuple[Any, ...]) -> _PlannedStep:
        """Captures and plans the step for these inputs, and makes ready to run it."""
        # Of all plans one is kept, and it goes before the next one comes: arenas are as large as the budget.
        self._redraws, self._steps = self.redraws, {}
        planned = _PlannedStep(self, args)
        self._steps = {self._key(args): planned}
        self.model.__dict__["plan"] = planned.plan
        return planned

    def _key(self, args: tuple[Any, ...]) -> Any:
        leaves, structure = tree_flatten(args)
        inputs = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in leaves
        )
        parameters = tuple(
            (name, tuple(p.shape), p.stride(), p.dtype, p.device, p.requires_grad)
            for name, p in self.model.named_parameters()
        )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        same = tuple(next(i for i, other in enumerate(tensors) if other is one) for one in tensors)
        device = self.model_device().type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        modules = tuple(_settings(module) for module in self.model.modules())
        return inputs, same, str(structure), parameters, modules, autocast

    def model_device(self) -> torch.device:
        """Of the first parameter."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


@contextmanager
def _as_before(forward: CompiledForward) -> Iterator[None]:
    """The model with the forward that it had before."""
    held = forward.model.__dict__
    if forward.inner is None:
        del held["forward"]
    else:
        held["forward"] = forward.inner
    try:
        yield
    finally:
        held["forward"] = forward


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What a captured step takes for constant about a module: its class, flags, numbers, and whether it has hooks."""
    held = module.__dict__
    plain = tuple(
        (name, value)
        for name, value in held.items()
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(one, _PLAIN) for one in value))
    )
    return id(module), type(module), plain, tuple(len(held[name]) for name in _HOOKS)


def _shapes(key: Any) -> str:
    return ", ".join(str(list(one[0])) for one in key[0] if isinstance(one, tuple))


class _PlannedStep:
    """One captured step with its plan and its executor."""

    def __init__(self, forward: CompiledForward, args: tuple[Any, ...]) -> None:
        model, options = forward.model, forward.options
        family = None
        with _as_before(forward):
            split = drawing_split_of(model)
            if split is None:
                step = capture(model, args, given_gradients=True)
            else:
                family, drawing = capture_family(split, lambda: capture(model, args, given_gradients=True))
                step = family.base
        step, rates = _on_machine(step, options)
        graph = _core.Graph.from_json(step.graph_json())
        self.draws: DrawnSteps | None = None
        if family is None:
            reserve_bytes = reserve_of(step)
            plan = _plan(graph, rates, options, reserve_bytes)
            self.executor = StepExecutor(step, graph, plan, options.execution)
        else:
            family = family.with_base(step)
            reserve_bytes = reserve_of(family.step(family.largest(drawing.ranges)))
            samples = [
                _core.with_sizes(graph, family.graph_numbers(family.numbers(draw)))
                for draw in drawing.samples(SAMPLED_DRAWS)
            ]
            plan = _plan(graph, rates, options, reserve_bytes, samples)
            self.draws = DrawnSteps(drawing, family, graph, plan, options.execution)
            self.executor = self.draws.even
        self.plan = CompiledPlan(graph, plan, reserve_bytes, self.executor.arenas.device.numel())
        self._structure = step.structure
        self.parameter_names = [name for name, p in model.named_parameters() if p.requires_grad]
        leaves, _ = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.input_names = [f"input.{i}" if t.requires_grad else None for i, t in enumerate(tensors)]
        self.differentiable = step.differentiable

    @property
    def redraws(self) -> int:
        """Of boundaries that did not fit."""
        return 0 if self.draws is None else self.draws.redraws

    def next_executor(self) -> StepExecutor:
        """Of the step that begins; where it is another one than the last step's, that one is given up."""
        if self.draws is not None:
            executor = self.draws.take()
            if executor is not self.executor:
                self.executor.abort()
                self.executor = executor
        return self.executor

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> Any:
        leaves, _ = tree_flatten(args)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        parameters = dict(model.named_parameters())
        trained = [parameters[name] for name in self.parameter_names]
        outputs = _RunStep.apply(self, model, len(inputs), *inputs, *trained)  # type: ignore[no-untyped-call]
        assert self._structure is not None
        return tree_unflatten(list(outputs), self._structure)


def reserve_of(step: CapturedStep) -> int:
    """Most bytes that one operation allocates beside its places: the results of what has no ``.out`` form."""
    most = 0
    for operation in step.operations:
        call = operation.call if operation.out_call is None else operation.out_call
        places = [operation.writes[place] for place in call.results if place is not None]
        most = max(most, sum(_dense_bytes(step, place) for place in places))
    return most


def _dense_bytes(step: CapturedStep, place: int) -> int:
    tensor = step.tensors[place]
    return math.prod(tensor.sizes) * tensor.element_bytes


def _on_machine(step: CapturedStep, options: CompileOptions) -> tuple[CapturedStep, dict[str, float]]:
    """The step with durations, and the machine's link."""
    costs = options.costs
    if isinstance(costs, CostModel):
        step = step.with_durations(costs.durations_us(step.operations), costs.label)
        rates = {
            "offload_gbps": costs.offload_gbps,
            "prefetch_gbps": costs.prefetch_gbps,
            "copy_latency_us": costs.copy_latency_us,
        }
    else:
        profile = measure_step(step, cache=DurationCache())
        step = step.with_durations(profile.durations_us, profile.label, workspace_bytes=profile.workspace_bytes)
        rates = {}
        if options.link_gbps is None and options.budget is not None:
            link = measure_link(step.device, size_bytes=32 << 20)
            rates = {"offload_gbps": link.offload_computing_gbps, "prefetch_gbps": link.prefetch_computing_gbps}
    if options.link_gbps is not None:
        rates |= {"offload_gbps": options.link_gbps, "prefetch_gbps": options.link_gbps}
    return step, rates


def _plan(
    graph: _core.Graph,
    rates: dict[str, float],
    options: CompileOptions,
    reserve_bytes: int,
    samples: Sequence[_core.Graph] = (),
) -> _core.Plan:
    if options.budget is None:
        return _core.plan(graph, _core.Limits(), strategy="none")
    beside = reserve_bytes + options.optimizer_bytes
    limits = _core.Limits(
        device_bytes=max(options.budget - beside, 0),
        host_bytes=options.host_budget,
        offload_gbps=rates.get("offload_gbps", 0.0),
        prefetch_gbps=rates.get("prefetch_gbps", 0.0),
        copy_latency_us=rates.get("copy_latency_us", 0.0),
    )
    try:
        return decide(graph, samples, limits, options.strategy)
    except _core.Infeasible as error:
        if error.pool != "device":
            raise BudgetError(
                f"host_budget={bytes_text(options.host_budget)} is too small: {error}",
                error.budget_bytes,
                error.smallest_feasible_bytes,
            ) from error
        smallest = error.smallest_feasible_bytes + beside
        parts = f"reserve {bytes_text(reserve_bytes)}, optimizer {bytes_text(options.optimizer_bytes)}"
        raise BudgetError(
            f"budget={bytes_text(options.budget)} ({options.budget} bytes) is too small for a step of this model: "
            f"the smallest that would do is {bytes_text(smallest)} ({smallest} bytes), of which "
            f"{bytes_text(beside)} lie beside the plan ({parts}); "
            "use a smaller batch, a larger budget, or split_ with a finer grid",
            options.budget,
            smallest,
        ) from error


class _RunStep(torch.autograd.Function):
    """The planned step as one function of autograd."""

    @staticmethod
    def forward(ctx: Any, planned: _PlannedStep, model: nn.Module, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        executor = planned.next_executor()
        outputs = executor.forward(values, tensors[:count])
        if planned.draws is not None:
            planned.draws.look_ahead()
        ctx.planned, ctx.count = planned, count
        ctx.executor, ctx.number = executor, executor.number
        ctx.set_materialize_grads(True)
        ctx.mark_non_differentiable(*(out for i, out in enumerate(outputs) if i not in planned.differentiable))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        planned: _PlannedStep = ctx.planned
        executor: StepExecutor = ctx.executor
        if ctx.number != executor.number or not executor.is_between:
            raise RuntimeError(
                "the activations of this forward pass are gone: a compiled model keeps those of its last forward pass, "
                "for one backward pass (no retain_graph, no second forward pass in between; uncompile_ allows both)"
            )
        given = [grads[i] for i in planned.differentiable]
        found = executor.backward(given)
        of_inputs = [None if name is None else found.get(name) for name in planned.input_names]
        of_parameters = [found.get(name) for name in planned.parameter_names]
        return (None, None, None, *of_inputs, *of_parameters)


# --- the public functions -----------------------------------------------------------------------------------------


def compile(
    model: Model,
    example_inputs: Tensor | Sequence[Any],
    *,
    budget: int | str | None,
    host_budget: int | str | None = None,
    strategy: str = "default",
    costs: str | CostModel = "measured",
    link_gbps: float | None = None,
    optimizer_bytes: int = 0,
    strict: bool = False,
    execution: ExecutorOptions | None = None,
) -> Model:
    """Make the training step of a model instance run in a byte budget, by offload and recomputation (HMMS).

    An ordinary training loop then runs as planned: the forward pass in training mode with gradients enabled, and its
    backward pass; everything else (evaluation, ``no_grad``) runs as before. Gradients are those of the same kernels
    without a budget, to the bit. Inputs of other shapes or types, or changed training flags, are planned anew.

    Of a model split with ``boundary="stochastic"`` one plan serves all draws: decided once, with new sizes and
    addresses in every step. A draw that does not fit the budget is drawn again, and counted in
    ``model.forward.redraws``; until the first of them a seed gives the boundaries that it gives without `compile`.
    Several captures are needed.

    The budget covers the arena, the reserve for operations that allocate, parameters, buffers, their gradients, inputs,
    and what `optimizer_bytes` says; on a GPU the CUDA context comes on top.

    Args:
        model: any module that `capture` takes, split or not, in training mode; patched in place.
        example_inputs: a batch, or the tuple of the model's arguments, with the shapes of training.
        budget: device bytes, as a number or as text ("16GiB"); None: the same executor, with nothing offloaded or
            recomputed.
        host_budget: bytes of pinned memory for what is offloaded; None: no limit.
        strategy: one of `splitkern._core.strategy_names()`.
        costs: "measured": every operation is timed on this machine (kept on disk); or a cost model, or its name.
        link_gbps: bandwidth of host copies, each way, in 10^9 bytes per second; None: measured, or the cost model's.
        optimizer_bytes: what the optimizer's state takes.
        strict: refuse inputs of other shapes instead of planning anew.
        execution: how copies run; `ExecutorOptions(debug=True)` checks every copy and poisons freed memory.

    Returns:
        The model that was given. `model.plan` is its plan (:class:`CompiledPlan`).

    Raises:
        BudgetError: a ValueError with the smallest budget that would do; the model stays as it was.
        CaptureError: a ValueError that names what cannot be captured; likewise.
        ValueError, TypeError: naming the argument, what came and what is allowed; likewise.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> model = compile(model, images, budget="1MiB", costs="paper")
        >>> model(images).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if compiled_forward_of(model) is not None:
        raise ValueError(f"this {type(model).__name__} is already compiled; call uncompile_ first")
    if not model.training:
        raise ValueError(f"this {type(model).__name__} is in evaluation mode; call train() before compile")
    if hasattr(model, "plan"):
        raise ValueError(f"this {type(model).__name__} has an attribute 'plan', which compile would replace")
    if strategy not in _core.strategy_names():
        raise ValueError(f"strategy must be one of {_core.strategy_names()}, got {strategy!r}")
    if isinstance(costs, str) and costs != "measured":
        costs = cost_model(costs)
    if link_gbps is not None and not 0 < link_gbps < math.inf:
        raise ValueError(f"link_gbps must be a positive number, got {link_gbps}")
    if optimizer_bytes < 0:
        raise ValueError(f"optimizer_bytes must not be negative, got {optimizer_bytes}")
    options = CompileOptions(
        budget=_bytes("budget", budget),
        host_budget=_bytes("host_budget", host_budget),
        strategy=strategy,
        costs=costs,
        link_gbps=link_gbps,
        optimizer_bytes=optimizer_bytes,
        strict=strict,
        execution=ExecutorOptions() if execution is None else execution,
    )
    arguments = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    forward = CompiledForward(model, options)
    model.__dict__["forward"] = forward
    try:
        forward.prepare(arguments)
    except BaseException:
        uncompile_(model)
        raise
    return model


def uncompile_(model: Model) -> Model:
    """Give a compiled model its forward back, in place, and its arenas to the allocator.

    Args:
        model: compiled.

    Returns:
        The model that was given.

    Raises:
        ValueError: the model is not compiled.
    """
    forward = compiled_forward_of(model)
    if forward is None:
        raise ValueError(f"this {type(model).__name__} is not compiled; there is nothing to undo")
    if forward.inner is None:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = forward.inner
    model.__dict__.pop("plan", None)
    forward._steps.clear()
    return model


def compiled_forward_of(model: nn.Module) -> CompiledForward | None:
    """The compiled forward of a model, None where it is not compiled."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, CompiledForward) else None


def _bytes(name: str, value: int | str | None) -> int | None:
    if value is None:
        return None
    size = parse_bytes(value) if isinstance(value, str) else value
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{name} must be a number of bytes or text such as '16GiB', got {value!r}")
    return size
