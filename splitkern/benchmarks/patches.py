"""The patches of a benchmarked layer as views of its tensors, for what runs patch by patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from splitkern.benchmarks.layers import ConvLayer, Patches, PoolLayer, patches
from splitkern.geometry import Span, patch_paddings


@dataclass(frozen=True)
class Patch:
    """One patch: where it reads and writes, and its paddings (begin, end) of rows and columns."""

    rows: Span
    cols: Span
    out_rows: Span
    out_cols: Span
    row_padding: Span
    col_padding: Span

    def of_input(self, tensor: Tensor) -> Tensor:
        """The view of a tensor over the input's positions."""
        return tensor[:, :, self.rows[0] : self.rows[1], self.cols[0] : self.cols[1]]

    def of_output(self, tensor: Tensor) -> Tensor:
        """The view of a tensor over the output's positions."""
        return tensor[:, :, self.out_rows[0] : self.out_rows[1], self.out_cols[0] : self.out_cols[1]]

    def padded(self, tensor: Tensor, value: float = 0.0) -> Tensor:
        """The slice of the input with its padding."""
        return F.pad(self.of_input(tensor), (*self.col_padding, *self.row_padding), value=value)

    def unpadded(self, tensor: Tensor) -> Tensor:
        """The inverse of `padded`; positions that it cropped become zero."""
        (top, bottom), (left, right) = self.row_padding, self.col_padding
        return F.pad(tensor, (-left, -right, -top, -bottom))

    def local_bounds(self) -> list[list[int]]:
        """Its bounds in local coordinates."""
        spans = (self.rows, self.cols, self.out_rows, self.out_cols)
        return [[0, end - begin] for begin, end in spans]


def patches_of(layer: ConvLayer | PoolLayer, grid: tuple[int, int]) -> tuple[Patches, list[list[Patch]]]:
    """The patches of a layer, as bounds and as rows of patches."""
    bounds = patches(layer.window, layer.size, grid)
    row_paddings = patch_paddings(layer.window, bounds.in_rows, bounds.out_rows)
    col_paddings = patch_paddings(layer.window, bounds.in_cols, bounds.out_cols)

    def span(of: tuple[int, ...], index: int) -> Span:
        return of[index], of[index + 1]

    table = [
        [
            Patch(
                span(bounds.in_rows, i), span(bounds.in_cols, j), span(bounds.out_rows, i), span(bounds.out_cols, j),
                row_paddings[i], col_paddings[j],
            )
            for j in range(grid[1])
        ]
        for i in range(grid[0])
    ]  # fmt: skip
    return bounds, table
