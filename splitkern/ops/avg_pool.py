"""Average pooling of image patches and its gradient; each is the other's derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitkern.ops._common import (
    INTEGER,
    Bounds,
    Ints,
    call,
    check_axes,
    check_output,
    check_shape,
    check_sizes,
    check_tensor,
    fill_bounds,
    new_like,
    pair,
    refuse_gradients,
    register_autograd,
    register_fake,
)

_FORWARD = "splitkern::patch_avg_pool2d"
_BACKWARD = "splitkern::patch_avg_pool2d_backward"
_NO_DILATION = (1, 1)

_forward = torch.ops.splitkern.patch_avg_pool2d.default
_forward_out = torch.ops.splitkern.patch_avg_pool2d.out
_backward = torch.ops.splitkern.patch_avg_pool2d_backward.default
_backward_out = torch.ops.splitkern.patch_avg_pool2d_backward.out


def _check_divisor(operator: str, divisor_override: Any) -> None:
    if divisor_override is None:
        return
    if not isinstance(divisor_override, INTEGER):
        raise TypeError(
            f"{operator}: divisor_override must be an integer or None, got {type(divisor_override).__name__}"
        )
    if divisor_override == 0:
        raise ValueError(f"{operator}: divisor_override must not be 0, got 0")


# --- patch_avg_pool2d -----------------------------------------------------------------------------


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
    output: Tensor | None = None,
) -> Tensor:
    """Average every window over its own patch.

    Args:
        input: [N, C, H, W], any strides.
        kernel_size: in elements, for both axes or (rows, columns).
        stride: in elements; ``kernel_size`` where None.
        padding: begin padding in elements, possibly negative; the end padding follows from the bounds.
        ceil_mode: round the output extent of an axis without bounds up.
        count_include_pad: divide by the window positions within [-padding, extent + padding) of the
            whole axis; otherwise by those inside the patch (a window with none gives 0).
        divisor_override: divide by this instead.
        in_rows, in_cols: input boundaries of the patches, from 0 to H and W, strictly increasing.
        out_rows, out_cols: output boundaries, as many. An axis without bounds is one patch, padded
            alike at both ends.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        [N, C, out_rows[-1], out_cols[-1]] in the input's memory format, or ``output``.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> patch_avg_pool2d(torch.ones(1, 1, 4, 4), 2).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]

    Source: Jin and Hong, Split-CNN, ASPLOS 2019, section 3; the divisor as
    ``aten/src/ATen/native/cpu/AvgPoolKernel.cpp``.
    """
    kernel_size, padding = pair(kernel_size), pair(padding)
    stride = kernel_size if stride is None else pair(stride)
    if in_rows is None or out_rows is None or in_cols is None or out_cols is None:
        bounds = (in_rows, in_cols, out_rows, out_cols)
        in_rows, in_cols, out_rows, out_cols = fill_bounds(
            _FORWARD, input, kernel_size, stride, padding, _NO_DILATION, ceil_mode, bounds
        )
    # fmt: off
    arguments = (input, kernel_size, stride, padding, count_include_pad, divisor_override,
                 in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        result: Tensor = call(_forward, _check_forward, *arguments)
        return result
    call(_forward_out, _check_forward, *arguments, output=output)
    return output


def _check_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    *,
    output: Tensor | None = None,
) -> tuple[int, ...]:
    check_tensor(_FORWARD, "input", input, 4)
    _check_divisor(_FORWARD, divisor_override)
    bounds = (in_rows, in_cols, out_rows, out_cols)
    check_axes(_FORWARD, input.shape[2:], kernel_size, stride, padding, _NO_DILATION, bounds)
    shape = (*input.shape[:2], out_rows[-1], out_cols[-1])
    check_output(_FORWARD, "output", output, input, "input", shape)
    return shape


@register_fake("patch_avg_pool2d")
def _forward_fake(input: Tensor, *arguments: Any) -> Tensor:
    return new_like(input, _check_forward(input, *arguments))


@register_fake("patch_avg_pool2d.out")
def _forward_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_forward(*arguments, output=output)


def _forward_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return (_backward(grad_output, ctx.input_size, *ctx.geometry), *(None,) * 9)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.input_size, ctx.geometry = list(inputs[0].shape), inputs[1:]


register_autograd("patch_avg_pool2d", _forward_backward, _forward_setup)
refuse_gradients("patch_avg_pool2d")


# --- patch_avg_pool2d_backward --------------------------------------------------------------------


def patch_avg_pool2d_backward(
    grad_output: Tensor,
    input_size: Sequence[int],
    kernel_size: Ints,
    *,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    stride: Ints | None = None,
    padding: Ints = 0,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`patch_avg_pool2d` with respect to its input.

    Args:
        grad_output: [N, C, out_rows[-1], out_cols[-1]], any strides.
        input_size: [N, C, H, W].
        kernel_size, stride, padding, count_include_pad, divisor_override, in_rows, in_cols, out_rows,
            out_cols: as in the forward call.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        [N, C, H, W] in grad_output's memory format, or ``output``.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> bounds = {"in_rows": (0, 2), "in_cols": (0, 2), "out_rows": (0, 1), "out_cols": (0, 1)}
        >>> patch_avg_pool2d_backward(torch.ones(1, 1, 1, 1), (1, 1, 2, 2), 2, **bounds)
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])

    Source: the transpose of :func:`patch_avg_pool2d`, which is linear.
    """
    kernel_size = pair(kernel_size)
    stride = kernel_size if stride is None else pair(stride)
    # fmt: off
    arguments = (grad_output, input_size, kernel_size, stride, pair(padding), count_include_pad,
                 divisor_override, in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        result: Tensor = call(_backward, _check_backward, *arguments)
        return result
    call(_backward_out, _check_backward, *arguments, output=output)
    return output


def _check_backward(
    grad_output: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    *,
    output: Tensor | None = None,
) -> None:
    check_tensor(_BACKWARD, "grad_output", grad_output, 4)
    check_sizes(_BACKWARD, "input_size", input_size)
    _check_divisor(_BACKWARD, divisor_override)
    bounds = (in_rows, in_cols, out_rows, out_cols)
    outputs = grad_output.shape[2:]
    check_axes(_BACKWARD, input_size[2:], kernel_size, stride, padding, _NO_DILATION, bounds, outputs)
    shape = (*input_size[:2], out_rows[-1], out_cols[-1])
    check_shape(_BACKWARD, "grad_output", grad_output, shape)
    check_output(_BACKWARD, "output", output, grad_output, "grad_output", input_size)


@register_fake("patch_avg_pool2d_backward")
def _backward_fake(grad_output: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    _check_backward(grad_output, input_size, *rest)
    return new_like(grad_output, input_size)


@register_fake("patch_avg_pool2d_backward.out")
def _backward_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_backward(*arguments, output=output)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (_forward(grad, *ctx.geometry), *(None,) * 10)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = inputs[2:]


register_autograd("patch_avg_pool2d_backward", _backward_backward, _backward_setup)
refuse_gradients("patch_avg_pool2d_backward")
