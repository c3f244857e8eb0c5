"""A split model's forward pass as one operator, for tracers that cannot follow it.

Dynamo cannot trace the region's layouts, caches and autograd functions; it puts this operator into its graph instead.
The operator is composite: whatever runs the graph, autograd and ahead-of-time tracing included, sees what it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from splitkern.ops._common import registrations


class Forward(Protocol):
    """What the operator runs."""

    model: nn.Module

    def run(self, *args: Tensor) -> Tensor:
        """The forward pass."""


#: Whether graphs are made for the planner, which decides itself what to recompute; others would lose
#: ``recompute=True``. Set by importing its backend.
is_for_planner = False

_forwards: WeakValueDictionary[str, Forward] = WeakValueDictionary()
_numbers = itertools.count()


def register(forward: Forward) -> str:
    """Gives a forward pass the name that the operator finds it by, for as long as it lives."""
    name = f"{type(forward.model).__name__}.{next(_numbers)}"
    _forwards[name] = forward
    return name


def state_of(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once."""
    return [*model.parameters(), *model.buffers()]


def split_forward(name: str, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
    """Calls the operator; Dynamo traces into this.

    Args:
        name: from :func:`register`.
        inputs: of the model, by position.
        state: from :func:`state_of` its model.
    """
    result: Tensor = torch.ops.splitkern.split_forward(name, inputs, state)
    return result


def model_of(name: str) -> nn.Module:
    """The model that a name stands for.

    Raises:
        RuntimeError: the model is gone.
    """
    return _forward(name).model


def _forward(name: str) -> Forward:
    forward = _forwards.get(name)
    if forward is None:
        raise RuntimeError(f"the split model {name} of a compiled graph is gone; compile the model again")
    return forward


def _run(name: str, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
    forward = _forward(name)
    with _holding(forward.model, state):
        result = forward.run(*inputs)
    if not isinstance(result, Tensor):
        raise TypeError(f"a split model that is traced whole must return a tensor, got {type(result).__name__}")
    return result


@contextmanager
def _holding(model: nn.Module, state: Sequence[Tensor]) -> Iterator[None]:
    """The model with other tensors in the places of its parameters and buffers."""
    given = {id(own): other for own, other in zip(state_of(model), state, strict=True)}
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, key, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    ]
    try:
        for held, key, tensor in places:
            held[key] = given[id(tensor)]
        yield
    finally:
        for held, key, tensor in places:
            held[key] = tensor


def mark_untraced(name: str, value: Any) -> Any:
    """Puts a mark into Dynamo's graph, by which the planner's backend knows of a split model that is not one operator.

    Args:
        name: of the forward pass.
        value: an argument of it; a tensor comes back equal, anything else as it is.
    """
    return torch.ops.splitkern.split_untraced(name, value) if isinstance(value, Tensor) else value


def _same(name: str, input: Tensor) -> Tensor:
    return input.view_as(input)


registrations.define("split_forward(str name, Tensor[] inputs, Tensor[] state) -> Tensor")  # type: ignore[no-untyped-call]
registrations.impl("split_forward", _run, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
registrations.define("split_untraced(str name, Tensor(a) input) -> Tensor(a)")  # type: ignore[no-untyped-call]
registrations.impl("split_untraced", _same, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
