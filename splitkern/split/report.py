"""``check``: what a split would do to a model, without touching it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from splitkern.geometry import Bounds
from splitkern.split.layout import Layout
from splitkern.split.operations import AvgPool, BatchNorm, Convolution, MaxPool, Operation, Pointwise
from splitkern.split.options import Options, make_options
from splitkern.split.surgery import bound_inputs, prepare
from splitkern.split.trace import Program, fake_shapes

Shapes = dict[str, tuple[torch.Size, torch.dtype]]

_ADVICE = (
    "order='patch' alone does not lower the peak: autograd keeps every patch's activations; "
    "recompute=True (or offloading) does"
)


@dataclass(frozen=True)
class Join:
    """Where patches come together: the value's shape and the boundaries of both axes."""

    value: str
    shape: tuple[int, ...]
    rows: Bounds
    cols: Bounds


@dataclass(frozen=True)
class SplitReport:
    """What :func:`check` found.

    Args:
        operations: module path or function of everything inside the region, in execution order.
        joins: where the patches come together again.
        input_rows, input_cols: boundaries at the region's input.
        obstacles: what stands in the way; empty if ``split_`` would succeed.
        unsplit_bytes: predicted bytes that the region saves for backward, unsplit.
        split_bytes: the same for the split with these options: the joins, and what is saved of
            all patches, or of the largest patch under recomputation.
        notes: what to know about these options.
    """

    operations: tuple[str, ...]
    joins: tuple[Join, ...]
    input_rows: Bounds
    input_cols: Bounds
    obstacles: tuple[str, ...]
    unsplit_bytes: int
    split_bytes: int
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether ``split_`` with the same arguments would succeed."""
        return not self.obstacles

    def __str__(self) -> str:
        if self.obstacles:
            return "\n".join(["cannot be split:", *(f"  - {text}" for text in self.obstacles)])
        lines = [
            f"{len(self.operations)} operations in the region, {self.operations[0]} to {self.operations[-1]}",
            f"input  rows {list(self.input_rows)} columns {list(self.input_cols)}",
        ]
        for join in self.joins:
            lines.append(f"join   {join.value} {list(join.shape)} rows {list(join.rows)} columns {list(join.cols)}")
        lines.append(
            f"predicted bytes saved for backward: {self.unsplit_bytes / 2**20:.1f} MiB unsplit, "
            f"{self.split_bytes / 2**20:.1f} MiB split "
            f"({self.split_bytes / max(1, self.unsplit_bytes):.2f}×)"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def check(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    grid: Sequence[int | Sequence[int]],
    until: str | None = None,
    depth: float | None = None,
    boundary: str = "zero",
    wiggle: float = 0.2,
    norm: str | None = None,
    order: str = "patch",
    recompute: bool = False,
    evaluation: str = "unsplit",
) -> SplitReport:
    """What :func:`splitkern.split_` with the same arguments would do; nothing is changed.

    Args: as :func:`splitkern.split_`.

    Returns:
        The region, its joins, what stands in the way, and predicted bytes: an estimate from
        shapes, of the values that plain PyTorch and this package save for backward.

    Raises:
        ValueError, TypeError: only for options that are wrong whatever the model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
        >>> check(model, torch.randn(2, 3, 16, 16), grid=(2, 2), until="1").ok
        True
    """
    options = make_options(
        grid=grid,
        until=until,
        depth=depth,
        boundary=boundary,
        wiggle=wiggle,
        norm=norm,
        order=order,
        recompute=recompute,
        evaluation=evaluation,
    )
    try:
        _, program, layout = prepare(model, example_inputs, options)
    except ValueError as error:
        return SplitReport((), (), (), (), (str(error),), 0, 0, ())
    given = bound_inputs(model, example_inputs)
    shapes = fake_shapes(program, model, [given[argument] for _, argument in program.arguments])
    for name, (shape, _) in shapes.items():
        if name in layout.rows.extents:
            assert tuple(shape[2:]) == (layout.rows.extents[name], layout.cols.extents[name])
    notes = []
    if order == "patch" and not recompute:
        notes.append(_ADVICE)
    if boundary == "halo" and order == "layer":
        notes.append("boundary='halo' with order='layer' is the unsplit network")
    return _report(program, layout, shapes, options, tuple(notes))


def _report(program: Program, layout: Layout, shapes: Shapes, options: Options, notes: tuple[str, ...]) -> SplitReport:
    region = program.region
    unsplit = sum(_unsplit_saved(program, shapes).values())
    joined = sum(_bytes(shapes[name]) for name in region.outputs)
    saved = _split_saved(region.operations, shapes)
    saved.pop(region.inputs[0], None)
    if options.recompute:
        largest = max(
            sum(
                size
                * prod(end - begin for begin, end in layout.box(name.split(":")[0], patch))
                / prod(shapes[name.split(":")[0]][0][2:])
                for name, size in saved.items()
            )
            for patch in layout.patches
        )
        split = int(largest) + joined
    else:
        split = sum(size for name, size in saved.items() if name not in region.outputs) + joined
    first = region.inputs[0]
    return SplitReport(
        operations=tuple(operation.label for operation in region.operations),
        joins=tuple(
            Join(
                name,
                tuple(shapes[name][0]),
                layout.rows.bounds[name],
                layout.cols.bounds[name],
            )
            for name in region.outputs
        ),
        input_rows=layout.rows.bounds[first],
        input_cols=layout.cols.bounds[first],
        obstacles=(),
        unsplit_bytes=unsplit,
        split_bytes=split,
        notes=notes,
    )


def _bytes(shape: tuple[torch.Size, torch.dtype]) -> int:
    return prod(shape[0]) * shape[1].itemsize


def _split_saved(operations: Sequence[Operation], shapes: Shapes) -> dict[str, int]:
    """Bytes of every value that our operations save; a ``:`` marks what belongs to a value."""
    saved: dict[str, int] = {}
    for operation in operations:
        if isinstance(operation, MaxPool):
            saved[f"{operation.name}:offsets"] = prod(shapes[operation.name][0])
            continue
        if isinstance(operation, AvgPool):
            continue
        if isinstance(operation, Pointwise) and operation.kind == "add":
            continue
        if isinstance(operation, Convolution) and operation.activation == "relu":
            saved[operation.name] = _bytes(shapes[operation.name])
        if isinstance(operation, Pointwise) and operation.kind == "relu":
            saved[operation.name] = _bytes(shapes[operation.name])
            continue
        for name in operation.inputs:
            # A batch norm that applies a ReLU hides the value between: name it by its source.
            saved[name] = _bytes(shapes[name])
    return saved


def _unsplit_saved(program: Program, shapes: Shapes) -> dict[str, int]:
    """Bytes of every value that plain PyTorch saves in the region, its input aside."""
    saved: dict[str, int] = {}
    for operation in program.region.operations:
        if isinstance(operation, Pointwise) and operation.kind == "add":
            continue
        if isinstance(operation, Convolution | BatchNorm) and operation.activation == "relu":
            saved[operation.name] = _bytes(shapes[operation.name])
        if isinstance(operation, Pointwise) and operation.kind == "relu":
            saved[operation.name] = _bytes(shapes[operation.name])
            continue
        if isinstance(operation, MaxPool):
            saved[f"{operation.name}:indices"] = 8 * prod(shapes[operation.name][0])
        for name in operation.inputs:
            saved[name] = _bytes(shapes[name])
    saved.pop(program.region.inputs[0], None)
    return saved
