"""`compile`: a model instance whose training step runs in a byte budget, inside an ordinary training loop.

The instance's ``forward`` is replaced, as a split's is; class, parameters and ``state_dict`` stay. In training, with
gradients enabled, a forward pass runs the first part of the planned step, and autograd's backward pass the rest.
"""

from __future__ import annotations

import math
import warnings
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from numbers import Integral
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from splitkern import _core
from splitkern.memory.capture import global_hooks
from splitkern.memory.cost_model import CostModel, cost_model
from splitkern.memory.executor import ExecutorOptions
from splitkern.memory.planned_step import BudgetError, CompiledPlan, CompileOptions, PlannedStep
from splitkern.memory.report import bytes_text, parse_bytes
from splitkern.split.surgery import SplitForward

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["BudgetError", "CompiledPlan", "compile", "compiled_forward_of", "uncompile_"]


#: Of all compiled models that are alive.
_FORWARDS: weakref.WeakSet[CompiledForward] = weakref.WeakSet()


class CompiledForward:
    """The ``forward`` of a compiled model.

    Copies and pickles with its model; plans are made again where needed.

    Attributes:
        replans: how often a forward pass came with shapes or settings that no plan was there for.
    """

    def __init__(self, model: nn.Module, options: CompileOptions) -> None:
        self.model = model
        self.options = options
        # What the instance had before, such as the forward of a split; None: the class's own.
        self.inner: Callable[..., Any] | None = model.__dict__.get("forward")
        self._reset()

    def _reset(self) -> None:
        _FORWARDS.add(self)
        self.replans = 0
        self._redraws = 0  # of executors that are gone
        #: The steps planned last. The one that ran last has executors, and so arenas.
        self._steps: OrderedDict[Any, PlannedStep] = OrderedDict()
        self._ready: PlannedStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self.options, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def redraws(self) -> int:
        """How often stochastic boundaries were drawn again because those drawn did not fit the budget."""
        draws = None if self._ready is None else self._ready.draws
        return self._redraws + (0 if draws is None else draws.redraws)

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
        tensors = (*self.model.parameters(), *self.model.buffers(), *tree_leaves(args))
        if not any(isinstance(one, Tensor) and one.requires_grad for one in tensors):
            return self.original(*args)  # there is nothing to train
        return self.planned(args)(self.model, args)

    def planned(self, args: tuple[Any, ...]) -> PlannedStep:
        """The step for these inputs, planned anew where there is none for them.

        Raises:
            ValueError: there is none, and `strict` forbids another one.
        """
        key = self._key(args)
        planned = self._steps.get(key)
        if planned is None:
            if self.options.strict and self._steps:
                raise ValueError(
                    f"strict=True: the model was compiled for {_shapes(next(iter(self._steps)))}, "
                    f"got {_shapes(key)} (or other types, devices, strides, training flags, requires_grad or autocast)"
                )
            planned = self.prepare(args)
            self.replans += 1
        elif planned is not self._ready:
            self._release()
            planned.make_ready()
            self._steps.move_to_end(key)
            self._show(planned)
        return planned

    def prepare(self, args: tuple[Any, ...]) -> PlannedStep:
        """Captures and plans the step for these inputs, and makes ready to run it."""
        self._release()
        with _as_before(self):
            planned = PlannedStep(self.model, args, self.options)
        self._steps[self._key(args)] = planned
        if len(self._steps) > _KEPT_PLANS:
            self._steps.popitem(last=False)
        self._show(planned)
        return planned

    def _release(self) -> None:
        """Lets go of the arenas, before others come: they are as large as the budget."""
        self._redraws = self.redraws
        ready, self._ready = self._ready, None
        if ready is not None and (under_way := ready.release()):
            warnings.warn(
                f"{under_way} forward pass(es) with other shapes or settings still wait for their backward pass, in "
                f"arenas of {bytes_text(ready.plan.arena_bytes)} beside the budget; call backward() before the model "
                "is given other inputs",
                stacklevel=6,
            )

    def _show(self, planned: PlannedStep) -> None:
        self._ready = planned
        self.model.__dict__["plan"] = planned.plan

    def _key(self, args: tuple[Any, ...]) -> Any:
        leaves, structure = tree_flatten(args)
        inputs = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else _constant(leaf)
            for leaf in leaves
        )
        parameters = tuple(
            (name, tuple(p.shape), p.stride(), p.dtype, p.device, p.requires_grad)
            for name, p in (*self.model.named_parameters(), *self.model.named_buffers())
        )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        same = tuple(next(i for i, other in enumerate(tensors) if other is one) for one in tensors)
        device = self.model_device().type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        modules = tuple(_settings(module, is_root=module is self.model) for module in self.model.modules())
        return inputs, same, str(structure), parameters, modules, autocast, global_hooks()

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


#: Plans that are kept beside the one in use, without arenas: the last batch of an epoch may be smaller.
_KEPT_PLANS = 8
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None))
#: What every module has of its own accord (parameters, hooks), and what `compile` adds to the model.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_ADDED = frozenset({"forward", "plan"})


def _settings(module: nn.Module, *, is_root: bool = False, within: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """What a captured step takes for constant about a module: its class, attributes, and whether it has hooks."""
    held = module.__dict__
    left_out = _OWN | _ADDED if is_root else _OWN
    attributes = tuple((name, _constant(value, within)) for name, value in held.items() if name not in left_out)
    return _Same(module), type(module), attributes, tuple(len(held[name]) for name in _HOOKS)


def _constant(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Equal only for what a captured step takes for the same: plain values by type and value, containers and objects
    that hold settings also by what is in them, others by identity.
    """
    kind = type(value)
    if isinstance(value, _PLAIN):
        return kind, value
    if id(value) in within:
        return kind, _Same(value)
    within = (*within, id(value))
    if kind in (list, tuple):
        return kind, tuple(_constant(one, within) for one in value)
    if kind is dict:
        return tuple((_constant(key, within), _constant(one, within)) for key, one in value.items())
    if isinstance(value, SplitForward):
        return kind, _Same(value), value.enabled, _Same(value.options)
    if isinstance(value, nn.Module):  # in a container, and so not among the model's modules
        return _settings(value, within=within)
    content: tuple[Any, ...] = ()
    if isinstance(value, dict):
        content = tuple(value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        content = tuple(value)
    elif isinstance(value, SimpleNamespace | Namespace) or (is_dataclass(value) and not isinstance(value, type)):
        content = tuple(getattr(value, "__dict__", {}).items())
    return kind, _Same(value), tuple(_constant(one, within) for one in content)


class _Same:
    """Equal for one and the same object alone, and for none once it is gone, if it lets itself be watched."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._value = partial(_itself, value)

    def __eq__(self, other: object) -> bool:
        value = self._value()
        return isinstance(other, _Same) and value is not None and value is other._value()

    def __hash__(self) -> int:
        return self._hash


def _itself(value: Any) -> Any:
    return value


def _shapes(key: Any) -> str:
    return ", ".join(str(list(one[0])) for one in key[0] if isinstance(one[0], tuple))


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
    accumulate: bool = False,
    in_flight: int = 1,
    strict: bool = False,
    compress: bool = False,
    execution: ExecutorOptions | None = None,
) -> Model:
    """Make the training step of a model instance run in a byte budget, by offload and recomputation (HMMS).

    An ordinary training loop then runs as planned: the forward pass in training mode with gradients enabled, and its
    backward pass; everything else (evaluation, ``no_grad``) runs as before. Gradients are those of the same kernels
    without a budget, to the bit. Inputs of other shapes or types, or changed training flags, are planned anew.

    Of a model split with ``boundary="stochastic"`` one plan serves all draws: decided once, with new sizes and
    addresses in every step. A draw that does not fit the budget is drawn again, and counted in
    ``model.forward.redraws``; until the first of them a seed gives the boundaries that it gives without `compile`.

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
        accumulate: gradients are added to those of earlier steps (``zero_grad`` comes less often than ``backward``, or
            with ``set_to_none=False``), so that the budget holds each twice.
        in_flight: forward passes that may wait for their backward pass at a time, each with an arena of its own.
        strict: refuse inputs of other shapes instead of planning anew.
        compress: offload without zeros, lossless, what compresses well on `example_inputs`: a forward pass on them
            measures it. Later values that compress less take longer on the link, and are right all the same.
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
    if torch.is_inference_mode_enabled():
        raise ValueError("compile plans training and must be called outside of torch.inference_mode(), got it inside")
    if compiled_forward_of(model) is not None:
        raise ValueError(f"this {type(model).__name__} is already compiled; call uncompile_ first")
    for path, module in model.named_modules():
        if path and compiled_forward_of(module) is not None:
            raise ValueError(
                f"module {path!r} ({type(module).__name__}) is already compiled; call uncompile_ on it first"
            )
    for forward in _FORWARDS:
        outer = forward.model
        if compiled_forward_of(outer) is forward and any(module is model for module in outer.modules()):
            raise ValueError(
                f"this {type(model).__name__} is part of a compiled {type(outer).__name__}, whose step runs it; call "
                "uncompile_ on that first"
            )
    if not model.training:
        raise ValueError(f"this {type(model).__name__} is in evaluation mode; call train() before compile")
    if hasattr(model, "plan"):
        raise ValueError(f"this {type(model).__name__} has an attribute 'plan', which compile would replace")
    if strategy not in _core.strategy_names():
        raise ValueError(f"strategy must be one of {_core.strategy_names()}, got {strategy!r}")
    if isinstance(costs, str) and costs != "measured":
        costs = cost_model(costs)
    if not isinstance(costs, str | CostModel):
        raise TypeError(f"costs must be 'measured', a cost model or its name, got {type(costs).__name__}")
    is_number = isinstance(link_gbps, int | float) and not isinstance(link_gbps, bool)
    if link_gbps is not None and not (is_number and 0 < link_gbps < math.inf):
        raise ValueError(f"link_gbps must be a positive number, got {link_gbps!r}")
    if not isinstance(optimizer_bytes, int) or isinstance(optimizer_bytes, bool):
        raise TypeError(f"optimizer_bytes must be a whole number of bytes, got {optimizer_bytes!r}")
    if optimizer_bytes < 0:
        raise ValueError(f"optimizer_bytes must not be negative, got {optimizer_bytes}")
    if execution is not None and not isinstance(execution, ExecutorOptions):
        raise TypeError(f"execution must be ExecutorOptions or None, got {type(execution).__name__}")
    if not isinstance(in_flight, int) or isinstance(in_flight, bool) or in_flight < 1:
        raise ValueError(f"in_flight must be a whole number of at least 1, got {in_flight!r}")
    for name, value in (("accumulate", accumulate), ("strict", strict), ("compress", compress)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if compress and budget is None:
        raise ValueError("compress=True needs a budget: with budget=None nothing is offloaded")
    options = CompileOptions(
        budget=_bytes("budget", budget),
        host_budget=_bytes("host_budget", host_budget),
        strategy=strategy,
        costs=costs,
        link_gbps=link_gbps,
        optimizer_bytes=optimizer_bytes,
        accumulate=accumulate,
        in_flight=in_flight,
        strict=strict,
        compress=compress,
        execution=ExecutorOptions() if execution is None else execution,
    )
    if not isinstance(example_inputs, Tensor | Sequence) or isinstance(example_inputs, str):
        came = type(example_inputs).__name__
        raise TypeError(f"example_inputs must be a tensor or the tuple of the model's arguments, got {came}")
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, CompiledForward) else None


def _bytes(name: str, value: int | str | None) -> int | None:
    if value is None:
        return None
    size: Any = value
    try:
        if isinstance(size, str):
            size = parse_bytes(size)
        elif not isinstance(size, bool) and (isinstance(size, Integral) or (isinstance(size, float) and size % 1 == 0)):
            size = int(size)  # 16e9, or a number of NumPy's
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{name} must be a number of bytes or text such as '16GiB', got {value!r}")
    if size >= 1 << 63:
        raise ValueError(f"{name} must be below 2^63 bytes, got {value}")
    return size
