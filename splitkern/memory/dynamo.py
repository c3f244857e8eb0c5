"""``backend="splitkern"`` of `torch.compile`: the graphs that Dynamo finds, each run in a byte budget.

Dynamo's graph becomes a module (:mod:`splitkern.memory.graph_model`) that :func:`splitkern.memory.compile.compile`
captures, plans and runs; here is which graph runs by which plan, and what Dynamo's ways mean for the budget.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from splitkern.memory.compile import CompiledPlan, compile, uncompile_
from splitkern.memory.graph_model import GraphModel, GraphStep, calls_of, places_of, returned_by
from splitkern.memory.record import CaptureError
from splitkern.split import operator

# What the planner recomputes is its own decision: the region may enter a graph without its recomputation.
operator.is_for_planner = True

__all__ = ["PlannedGraph", "backend", "plans"]

#: The keyword arguments of `compile`, which are the options of the backend.
_OPTIONS = tuple(name for name, p in signature(compile).parameters.items() if p.kind is Parameter.KEYWORD_ONLY)


@dataclass(eq=False)
class PlannedGraph:
    """A graph that `torch.compile` found in a model, with the plan that it runs.

    Attributes:
        plan: of the shapes that came last.
        plans_made: how many plans were made so far: one for the first shapes, one for every change of shapes,
            ``requires_grad``, training flags or autocast after that.
        graph_break: why the graph is less than the model, None where it is all of it.
    """

    plan: CompiledPlan | None = None
    plans_made: int = 0
    graph_break: str | None = None
    _parameters: tuple[int, ...] = ()
    _current: _Instance | None = field(default=None, repr=False)

    @property
    def replans(self) -> int:
        """How often a step came for which the plan at hand was not made."""
        return max(self.plans_made - 1, 0)


#: By frame and parameters: graphs of one frame with the same parameters are steps of one model with other shapes or
#: settings, and share a budget. They live as long as Dynamo keeps one of these graphs.
_planned: weakref.WeakValueDictionary[Any, PlannedGraph] = weakref.WeakValueDictionary()


def plans(model: nn.Module | None = None) -> list[PlannedGraph]:
    """The training graphs that ``torch.compile(..., backend="splitkern")`` runs in this process, oldest first.

    A model that was compiled whole has one; an empty list means that no training graph of it has run yet.

    Args:
        model: only the graphs that use one of its parameters; what `torch.compile` returned, or what it was given.

    Raises:
        TypeError: `model` is not a module.
    """
    found = list(_planned.values())
    if model is None:
        return found
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    return [planned for planned in found if own.intersection(planned._parameters)]


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **others: Any
) -> Callable[..., Any]:
    """What `torch.compile` calls for every graph; installed as the entry point "splitkern" of its backends.

    Graphs without gradients run as they are. The first plan is made here, before anything runs; an error reaches the
    caller of the model as ``torch._dynamo.exc.BackendCompilerFailed``, whose text contains it and whose
    ``inner_exception`` it is.

    Args:
        graph: from Dynamo.
        example_inputs: for its placeholders.
        options: the keyword arguments of `compile`, of which "budget" must be among them.
            With ``strict=True`` a graph that is less than the model is an error too, not a warning.

    Raises:
        BudgetError: a ValueError with the smallest budget that would do.
        CaptureError: a ValueError that names what cannot be captured.
        ValueError, TypeError: naming the option, what came and what is allowed.

    Example:
        >>> model = torch.compile(model, backend="splitkern", options={"budget": "2GiB"})  # doctest: +SKIP
    """
    _keep_dynamo_out()
    given = _checked(options, others)
    if torch.is_grad_enabled():
        _require_whole_split(graph)
    if not torch.is_grad_enabled() or not _is_trained(graph):
        return graph.forward
    partial = _graph_break(graph)
    if partial is not None:
        text = (
            f"backend='splitkern': a training graph is not the whole model: {partial}. Every graph is planned alone, "
            f"with the whole budget, and what runs between graphs is not planned. torch._dynamo.explain(model)(inputs) "
            "lists the graph breaks, torch.compile(..., fullgraph=True) refuses them; splitkern.compile(model, inputs, "
            "budget=...) does without Dynamo"
        )
        if given.get("strict"):
            raise CaptureError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    program = _Program(graph, given, partial)
    examples = [_concrete(value) for value in example_inputs]
    if not any(value is None or isinstance(value, FakeTensor) for value in examples):
        program.prepare(examples)
    return program


@functools.cache
def _keep_dynamo_out() -> None:
    """A backward pass inside a compiled function runs this package's Python, which is nothing to trace."""
    from torch._dynamo import trace_rules

    trace_rules.add("splitkern.memory")


def _checked(options: Mapping[str, Any] | None, others: Mapping[str, Any]) -> dict[str, Any]:
    allowed = ", ".join(_OPTIONS)
    if others:
        raise TypeError(f"backend='splitkern' takes options={{...}} only, of {allowed}; got {sorted(others)}")
    given = dict(options or {})
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"options of backend='splitkern' must be among {allowed}, got {', '.join(unknown)}")
    if "budget" not in given:
        raise TypeError(
            f"options of backend='splitkern' must have 'budget', such as '16GiB', or None for no limit, got "
            f"{given or 'no options'}; further ones are {allowed}"
        )
    return given


def _is_trained(graph: fx.GraphModule) -> bool:
    """Whether something that the graph returns has a gradient."""
    examples = [node.meta.get("example_value") for node in returned_by(graph) if isinstance(node, fx.Node)]
    return any(isinstance(value, Tensor) and value.requires_grad for value in examples)


def _concrete(value: Any) -> Any:
    """The number behind a size that Dynamo keeps symbolic, None where it knows none."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


# --- graph breaks -------------------------------------------------------------------------------------------------


def _require_whole_split(graph: fx.GraphModule) -> None:
    """Refuse to plan without the split region, where Dynamo could not see it as one operator."""
    if calls_of(graph, torch.ops.splitkern.split_untraced):
        raise CaptureError(
            'Dynamo cannot trace this split model whole: that takes boundary="zero" or "halo", tensors by position as '
            "the only arguments, and one tensor that is returned; use splitkern.compile(model, inputs, budget=...)"
        )


def _graph_break(graph: fx.GraphModule) -> str | None:
    """Why a graph is less than what was compiled; None where nothing speaks for that.

    A break at the call of ``backward`` leaves the whole model before it.
    """
    if "dynamo_compile_id" not in graph.meta:
        return (
            "it is a piece of a graph of Dynamo's, which cuts those of a DistributedDataParallel model unless "
            "torch._dynamo.config.optimize_ddp is False"
        )
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is not None:
        place = reason.user_stack[-1] if reason.user_stack else None
        if reason.graph_break and "backward()" not in reason.reason:
            where = f" at {place.filename}:{place.lineno}" if place is not None else ""
            return f"it ends at a graph break{where} ({reason.reason.splitlines()[0]})"
        if place is not None and place.name.startswith("torch_dynamo_resume_in_"):
            return f"it begins after a graph break in {place.name.removeprefix('torch_dynamo_resume_in_')}"
    caller = _calling_module()
    return None if caller is None else f"Dynamo runs the {caller} that it belongs to without a graph"


def _calling_module() -> str | None:
    """Class of the outermost module of those that call each other in plain Python, where the innermost of them is the
    one that Dynamo compiles.
    """
    frame, calling = sys._getframe(), []
    while frame.f_code.co_name != "compile_wrapper":
        if frame.f_code is nn.Module._call_impl.__code__:
            calling.append(type(frame.f_locals["self"]).__name__)
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return calling[-1] if len(calling) > 1 else None


# --- running ------------------------------------------------------------------------------------------------------


class _Program:
    """What Dynamo calls instead of a graph, with the parameters that belong to the call.

    Dynamo runs one graph for all models that are built alike, and a step belongs to the model: each has its own.
    """

    def __init__(self, graph: fx.GraphModule, options: Mapping[str, Any], partial: str | None) -> None:
        self.graph, self.options, self.partial = graph, options, partial
        self.frame = getattr(graph.meta.get("dynamo_compile_id"), "frame_id", None)
        self.instances: dict[tuple[int, ...], _Instance] = {}
        weakref.finalize(self, _close, self.instances).atexit = False

    def prepare(self, arguments: Sequence[Any]) -> None:
        """Plans for these arguments, before anything runs."""
        self._instance(arguments).prepare(arguments)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        return self._instance(arguments)(arguments)

    def _instance(self, arguments: Sequence[Any]) -> _Instance:
        parameters = [value for value in arguments if isinstance(value, nn.Parameter)]
        key = tuple(map(id, parameters))
        if key not in self.instances:
            planned = _planned.setdefault((self.frame, frozenset(key)), PlannedGraph(_parameters=key))
            planned.graph_break = self.partial or planned.graph_break
            self.instances[key] = _Instance(self, arguments, planned)
            if parameters:
                # A model that is gone needs no arena, though Dynamo may keep the graph.
                weakref.finalize(parameters[0], _close, self.instances, key).atexit = False
        return self.instances[key]


def _close(instances: dict[tuple[int, ...], _Instance], key: tuple[int, ...] | None = None) -> None:
    for closing in list(instances) if key is None else [key]:
        instance = instances.pop(closing, None)
        if instance is not None:
            instance.close()


class _Instance:
    """A graph with the parameters of one model."""

    def __init__(self, program: _Program, arguments: Sequence[Any], planned: PlannedGraph) -> None:
        self.options = program.options
        self.model = GraphModel(program.graph, places_of(program.graph, arguments))
        self.step: GraphStep = self.model.__dict__["_step"]
        self.planned = planned

    def prepare(self, arguments: Sequence[Any]) -> None:
        with self.step.holding(arguments):
            self._become_current(arguments)

    def __call__(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        with self.step.holding(arguments):
            self._become_current(arguments)
            computed = self.model(*self.step.inputs(arguments))
            self._note_plan()
        return self.step.outputs(computed, arguments)

    def _become_current(self, arguments: Sequence[Any]) -> None:
        """One plan at a time: arenas are as large as the budget."""
        planned, before = self.planned, self.planned._current
        if before is self:
            return
        if before is not None and self.options.get("strict"):
            raise ValueError(
                "strict=True: this model was compiled for other shapes or settings than those of "
                f"{[list(value.shape) for value in self.step.inputs(arguments) if isinstance(value, Tensor)]}"
            )
        if before is not None:
            before.close()
        compile(self.model, self.step.inputs(arguments), **self.options)
        planned._current = self
        self._note_plan()

    def close(self) -> None:
        """Gives the arenas back."""
        if self.planned._current is self:
            self.planned._current = self.planned.plan = None
            uncompile_(self.model)

    def _note_plan(self) -> None:
        plan = self.model.__dict__["plan"]
        if plan is not self.planned.plan:
            self.planned.plan = plan
            self.planned.plans_made += 1
