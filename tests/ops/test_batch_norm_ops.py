"""Batch normalisation of patches against torch's per patch, the reference, and autograd."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitkern import ops, reference

from .cases import DTYPES, FORMATS, CalledOperators, SavedBytes, assert_accurate, assert_format_of, dtype_name, make

EPS = 1e-3
BOUNDS = {
    "one_patch": {},
    "2x2_even": {"rows": (0, 4, 8), "cols": (0, 3, 6)},
    "4x3_uneven": {"rows": (0, 1, 3, 7, 8), "cols": (0, 1, 5, 6)},
    "rows_only": {"rows": (0, 5, 8)},
}
SHAPE = (3, 4, 8, 6)
CHECKED = {"rows": (0, 2, 5), "cols": (0, 1, 3)}


def patches_of(x: Tensor, bounds: dict[str, tuple[int, ...]]) -> list[Tensor]:
    rows, cols = bounds.get("rows", (0, x.shape[2])), bounds.get("cols", (0, x.shape[3]))
    return [x[:, :, a:b, c:d] for a, b in pairwise(rows) for c, d in pairwise(cols)]


def pytorch_batch_norm(
    x: Tensor, w: Tensor | None, b: Tensor | None, bounds: dict[str, tuple[int, ...]], activation: str
) -> Tensor:
    """F.batch_norm of every patch, put together."""
    rows, cols = bounds.get("rows", (0, x.shape[2])), bounds.get("cols", (0, x.shape[3]))
    patches = [F.batch_norm(patch, None, None, w, b, True, 0.0, EPS) for patch in patches_of(x, bounds)]
    across = len(cols) - 1
    strips = [torch.cat(patches[i * across : (i + 1) * across], 3) for i in range(len(rows) - 1)]
    output = torch.cat(strips, 2)
    return F.relu(output) if activation == "relu" else output


def inputs_of(dtype: torch.dtype, layout: str = "nchw", parameters: str = "own") -> tuple[Tensor, Tensor, Tensor]:
    of = torch.float32 if parameters == "float32" else dtype
    return make(SHAPE, dtype, layout) * 2 + 3, make((4,), of, seed=1), make((4,), of, seed=2)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [*((dtype, "own") for dtype in DTYPES), (torch.float16, "float32"), (torch.bfloat16, "float32")],
    ids=lambda value: dtype_name(value) if isinstance(value, torch.dtype) else f"{value}_parameters",
)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_values_and_gradients_equal_pytorch_per_patch(
    bounds: dict[str, tuple[int, ...]], dtype: torch.dtype, parameters: str, layout: str, activation: str
) -> None:
    inputs = inputs_of(dtype, layout, parameters)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    g = make(SHAPE, dtype, layout, seed=3)

    result = ops.patch_batch_norm(*inputs, **bounds, eps=EPS, activation=activation)
    exact = pytorch_batch_norm(*exact_inputs, bounds, activation)
    pytorch = pytorch_batch_norm(*inputs, bounds, activation)
    reduction = SHAPE[0] * SHAPE[2] * SHAPE[3]
    assert_accurate(result.output.detach(), exact.detach(), pytorch.detach(), reduction)
    assert_format_of(result.output, inputs[0])

    # Where rounding decides whether the ReLU lets an element pass, either answer is right: no gradient there.
    g = g * (exact.detach().abs() > 1e-2)
    came = torch.autograd.grad(result.output, inputs, g)
    wanted = torch.autograd.grad(exact, exact_inputs, g.double())
    usual = torch.autograd.grad(pytorch, inputs, g)
    for one, other, third, what in zip(came, wanted, usual, ("input", "weight", "bias"), strict=True):
        assert_accurate(one, other, third, reduction, f"{what} gradient")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_statistics(bounds: dict[str, tuple[int, ...]], dtype: torch.dtype, layout: str) -> None:
    x, w, b = inputs_of(dtype, layout)
    result = ops.patch_batch_norm(x, w, b, **bounds, eps=EPS)
    mean, m2 = ops.patch_batch_norm_stats(x, **bounds)
    exact = reference.patch_batch_norm(x.double(), w.double(), b.double(), **bounds, eps=EPS)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    patches = [patch.to(work) for patch in patches_of(x, bounds)]
    usual_mean = torch.stack([patch.mean((0, 2, 3)) for patch in patches])
    counts = torch.tensor([[patch[:, 0].numel()] for patch in patches])
    usual_m2 = torch.stack([patch.var((0, 2, 3), correction=0) for patch in patches]) * counts
    reduction = SHAPE[0] * SHAPE[2] * SHAPE[3]
    assert_accurate(mean, exact.mean, usual_mean.to(work), reduction, "mean")
    assert_accurate(m2, exact.m2, usual_m2.to(work), reduction, "m2")
    assert_accurate(result.invstd, exact.invstd, (usual_m2 / counts + EPS).rsqrt().to(work), reduction, "invstd")
    assert torch.equal(result.mean, mean)
    assert torch.equal(result.m2, m2)
    applied = ops.patch_batch_norm_apply(x, result.mean, result.invstd, w, b, **bounds)
    assert torch.equal(applied, result.output)


def test_statistics_far_from_zero_do_not_cancel() -> None:
    x = make((4, 2, 16, 16), torch.float32) + 10_000
    _, m2 = ops.patch_batch_norm_stats(x, rows=(0, 8, 16))
    exact = reference.patch_batch_norm(x.double(), rows=(0, 8, 16)).m2
    torch.testing.assert_close(m2.double(), exact, rtol=1e-5, atol=0.0)


def test_empty_batch() -> None:
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    w = torch.ones(3, requires_grad=True)
    result = ops.patch_batch_norm(x, w, None, rows=(0, 2, 4))
    result.output.sum().backward()
    assert result.output.shape == x.shape
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and torch.equal(w.grad, torch.zeros(3))
    assert torch.equal(result.mean, torch.zeros(2, 3))
    assert torch.equal(result.m2, torch.zeros(2, 3))


def test_no_parameters_and_one_of_them() -> None:
    x, w, b = inputs_of(torch.float64)
    for weight, bias in ((None, None), (w, None), (None, b)):
        came = ops.patch_batch_norm(x, weight, bias, **BOUNDS["2x2_even"], eps=EPS, activation="relu")
        torch.testing.assert_close(came.output, pytorch_batch_norm(x, weight, bias, BOUNDS["2x2_even"], "relu"))


# --- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("parameters", ["none", "weight", "both"])
def test_gradcheck_and_gradgradcheck(activation: str, parameters: str) -> None:
    given = {"none": 0, "weight": 1, "both": 2}[parameters]
    inputs = [make((2, 2, 5, 3)), make((2,), seed=1), make((2,), seed=2)][: given + 1]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def normalised(*tensors: Tensor) -> Tensor:
        return ops.patch_batch_norm(*tensors, **CHECKED, activation=activation).output

    torch.autograd.gradcheck(normalised, inputs)
    torch.autograd.gradgradcheck(normalised, inputs)

    statistics = [make((4, 2), seed=3), make((4, 2), seed=4).abs() + 0.5]
    at = [inputs[0], *(tensor.requires_grad_() for tensor in statistics), *inputs[1:]]

    def applied(*tensors: Tensor) -> Tensor:
        return ops.patch_batch_norm_apply(*tensors, **CHECKED, activation=activation)

    torch.autograd.gradcheck(applied, at)
    torch.autograd.gradgradcheck(applied, at)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_are_the_same_when_their_gradients_are_recorded(activation: str) -> None:
    """gradgradcheck sees only the formulas that run then; here they meet the operators."""
    x, w, b = (tensor.requires_grad_() for tensor in inputs_of(torch.float64))
    bounds, g = BOUNDS["4x3_uneven"], make(SHAPE, seed=3)
    mean = make((12, 4), seed=4).requires_grad_()
    invstd = (make((12, 4), seed=5).abs() + 0.5).requires_grad_()
    whole = ops.patch_batch_norm(x, w, b, **bounds, activation=activation).output
    applied = ops.patch_batch_norm_apply(x, mean, invstd, w, b, **bounds, activation=activation)
    statistics = torch.stack(ops.patch_batch_norm_stats(x, **bounds))
    for output, leaves, grad in (
        (whole, (x, w, b), g),
        (applied, (x, mean, invstd, w, b), g),
        (statistics, (x,), make((2, 12, 4), seed=6)),
    ):
        plain = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        recorded = torch.autograd.grad(output, leaves, grad, create_graph=True)
        torch.testing.assert_close(plain, tuple(tensor.detach() for tensor in recorded), rtol=1e-10, atol=1e-12)


def test_gradcheck_of_the_statistics() -> None:
    x = make((2, 2, 5, 3)).requires_grad_()
    for pick in (lambda mean, m2: (mean, m2), lambda mean, m2: mean, lambda mean, m2: m2):
        torch.autograd.gradcheck(lambda x, pick=pick: pick(*ops.patch_batch_norm_stats(x, **CHECKED)), x)
        torch.autograd.gradgradcheck(lambda x, pick=pick: pick(*ops.patch_batch_norm_stats(x, **CHECKED)), x)


def test_statistics_then_apply_have_the_gradient_of_batch_norm() -> None:
    """What norm="image" and a user's own pooling of statistics rest on."""
    x, w, b = (tensor.requires_grad_() for tensor in inputs_of(torch.float64))
    bounds, g = BOUNDS["2x2_even"], make(SHAPE, seed=3)
    mean, m2 = ops.patch_batch_norm_stats(x, **bounds)
    count = SHAPE[0] * 12
    output = ops.patch_batch_norm_apply(x, mean, (m2 / count + EPS).rsqrt(), w, b, **bounds, activation="relu")
    whole = ops.patch_batch_norm(x, w, b, **bounds, eps=EPS, activation="relu").output
    came, wanted = (torch.autograd.grad(y, (x, w, b), g) for y in (output, whole))
    torch.testing.assert_close(came, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_two_backward_operators_follow_the_formula(activation: str) -> None:
    x, w, b = inputs_of(torch.float64)
    bounds, g = BOUNDS["4x3_uneven"], make(SHAPE, seed=3)
    result = ops.patch_batch_norm(x, w, b, **bounds, eps=EPS, activation=activation)
    given = (g, x, result.mean, result.invstd, w, b)
    sums = ops.patch_batch_norm_backward_reduce(*given, **bounds, activation=activation)
    came = ops.patch_batch_norm_backward_apply(*given, *sums, **bounds, activation=activation)
    constant = ops.patch_batch_norm_backward_apply(*given, **bounds, activation=activation)

    masked = g * (result.output > 0) if activation == "relu" else g
    triples = zip(*(patches_of(tensor, bounds) for tensor in (masked, x, came, constant)), strict=True)
    for p, (grad, patch, moving, fixed) in enumerate(triples):
        mean, invstd = result.mean[p][:, None, None], result.invstd[p][:, None, None]
        count = patch[:, 0].numel()
        sum_grad, centred = grad.sum((0, 2, 3)), patch - mean
        sum_grad_centered = (grad * centred).sum((0, 2, 3))
        torch.testing.assert_close(sums[0][p], sum_grad)
        torch.testing.assert_close(sums[1][p], sum_grad_centered)
        scale = w[:, None, None] * invstd
        correction = (sum_grad[:, None, None] + centred * invstd**2 * sum_grad_centered[:, None, None]) / count
        torch.testing.assert_close(moving, scale * (grad - correction))
        torch.testing.assert_close(fixed, scale * grad)


def test_the_backward_operators_refuse_to_be_differentiated() -> None:
    x, w, b = inputs_of(torch.float64)
    mean, invstd = make((1, 4)), make((1, 4)).abs()
    g = make(SHAPE).requires_grad_()
    sums = ops.patch_batch_norm_backward_reduce(g, x, mean, invstd, w, b)
    with pytest.raises(RuntimeError, match=r"patch_batch_norm_backward_reduce: has no derivative"):
        sums[0].sum().backward()
    with pytest.raises(RuntimeError, match=r"patch_batch_norm_backward_apply: has no derivative"):
        ops.patch_batch_norm_backward_apply(g, x, mean, invstd, w, b).sum().backward()


def test_statistics_of_batch_norm_carry_no_gradient() -> None:
    x, w, b = (tensor.requires_grad_() for tensor in inputs_of(torch.float32))
    result = ops.patch_batch_norm(x, w, b)
    assert [tensor.requires_grad for tensor in result] == [True, False, False, False]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_saves_the_input_and_not_the_output(activation: str) -> None:
    x, w, b = (tensor.requires_grad_() for tensor in inputs_of(torch.float32))
    with SavedBytes(x, w, b) as saved:
        result = ops.patch_batch_norm(x, w, b, **BOUNDS["2x2_even"], activation=activation)
    assert saved.total == result.mean.nbytes + result.invstd.nbytes


def test_backward_computes_only_what_is_asked() -> None:
    x, w, b = inputs_of(torch.float32)
    with CalledOperators() as calls:
        ops.patch_batch_norm(x, w.requires_grad_(), b).output.sum().backward()
        ops.patch_batch_norm_apply(x.requires_grad_(), *ops.patch_batch_norm_stats(x.detach())).sum().backward()
    assert calls.names == [
        "patch_batch_norm",
        "patch_batch_norm_backward_reduce",
        "patch_batch_norm_stats",
        "patch_batch_norm_apply",
        "patch_batch_norm_backward_apply",
    ]
