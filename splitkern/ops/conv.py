"""Convolution of image patches: the operator, its two gradients, and what PyTorch must know of them.

The three are one trilinear form seen from its three sides, so each one's derivative is the other two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from splitkern.ops._common import (
    Bounds,
    Ints,
    call,
    check_activation,
    check_axes,
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
    register_kernel,
)

_FORWARD = "splitkern::patch_conv2d"
_INPUT_GRAD = "splitkern::patch_conv2d_input_grad"
_WEIGHT_GRAD = "splitkern::patch_conv2d_weight_grad"

_forward = torch.ops.splitkern.patch_conv2d.default
_forward_out = torch.ops.splitkern.patch_conv2d.out
_input_grad = torch.ops.splitkern.patch_conv2d_input_grad.default
_input_grad_out = torch.ops.splitkern.patch_conv2d_input_grad.out
_weight_grad = torch.ops.splitkern.patch_conv2d_weight_grad.default
_weight_grad_out = torch.ops.splitkern.patch_conv2d_weight_grad.out


# --- patch_conv2d ---------------------------------------------------------------------------------


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
    output: Tensor | None = None,
) -> Tensor:
    """Convolve every patch of an image by itself, with zeros wherever a window leaves its patch.

    Args:
        input: [N, C, H, W], any strides.
        weight: [O, C / groups, kernel rows, kernel columns], of the input's type.
        bias: [O] or None, of the input's type.
        stride, dilation: in elements, for both axes or (rows, columns).
        padding: begin padding in elements, possibly negative; the end padding follows from the bounds.
        groups: number of channel groups.
        in_rows, in_cols: input boundaries of the patches, from 0 to H and W, strictly increasing.
        out_rows, out_cols: output boundaries, as many. An axis without bounds is one patch, padded
            alike at both ends.
        activation: "none" or "relu", applied to the result.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        [N, O, out_rows[-1], out_cols[-1]] in the input's memory format, or ``output``.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> patch_conv2d(x, w, padding=1, in_rows=(0, 4, 8), out_rows=(0, 4, 8)).shape
        torch.Size([1, 4, 8, 8])

    Source: Jin and Hong, Split-CNN, ASPLOS 2019, section 3.
    """
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    if in_rows is None or out_rows is None or in_cols is None or out_cols is None:
        check_tensor(_FORWARD, "weight", weight, 4)
        bounds = (in_rows, in_cols, out_rows, out_cols)
        in_rows, in_cols, out_rows, out_cols = fill_bounds(
            _FORWARD, input, weight.shape[2:], stride, padding, dilation, False, bounds
        )
    # fmt: off
    arguments = (input, weight, bias, stride, padding, dilation, groups,
                 in_rows, in_cols, out_rows, out_cols, activation)
    # fmt: on
    if output is None:
        result: Tensor = call(_forward, _explain_forward, *arguments)
        return result
    call(_forward_out, _explain_forward, *arguments, output=output)
    return output


def _explain_forward(input: Any, weight: Any, bias: Any, *rest: Any, output: Any = None) -> None:
    device = input.device.type if isinstance(input, Tensor) else None
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        input, weight, bias = _cast(device, input, weight, bias)
    _check_forward(input, weight, bias, *rest, output=output)


def _check_weight(
    operator: str,
    channels: int,
    weight_shape: Sequence[int],
    groups: Any,
    argument: str = "weight",
) -> None:
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{operator}: groups must be an integer of at least 1, got {groups}")
    if channels % groups != 0:
        raise ValueError(f"{operator}: groups must divide the input channels {channels}, got {groups}")
    if weight_shape[1] * groups != channels:
        raise ValueError(
            f"{operator}: {argument} must have {channels // groups} input channels per group "
            f"(input channels {channels}, groups {groups}), got shape {list(weight_shape)}"
        )
    if weight_shape[0] % groups != 0:
        raise ValueError(f"{operator}: groups must divide the output channels {weight_shape[0]}, got {groups}")


def _check_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    activation: str,
    *,
    output: Tensor | None = None,
) -> tuple[int, ...]:
    check_tensor(_FORWARD, "input", input, 4)
    check_tensor(_FORWARD, "weight", weight, 4)
    check_like(_FORWARD, "weight", weight, input, "input")
    _check_weight(_FORWARD, input.shape[1], weight.shape, groups)
    if bias is not None:
        check_tensor(_FORWARD, "bias", bias, 1)
        check_like(_FORWARD, "bias", bias, input, "input")
        check_shape(_FORWARD, "bias", bias, (weight.shape[0],))
    check_axes(
        _FORWARD,
        input.shape[2:],
        weight.shape[2:],
        stride,
        padding,
        dilation,
        (in_rows, in_cols, out_rows, out_cols),
    )
    check_activation(_FORWARD, activation)
    shape = (input.shape[0], weight.shape[0], out_rows[-1], out_cols[-1])
    check_output(_FORWARD, "output", output, input, "input", shape)
    return shape


@register_fake("patch_conv2d")
def _forward_fake(input: Tensor, *arguments: Any) -> Tensor:
    return new_like(input, _check_forward(input, *arguments))


@register_fake("patch_conv2d.out")
def _forward_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_forward(*arguments, output=output)


def _forward_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    if output is not None:
        grad_output = torch.ops.aten.threshold_backward(grad_output, output, 0)
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        _input_grad(grad_output, weight, ctx.input_size, *ctx.geometry) if needs_input else None,
        _weight_grad(grad_output, input, ctx.weight_size, *ctx.geometry) if needs_weight else None,
        grad_output.sum((0, 2, 3)) if needs_bias else None,
        *_NO_GRADIENTS,
    )


_NO_GRADIENTS = (None,) * 9


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight = inputs[:2]
    ctx.input_size, ctx.weight_size = list(input.shape), list(weight.shape)
    ctx.geometry = inputs[3:11]
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        input if needs_weight else None,
        weight if needs_input else None,
        output if inputs[11] == "relu" else None,
    )


register_autograd("patch_conv2d", _forward_backward, _forward_setup)
refuse_gradients("patch_conv2d")


def _cast(device_type: str, *tensors: Any) -> list[Any]:
    """What PyTorch's own autocast does before a convolution; float64 stays."""
    dtype = torch.get_autocast_dtype(device_type)
    return [
        tensor.to(dtype)
        if isinstance(tensor, Tensor)
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and tensor.device.type == device_type
        else tensor
        for tensor in tensors
    ]


def _autocast_kernel(overload: Any, device_type: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(key)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **outputs: Tensor) -> Any:
        tensors = _cast(device_type, input, weight, bias)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return overload(*tensors, *rest, **outputs)

    return kernel


# The gradients have no autocast rule: they are given tensors of the type that the forward used.
_AUTOCAST_DEVICES = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
}
for _device, _key in _AUTOCAST_DEVICES.items():
    register_kernel("patch_conv2d", _autocast_kernel(_forward, _device, _key), _key.name)
    register_kernel("patch_conv2d.out", _autocast_kernel(_forward_out, _device, _key), _key.name)

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _forward_of_gradients(input: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """The convolution inside a double backward, in the types it is given also under autocast."""
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        result: Tensor = _forward(input, weight, None, *geometry, "none")
    return result


# --- patch_conv2d_input_grad ----------------------------------------------------------------------


def patch_conv2d_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    *,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    output: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`patch_conv2d` with respect to its input (no activation).

    Args:
        grad_output: [N, O, out_rows[-1], out_cols[-1]], any strides.
        weight: [O, C / groups, kernel rows, kernel columns], of grad_output's type.
        input_size: [N, C, H, W].
        in_rows, in_cols, out_rows, out_cols, stride, padding, dilation, groups: as in the forward call.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        [N, C, H, W] in grad_output's memory format, or ``output``. Inputs that no window of their
        patch reads get zero.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> g, w = torch.randn(1, 4, 8, 8), torch.randn(4, 3, 3, 3)
        >>> rows = cols = (0, 4, 8)
        >>> patch_conv2d_input_grad(g, w, (1, 3, 8, 8), padding=1, in_rows=rows, in_cols=cols,
        ...                         out_rows=rows, out_cols=cols).shape
        torch.Size([1, 3, 8, 8])

    Source: the transposed convolution, Dumoulin and Visin, arXiv 1603.07285, section 4.
    """
    # fmt: off
    arguments = (grad_output, weight, input_size, pair(stride), pair(padding), pair(dilation), groups,
                 in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        result: Tensor = call(_input_grad, _check_input_grad, *arguments)
        return result
    call(_input_grad_out, _check_input_grad, *arguments, output=output)
    return output


def _check_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    *,
    output: Tensor | None = None,
) -> None:
    check_tensor(_INPUT_GRAD, "grad_output", grad_output, 4)
    check_tensor(_INPUT_GRAD, "weight", weight, 4)
    check_like(_INPUT_GRAD, "weight", weight, grad_output, "grad_output")
    check_sizes(_INPUT_GRAD, "input_size", input_size)
    _check_weight(_INPUT_GRAD, input_size[1], weight.shape, groups)
    check_axes(
        _INPUT_GRAD,
        input_size[2:],
        weight.shape[2:],
        stride,
        padding,
        dilation,
        (in_rows, in_cols, out_rows, out_cols),
        grad_output.shape[2:],
    )
    channels = (input_size[0], weight.shape[0])
    check_shape(_INPUT_GRAD, "grad_output", grad_output, (*channels, out_rows[-1], out_cols[-1]))
    check_output(_INPUT_GRAD, "output", output, grad_output, "grad_output", input_size)


@register_fake("patch_conv2d_input_grad")
def _input_grad_fake(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    _check_input_grad(grad_output, weight, input_size, *rest)
    return new_like(grad_output, input_size)


@register_fake("patch_conv2d_input_grad.out")
def _input_grad_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_input_grad(*arguments, output=output)


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight = ctx.saved_tensors
    needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
    return (
        _forward_of_gradients(grad, weight, ctx.geometry) if needs_grad_output else None,
        _weight_grad(grad_output, grad, ctx.weight_size, *ctx.geometry) if needs_weight else None,
        *_NO_GRADIENTS,
    )


def _input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight = inputs[:2]
    ctx.weight_size = list(weight.shape)
    ctx.geometry = inputs[3:]
    needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad_output if needs_weight else None, weight if needs_grad_output else None)


register_autograd("patch_conv2d_input_grad", _input_grad_backward, _input_grad_setup)
refuse_gradients("patch_conv2d_input_grad")


# --- patch_conv2d_weight_grad ---------------------------------------------------------------------


def patch_conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    *,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    accumulate: bool = False,
    output: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`patch_conv2d` with respect to its weight (no activation).

    Args:
        grad_output: [N, O, out_rows[-1], out_cols[-1]], any strides.
        input: [N, C, H, W], any strides, of grad_output's type.
        weight_size: [O, C / groups, kernel rows, kernel columns].
        in_rows, in_cols, out_rows, out_cols, stride, padding, dilation, groups: as in the forward call.
        accumulate: add to what ``output`` holds; only with ``output``.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        A contiguous tensor of ``weight_size``, or ``output``.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> g, x = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8, 8)
        >>> rows = cols = (0, 4, 8)
        >>> patch_conv2d_weight_grad(g, x, (4, 3, 3, 3), padding=1, in_rows=rows, in_cols=cols,
        ...                          out_rows=rows, out_cols=cols).shape
        torch.Size([4, 3, 3, 3])

    Source: the derivative of the sum that :func:`patch_conv2d` computes.
    """
    # fmt: off
    arguments = (grad_output, input, weight_size, pair(stride), pair(padding), pair(dilation), groups,
                 in_rows, in_cols, out_rows, out_cols)
    # fmt: on
    if output is None:
        if accumulate:
            raise ValueError(f"{_WEIGHT_GRAD}: accumulate must come with output, got output None")
        result: Tensor = call(_weight_grad, _check_weight_grad, *arguments)
        return result
    call(_weight_grad_out, _check_weight_grad, *arguments, accumulate, output=output)
    return output


def _check_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_rows: Sequence[int],
    in_cols: Sequence[int],
    out_rows: Sequence[int],
    out_cols: Sequence[int],
    accumulate: bool = False,
    *,
    output: Tensor | None = None,
) -> None:
    check_tensor(_WEIGHT_GRAD, "grad_output", grad_output, 4)
    check_tensor(_WEIGHT_GRAD, "input", input, 4)
    check_like(_WEIGHT_GRAD, "input", input, grad_output, "grad_output")
    check_sizes(_WEIGHT_GRAD, "weight_size", weight_size)
    _check_weight(_WEIGHT_GRAD, input.shape[1], weight_size, groups, "weight_size")
    check_axes(
        _WEIGHT_GRAD,
        input.shape[2:],
        weight_size[2:],
        stride,
        padding,
        dilation,
        (in_rows, in_cols, out_rows, out_cols),
        grad_output.shape[2:],
    )
    channels = (input.shape[0], weight_size[0])
    check_shape(_WEIGHT_GRAD, "grad_output", grad_output, (*channels, out_rows[-1], out_cols[-1]))
    check_output(_WEIGHT_GRAD, "output", output, grad_output, "grad_output", weight_size)


@register_fake("patch_conv2d_weight_grad")
def _weight_grad_fake(grad_output: Tensor, input: Tensor, weight_size: Sequence[int], *rest: Any) -> Tensor:
    _check_weight_grad(grad_output, input, weight_size, *rest)
    return grad_output.new_empty(list(weight_size))


@register_fake("patch_conv2d_weight_grad.out")
def _weight_grad_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_weight_grad(*arguments, output=output)


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input = ctx.saved_tensors
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    return (
        _forward_of_gradients(input, grad, ctx.geometry) if needs_grad_output else None,
        _input_grad(grad_output, grad, ctx.input_size, *ctx.geometry) if needs_input else None,
        *_NO_GRADIENTS,
    )


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input = inputs[:2]
    ctx.input_size = list(input.shape)
    ctx.geometry = inputs[3:]
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad_output if needs_input else None, input if needs_grad_output else None)


register_autograd("patch_conv2d_weight_grad", _weight_grad_backward, _weight_grad_setup)
refuse_gradients("patch_conv2d_weight_grad")
