"""Batch normalisation of image patches, each by statistics of its own or by given ones.

The training operator saves its input and the statistics; the ReLU's mask is rebuilt in backward. Its
gradient runs in two operators (reduce, apply); where a gradient of the gradient is recorded, the same
formulas run in differentiable PyTorch operations instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitkern.geometry import check_bounds
from splitkern.ops._common import (
    Bounds,
    call,
    check_activation,
    check_ints,
    check_like,
    check_output,
    check_shape,
    check_tensor,
    new_like,
    refuse_gradients,
    register_autograd,
    register_fake,
    statistics_dtype,
)

_NORM = "splitkern::patch_batch_norm"
_STATS = "splitkern::patch_batch_norm_stats"
_APPLY = "splitkern::patch_batch_norm_apply"
_REDUCE = "splitkern::patch_batch_norm_backward_reduce"
_INPUT_GRAD = "splitkern::patch_batch_norm_backward_apply"

_norm = torch.ops.splitkern.patch_batch_norm.default
_stats = torch.ops.splitkern.patch_batch_norm_stats.default
_stats_out = torch.ops.splitkern.patch_batch_norm_stats.out
_apply = torch.ops.splitkern.patch_batch_norm_apply.default
_apply_out = torch.ops.splitkern.patch_batch_norm_apply.out
_reduce = torch.ops.splitkern.patch_batch_norm_backward_reduce.default
_reduce_out = torch.ops.splitkern.patch_batch_norm_backward_reduce.out
_input_grad = torch.ops.splitkern.patch_batch_norm_backward_apply.default
_input_grad_out = torch.ops.splitkern.patch_batch_norm_backward_apply.out


class BatchNormResult(NamedTuple):
    """Output of :func:`patch_batch_norm`, and the statistics of every patch and channel."""

    output: Tensor
    mean: Tensor
    invstd: Tensor
    m2: Tensor


def _whole(operator: str, input: Tensor, rows: Bounds, cols: Bounds) -> tuple[Any, Any]:
    if rows is None or cols is None:
        check_tensor(operator, "input", input, 4)
        rows = (0, input.shape[2]) if rows is None else rows
        cols = (0, input.shape[3]) if cols is None else cols
    return rows, cols


def _check_patches(operator: str, input: Tensor, rows: Sequence[int], cols: Sequence[int]) -> tuple[int, int]:
    check_tensor(operator, "input", input, 4)
    for argument, bounds, extent, what in (
        ("rows", rows, input.shape[2], "input height"),
        ("cols", cols, input.shape[3], "input width"),
    ):
        check_ints(operator, argument, bounds)
        check_bounds(operator, argument, bounds, extent, what)
    return (len(rows) - 1) * (len(cols) - 1), input.shape[1]


def _check_parameters(operator: str, input: Tensor, weight: Any, bias: Any) -> None:
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(operator, argument, value, 1)
            allowed = (torch.float32,) if input.dtype == torch.float32 else (input.dtype, torch.float32)
            check_like(operator, argument, value, input, "input", *allowed)
            check_shape(operator, argument, value, (input.shape[1],))


def _check_statistics(operator: str, input: Tensor, patches: Sequence[int], **values: Any) -> None:
    for argument, value in values.items():
        check_tensor(operator, argument, value, 2)
        check_like(operator, argument, value, input, "input", statistics_dtype(input.dtype))
        check_shape(operator, argument, value, patches)


# --- the formulas in differentiable operations, for gradients of gradients -----------------------


def _patches(input: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Iterator[Tensor]:
    """The patches of a tensor in row-major order, in the type of the statistics."""
    work = statistics_dtype(input.dtype)
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(cols):
            yield input[:, :, top:bottom, left:right].to(work)


def _joined(patches: list[Tensor], cols: Sequence[int], dtype: torch.dtype) -> Tensor:
    across = len(cols) - 1
    strips = [torch.cat(patches[i : i + across], 3) for i in range(0, len(patches), across)]
    return torch.cat(strips, 2).to(dtype)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


class _Derivatives(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    invstd: Tensor


def _differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[int],
    cols: Sequence[int],
    activation: str,
    *,
    eps: float = 0.0,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> _Derivatives:
    """All gradients of normalisation; by batch statistics, or by the constants ``statistics``."""
    work = statistics_dtype(input.dtype)
    scale = torch.ones((), dtype=work, device=input.device) if weight is None else _column(weight.to(work))
    inputs, weights, biases, means, invstds = [], [], [], [], []
    pairs = zip(_patches(grad_output, rows, cols), _patches(input, rows, cols), strict=True)
    for p, (grad, patch) in enumerate(pairs):
        if statistics is None:
            count = max(1, patch.shape[0] * patch.shape[2] * patch.shape[3])
            mean = patch.sum((0, 2, 3)) / count
            centred = patch - _column(mean)
            invstd = torch.rsqrt(centred.square().sum((0, 2, 3)) / count + eps)
        else:
            mean, invstd = statistics[0][p], statistics[1][p]
            centred = patch - _column(mean)
        normal = centred * _column(invstd)
        if activation == "relu":
            output = normal * scale
            if bias is not None:
                output = output + _column(bias.to(work))
            grad = grad * (output > 0)
        sum_grad, sum_grad_centred = grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3))
        weights.append(sum_grad_centred * invstd)
        biases.append(sum_grad)
        means.append(-(grad * scale).sum((0, 2, 3)) * invstd)
        invstds.append((grad * scale * centred).sum((0, 2, 3)))
        if statistics is None:
            correction = normal * _column(weights[-1] / count)
            grad = grad - _column(sum_grad / count) - correction
        inputs.append(grad * scale * _column(invstd))
    return _Derivatives(
        _joined(inputs, cols, input.dtype),
        torch.stack(weights).sum(0),
        torch.stack(biases).sum(0),
        torch.stack(means),
        torch.stack(invstds),
    )


def _like_parameter(needed: bool, gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return gradient.to(parameter.dtype) if needed and parameter is not None else None


# --- patch_batch_norm -----------------------------------------------------------------------------


def patch_batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rows: Bounds = None,
    cols: Bounds = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> BatchNormResult:
    """Normalise every patch of an image batch by the patch's own statistics.

    Args:
        input: [N, C, H, W], any strides.
        weight, bias: [C] or None, of the input's type or float32.
        rows, cols: boundaries of the patches, from 0 to H and W, strictly increasing; an axis without
            is one patch.
        eps: added to the biased variance, in squared units of the input.
        activation: "none" or "relu", applied to the result.

    Returns:
        output, as the input; mean, invstd = 1 / sqrt(m2 / n + eps) and m2 (sum of squared deviations;
        n is N times the patch's area), each [patches in row-major order, C] in float32 (float64 for
        float64). The statistics carry no gradient: it is in the output's.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.

    Example:
        >>> result = patch_batch_norm(torch.randn(2, 3, 4, 4), rows=(0, 2, 4))
        >>> result.output.shape, result.mean.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3]))

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 1.
    """
    rows, cols = _whole(_NORM, input, rows, cols)
    return BatchNormResult(*call(_norm, _check_norm, input, weight, bias, rows, cols, eps, activation))


def _check_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[int],
    cols: Sequence[int],
    eps: float,
    activation: str,
) -> tuple[int, int]:
    patches = _check_patches(_NORM, input, rows, cols)
    _check_parameters(_NORM, input, weight, bias)
    if not isinstance(eps, float | int | torch.SymFloat):
        raise TypeError(f"{_NORM}: eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{_NORM}: eps must not be negative, got {eps}")
    check_activation(_NORM, activation)
    return patches


@register_fake("patch_batch_norm")
def _norm_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    patches = _check_norm(input, *arguments)
    dtype = statistics_dtype(input.dtype)
    mean, invstd, m2 = (input.new_empty(patches, dtype=dtype) for _ in range(3))
    return new_like(input, input.shape), mean, invstd, m2


@register_fake("patch_batch_norm.out")
def _norm_out_fake(input: Tensor, *arguments: Any, output: Tensor, mean: Tensor, invstd: Tensor, m2: Tensor) -> None:
    patches, dtype = _check_norm(input, *arguments), statistics_dtype(input.dtype)
    check_output(_NORM, "output", output, input, "input", input.shape, input.dtype)
    for name, value in (("mean", mean), ("invstd", invstd), ("m2", m2)):
        check_output(_NORM, name, value, input, "input", patches, dtype)


def _norm_backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    input, weight, bias, mean, invstd = ctx.saved_tensors
    rows, cols, eps, activation = ctx.options
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        exact = _differentiable_gradients(grad_output, input, weight, bias, rows, cols, activation, eps=eps)
        return (
            exact.input if needs_input else None,
            _like_parameter(needs_weight, exact.weight, weight),
            _like_parameter(needs_bias, exact.bias, bias),
            *(None,) * 4,
        )
    common = (grad_output, input, mean, invstd, weight, bias)
    sum_grad, sum_grad_centered = _reduce(*common, rows, cols, activation)
    return (
        _input_grad(*common, sum_grad, sum_grad_centered, rows, cols, activation) if needs_input else None,
        _like_parameter(needs_weight, (invstd * sum_grad_centered).sum(0), weight),
        _like_parameter(needs_bias, sum_grad.sum(0), bias),
        *(None,) * 4,
    )


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, *ctx.options = inputs
    _, mean, invstd, m2 = output
    ctx.mark_non_differentiable(mean, invstd, m2)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, mean, invstd)


register_autograd("patch_batch_norm", _norm_backward, _norm_setup)
refuse_gradients("patch_batch_norm")


# --- patch_batch_norm_stats -----------------------------------------------------------------------


def patch_batch_norm_stats(
    input: Tensor,
    *,
    rows: Bounds = None,
    cols: Bounds = None,
    output: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every patch and channel.

    Args:
        input: [N, C, H, W], any strides.
        rows, cols: boundaries of the patches, from 0 to H and W, strictly increasing; an axis without
            is one patch.
        output: (mean, m2) to write to, any strides; refused where gradients are recorded.

    Returns:
        mean and m2, both [patches in row-major order, C] in float32 (float64 for float64); zeros for
        an empty batch.

    Raises:
        ValueError: for bounds that do not fit the input.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> mean, m2 = patch_batch_norm_stats(torch.tensor([[[[1.0, 3.0]]]]))
        >>> mean.item(), m2.item()
        (2.0, 2.0)

    Source: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
    """
    rows, cols = _whole(_STATS, input, rows, cols)
    if output is None:
        result: tuple[Tensor, Tensor] = call(_stats, _check_stats, input, rows, cols)
        return result
    mean, m2 = output
    call(_stats_out, _check_stats, input, rows, cols, mean=mean, m2=m2)
    return mean, m2


def _check_stats(
    input: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    *,
    mean: Tensor | None = None,
    m2: Tensor | None = None,
) -> tuple[int, int]:
    patches = _check_patches(_STATS, input, rows, cols)
    dtype = statistics_dtype(input.dtype)
    check_output(_STATS, "mean", mean, input, "input", patches, dtype)
    check_output(_STATS, "m2", m2, input, "input", patches, dtype)
    return patches


@register_fake("patch_batch_norm_stats")
def _stats_fake(input: Tensor, rows: Sequence[int], cols: Sequence[int]) -> tuple[Tensor, Tensor]:
    patches, dtype = _check_stats(input, rows, cols), statistics_dtype(input.dtype)
    return input.new_empty(patches, dtype=dtype), input.new_empty(patches, dtype=dtype)


@register_fake("patch_batch_norm_stats.out")
def _stats_out_fake(*arguments: Any, mean: Tensor, m2: Tensor) -> None:
    _check_stats(*arguments, mean=mean, m2=m2)


def _stats_backward(ctx: Any, grad_mean: Tensor | None, grad_m2: Tensor | None) -> tuple[Tensor | None, ...]:
    input, mean = ctx.saved_tensors
    rows, cols = ctx.bounds
    if grad_mean is None and grad_m2 is None:
        return None, None, None
    grad_mean = torch.zeros_like(mean) if grad_mean is None else grad_mean
    grad_m2 = torch.zeros_like(mean) if grad_m2 is None else grad_m2
    gradients = []
    for p, patch in enumerate(_patches(input, rows, cols)):
        count = max(1, patch.shape[0] * patch.shape[2] * patch.shape[3])
        centre = patch.sum((0, 2, 3)) / count if torch.is_grad_enabled() else mean[p]
        gradient = (patch - _column(centre)) * _column(2 * grad_m2[p])
        gradients.append(gradient + _column(grad_mean[p] / count))
    return _joined(gradients, cols, input.dtype), None, None


def _stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.bounds = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, output[0])


register_autograd("patch_batch_norm_stats", _stats_backward, _stats_setup)
refuse_gradients("patch_batch_norm_stats")


# --- patch_batch_norm_apply -----------------------------------------------------------------------


def patch_batch_norm_apply(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rows: Bounds = None,
    cols: Bounds = None,
    activation: str = "none",
    output: Tensor | None = None,
) -> Tensor:
    """Normalise every patch by given statistics: (input - mean) · invstd · weight + bias.

    Args:
        input: [N, C, H, W], any strides.
        mean, invstd: [patches in row-major order, C] in float32 (float64 for float64 input).
        weight, bias: [C] or None, of the input's type or float32.
        rows, cols: boundaries of the patches, from 0 to H and W, strictly increasing; an axis without
            is one patch.
        activation: "none" or "relu", applied to the result.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        As the input, or ``output``. Differentiable in all five tensors.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> patch_batch_norm_apply(x, torch.full((1, 1), 2.0), torch.ones(1, 1)).flatten().tolist()
        [-1.0, 1.0]

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 2.
    """
    rows, cols = _whole(_APPLY, input, rows, cols)
    arguments = (input, mean, invstd, weight, bias, rows, cols, activation)
    if output is None:
        result: Tensor = call(_apply, _check_apply, *arguments)
        return result
    call(_apply_out, _check_apply, *arguments, output=output)
    return output


def _check_apply(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[int],
    cols: Sequence[int],
    activation: str,
    *,
    output: Tensor | None = None,
) -> None:
    patches = _check_patches(_APPLY, input, rows, cols)
    _check_statistics(_APPLY, input, patches, mean=mean, invstd=invstd)
    _check_parameters(_APPLY, input, weight, bias)
    check_activation(_APPLY, activation)
    check_output(_APPLY, "output", output, input, "input", input.shape)


@register_fake("patch_batch_norm_apply")
def _apply_fake(input: Tensor, *arguments: Any) -> Tensor:
    _check_apply(input, *arguments)
    return new_like(input, input.shape)


@register_fake("patch_batch_norm_apply.out")
def _apply_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_apply(*arguments, output=output)


def _apply_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, invstd, weight, bias = ctx.saved_tensors
    rows, cols, activation = ctx.options
    needs = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        exact = _differentiable_gradients(
            grad_output, input, weight, bias, rows, cols, activation, statistics=(mean, invstd)
        )
        return (
            exact.input if needs[0] else None,
            exact.mean if needs[1] else None,
            exact.invstd if needs[2] else None,
            _like_parameter(needs[3], exact.weight, weight),
            _like_parameter(needs[4], exact.bias, bias),
            *(None,) * 3,
        )
    common = (grad_output, input, mean, invstd, weight, bias)
    grad_input = _input_grad(*common, None, None, rows, cols, activation) if needs[0] else None
    if not any(needs[1:]):
        return (grad_input, *(None,) * 7)
    sum_grad, sum_grad_centered = _reduce(*common, rows, cols, activation)
    scale = 1 if weight is None else weight.to(mean.dtype)
    return (
        grad_input,
        -sum_grad * invstd * scale if needs[1] else None,
        sum_grad_centered * scale if needs[2] else None,
        _like_parameter(needs[3], (invstd * sum_grad_centered).sum(0), weight),
        _like_parameter(needs[4], sum_grad.sum(0), bias),
        *(None,) * 3,
    )


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mean, invstd, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(input, mean, invstd, weight, bias)


register_autograd("patch_batch_norm_apply", _apply_backward, _apply_setup)
refuse_gradients("patch_batch_norm_apply")


# --- patch_batch_norm_backward_reduce -------------------------------------------------------------


def patch_batch_norm_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rows: Bounds = None,
    cols: Bounds = None,
    activation: str = "none",
    output: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """First half of the gradient of batch norm: the sums over every patch and channel.

    Args:
        grad_output: [N, C, H, W], any strides, of the input's type.
        input, mean, invstd, weight, bias, rows, cols, activation: as in the forward call.
        output: (sum_grad, sum_grad_centered) to write to, any strides; refused where gradients are
            recorded.

    Returns:
        Σ g and Σ g · (input - mean), both [patches in row-major order, C]; g is grad_output, zero
        where the activation's rebuilt input is not positive. Not differentiable: a second derivative
        goes through :func:`patch_batch_norm` or :func:`patch_batch_norm_apply`.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> x, zero, one = torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1), torch.ones(1, 1)
        >>> sums = patch_batch_norm_backward_reduce(torch.ones_like(x), x, zero, one)
        >>> [value.item() for value in sums]
        [2.0, 4.0]

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3.
    """
    rows, cols = _whole(_REDUCE, input, rows, cols)
    arguments = (grad_output, input, mean, invstd, weight, bias, rows, cols, activation)
    if output is None:
        result: tuple[Tensor, Tensor] = call(_reduce, _check_reduce, *arguments)
        return result
    sum_grad, sum_grad_centered = output
    call(_reduce_out, _check_reduce, *arguments, sum_grad=sum_grad, sum_grad_centered=sum_grad_centered)
    return sum_grad, sum_grad_centered


def _check_gradient(
    operator: str,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[int],
    cols: Sequence[int],
    activation: str,
) -> tuple[int, int]:
    patches = _check_patches(operator, input, rows, cols)
    check_tensor(operator, "grad_output", grad_output, 4)
    check_like(operator, "grad_output", grad_output, input, "input")
    check_shape(operator, "grad_output", grad_output, input.shape)
    _check_statistics(operator, input, patches, mean=mean, invstd=invstd)
    _check_parameters(operator, input, weight, bias)
    check_activation(operator, activation)
    return patches


def _check_reduce(
    *arguments: Any,
    sum_grad: Tensor | None = None,
    sum_grad_centered: Tensor | None = None,
) -> tuple[int, int]:
    patches = _check_gradient(_REDUCE, *arguments)
    input = arguments[1]
    dtype = statistics_dtype(input.dtype)
    check_output(_REDUCE, "sum_grad", sum_grad, input, "input", patches, dtype)
    check_output(_REDUCE, "sum_grad_centered", sum_grad_centered, input, "input", patches, dtype)
    return patches


@register_fake("patch_batch_norm_backward_reduce")
def _reduce_fake(grad_output: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    patches = _check_reduce(grad_output, input, *rest)
    dtype = statistics_dtype(input.dtype)
    return input.new_empty(patches, dtype=dtype), input.new_empty(patches, dtype=dtype)


@register_fake("patch_batch_norm_backward_reduce.out")
def _reduce_out_fake(*arguments: Any, sum_grad: Tensor, sum_grad_centered: Tensor) -> None:
    _check_reduce(*arguments, sum_grad=sum_grad, sum_grad_centered=sum_grad_centered)


def _reduce_backward(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(f"{_REDUCE}: has no derivative; differentiate patch_batch_norm or patch_batch_norm_apply twice")


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing to keep: the operator has no derivative."""


register_autograd("patch_batch_norm_backward_reduce", _reduce_backward, _no_setup)
refuse_gradients("patch_batch_norm_backward_reduce")


# --- patch_batch_norm_backward_apply --------------------------------------------------------------


def patch_batch_norm_backward_apply(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    sum_grad: Tensor | None = None,
    sum_grad_centered: Tensor | None = None,
    *,
    rows: Bounds = None,
    cols: Bounds = None,
    activation: str = "none",
    output: Tensor | None = None,
) -> Tensor:
    """Second half of the gradient of batch norm: the input's.

    Args:
        grad_output: [N, C, H, W], any strides, of the input's type.
        input, mean, invstd, weight, bias, rows, cols, activation: as in the forward call.
        sum_grad, sum_grad_centered: from :func:`patch_batch_norm_backward_reduce` where the statistics
            are the patches' own, both None where they are constants.
        output: tensor to write to, any strides; refused where gradients are recorded.

    Returns:
        weight · invstd · (g - sum_grad / n - (input - mean) · invstd² · sum_grad_centered / n), n being
        N times the patch's area, or weight · invstd · g, in grad_output's memory format; or ``output``.
        Not differentiable, as :func:`patch_batch_norm_backward_reduce`.

    Raises:
        ValueError: for shapes, options or bounds that do not fit each other.
        TypeError: for types that do not.
        RuntimeError: for ``output`` where gradients are recorded.

    Example:
        >>> x, zero, one = torch.ones(1, 1, 1, 2), torch.zeros(1, 1), torch.ones(1, 1)
        >>> patch_batch_norm_backward_apply(2 * x, x, zero, one).flatten().tolist()
        [2.0, 2.0]

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3.
    """
    rows, cols = _whole(_INPUT_GRAD, input, rows, cols)
    # fmt: off
    arguments = (grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered,
                 rows, cols, activation)
    # fmt: on
    if output is None:
        result: Tensor = call(_input_grad, _check_input_grad, *arguments)
        return result
    call(_input_grad_out, _check_input_grad, *arguments, output=output)
    return output


def _check_input_grad(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_centered: Tensor | None,
    *options: Any,
    output: Tensor | None = None,
) -> None:
    arguments = (grad_output, input, mean, invstd, weight, bias, *options)
    patches = _check_gradient(_INPUT_GRAD, *arguments)
    if (sum_grad is None) != (sum_grad_centered is None):
        raise ValueError(
            f"{_INPUT_GRAD}: sum_grad and sum_grad_centered must be given together or not at all, "
            f"got only {'sum_grad' if sum_grad_centered is None else 'sum_grad_centered'}"
        )
    if sum_grad is not None:
        sums = {"sum_grad": sum_grad, "sum_grad_centered": sum_grad_centered}
        _check_statistics(_INPUT_GRAD, input, patches, **sums)
    check_output(_INPUT_GRAD, "output", output, input, "input", input.shape)


@register_fake("patch_batch_norm_backward_apply")
def _input_grad_fake(grad_output: Tensor, *arguments: Any) -> Tensor:
    _check_input_grad(grad_output, *arguments)
    return new_like(grad_output, grad_output.shape)


@register_fake("patch_batch_norm_backward_apply.out")
def _input_grad_out_fake(*arguments: Any, output: Tensor) -> None:
    _check_input_grad(*arguments, output=output)


def _input_grad_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        f"{_INPUT_GRAD}: has no derivative; differentiate patch_batch_norm or patch_batch_norm_apply twice"
    )


register_autograd("patch_batch_norm_backward_apply", _input_grad_backward, _no_setup)
refuse_gradients("patch_batch_norm_backward_apply")
