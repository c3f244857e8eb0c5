"""Max and average pooling of patches: bit-equal to PyTorch where unsplit, to the reference elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitkern import ops, reference

from .cases import (
    CASES,
    DTYPES,
    FORMATS,
    CalledOperators,
    Case,
    SavedBytes,
    assert_accurate,
    assert_format_of,
    by_name,
    dtype_name,
    gradients,
    make,
)

INF, NAN = float("inf"), float("nan")


# --- maximum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_max_equals_the_reference(case: Case, dtype: torch.dtype, layout: str) -> None:
    x = make(case.shape, dtype, layout)
    values, offsets = ops.patch_max_pool2d(x, **case.max_pool)
    wanted_values, wanted_offsets = reference.patch_max_pool2d(x, **case.max_pool)
    assert values.dtype == dtype
    assert offsets.dtype == torch.uint8
    assert torch.equal(values, wanted_values)
    assert torch.equal(offsets, wanted_offsets)
    assert_format_of(values, x)
    assert_format_of(offsets, x)

    g = make(values.shape, dtype, layout, seed=1)
    came = ops.patch_max_pool2d_backward(g, offsets, x.shape, **case.max_pool)
    (exact,) = gradients(lambda x: reference.patch_max_pool2d(x, **case.max_pool)[0], [x.double()], g.double())
    (pytorch,) = gradients(lambda x: reference.patch_max_pool2d(x, **case.max_pool)[0], [x], g)
    assert_accurate(came, exact, pytorch, case.kernel[0] * case.kernel[1])
    assert_format_of(came, g)

    seen = ops.patch_max_pool2d_gather(x, offsets, **case.max_pool)
    assert torch.equal(seen, torch.where(offsets == 255, torch.zeros((), dtype=dtype), values))
    assert_format_of(seen, x)


def special_values(kind: str) -> Tensor:
    x = make((2, 3, 11, 13), torch.float32)
    if kind == "ties":
        return x.round()
    if kind == "constant":
        return torch.zeros_like(x)
    if kind == "nan":
        return x.masked_fill(make(x.shape, seed=1) > 1, NAN)
    if kind == "all_nan":
        return torch.full_like(x, NAN)
    if kind == "minus_inf":
        return x.masked_fill(make(x.shape, seed=1) > -1, -INF)
    if kind == "all_minus_inf":
        return torch.full_like(x, -INF)
    if kind == "inf_and_nan":
        return x.masked_fill(make(x.shape, seed=1) > 1, NAN).masked_fill(make(x.shape, seed=2) > 1, INF)
    return x


POOL_OPTIONS: dict[str, dict[str, Any]] = {
    "2_2": {"kernel_size": 2},
    "3_2_1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3_1_1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "2_3_ceil": {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    "3_2_ceil": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "unequal": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
}
DILATED = {"3_2_1_dilation_2": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("options", (POOL_OPTIONS | DILATED).values(), ids=(POOL_OPTIONS | DILATED).keys())
@pytest.mark.parametrize(
    "kind", ["normal", "ties", "constant", "nan", "all_nan", "minus_inf", "all_minus_inf", "inf_and_nan"]
)
def test_max_unsplit_is_bit_equal_to_pytorch(kind: str, options: dict[str, Any], layout: str) -> None:
    x = special_values(kind)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    values, offsets = ops.patch_max_pool2d(x, **options)
    wanted, indices = F.max_pool2d(x, **options, return_indices=True)
    assert torch.equal(values.nan_to_num(7.0, 8.0, 9.0), wanted.nan_to_num(7.0, 8.0, 9.0))

    pairs = {name: (value, value) if isinstance(value, int) else value for name, value in options.items()}
    kernel, dilation = pairs["kernel_size"], pairs.get("dilation", (1, 1))
    stride, padding = pairs.get("stride", kernel), pairs.get("padding", (0, 0))
    rows = torch.arange(values.shape[2])[:, None] * stride[0] - padding[0]
    cols = torch.arange(values.shape[3]) * stride[1] - padding[1]
    row, col = offsets.long() // kernel[1], offsets.long() % kernel[1]
    assert torch.equal((rows + row * dilation[0]) * x.shape[3] + cols + col * dilation[1], indices)


def test_max_of_a_blind_window_is_minus_infinity_and_passes_no_gradient() -> None:
    bounds = {"in_rows": (0, 1, 8), "out_rows": (0, 7, 8)}
    x = make((1, 1, 8, 8)).requires_grad_()
    values, offsets = ops.patch_max_pool2d(x, 3, stride=1, padding=1, **bounds)
    blind = offsets == 255
    assert blind[0, 0, 2:7].all()
    assert torch.equal(values == -INF, blind)
    values.backward(torch.ones_like(values))
    assert x.grad is not None
    assert x.grad.sum() == (~blind).sum()


def test_max_keeps_nan_within_its_patch() -> None:
    x = make((1, 1, 8, 8))
    x[:, :, 4:] = NAN
    values, _ = ops.patch_max_pool2d(x, 3, stride=1, padding=1, in_rows=(0, 4, 8), out_rows=(0, 4, 8))
    assert values[:, :, :4].isfinite().all()
    assert values[:, :, 4:].isnan().all()


def test_max_window_of_255_positions_works() -> None:
    x = torch.arange(15.0 * 17.0).view(1, 1, 15, 17)
    values, offsets = ops.patch_max_pool2d(x, (15, 17))
    assert (values.item(), offsets.item()) == (254.0, 254)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_max_saves_one_byte_per_output(dtype: torch.dtype) -> None:
    x = make((2, 3, 16, 16), dtype).requires_grad_()
    with SavedBytes() as saved:
        values, offsets = ops.patch_max_pool2d(x, 2, in_rows=(0, 6, 16), out_rows=(0, 3, 8))
    assert saved.total == values.numel()
    assert not offsets.requires_grad


# --- average --------------------------------------------------------------------------------------

DIVISORS: dict[str, dict[str, Any]] = {
    "padded": {"count_include_pad": True},
    "inside": {"count_include_pad": False},
    "given": {"divisor_override": 5},
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("divisor", DIVISORS.values(), ids=DIVISORS.keys())
@pytest.mark.parametrize("case", [case for case in CASES if "dilation" not in case.name], ids=str)
def test_average_equals_the_reference(case: Case, divisor: dict[str, Any], dtype: torch.dtype, layout: str) -> None:
    x = make(case.shape, dtype, layout)

    def function(x: Tensor) -> Tensor:
        return reference.patch_avg_pool2d(x, **case.avg_pool, **divisor)

    positions = case.kernel[0] * case.kernel[1]
    came = ops.patch_avg_pool2d(x, **case.avg_pool, **divisor)
    assert_accurate(came, function(x.double()), function(x), positions)
    assert_format_of(came, x)

    g = make(came.shape, dtype, layout, seed=1)
    came = ops.patch_avg_pool2d_backward(g, x.shape, **case.avg_pool, **divisor)
    (exact,), (pytorch,) = gradients(function, [x.double()], g.double()), gradients(function, [x], g)
    assert_accurate(came, exact, pytorch, positions)
    assert_format_of(came, g)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("divisor", DIVISORS.values(), ids=DIVISORS.keys())
@pytest.mark.parametrize("options", POOL_OPTIONS.values(), ids=POOL_OPTIONS.keys())
def test_average_unsplit_equals_pytorch(options: dict[str, Any], divisor: dict[str, Any], layout: str) -> None:
    x = make((2, 3, 11, 13), torch.float64, layout).requires_grad_()
    options = options | {"padding": options.get("padding", 0)}
    if options["kernel_size"] == (3, 5):
        options = options | {"padding": (1, 2)}
    came, wanted = ops.patch_avg_pool2d(x, **options, **divisor), F.avg_pool2d(x, **options, **divisor)
    torch.testing.assert_close(came, wanted, rtol=1e-14, atol=1e-15)
    g = make(came.shape, seed=1)
    torch.testing.assert_close(
        torch.autograd.grad(came, x, g), torch.autograd.grad(wanted, x, g), rtol=1e-14, atol=1e-15
    )


def test_average_of_a_blind_window_is_zero() -> None:
    bounds = {"in_rows": (0, 1, 8), "out_rows": (0, 7, 8)}
    x = torch.ones(1, 1, 8, 8)
    for divisor in DIVISORS.values():
        came = ops.patch_avg_pool2d(x, 3, stride=1, padding=1, **divisor, **bounds)
        assert torch.equal(came[:, :, 2:7], torch.zeros(1, 1, 5, 8))


def test_average_counts_the_padding_of_the_whole_axis() -> None:
    """Between patches the divisor stays full; past the image's own end padding it shrinks."""
    x = torch.ones(1, 1, 7, 1)
    came = ops.patch_avg_pool2d(x, (4, 1), stride=(3, 1), padding=(1, 0), in_rows=(0, 3, 7), out_rows=(0, 2, 3))
    torch.testing.assert_close(came.flatten(), torch.tensor([3 / 4, 1 / 4, 2 / 3]))


def test_average_saves_nothing() -> None:
    with SavedBytes() as saved:
        ops.patch_avg_pool2d(make((2, 3, 8, 8)).requires_grad_(), 2)
    assert saved.total == 0


# --- gradients of both ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", by_name("1x1_patches", "negative_padding", "window_sees_nothing", "end_cropped", "unequal_axes"), ids=str
)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    x = make((1, 2, *case.shape[2:])).requires_grad_()

    def values(x: Tensor) -> Tensor:
        came = ops.patch_max_pool2d(x, **case.max_pool)[0]
        return came.masked_fill(came == -INF, 0.0)

    with torch.no_grad():
        offsets = ops.patch_max_pool2d(x, **case.max_pool)[1]
    g = make(offsets.shape, seed=1).requires_grad_()
    functions = [
        (values, x),
        (lambda x: ops.patch_max_pool2d_gather(x, offsets, **case.max_pool), x),
        (lambda g: ops.patch_max_pool2d_backward(g, offsets, x.shape, **case.max_pool), g),
        (lambda x: ops.patch_avg_pool2d(x, **case.avg_pool), x),
        (lambda x: ops.patch_avg_pool2d(x, **case.avg_pool, count_include_pad=False), x),
        (lambda g: ops.patch_avg_pool2d_backward(g, x.shape, **case.avg_pool), g),
    ]
    for function, at in functions:
        torch.autograd.gradcheck(function, at)
        torch.autograd.gradgradcheck(function, at, fast_mode=True)


def test_backwards_call_the_operators() -> None:
    x = make((1, 2, 8, 8)).requires_grad_()
    y = ops.patch_max_pool2d(x, 2)[0].sum() + ops.patch_avg_pool2d(x, 2).sum()
    with CalledOperators() as calls:
        y.backward()
    assert sorted(calls.names) == ["patch_avg_pool2d_backward", "patch_max_pool2d_backward"]
