"""Max pooling of image patches, one saved byte per output, and its first and second derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitkern.ops._common import (
    MAX_WINDOW_POSITIONS,
    Bounds,
    Ints,
    call,
    check_axes,
    check_ints,
    check_like,
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

_FORWARD = "splitkern::patch_max_pool2d"
_BACKWARD = "splitkern::patch_max_pool2d_backward"
_GATHER = "splitkern::patch_max_pool2d_gather"

_forward = torch.ops.splitkern.patch_max_pool2d.default
_forward_out = torch.ops.splitkern.patch_max_pool2d.out
_backward = torch.ops.splitkern.patch_max_pool2d_backward.default
_backward_out = torch.ops.splitkern.patch_max_pool2d_backward.out
_gather = torch.ops.splitkern.patch_max_pool2d_gather.default
_gather_out = torch.ops.splitkern.patch_max_pool2d_gather.out


def _check_window(operator: str, kernel_size: Sequence[int]) -> None:
    check_ints(operator, "kernel_size", kernel_size, 2)
    if kernel_size[0] * kernel_size[1] > MAX_WINDOW_POSITIONS:
        raise ValueError(
            f"{operator}: kernel_size must have at most {MAX_WINDOW_POSITIONS} positions, got {list(kernel_size)}"
        )


def _check_offsets(operator: str, offsets: Any, like: Tensor, of: str, shape: Sequence[int]) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{operator}: offsets must be a Tensor, got {type(offsets).__name__}")
    check_shape(operator, "offsets", offsets, shape)
    check_like(operator, "offsets", offsets, like, of, torch.uint8)


# --- patch_max_pool2d -----------------------------------------------------------------------------


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
    output: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Take the maximum of every window over its own patch, and where in the window it was.

    Args:
        input: [N, C, H, W], any strides.
        kernel_size: in elements, for both axes or (rows, columns); at most 255 positions.
        stride: in elements; ``kernel_size`` where None.
        padding: begin padding in elements, possibly negative; the end padding follows from the bounds.
        dilation: in elements.
        ceil_mode: round the output extent of an axis without bounds up.
        in_rows, in_cols: input boundaries of the patches, from 0 to H and W, strictly increasing.
        out_rows, out_cols: output boundaries, as many. An axis without bounds is one patch, padded
            alike at both ends.
        output: (values, offsets) to write to, any strides; refused where gradients are recorded.

    Returns:
        values, of the input's type, and uint8 offsets (row-major position inside the window), both
        [N, C, out_rows[-1], out_cols[-1]] in the input's memory format. The first maximum wins and a
        NaN is kept, as in PyTorch; a window that sees no input has value -inf and offset 255.
        Offsets carry no gradient.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> values, offsets = patch_max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
        >>> values.flatten().tolist(), offsets.flatten().tolist()
        ([5.0, 7.0, 13.0, 15.0], [3, 3, 3, 3])

    Source: Jin and Hong, Split-CNN, ASPLOS 2019, section 3; ties and NaN as
    ``aten/src/ATen/native/cpu/MaxPoolKernel.cpp``.
    """
    kernel_size, padding, dilation = pair(kernel_size), pair(padding), pair(dilation)
    stride = kernel_size if stride is None else pair(stride)
    if in_rows is None or out_rows is None or in_cols is None or out_cols is None:
        bounds = (in_rows, in_cols, out_rows, out_cols)
        in_rows, in_cols, out_rows, out_cols = fill_bounds(
            _FORWARD, input, kernel_size, stride, padding, dilation, ceil_mode, bounds
        )
    # fmt: off
    arguments = (input, kernel_size, stride, padding, dilation,
                 in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        result: tuple[Tensor, Tensor] = call(_forward, _check_forward, *arguments)
        return result
    values, offsets = output
    call(_forward_out, _check_forward, *arguments, values=values, offsets=offsets)
    return values, offsets


def _check_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    *,
    values: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[int, ...]:
    check_tensor(_FORWARD, "input", input, 4)
    _check_window(_FORWARD, kernel_size)
    bounds = (in_rows, in_cols, out_rows, out_cols)
    check_axes(_FORWARD, input.shape[2:], kernel_size, stride, padding, dilation, bounds)
    shape = (*input.shape[:2], out_rows[-1], out_cols[-1])
    check_output(_FORWARD, "values", values, input, "input", shape)
    check_output(_FORWARD, "offsets", offsets, input, "input", shape, torch.uint8)
    return shape


@register_fake("patch_max_pool2d")
def _forward_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    shape = _check_forward(input, *arguments)
    return new_like(input, shape), new_like(input, shape, torch.uint8)


@register_fake("patch_max_pool2d.out")
def _forward_out_fake(*arguments: Any, values: Tensor, offsets: Tensor) -> None:
    _check_forward(*arguments, values=values, offsets=offsets)


def _forward_backward(ctx: Any, grad_values: Tensor | None, grad_offsets: None) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    if grad_values is None:
        return (None,) * 9
    return (_backward(grad_values, offsets, ctx.input_size, *ctx.geometry), *(None,) * 8)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.input_size, ctx.geometry = list(inputs[0].shape), inputs[1:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


register_autograd("patch_max_pool2d", _forward_backward, _forward_setup)
refuse_gradients("patch_max_pool2d")


# --- patch_max_pool2d_backward --------------------------------------------------------------------


def patch_max_pool2d_backward(
    grad_output: Tensor,
    offsets: Tensor,
    input_size: Sequence[int],
    kernel_size: Ints,
    *,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    output: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`patch_max_pool2d`: every output's goes to the input it was taken from.

    Args:
        grad_output: [N, C, out_rows[-1], out_cols[-1]], any strides.
        offsets: uint8, of grad_output's shape, from the forward call.
        input_size: [N, C, H, W].
        kernel_size, stride, padding, dilation, in_rows, in_cols, out_rows, out_cols: as in the
            forward call.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        [N, C, H, W] in grad_output's memory format, or ``output``.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> offsets = torch.full((1, 1, 1, 1), 3, dtype=torch.uint8)
        >>> bounds = {"in_rows": (0, 2), "in_cols": (0, 2), "out_rows": (0, 1), "out_cols": (0, 1)}
        >>> patch_max_pool2d_backward(torch.ones(1, 1, 1, 1), offsets, (1, 1, 2, 2), 2, **bounds)
        tensor([[[[0., 0.],
                  [0., 1.]]]])

    Source: the derivative of the maximum, as ``torch.nn.functional.max_pool2d`` defines it at ties.
    """
    kernel_size = pair(kernel_size)
    stride = kernel_size if stride is None else pair(stride)
    # fmt: off
    arguments = (grad_output, offsets, input_size, kernel_size, stride, pair(padding), pair(dilation),
                 in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        result: Tensor = call(_backward, _check_backward, *arguments)
        return result
    call(_backward_out, _check_backward, *arguments, output=output)
    return output


def _check_backward(
    grad_output: Tensor,
    offsets: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    *,
    output: Tensor | None = None,
) -> None:
    check_tensor(_BACKWARD, "grad_output", grad_output, 4)
    check_sizes(_BACKWARD, "input_size", input_size)
    _check_window(_BACKWARD, kernel_size)
    bounds = (in_rows, in_cols, out_rows, out_cols)
    outputs = grad_output.shape[2:]
    check_axes(_BACKWARD, input_size[2:], kernel_size, stride, padding, dilation, bounds, outputs)
    shape = (*input_size[:2], out_rows[-1], out_cols[-1])
    check_shape(_BACKWARD, "grad_output", grad_output, shape)
    _check_offsets(_BACKWARD, offsets, grad_output, "grad_output", shape)
    check_output(_BACKWARD, "output", output, grad_output, "grad_output", input_size)


@register_fake("patch_max_pool2d_backward")
def _backward_fake(grad_output: Tensor, offsets: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    _check_backward(grad_output, offsets, input_size, *rest)
    return new_like(grad_output, input_size)


@register_fake("patch_max_pool2d_backward.out")
def _backward_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_backward(*arguments, output=output)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return (_gather(grad, offsets, *ctx.geometry), *(None,) * 10)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = inputs[3:]
    ctx.save_for_backward(inputs[1])


register_autograd("patch_max_pool2d_backward", _backward_backward, _backward_setup)
refuse_gradients("patch_max_pool2d_backward")


# --- patch_max_pool2d_gather ----------------------------------------------------------------------


def patch_max_pool2d_gather(
    input: Tensor,
    offsets: Tensor,
    kernel_size: Ints,
    *,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    output: Tensor | None = None,
) -> Tensor:
    """Read a tensor at the places that an earlier :func:`patch_max_pool2d` took its maxima from.

    Args:
        input: [N, C, H, W], any strides.
        offsets: uint8 [N, C, out_rows[-1], out_cols[-1]], from the forward call.
        kernel_size, stride, padding, dilation, in_rows, in_cols, out_rows, out_cols: as in the
            forward call.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        [N, C, out_rows[-1], out_cols[-1]] in the input's memory format, or ``output``; 0 where the
        offset is 255.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> offsets = torch.full((1, 1, 1, 1), 3, dtype=torch.uint8)
        >>> bounds = {"in_rows": (0, 2), "in_cols": (0, 2), "out_rows": (0, 1), "out_cols": (0, 1)}
        >>> patch_max_pool2d_gather(torch.arange(4.0).view(1, 1, 2, 2), offsets, 2, **bounds).item()
        3.0

    Source: the transpose of :func:`patch_max_pool2d_backward`, hence its derivative.
    """
    kernel_size = pair(kernel_size)
    stride = kernel_size if stride is None else pair(stride)
    # fmt: off
    arguments = (input, offsets, kernel_size, stride, pair(padding), pair(dilation),
                 in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        result: Tensor = call(_gather, _check_gather, *arguments)
        return result
    call(_gather_out, _check_gather, *arguments, output=output)
    return output


def _check_gather(
    input: Tensor,
    offsets: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    *,
    output: Tensor | None = None,
) -> tuple[int, ...]:
    check_tensor(_GATHER, "input", input, 4)
    _check_window(_GATHER, kernel_size)
    bounds = (in_rows, in_cols, out_rows, out_cols)
    check_axes(_GATHER, input.shape[2:], kernel_size, stride, padding, dilation, bounds)
    shape = (*input.shape[:2], out_rows[-1], out_cols[-1])
    _check_offsets(_GATHER, offsets, input, "input", shape)
    check_output(_GATHER, "output", output, input, "input", shape)
    return shape


@register_fake("patch_max_pool2d_gather")
def _gather_fake(input: Tensor, *arguments: Any) -> Tensor:
    return new_like(input, _check_gather(input, *arguments))


@register_fake("patch_max_pool2d_gather.out")
def _gather_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_gather(*arguments, output=output)


def _gather_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return (_backward(grad_output, offsets, ctx.input_size, *ctx.geometry), *(None,) * 9)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.input_size, ctx.geometry = list(inputs[0].shape), inputs[2:]
    ctx.save_for_backward(inputs[1])


register_autograd("patch_max_pool2d_gather", _gather_backward, _gather_setup)
refuse_gradients("patch_max_pool2d_gather")
