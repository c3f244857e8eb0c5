"""The planned step as functions of autograd: one for every part of the backward pass, chained by a token.

Gradients of one part reach their parameters, and the hooks of DistributedDataParallel, before the next part runs. All
of the forward pass runs in the function that autograd enters last, and leaves first in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from splitkern.memory.executor import StepExecutor

_GONE = (
    "the activations of this forward pass are gone: a compiled model keeps those of its last {kept}, for one backward "
    "pass each (no retain_graph, no more forward passes in between; compile(in_flight=n) keeps n, uncompile_ lifts it)"
)


def _require_first_order() -> None:
    """Autograd has gradients enabled in a backward pass that is to be differentiated, and only then."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: gradients of a compiled model cannot be differentiated; uncompile_ lifts it"
        )


def _require_no_tangents(tensors: Iterable[Tensor]) -> None:
    if forward_ad._current_level < 0:
        return
    values = (value for value in tensors if value.is_floating_point())
    if any(forward_ad.unpack_dual(value).tangent is not None for value in values):  # type: ignore[no-untyped-call]
        raise RuntimeError("a compiled model has no forward-mode derivatives; uncompile_ lifts it")


class _Ticket:
    """Held by the functions of one step: with the last of them goes what the step holds."""

    def __init__(self, executor: StepExecutor, kept: int) -> None:
        self.executor, self.number, self.kept = executor, executor.number + 1, kept

    def require_next(self, part: int) -> None:
        executor = self.executor
        if executor.number != self.number or executor.next_part != part:
            kept = "forward pass" if self.kept == 1 else f"{self.kept} forward passes"
            raise RuntimeError(_GONE.format(kept=kept))

    def __del__(self) -> None:
        if hasattr(self, "kept"):  # not where Dynamo made it without `__init__`
            self.executor.give_up(self.number)


def run_step(
    executor: StepExecutor,
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    differentiable: Sequence[int],
    *,
    kept: int = 1,
) -> list[Tensor]:
    """The forward pass of a step, recorded by autograd.

    Args:
        executor: whose step.
        parameters: parameters and buffers by qualified name.
        inputs: as captured.
        differentiable: positions of outputs that can have a gradient.
        kept: how many steps can be under way, for the text of an error.

    Returns:
        What the model returns.
    """
    named = {**parameters, **{f"input.{number}": value for number, value in enumerate(inputs)}}
    _require_no_tangents(named.values())
    ticket = _Ticket(executor, kept)
    token = torch.empty(0, device=executor.step.device)
    for part in reversed(range(1, len(executor.parts))):
        names = executor.parts[part].gradients
        token = _LaterPart.apply(ticket, part, names, token, *(named[name] for name in names))  # type: ignore[no-untyped-call]
    names = executor.parts[0].gradients
    outputs = _FirstPart.apply(  # type: ignore[no-untyped-call]
        ticket, names, (parameters, inputs), tuple(differentiable), token, *(named[name] for name in names)
    )
    return list(outputs)


class _LaterPart(torch.autograd.Function):
    """A part of the backward pass but the first."""

    @staticmethod
    def forward(
        ctx: Any, ticket: _Ticket, part: int, names: tuple[str, ...], token: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.ticket, ctx.part, ctx.names = ticket, part, names
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> Any:
        _require_first_order()
        ctx.ticket.require_next(ctx.part)
        found = ctx.ticket.executor.backward_part(ctx.part)
        return (None, None, None, token, *(found.get(name) for name in ctx.names))


class _FirstPart(torch.autograd.Function):
    """The forward pass, and the first part of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        ticket: _Ticket,
        names: tuple[str, ...],
        given: tuple[Mapping[str, Tensor], Sequence[Tensor]],
        differentiable: tuple[int, ...],
        token: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = ticket.executor.forward(*given)
        ctx.ticket, ctx.names, ctx.differentiable = ticket, names, differentiable
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for i, out in enumerate(outputs) if i not in differentiable))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _require_first_order()
        ctx.ticket.require_next(0)
        found = ctx.ticket.executor.backward_part(0, [grads[i] for i in ctx.differentiable])
        token = torch.zeros(0, device=ctx.ticket.executor.step.device)
        return (None, None, None, None, token, *(found.get(name) for name in ctx.names))
