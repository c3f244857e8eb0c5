"""patch_conv2d and its two gradients: values, formats, gradients, what autograd keeps and calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from splitkern import ops, reference

from .cases import (
    CONV_CASES,
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


def tensors_of(case: Case, dtype: torch.dtype, layout: str = "nchw") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        make(case.shape, dtype, layout, seed=1),
        make(case.weight_shape, dtype, "nchw", seed=2),
        make((case.outputs,), dtype, seed=3),
        make(case.output_shape, dtype, layout, seed=4),
    )


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    x, w, b, g = tensors_of(case, dtype, layout)
    per_output = w[0].numel()
    activation = "relu" if case.shape[2] % 2 else "none"

    came = ops.patch_conv2d(x, w, b, activation=activation, **case.conv)
    exact = reference.patch_conv2d(x.double(), w.double(), b.double(), activation=activation, **case.conv)
    pytorch = reference.patch_conv2d(x, w, b, activation=activation, **case.conv)
    assert_accurate(came, exact, pytorch, per_output)
    assert_format_of(came, x)

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return reference.patch_conv2d(x, w, None, **case.conv)

    exact_x, exact_w = gradients(linear, (x.double(), w.double()), g.double())
    pytorch_x, pytorch_w = gradients(linear, (x, w), g)
    came_x = ops.patch_conv2d_input_grad(g, w, x.shape, **case.conv)
    came_w = ops.patch_conv2d_weight_grad(g, x, w.shape, **case.conv)
    assert_accurate(came_x, exact_x, pytorch_x, per_output * case.outputs, "input gradient")
    assert_accurate(came_w, exact_w, pytorch_w, max(1, g.numel() // case.outputs), "weight gradient")
    assert_format_of(came_x, g)
    assert came_w.is_contiguous()


@pytest.mark.parametrize("case", by_name("2x2_even", "stride_2", "groups"), ids=str)
def test_channels_last_weight(case: Case) -> None:
    x, w, b, g = tensors_of(case, torch.float64)
    last = w.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.patch_conv2d(x, last, b, **case.conv), ops.patch_conv2d(x, w, b, **case.conv))
    torch.testing.assert_close(
        ops.patch_conv2d_input_grad(g, last, x.shape, **case.conv),
        ops.patch_conv2d_input_grad(g, w, x.shape, **case.conv),
    )


def test_expanded_grad_output() -> None:
    (case,) = by_name("2x2_even")
    x, w, _, g = tensors_of(case, torch.float64)
    ones = torch.ones((), dtype=torch.float64).expand(g.shape)
    full = ones.contiguous()
    torch.testing.assert_close(
        ops.patch_conv2d_input_grad(ones, w, x.shape, **case.conv),
        ops.patch_conv2d_input_grad(full, w, x.shape, **case.conv),
    )
    torch.testing.assert_close(
        ops.patch_conv2d_weight_grad(ones, x, w.shape, **case.conv),
        ops.patch_conv2d_weight_grad(full, x, w.shape, **case.conv),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_one_patch_equals_pytorch(dtype: torch.dtype) -> None:
    x, w, b = make((2, 3, 13, 11), dtype), make((5, 3, 3, 3), dtype, seed=1), make((5,), dtype, seed=2)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    exact = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), **options)
    pytorch = torch.nn.functional.conv2d(x, w, b, **options)
    assert_accurate(ops.patch_conv2d(x, w, b, **options), exact, pytorch, 27)


def test_integers_and_pairs_and_missing_bounds_mean_the_same() -> None:
    x, w = make((1, 2, 8, 8)), make((3, 2, 3, 3), seed=1)
    short = ops.patch_conv2d(x, w, stride=2, padding=1, in_rows=(0, 4, 8), out_rows=(0, 2, 4))
    pairs = {"stride": [2, 2], "padding": (1, 1), "dilation": (1, 1)}
    rows = {"in_rows": [0, 4, 8], "out_rows": [0, 2, 4]}
    assert torch.equal(short, ops.patch_conv2d(x, w, **pairs, **rows, in_cols=(0, 8), out_cols=(0, 4)))


def test_a_blind_window_gives_the_bias() -> None:
    (case,) = by_name("window_sees_nothing")
    x, w, b, _ = tensors_of(case, torch.float64)
    came = ops.patch_conv2d(x, w, b, **case.conv)
    assert torch.equal(came[0, :, 5, 5], b)  # row 5 of patch 0, which holds input row 0 alone


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", FORMATS)
def test_windows_wholly_in_the_padding(dtype: torch.dtype, layout: str) -> None:
    """oneDNN crashed on such windows, with padding at or above the effective kernel, when given the padding itself."""
    x, w = make((2, 6, 12, 1), dtype, layout, seed=1), make((6, 2, 4, 1), dtype, "nchw", seed=2)
    options = {"stride": (2, 3), "padding": (3, 2), "dilation": (1, 2), "groups": 3}
    came = ops.patch_conv2d(x, w, **options)
    exact = reference.patch_conv2d(x.double(), w.double(), **options)
    assert came.shape == exact.shape == (2, 6, 8, 2)
    assert_accurate(came, exact, exact.to(dtype), reduction=8)

    for kernel in (1, 2):
        w = make((6, 6, kernel, kernel), dtype, "nchw", seed=3)
        came = ops.patch_conv2d(x, w, padding=3)
        exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=3)
        assert_accurate(came, exact, exact.to(dtype), reduction=6 * kernel**2)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [3, 4, 8])
def test_weight_gradient_of_strided_1x1_windows(channels: int, layout: str) -> None:
    """oneDNN added memory that nobody had written, for channels_last and channels that do not fill its vectors."""
    halves: dict[str, Any] = {"stride": 2, "in_rows": [0, 6, 12], "in_cols": [0, 12]}
    halves |= {"out_rows": [0, 3, 6], "out_cols": [0, 6]}
    padded: dict[str, Any] = {"stride": (2, 3), "padding": (0, 1), "in_rows": [0, 5, 12], "in_cols": [0, 4, 12]}
    padded |= {"out_rows": [0, 3, 6], "out_cols": [0, 2, 5]}
    for options in (halves, padded):
        x = make((2, channels, 12, 12), torch.float32, layout, seed=1)
        dy = make((2, 6, options["out_rows"][-1], options["out_cols"][-1]), torch.float32, layout, seed=2)
        size = (6, channels, 1, 1)

        def linear(w: Tensor, x: Tensor = x, options: dict[str, Any] = options) -> Tensor:
            return reference.patch_conv2d(x.double(), w, None, **options)

        (exact,) = gradients(linear, (torch.zeros(size, dtype=torch.float64),), dy.double())
        for _ in range(4):
            dirty = [torch.full((2**power,), 1e30) for power in range(4, 18) for _ in range(8)]
            del dirty  # what is allocated next holds large numbers
            came = ops.patch_conv2d_weight_grad(dy, x, size, **options)
            assert_accurate(came, exact, exact.float(), reduction=72)


def test_nan_in_another_patch_does_not_leak() -> None:
    x, w = make((1, 2, 8, 8)), make((3, 2, 3, 3), seed=1)
    x[:, :, 4:] = float("nan")
    came = ops.patch_conv2d(x, w, padding=1, in_rows=(0, 4, 8), out_rows=(0, 4, 8))
    assert came[:, :, :4].isfinite().all()
    assert came[:, :, 4:].isnan().all()


# --- autograd -------------------------------------------------------------------------------------

SMALL = (
    Case("2x2", (2, 2, 4, 3), (3, 3), (0, 2, 4), (0, 2, 4), (0, 1, 3), (0, 1, 3), padding=(1, 1), outputs=2),
    Case("cropped", (1, 2, 7, 4), (1, 2), (0, 3, 7), (0, 1, 3), (0, 4), (0, 2), stride=(3, 2), outputs=2),
    Case(
        "groups_dilated", (1, 2, 4, 5), (2, 2), (0, 2, 4), (0, 2, 3), (0, 2, 5), (0, 2, 4), padding=(1, 1),
        dilation=(2, 2), groups=2, outputs=2,
    ),
    Case("blind", (1, 2, 6, 3), (3, 1), (0, 1, 6), (0, 5, 6), (0, 3), (0, 3), padding=(1, 0), outputs=2),
)  # fmt: skip


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case, activation: str) -> None:
    x, w, b, _ = (tensor.requires_grad_() for tensor in tensors_of(case, torch.float64))

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.patch_conv2d(x, w, b, activation=activation, **case.conv)

    torch.autograd.gradcheck(function, (x, w, b))
    torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_of_the_gradients(case: Case) -> None:
    x, w, _, g = (tensor.requires_grad_() for tensor in tensors_of(case, torch.float64))
    for function, inputs in (
        (lambda g, w: ops.patch_conv2d_input_grad(g, w, case.shape, **case.conv), (g, w)),
        (lambda g, x: ops.patch_conv2d_weight_grad(g, x, case.weight_shape, **case.conv), (g, x)),
    ):
        torch.autograd.gradcheck(function, inputs)
        torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_equal_the_reference(activation: str) -> None:
    (case,) = by_name("5x3_uneven")
    *inputs, g = tensors_of(case, torch.float64)
    came = gradients(lambda *t: ops.patch_conv2d(*t, activation=activation, **case.conv), inputs, g)
    wanted = gradients(lambda *t: reference.patch_conv2d(*t, activation=activation, **case.conv), inputs, g)
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("needs", "called"),
    [
        ((False, True, False), ["patch_conv2d_weight_grad"]),
        ((True, False, False), ["patch_conv2d_input_grad"]),
        ((False, False, True), []),
        ((True, True, True), ["patch_conv2d_input_grad", "patch_conv2d_weight_grad"]),
    ],
    ids=["weight_only", "input_only", "bias_only", "all"],
)
def test_backward_computes_only_what_is_asked(needs: tuple[bool, ...], called: list[str]) -> None:
    (case,) = by_name("2x2_even")
    *inputs, g = tensors_of(case, torch.float32)
    inputs = [tensor.requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    output = ops.patch_conv2d(*inputs, **case.conv)
    with CalledOperators() as calls:
        output.backward(g)
    assert calls.names == called
    assert [tensor.grad is not None for tensor in inputs] == list(needs)


def test_a_frozen_weight_keeps_no_input() -> None:
    (case,) = by_name("2x2_even")
    x, w, b, _ = tensors_of(case, torch.float32)
    for need, kept in ((True, x.untyped_storage().nbytes()), (False, 0)):
        with SavedBytes(w, b) as saved:
            ops.patch_conv2d(x.requires_grad_(), w.requires_grad_(need), b, **case.conv)
        assert saved.total == kept


def test_relu_keeps_the_output_and_nothing_else() -> None:
    (case,) = by_name("2x2_even")
    x, w, b, _ = tensors_of(case, torch.float32)
    with SavedBytes(x, w, b) as saved:
        output = ops.patch_conv2d(x.requires_grad_(), w.requires_grad_(), b, activation="relu", **case.conv)
    assert list(saved.storages) == [output.untyped_storage().data_ptr()]


def test_a_saved_input_that_was_overwritten_is_noticed() -> None:
    (case,) = by_name("2x2_even")
    x, w, _, g = tensors_of(case, torch.float32)
    output = ops.patch_conv2d(x, w.requires_grad_(), **case.conv)
    with torch.no_grad():
        ops.patch_avg_pool2d(x, 1, output=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(g)


def test_weight_gradient_accumulates_into_output() -> None:
    (case,) = by_name("stride_2")
    x, w, _, g = tensors_of(case, torch.float64)
    once = ops.patch_conv2d_weight_grad(g, x, w.shape, **case.conv)
    total = once.clone()
    came = ops.patch_conv2d_weight_grad(g, x, w.shape, accumulate=True, output=total, **case.conv)
    assert came is total
    torch.testing.assert_close(total, 2 * once)
    ops.patch_conv2d_weight_grad(g, x, w.shape, output=total, **case.conv)
    torch.testing.assert_close(total, once)
