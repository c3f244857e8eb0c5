"""An operation of a plan with its tensors bound: what the executor repeats from step to step.

Arguments are laid out once. Tensors of an arena are in them for good; tensors that every step binds anew lie in slots,
which know all arguments that they stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitkern.memory.record import Read, Write
from splitkern.memory.rewrite import Blank, Call


class Slot:
    """A tensor of the step that is bound anew in every step, or whenever another one comes.

    Attributes:
        place: of the tensor in the captured step.
        value: what is bound now.
    """

    __slots__ = ("_arguments", "place", "value")

    def __init__(self, place: int) -> None:
        self.place = place
        self.value: Tensor | None = None
        self._arguments: list[tuple[Any, Any]] = []

    def bind(self, value: Tensor | None) -> None:
        """Puts a tensor, or nothing, into all arguments that the slot stands in."""
        self.value = value
        for container, key in self._arguments:
            container[key] = value

    def stands_in(self, container: Any, key: Any) -> None:
        """Notes an argument."""
        self._arguments.append((container, key))


Bound = Tensor | Slot


def tensor_of(bound: Bound) -> Tensor:
    """The tensor itself, or what is bound to the slot."""
    if isinstance(bound, Slot):
        assert bound.value is not None, bound.place
        return bound.value
    return bound


class BoundCall:
    """One operation, ready to run.

    Args:
        call: what to run.
        reads, writes: its tensors, in the order that the call's ``Read`` and ``Write`` count them.
        device: of the step.
    """

    def __init__(self, call: Call, reads: Sequence[Bound], writes: Sequence[Bound], device: torch.device) -> None:
        self.reads, self.writes = reads, writes
        self._overload = call.overload
        self._preload = [(reads[read], writes[write]) for read, write in call.preload]
        # By the position of a result: where it goes.
        self._copies = [(position, writes[place]) for position, place in enumerate(call.results) if place is not None]
        self._args: list[Any] = self._laid_out(list(call.args), device)
        self._kwargs: dict[str, Any] = self._laid_out(dict(call.kwargs), device)

    def _laid_out(self, container: Any, device: torch.device) -> Any:
        """A list or dictionary of arguments with tensors in the place of their stand-ins; slots are told."""
        for key, value in list(enumerate(container)) if isinstance(container, list) else list(container.items()):
            if isinstance(value, Blank):
                # Only its shape matters: one element serves all.
                container[key] = torch.zeros((), dtype=value.dtype, device=device).expand(value.sizes)
            elif isinstance(value, Read | Write):
                bound = (self.reads if isinstance(value, Read) else self.writes)[value.position]
                container[key] = bound
                if isinstance(bound, Slot):
                    container[key] = bound.value
                    bound.stands_in(container, key)
            elif isinstance(value, list | tuple):
                container[key] = self._laid_out(list(value), device)
        return container

    def run(self) -> None:
        """Runs it once; the caller has switched gradients off."""
        for read, write in self._preload:
            tensor_of(write).copy_(tensor_of(read))
        returned = self._overload(*self._args, **self._kwargs)
        if not self._copies:
            return
        values = returned if isinstance(returned, tuple | list) else (returned,)
        for position, write in self._copies:
            value = values[position]
            # A gradient that nobody asked for is None, though its shape rule says otherwise.
            if value is not None:
                tensor_of(write).copy_(value)
