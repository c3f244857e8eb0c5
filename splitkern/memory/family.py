"""A captured step as a function of its patch boundaries: every integer in it, reconstructed from a few captures.

Along one axis all extents of a split network are affine in the boundaries at the join; strides, offsets and bytes are
products of a row term and a column term. So with row boundaries v and column boundaries w every integer of the step is

    f(v, w) = f0 + g·(a·dv) + h·(b·dw) + q·(a·dv)·(b·dw),    dv = v - v0, dw = w - w0,

with integers f0, g, h, q and integer vectors a, b. `fit` finds them from captures at which one boundary moves at a time
and a few at which all move, and compares with captures that it has not used: what does not match exactly is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitkern.memory.capture import CapturedOperation, CapturedStep, CapturedStorage, CapturedTensor
from splitkern.memory.rewrite import Blank, Call

__all__ = ["Draw", "DrawError", "Family", "fit", "numbers_of"]

Integers = NDArray[np.int64]
#: Interior boundaries at the join: of the rows, then of the columns.
Draw = tuple[int, ...]

Part = TypeVar("Part", CapturedOperation, CapturedStorage, CapturedTensor)

#: Largest whole number up to which every whole number is a float64.
_EXACT = 2**53


class DrawError(ValueError):
    """The step of a model with stochastic boundaries is no exact function of them."""


@dataclass(frozen=True)
class Family:
    """The steps of all draws.

    Attributes:
        base: the step at the draw `origin`, with durations.
        origin: its boundaries.
        rows: how many of them are of rows.
    """

    base: CapturedStep
    origin: Draw
    rows: int
    _terms: Mapping[str, Integers]
    _constants: Integers  # every number of the step at the origin, and then those that vary, as `_terms` gives them
    _template: _Template

    def numbers(self, draw: Draw) -> Integers:
        """Every number of the step at a draw: those that never change, then those that do."""
        moved = np.asarray(draw, dtype=np.int64) - np.asarray(self.origin, dtype=np.int64)
        terms = self._terms
        down, right = terms["a"] @ moved[: self.rows], terms["b"] @ moved[self.rows :]
        varying = terms["f0"] + terms["g"] * down + terms["h"] * right + terms["q"] * down * right
        return np.concatenate((self._constants, varying))

    def largest(self, ranges: Sequence[tuple[int, int]]) -> Integers:
        """Bounds: no number of any draw within these closed ranges of boundaries is larger."""
        if not ranges:
            return self.numbers(self.origin)
        low, high = (np.asarray(one, dtype=np.int64) - np.asarray(self.origin) for one in zip(*ranges, strict=True))
        terms = self._terms
        corners = []
        downs = _extremes(terms["a"], low[: self.rows], high[: self.rows])
        rights = _extremes(terms["b"], low[self.rows :], high[self.rows :])
        for down in downs:
            for right in rights:
                corners.append(terms["f0"] + terms["g"] * down + terms["h"] * right + terms["q"] * down * right)
        return np.concatenate((self._constants, np.max(corners, axis=0)))

    def with_base(self, base: CapturedStep) -> Family:
        """The same family with other durations and workspaces in its base."""
        return replace(self, base=base)

    def graph_numbers(self, numbers: Integers) -> Integers:
        """Of :meth:`numbers` those that `splitkern._core.with_sizes` takes."""
        return numbers[self._template.graph]

    def step(self, numbers: Integers) -> CapturedStep:
        """The step at a draw, as a capture there would return it.

        Names, durations, workspaces and counts (flop, bytes) are those of `base`.

        Args:
            numbers: of :meth:`numbers`.
        """
        return self._template.fill(self.base, numbers.tolist())


def _extremes(vectors: Integers, low: Integers, high: Integers) -> tuple[Integers, Integers]:
    """Least and largest of every row's product with anything between two vectors."""
    zero = np.int64(0)
    positive: Integers = np.maximum(vectors, zero)
    negative: Integers = np.minimum(vectors, zero)
    least: Integers = positive @ low + negative @ high
    most: Integers = positive @ high + negative @ low
    return least, most


# --- a step as numbers --------------------------------------------------------------------------------------------


class _Numbers:
    """Collects the integers of a step in one fixed order; what is left of it says whether two steps are alike."""

    def __init__(self, step: CapturedStep) -> None:
        self.values: list[int] = []
        self.shape: list[Any] = []
        for storage in step.storages:
            self.values.append(storage.size_bytes)
            self.shape.append((storage.name, storage.kind, storage.is_output))
        for tensor in step.tensors:
            self.values += (tensor.offset_bytes, *tensor.sizes, *tensor.strides_bytes)
            self.shape.append((tensor.storage, len(tensor.sizes), tensor.dtype))
        for operation in step.operations:
            self.shape.append(
                tuple(getattr(operation, one.name) for one in fields(operation) if one.name not in _NOT_COMPARED)
            )
            self.shape.append(self._structure((operation.call, operation.out_call)))
        for place, value in step.constants.items():
            self.shape.append((place, value.shape, value.dtype, self._constant(value)))
        self.shape.append(
            (step.outputs, step.gradients, step.parameters, step.inputs, step.differentiable, step.structure)
        )

    def _structure(self, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            self.values.append(value)
            return int
        if isinstance(value, Call):
            parts = (value.args, value.kwargs)
            return Call, value.overload, value.results, value.preload, self._structure(parts)
        if isinstance(value, Blank):
            return Blank, value.dtype, self._structure((value.sizes, value.strides))
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self._structure(one) for one in value)
        if isinstance(value, dict):
            return tuple((name, self._structure(one)) for name, one in value.items())
        return value

    def _constant(self, value: Tensor) -> Any:
        whole = _whole_numbers(value)
        if whole is None:
            return value.tolist()
        self.values += whole
        return len(whole)


#: Of an operation: what `_Numbers` looks into by itself, and what follows from the sizes.
_NOT_COMPARED = frozenset({"call", "out_call", "flop", "bytes", "duration_us", "workspace_bytes"})


def _whole_numbers(value: Tensor) -> list[int] | None:
    """The elements of a constant if they are whole numbers that fit its type and int64 exactly."""
    if value.dtype == torch.bool or value.is_complex():
        return None
    flat = value.detach().reshape(-1).cpu()
    if value.is_floating_point():
        if not bool(torch.all((flat == flat.round()) & (flat.abs() < _EXACT))):
            return None
        flat = flat.to(torch.int64)
    return [int(one) for one in flat.tolist()]


#: Builds a part of the step from the values of a draw; a number is the position of a value that needs no building.
Fill = int | Callable[[list[Any]], Any]


class _Template:
    """Builds the step of a draw from its numbers; whatever holds none that varies is shared with the base.

    Args:
        base: the step whose structure it is.
        slots: for every number of the step, in the order of `_Numbers`, its position in what `Family.numbers` returns.
        count: of what that returns.
        first_varying: positions from this on hold numbers that change from draw to draw.
    """

    def __init__(self, base: CapturedStep, slots: Sequence[int], count: int, first_varying: int) -> None:
        self._slots, self._count, self._first, self._next = slots, count, first_varying, 0
        # Extents of a patch come in many places of the step: each sequence of them is built once.
        self._sequences: dict[tuple[type, tuple[int, ...]], int] = {}
        graph: list[int] = []
        self._storages: list[tuple[int, int]] = []
        for index in range(len(base.storages)):
            (slot,) = own = self._take(1)
            graph += own
            if slot >= first_varying:
                self._storages.append((index, slot))
        self._tensors: list[tuple[int, int, int, int]] = []
        for index, tensor in enumerate(base.tensors):
            rank = len(tensor.sizes)
            own = self._take(1 + 2 * rank)
            graph += own
            if max(own) >= first_varying:
                sizes, strides = self._sequence(tuple, own[1 : 1 + rank]), self._sequence(tuple, own[1 + rank :])
                self._tensors.append((index, own[0], sizes, strides))
        self.graph = np.asarray(graph, dtype=np.int64)
        self._operations: list[tuple[int, Fill | None, Fill | None]] = []
        for index, operation in enumerate(base.operations):
            fills = self._fill(operation.call), self._fill(operation.out_call)
            if fills != (None, None):
                self._operations.append((index, *fills))
        self._constants: list[tuple[int, int]] = []
        for place, value in base.constants.items():
            if _whole_numbers(value) is not None:
                own = self._take(value.numel())
                if max(own, default=-1) >= first_varying:
                    self._constants.append((place, self._sequence(list, own)))
        if self._next != len(slots):
            raise AssertionError(f"{len(slots)} numbers were collected, {self._next} have a place")

    def _take(self, count: int) -> list[int]:
        self._next += count
        return list(self._slots[self._next - count : self._next])

    def _sequence(self, kind: type, slots: Sequence[int]) -> int:
        return self._sequences.setdefault((kind, tuple(slots)), self._count + len(self._sequences))

    def _fill(self, value: Any) -> Fill | None:
        """What builds a value, None where it never changes."""
        if isinstance(value, int) and not isinstance(value, bool):
            (slot,) = self._take(1)
            return slot if slot >= self._first else None
        if isinstance(value, Call):
            return _made_of(
                self._fill((value.args, value.kwargs)),
                lambda parts: Call(value.overload, parts[0], parts[1], value.results, value.preload),
            )
        if isinstance(value, Blank):
            shape = self._fill((value.sizes, value.strides))
            return _made_of(shape, lambda parts: Blank(parts[0], parts[1], value.dtype))
        if isinstance(value, dict):
            return _made_of(self._fill(tuple(value.values())), lambda parts: dict(zip(value, parts, strict=True)))
        if not isinstance(value, (tuple, list)):
            return None
        begin, kind = self._next, type(value)
        fills = [(position, fill) for position, one in enumerate(value) if (fill := self._fill(one)) is not None]
        if not fills:
            return None
        if all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            return self._sequence(kind, self._slots[begin : self._next])
        ready = [(position, fill) for position, fill in fills if isinstance(fill, int)]
        nested = [(position, fill) for position, fill in fills if not isinstance(fill, int)]
        fixed = list(value)

        def build(values: list[Any]) -> Any:
            filled = fixed.copy()
            for position, place in ready:
                filled[position] = values[place]
            for position, inner in nested:
                filled[position] = inner(values)
            return filled if kind is list else kind(filled)

        return build

    def fill(self, base: CapturedStep, numbers: list[int]) -> CapturedStep:
        """The step whose numbers these are."""
        values: list[Any] = numbers
        for kind, slots in self._sequences:
            values.append(kind([values[slot] for slot in slots]))
        storages, tensors, operations = list(base.storages), list(base.tensors), list(base.operations)
        for index, slot in self._storages:
            storages[index] = _changed(storages[index], size_bytes=values[slot])
        for index, offset, sizes, strides in self._tensors:
            tensors[index] = _changed(
                tensors[index], offset_bytes=values[offset], sizes=values[sizes], strides_bytes=values[strides]
            )
        for index, call, out_call in self._operations:
            old = operations[index]
            operations[index] = _changed(
                old,
                call=old.call if call is None else _build(call, values),
                out_call=old.out_call if out_call is None else _build(out_call, values),
            )
        constants = dict(base.constants)
        for place, sequence in self._constants:
            value = constants[place]
            constants[place] = torch.tensor(values[sequence], dtype=value.dtype, device=value.device).reshape(
                value.shape
            )
        return replace(
            base,
            storages=tuple(storages),
            tensors=tuple(tensors),
            operations=tuple(operations),
            constants=constants,
        )


def _build(fill: Fill, values: list[Any]) -> Any:
    return values[fill] if isinstance(fill, int) else fill(values)


def _made_of(inner: Fill | None, make: Callable[[Any], Any]) -> Fill | None:
    return None if inner is None else lambda values: make(_build(inner, values))


def _changed(value: Part, **changes: Any) -> Part:
    """`dataclasses.replace`, several times as fast: it runs for most operations and tensors in every draw."""
    made: Part = object.__new__(type(value))
    made.__dict__.update(value.__dict__, **changes)
    return made


# --- fitting ------------------------------------------------------------------------------------------------------


def fit(
    capture: Callable[[Draw], CapturedStep],
    base: CapturedStep,
    origin: Draw,
    rows: int,
    *,
    single: Sequence[Draw],
    joint: Sequence[Draw],
    held_out: Sequence[Draw],
) -> Family:
    """The family of steps that a few captures determine.

    Args:
        capture: the step at a draw; it is called once for each.
        base: the step at `origin`.
        origin: boundaries.
        rows: how many of them are of rows.
        single: draws that differ from the origin by one in one boundary; a boundary that none of them moves is fixed.
        joint: draws that move several boundaries of both axes; only as many are captured as are needed.
        held_out: draws to compare with, where nothing may differ.

    Raises:
        DrawError: the structure of the step depends on the draw, or a number of it is no such function as above.
    """
    first = _Numbers(base)
    f0 = np.asarray(first.values, dtype=np.int64)
    slopes = np.zeros((len(origin), len(f0)), dtype=np.int64)
    for draw in single:
        moved = np.subtract(draw, origin)
        (index,) = np.flatnonzero(moved)
        slopes[index] = (_alike(first, capture(draw), draw) - f0) * moved[index]
    a, g = _primitive(slopes[:rows].T)
    b, h = _primitive(slopes[rows:].T)
    q = np.zeros_like(f0)
    unknown = (g != 0) & (h != 0)
    checked: list[tuple[Draw, Integers]] = []
    for draw in joint:
        if not unknown.any():
            break
        moved = np.subtract(draw, origin)
        down, right = a @ moved[:rows], b @ moved[rows:]
        checked.append((draw, _alike(first, capture(draw), draw)))
        rest = checked[-1][1] - (f0 + g * down + h * right)
        product = down * right
        found = unknown & (product != 0)
        q[found] = rest[found] // product[found]
        unknown &= ~found
    if unknown.any():
        raise DrawError(f"{int(unknown.sum())} numbers of the step are not determined by {len(joint)} joint draws")
    varies = (g != 0) | (h != 0)
    # Equal functions have one place; numbers that never change come before those that do.
    table = np.concatenate([np.stack((f0, g, h, q), axis=1), a, b], axis=1)[varies]
    unique, positions = np.unique(table, axis=0, return_inverse=True)
    constants, places = np.unique(f0[~varies], return_inverse=True)
    slots = np.empty(len(f0), dtype=np.int64)
    slots[~varies] = places.reshape(-1)
    slots[varies] = positions.reshape(-1) + len(constants)
    terms = {"f0": unique[:, 0], "g": unique[:, 1], "h": unique[:, 2], "q": unique[:, 3]}
    terms |= {"a": unique[:, 4 : 4 + rows], "b": unique[:, 4 + rows :]}
    template = _Template(base, slots.tolist(), len(constants) + len(unique), len(constants))
    family = Family(base, origin, rows, terms, constants, template)
    checked += ((draw, _alike(first, capture(draw), draw)) for draw in held_out)
    for draw, wanted in checked:
        wrong = np.flatnonzero(family.numbers(draw)[slots] != wanted)
        if len(wrong):
            raise DrawError(
                f"{len(wrong)} of {len(wanted)} numbers of the step are no product of a row term and a column term of "
                f"the boundaries: at {list(draw)} the first is {wanted[wrong[0]]}, "
                f"expected {family.numbers(draw)[slots][wrong[0]]}"
            )
    return family


def _primitive(vectors: Integers) -> tuple[Integers, Integers]:
    """Every row divided by the greatest common divisor of its elements, and that; zero rows stay."""
    divisor = np.gcd.reduce(vectors, axis=1) if vectors.shape[1] else np.zeros(len(vectors), dtype=np.int64)
    return vectors // np.maximum(divisor, 1)[:, None], divisor


def _alike(first: _Numbers, step: CapturedStep, draw: Draw) -> Integers:
    other = _Numbers(step)
    if other.shape != first.shape or len(other.values) != len(first.values):
        where = next((one for one, own in zip(first.shape, other.shape, strict=False) if one != own), None)
        raise DrawError(
            f"the operations of the step depend on the draw: at the boundaries {list(draw)} they are others than at "
            f"the even ones, first at {where}"
        )
    return np.asarray(other.values, dtype=np.int64)


def numbers_of(step: CapturedStep) -> tuple[list[int], list[Any]]:
    """Every integer of a step in a fixed order, and all else that two draws of it have in common."""
    found = _Numbers(step)
    return found.values, found.shape
