"""An operation of a plan with its tensors bound: what the executor repeats from step to step.

Arguments are laid out once. Tensors of an arena are in them for good; tensors that every step binds anew lie in slots,
which know all arguments that they stand in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


_READS, _WRITES, _BLANK = range(3)


@dataclass(frozen=True)
class _StandIn:
    """Something in a call's arguments that a tensor takes the place of.

    Attributes:
        outer: keys that lead to the list it is in, from the arguments on; empty where it is an argument itself.
        key: there; of a keyword argument its name.
        source: `_READS`, `_WRITES`, or `_BLANK`, of which only the shape matters.
        position: among these.
    """

    outer: tuple[Any, ...]
    key: Any
    source: int
    position: int = 0


@dataclass(frozen=True)
class StandIns:
    """Where in a call's arguments tensors are put: the same for all calls that differ in numbers alone."""

    positional: tuple[_StandIn, ...]
    named: tuple[_StandIn, ...]

    @classmethod
    def of(cls, call: Call) -> StandIns:
        """Of a call."""
        return cls(tuple(_stand_ins(call.args)), tuple(_stand_ins(call.kwargs)))


def _stand_ins(container: Any, outer: tuple[Any, ...] = ()) -> Iterator[_StandIn]:
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, Read):
            yield _StandIn(outer, key, _READS, value.position)
        elif isinstance(value, Write):
            yield _StandIn(outer, key, _WRITES, value.position)
        elif isinstance(value, Blank):
            yield _StandIn(outer, key, _BLANK)
        elif isinstance(value, list | tuple):
            yield from _stand_ins(value, (*outer, key))


class BoundCall:
    """One operation, ready to run. Steps with drawn boundaries make thousands: it holds little for the collector.

    Args:
        call: what to run.
        stand_ins: of the call, or of one that differs in numbers alone.
        reads, writes: its tensors, in the order that the call's ``Read`` and ``Write`` count them.
        device: of the step.
    """

    __slots__ = ("_args", "_copies", "_kwargs", "_overload", "_preload")

    def __init__(
        self, call: Call, stand_ins: StandIns, reads: Sequence[Bound], writes: Sequence[Bound], device: torch.device
    ) -> None:
        self._overload = call.overload
        self._preload: Sequence[tuple[Bound, Bound]] = ()
        if call.preload:
            self._preload = [(reads[read], writes[write]) for read, write in call.preload]
        # By the position of a result: where it goes.
        self._copies: Sequence[tuple[int, Bound]] = ()
        if call.results:
            self._copies = [(result, writes[at]) for result, at in enumerate(call.results) if at is not None]
        self._args: Sequence[Any] = call.args
        if stand_ins.positional:
            self._args = arguments = list(call.args)
            _fill(arguments, stand_ins.positional, (reads, writes), device)
        self._kwargs: dict[str, Any] = call.kwargs
        if stand_ins.named:
            self._kwargs = dict(call.kwargs)
            _fill(self._kwargs, stand_ins.named, (reads, writes), device)

    def run(self) -> Any:
        """Runs it once; the caller has switched gradients off. What the call returns."""
        for read, write in self._preload:
            tensor_of(write).copy_(tensor_of(read))
        returned = self._overload(*self._args, **self._kwargs)
        if not self._copies:
            return returned
        values = returned if isinstance(returned, tuple | list) else (returned,)
        for position, write in self._copies:
            value = values[position]
            # A gradient that nobody asked for is None, though its shape rule says otherwise.
            if value is not None:
                tensor_of(write).copy_(value)
        return returned


def _fill(
    arguments: Any, stand_ins: Sequence[_StandIn], sources: tuple[Sequence[Bound], ...], device: torch.device
) -> None:
    """Puts tensors into arguments, and tells slots where they stand."""
    copied: dict[tuple[Any, ...], list[Any]] = {}
    for one in stand_ins:
        container = arguments
        for depth, key in enumerate(one.outer, 1):
            # A list of the call's is shared with other steps: the first time it is copied.
            path = one.outer[:depth]
            if path not in copied:
                copied[path] = container[key] = list(container[key])
            container = copied[path]
        if one.source == _BLANK:
            blank = container[one.key]
            # Only its shape matters: one element serves all.
            container[one.key] = torch.zeros((), dtype=blank.dtype, device=device).expand(blank.sizes)
            continue
        bound = sources[one.source][one.position]
        if isinstance(bound, Slot):
            container[one.key] = bound.value
            bound.stands_in(container, one.key)
        else:
            container[one.key] = bound
