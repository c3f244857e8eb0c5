"""The patch operators from first principles: slice, pad, operate, concatenate.

Written to be read and believed rather than to be fast. Every function takes the same arguments as
its namesake in ``splitkern.ops``, works in whatever precision its inputs have (tests pass float64),
and is differentiable, so that gradients can be compared with what autograd derives from it.
It shares nothing with ``splitkern.ops`` but the integers of ``splitkern.geometry``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splitkern import geometry

__all__ = [
    "PatchBatchNorm",
    "patch_avg_pool2d",
    "patch_batch_norm",
    "patch_conv2d",
    "patch_max_pool2d",
]

Ints = int | Sequence[int]
Bounds = Sequence[int] | None


class PatchBatchNorm(NamedTuple):
    """What ``patch_batch_norm`` returns: the output, and per patch and channel the statistics."""

    output: Tensor
    mean: Tensor
    invstd: Tensor
    m2: Tensor


class _Axis(NamedTuple):
    """One axis of one patch: the padded range it reads and the part of it that exists."""

    begin: int  # first padded position, in input coordinates
    end: int  # one past the last padded position
    input_begin: int
    input_end: int
    output_begin: int
    output_end: int

    @property
    def seen_begin(self) -> int:
        return min(max(self.begin, self.input_begin), self.end)

    @property
    def seen_end(self) -> int:
        return max(min(self.end, self.input_end), self.seen_begin)

    @property
    def paddings(self) -> tuple[int, int]:
        return self.seen_begin - self.begin, self.end - self.seen_end


def _pair(value: Ints) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second


def _axes(window: geometry.Window, extent: int, inputs: Bounds, outputs: Bounds) -> list[_Axis]:
    if inputs is None or outputs is None:
        inputs, outputs = (0, extent), (0, window.output_extent(extent))
    paddings = geometry.patch_paddings(window, inputs, outputs)
    return [
        _Axis(
            begin=inputs[i] - before,
            end=inputs[i + 1] + after,
            input_begin=inputs[i],
            input_end=inputs[i + 1],
            output_begin=outputs[i],
            output_end=outputs[i + 1],
        )
        for i, (before, after) in enumerate(paddings)
    ]


def _padded(input: Tensor, rows: _Axis, cols: _Axis, value: float) -> Tensor:
    seen = input[:, :, rows.seen_begin : rows.seen_end, cols.seen_begin : cols.seen_end]
    return F.pad(seen, (*cols.paddings, *rows.paddings), value=value)


def _joined(rows: list[_Axis], cols: list[_Axis], patch: Callable[[_Axis, _Axis], Tensor]) -> Tensor:
    return torch.cat([torch.cat([patch(row, col) for col in cols], dim=3) for row in rows], dim=2)


def _windows(padded: Tensor, rows: geometry.Window, cols: geometry.Window) -> Tensor:
    """[N, C, H, W] to [N, C, output rows, output columns, window positions in row-major order]."""
    index = []
    for window, extent in ((rows, padded.shape[2]), (cols, padded.shape[3])):
        outputs = (extent - window.effective_kernel) // window.stride + 1
        first = torch.arange(outputs, device=padded.device) * window.stride
        taps = torch.arange(window.kernel, device=padded.device) * window.dilation
        index.append(first[:, None] + taps)
    seen = padded[:, :, index[0][:, None, :, None], index[1][None, :, None, :]]
    return seen.flatten(-2)


def _activated(output: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return output
    if activation == "relu":
        return torch.relu(output)
    raise ValueError(f"reference: activation must be 'none' or 'relu', got {activation!r}")


def patch_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    in_rows: Bounds = None,
    in_cols: Bounds = None,
    out_rows: Bounds = None,
    out_cols: Bounds = None,
    activation: str = "none",
) -> Tensor:
    """Convolve every patch by itself: zeros wherever a window leaves its patch.

    Args:
        input: [N, C, H, W].
        weight: [O, C / groups, kernel rows, kernel columns].
        bias: [O] or None.
        stride, padding, dilation, groups: as ``torch.nn.functional.conv2d``, ``padding`` being the
            begin padding in elements, possibly negative.
        in_rows, in_cols, out_rows, out_cols: boundary lists of the patches; None is one patch.
        activation: "none" or "relu".

    Returns:
        [N, O, out_rows[-1], out_cols[-1]].

    Raises:
        ValueError: for an unknown activation.

    Example:
        >>> x, w = torch.randn(1, 2, 8, 8), torch.randn(4, 2, 3, 3)
        >>> patch_conv2d(x, w, padding=1, in_rows=(0, 4, 8), out_rows=(0, 4, 8)).shape
        torch.Size([1, 4, 8, 8])

    Source: Jin and Hong, Split-CNN, ASPLOS 2019, section 3.
    """
    strides, paddings, dilations = _pair(stride), _pair(padding), _pair(dilation)
    windows = [geometry.Window(weight.shape[2 + a], strides[a], paddings[a], dilations[a]) for a in (0, 1)]
    rows = _axes(windows[0], input.shape[2], in_rows, out_rows)
    cols = _axes(windows[1], input.shape[3], in_cols, out_cols)

    def patch(row: _Axis, col: _Axis) -> Tensor:
        padded = _padded(input, row, col, 0.0)
        return F.conv2d(padded, weight, bias, strides, 0, dilations, groups)

    return _activated(_joined(rows, cols, patch), activation)


def patch_max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    in_rows: Bounds = None,
    in_cols: Bounds = None,
    out_rows: Bounds = None,
    out_cols: Bounds = None,
) -> tuple[Tensor, Tensor]:
    """Take the maximum of every window over its own patch, and where in the window it was.

    Args:
        input: [N, C, H, W].
        kernel_size, stride, padding, dilation, ceil_mode: as ``torch.nn.functional.max_pool2d``.
        in_rows, in_cols, out_rows, out_cols: boundary lists of the patches; None is one patch.

    Returns:
        values and uint8 offsets (row-major position inside the window), both
        [N, C, out_rows[-1], out_cols[-1]]. The first maximum wins, except that the last NaN does;
        a window that sees no input has value -inf and offset 255.

    Raises:
        ValueError: for a window of over 255 positions.

    Example:
        >>> values, offsets = patch_max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
        >>> values.flatten().tolist(), offsets.flatten().tolist()
        ([5.0, 7.0, 13.0, 15.0], [3, 3, 3, 3])

    Source: ``aten/src/ATen/native/cpu/MaxPoolKernel.cpp`` for ties and NaN.
    """
    kernels, paddings, dilations = _pair(kernel_size), _pair(padding), _pair(dilation)
    strides = kernels if stride is None else _pair(stride)
    if kernels[0] * kernels[1] > 255:
        raise ValueError(f"reference: a window must have at most 255 positions, got {kernels}")
    windows = [geometry.Window(kernels[a], strides[a], paddings[a], dilations[a], ceil_mode) for a in (0, 1)]
    rows = _axes(windows[0], input.shape[2], in_rows, out_rows)
    cols = _axes(windows[1], input.shape[3], in_cols, out_cols)
    positions = torch.arange(kernels[0] * kernels[1], device=input.device)
    inside = torch.ones((1, 1, *input.shape[2:]), dtype=torch.bool, device=input.device)

    def offsets_of(row: _Axis, col: _Axis) -> Tensor:
        seen = _windows(_padded(input.detach(), row, col, float("-inf")), *windows)
        exists = _windows(_padded(inside, row, col, 0.0), *windows)
        is_maximum = exists & (seen == seen.amax(-1, keepdim=True))
        first = torch.where(is_maximum, positions, 255).amin(-1)
        last_nan = torch.where(exists & seen.isnan(), positions, -1).amax(-1)
        return torch.where(last_nan >= 0, last_nan, first).to(torch.uint8)

    def values_of(row: _Axis, col: _Axis) -> Tensor:
        seen = _windows(_padded(input, row, col, float("-inf")), *windows)
        offsets = offsets_of(row, col)
        chosen = seen.gather(-1, offsets.long().clamp_max(len(positions) - 1)[..., None])[..., 0]
        return chosen.masked_fill(offsets == 255, float("-inf"))

    return _joined(rows, cols, values_of), _joined(rows, cols, offsets_of)


def patch_avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    *,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    in_rows: Bounds = None,
    in_cols: Bounds = None,
    out_rows: Bounds = None,
    out_cols: Bounds = None,
) -> Tensor:
    """Average every window over its own patch.

    Args:
        input: [N, C, H, W].
        kernel_size, stride, padding, ceil_mode, divisor_override: as
            ``torch.nn.functional.avg_pool2d``.
        count_include_pad: divide by the window positions within [-p, L + p) of the whole axis;
            otherwise by those inside the patch (a window with none gives 0).
        in_rows, in_cols, out_rows, out_cols: boundary lists of the patches; None is one patch.

    Returns:
        [N, C, out_rows[-1], out_cols[-1]].

    Raises:
        ValueError: for bounds that do not tile their axis.

    Example:
        >>> patch_avg_pool2d(torch.ones(1, 1, 4, 4), 2).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]

    Source: ``aten/src/ATen/native/cpu/AvgPoolKernel.cpp`` for the divisor.
    """
    kernels, paddings = _pair(kernel_size), _pair(padding)
    strides = kernels if stride is None else _pair(stride)
    windows = [geometry.Window(kernels[a], strides[a], paddings[a], 1, ceil_mode) for a in (0, 1)]
    axes = [
        _axes(windows[0], input.shape[2], in_rows, out_rows),
        _axes(windows[1], input.shape[3], in_cols, out_cols),
    ]

    def counted(axis: int, patch: _Axis) -> Tensor:
        window, extent = windows[axis], input.shape[2 + axis]
        low, high = patch.input_begin, patch.input_end
        if count_include_pad:
            low, high = -window.padding, extent + window.padding
        counts = []
        for o in range(patch.output_begin, patch.output_end):
            first = o * window.stride - window.padding
            counts.append(sum(low <= first + t < high for t in range(window.kernel)))
        return torch.tensor(counts, dtype=input.dtype, device=input.device)

    def patch(row: _Axis, col: _Axis) -> Tensor:
        total = _windows(_padded(input, row, col, 0.0), *windows).sum(-1)
        if divisor_override is not None:
            return total / divisor_override
        divisor = counted(0, row)[:, None] * counted(1, col)
        return torch.where(divisor > 0, total / divisor.clamp_min(1), 0.0)

    return _joined(axes[0], axes[1], patch)


def patch_batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rows: Bounds = None,
    cols: Bounds = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> PatchBatchNorm:
    """Normalise every patch by its own batch statistics.

    Args:
        input: [N, C, H, W].
        weight, bias: [C] or None.
        rows, cols: boundary lists of the patches; None is one patch.
        eps: added to the biased variance.
        activation: "none" or "relu".

    Returns:
        output as input; mean, 1 / sqrt(m2 / n + eps) and m2 (the sum of squared deviations) as
        [patches in row-major order, C], n = N times the patch's area.

    Raises:
        ValueError: for an unknown activation.

    Example:
        >>> patch_batch_norm(torch.randn(2, 3, 4, 4), rows=(0, 2, 4)).mean.shape
        torch.Size([2, 3])

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 1.
    """
    row_bounds = (0, input.shape[2]) if rows is None else rows
    col_bounds = (0, input.shape[3]) if cols is None else cols
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    statistics: list[tuple[Tensor, Tensor, Tensor]] = []
    strips = []
    for i in range(len(row_bounds) - 1):
        strip = []
        for j in range(len(col_bounds) - 1):
            patch = input[:, :, row_bounds[i] : row_bounds[i + 1], col_bounds[j] : col_bounds[j + 1]].to(work)
            count = max(1, patch.shape[0] * patch.shape[2] * patch.shape[3])
            mean = patch.sum((0, 2, 3)) / count
            centred = patch - mean[:, None, None]
            m2 = centred.square().sum((0, 2, 3))
            invstd = 1 / torch.sqrt(m2 / count + eps)
            output = centred * invstd[:, None, None]
            if weight is not None:
                output = output * weight.to(work)[:, None, None]
            if bias is not None:
                output = output + bias.to(work)[:, None, None]
            strip.append(_activated(output, activation).to(input.dtype))
            statistics.append((mean, invstd, m2))
        strips.append(torch.cat(strip, dim=3))
    means, invstds, m2s = (torch.stack(column) for column in zip(*statistics, strict=True))
    return PatchBatchNorm(torch.cat(strips, dim=2), means, invstds, m2s)
