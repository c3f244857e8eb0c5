"""Where every value of a region is cut: boundaries, patch spans and the bounds of every call.

Pure integers, derived from the region's operations, the input's extents and the boundaries at the
joins; cached by the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from splitkern import geometry
from splitkern.geometry import AxisNode, Bounds, Span, Window
from splitkern.split.operations import CallGeometry, Operation

Extents = tuple[int, int]
Box = tuple[Span, Span]


@dataclass(frozen=True)
class AxisLayout:
    """Extents, boundaries and patch spans of every value along one axis."""

    extents: dict[str, int]
    bounds: dict[str, Bounds]
    spans: dict[str, tuple[Span, ...]]


@dataclass(frozen=True)
class Layout:
    """The cut of a region for one input size.

    Args:
        operations: in execution order.
        rows, cols: the two axes.
        halo: whether patches overlap and recompute their borders.
    """

    operations: tuple[Operation, ...]
    rows: AxisLayout
    cols: AxisLayout
    halo: bool

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Patches along rows and columns."""
        name = self.operations[-1].name
        return len(self.rows.bounds[name]) - 1, len(self.cols.bounds[name]) - 1

    @cached_property
    def patches(self) -> list[tuple[int, int]]:
        """Patch indices (row, column) in execution order."""
        return [(i, j) for i in range(self.grid[0]) for j in range(self.grid[1])]

    def box(self, name: str, patch: tuple[int, int]) -> Box:
        """Rows and columns that a patch holds of a value."""
        return self.rows.spans[name][patch[0]], self.cols.spans[name][patch[1]]

    def owned_box(self, name: str, patch: tuple[int, int]) -> Box:
        """Rows and columns that a patch owns of a value: these tile it."""
        spans = []
        for axis, index in ((self.rows, patch[0]), (self.cols, patch[1])):
            bounds = axis.bounds[name]
            spans.append((bounds[index], bounds[index + 1]))
        return spans[0], spans[1]

    @cached_property
    def patch_calls(self) -> dict[tuple[int, int], list[CallGeometry]]:
        """For every patch the calls of all operations, in local coordinates."""
        return {patch: [self._patch_call(operation, patch) for operation in self.operations] for patch in self.patches}

    @cached_property
    def layer_calls(self) -> list[CallGeometry]:
        """The calls of all operations on joined tensors, all patches in one."""
        return [self._layer_call(operation) for operation in self.operations]

    def _patch_call(self, operation: Operation, patch: tuple[int, int]) -> CallGeometry:
        paddings: list[int] = []
        counted: list[Span] = []
        owned: list[Span] = []
        extents: list[tuple[int, int]] = []
        windows = operation.windows or (None, None)
        source, name = operation.inputs[0], operation.name
        for axis, index, window in zip((self.rows, self.cols), patch, windows, strict=True):
            read, written = axis.spans[source][index], axis.spans[name][index]
            window = window or _POINT
            paddings.append(geometry.span_paddings(window, read, written)[0])
            counted.append((-window.padding - read[0], axis.extents[source] + window.padding - read[0]))
            bounds = axis.bounds[name]
            owned.append((bounds[index] - written[0], bounds[index + 1] - written[0]))
            extents.append((read[1] - read[0], written[1] - written[0]))
        owns_all = all(part == (0, out) for part, (_, out) in zip(owned, extents, strict=True))
        return CallGeometry(
            padding=(paddings[0], paddings[1]),
            in_rows=(0, extents[0][0]),
            in_cols=(0, extents[1][0]),
            out_rows=(0, extents[0][1]),
            out_cols=(0, extents[1][1]),
            counted=(counted[0], counted[1]),
            owned=None if owns_all else (owned[0], owned[1]),
        )

    def _layer_call(self, operation: Operation) -> CallGeometry:
        windows = operation.windows or (_POINT, _POINT)
        source, name = operation.inputs[0], operation.name
        rows, cols = (
            (-window.padding, axis.extents[source] + window.padding)
            for axis, window in zip((self.rows, self.cols), windows, strict=True)
        )
        return CallGeometry(
            padding=(windows[0].padding, windows[1].padding),
            in_rows=self.rows.bounds[source],
            in_cols=self.cols.bounds[source],
            out_rows=self.rows.bounds[name],
            out_cols=self.cols.bounds[name],
            counted=(rows, cols),
        )


_POINT = Window(kernel=1)


def axis_nodes(operations: Sequence[Operation], axis: int) -> list[AxisNode]:
    """The region's graph along one axis (0 rows, 1 columns)."""
    return [
        AxisNode(
            operation.name,
            operation.inputs,
            operation.windows[axis] if operation.windows else None,
        )
        for operation in operations
    ]


def axis_extents(operations: Sequence[Operation], axis: int, inputs: Mapping[str, Extents]) -> dict[str, int]:
    """Extent of every value along one axis."""
    return geometry.forward_extents(
        axis_nodes(operations, axis), {name: extents[axis] for name, extents in inputs.items()}
    )


def axis_layout(
    operations: Sequence[Operation],
    axis: int,
    extents: Mapping[str, int],
    joins: Mapping[str, Bounds],
    *,
    halo: bool,
) -> AxisLayout:
    """Cut one axis from the boundaries at the joins.

    Raises:
        ValueError: where the boundaries cannot be carried back to the input.
    """
    nodes = axis_nodes(operations, axis)
    bounds = geometry.propagate(nodes, extents, joins)
    if halo:
        spans = geometry.halo_spans(nodes, extents, bounds)
    else:
        spans = {name: tuple(itertools.pairwise(cut)) for name, cut in bounds.items()}
    return AxisLayout(dict(extents), bounds, spans)
