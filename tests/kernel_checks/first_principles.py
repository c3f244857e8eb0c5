"""Patch operators from their definition: cut the patch out, lay it on a canvas of padding, compute, concatenate.

Shares no code with the package. Every function computes in the type of its arguments, so the same
function in fp64 is the truth and in a narrower type is what PyTorch itself would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """A window operation and its patches; rows first, columns second."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    in_rows: tuple[int, ...]
    in_columns: tuple[int, ...]
    out_rows: tuple[int, ...]
    out_columns: tuple[int, ...]

    @property
    def bounds(self) -> tuple[list[int], list[int], list[int], list[int]]:
        return list(self.in_rows), list(self.in_columns), list(self.out_rows), list(self.out_columns)

    @property
    def in_size(self) -> tuple[int, int]:
        return self.in_rows[-1], self.in_columns[-1]

    @property
    def out_size(self) -> tuple[int, int]:
        return self.out_rows[-1], self.out_columns[-1]

    def span(self, axis: int, out_begin: int, out_end: int) -> tuple[int, int]:
        """The positions [begin, end) that the windows of outputs [out_begin, out_end) touch."""
        effective = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        begin = out_begin * self.stride[axis] - self.padding[axis]
        return begin, (out_end - 1) * self.stride[axis] - self.padding[axis] + effective


def canvas(input: Tensor, g: Geometry, i: int, j: int, fill: float) -> Tensor:
    """Everything that patch (i, j)'s windows touch: its own inputs where there are any, else `fill`."""
    top, bottom = g.span(0, g.out_rows[i], g.out_rows[i + 1])
    left, right = g.span(1, g.out_columns[j], g.out_columns[j + 1])
    y0, y1 = max(top, g.in_rows[i]), min(bottom, g.in_rows[i + 1])
    x0, x1 = max(left, g.in_columns[j]), min(right, g.in_columns[j + 1])
    if y0 >= y1 or x0 >= x1:
        nothing = input[:, :, :0].sum()  # zero, and keeps the graph for autograd
        return torch.full((*input.shape[:2], bottom - top, right - left), fill, dtype=input.dtype) + nothing
    return F.pad(input[:, :, y0:y1, x0:x1], (x0 - left, right - x1, y0 - top, bottom - y1), value=fill)


def join(g: Geometry, patch: Callable[[int, int], Tensor]) -> Tensor:
    rows = range(len(g.out_rows) - 1)
    columns = range(len(g.out_columns) - 1)
    return torch.cat([torch.cat([patch(i, j) for j in columns], dim=3) for i in rows], dim=2)


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, groups: int) -> Tensor:
    return join(
        g,
        lambda i, j: F.conv2d(canvas(input, g, i, j, 0.0), weight, bias, g.stride, 0, g.dilation, groups),
    )


def windows(padded: Tensor, g: Geometry) -> Tensor:
    """[N, C, rows, columns, kernel rows * kernel columns], taps in row-major order."""
    for axis in (0, 1):
        effective = g.dilation[axis] * (g.kernel[axis] - 1) + 1
        padded = padded.unfold(2 + axis, effective, g.stride[axis])
    return padded[..., :: g.dilation[0], :: g.dilation[1]].flatten(4)


def max_pool2d(input: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """Values and offsets; the input holds no NaN."""

    def patch(i: int, j: int) -> tuple[Tensor, Tensor]:
        candidates = windows(canvas(input, g, i, j, float("-inf")), g)
        inside = windows(canvas(torch.ones_like(input), g, i, j, 0.0), g) > 0
        values = candidates.amax(-1)
        maxima = (candidates == values[..., None]) & inside
        first = maxima & (maxima.int().cumsum(-1) == 1)
        offsets = torch.where(inside.any(-1), first.int().argmax(-1), 255)
        return values, offsets.to(torch.uint8)

    return join(g, lambda i, j: patch(i, j)[0]), join(g, lambda i, j: patch(i, j)[1])


def max_pool2d_gather(input: Tensor, offsets: Tensor, g: Geometry) -> Tensor:
    """Differentiable in the input: the value at each saved offset, zero where there is none."""

    def patch(i: int, j: int) -> Tensor:
        candidates = windows(canvas(input, g, i, j, 0.0), g)
        mine = offsets[:, :, g.out_rows[i] : g.out_rows[i + 1], g.out_columns[j] : g.out_columns[j + 1]].long()
        chosen = candidates.gather(-1, mine.clamp(max=candidates.shape[-1] - 1)[..., None])[..., 0]
        return torch.where(mine == 255, torch.zeros_like(chosen), chosen)

    return join(g, patch)


def avg_pool2d(input: Tensor, g: Geometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    def patch(i: int, j: int) -> Tensor:
        total = windows(canvas(input, g, i, j, 0.0), g).sum(-1)
        if divisor_override is not None:
            return total / divisor_override
        if count_include_pad:
            counts = [
                [
                    sum(
                        -g.padding[axis] <= o * g.stride[axis] - g.padding[axis] + t < extent + g.padding[axis]
                        for t in range(g.kernel[axis])
                    )
                    for o in range(begin, end)
                ]
                for axis, extent, begin, end in (
                    (0, g.in_size[0], g.out_rows[i], g.out_rows[i + 1]),
                    (1, g.in_size[1], g.out_columns[j], g.out_columns[j + 1]),
                )
            ]
            divisor = torch.tensor(counts[0])[:, None] * torch.tensor(counts[1])[None, :]
        else:
            divisor = (windows(canvas(torch.ones_like(input[:1, :1]), g, i, j, 0.0), g) > 0).sum(-1)
        return torch.where(divisor > 0, total / divisor.clamp(min=1), torch.zeros_like(total))

    return join(g, patch)


def each_patch(rows: Sequence[int], columns: Sequence[int]) -> list[tuple[slice, slice]]:
    return [
        (slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1]))
        for i in range(len(rows) - 1)
        for j in range(len(columns) - 1)
    ]


def batch_norm_stats(input: Tensor, rows: Sequence[int], columns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations, [patches, channels]."""
    means, m2s = [], []
    for y, x in each_patch(rows, columns):
        box = input[:, :, y, x]
        mean = box.mean((0, 2, 3)) if box.numel() else box.new_zeros(box.shape[1])
        means.append(mean)
        m2s.append(((box - mean[None, :, None, None]) ** 2).sum((0, 2, 3)))
    return torch.stack(means), torch.stack(m2s)


def per_pixel(statistic: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """[patches, channels] spread to [1, channels, rows, columns]."""
    spread = statistic.new_empty(1, statistic.shape[1], rows[-1], columns[-1])
    for p, (y, x) in enumerate(each_patch(rows, columns)):
        spread[:, :, y, x] = statistic[p][None, :, None, None]
    return spread


def batch_norm_apply(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[int],
    columns: Sequence[int],
    relu: bool,
) -> Tensor:
    output = (input - per_pixel(mean, rows, columns)) * per_pixel(invstd, rows, columns)
    if weight is not None:
        output = output * weight[None, :, None, None]
    if bias is not None:
        output = output + bias[None, :, None, None]
    return output.relu() if relu else output


def batch_norm_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[int],
    columns: Sequence[int],
    eps: float,
    relu: bool,
) -> Tensor:
    """Differentiable: each patch by its own biased statistics."""
    output = torch.empty_like(input)
    for y, x in each_patch(rows, columns):
        box = F.batch_norm(input[:, :, y, x], None, None, weight, bias, True, 0.0, eps)
        output[:, :, y, x] = box.relu() if relu else box
    return output
