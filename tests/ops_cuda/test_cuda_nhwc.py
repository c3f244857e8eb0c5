"""The vectorised pooling and batch norm kernels on a GPU: every width of vector, realistic sizes, the plain bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import splitkern.ops  # noqa: F401  (registers the operators)
from splitkern._library import forced_path
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import GENERATED, NAMED, Case, even, square, without_dilation
from tests.kernel_checks.comparisons import Operators

pytestmark = pytest.mark.gpu

CASES = [case for case in NAMED if max(case.geometry.in_size) <= 17] + GENERATED[:6]
CHANNELS = [8, 20, 6, 96, 3]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["channels_last", "channels_last part", "channels_last view"]
each_case = pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        (replace(case, in_channels=c, out_channels=c, groups=1), DTYPES[(i + j) % 3], LAYOUTS[(i + j // 2) % 3])
        for i, case in enumerate(CASES)
        for j, c in enumerate(CHANNELS[i % 2 :: 2])
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


class PlainOnCuda(Operators):
    def __call__(self, name: str, *arguments: object) -> object:
        with forced_path("plain"):
            return super().__call__(name, *arguments)


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(torch.ops.splitkern, "cuda")


@pytest.fixture(scope="module")
def plain() -> Operators:
    return PlainOnCuda(torch.ops.splitkern, "cuda")


@each_case
def test_max_pool2d(operators: Operators, plain: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.max_pool2d(operators, case, dtype, layout)
    comparisons.max_pool2d_equal(operators, plain, case, dtype, layout)


@each_case
def test_avg_pool2d(operators: Operators, plain: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.avg_pool2d(operators, without_dilation(case), dtype, layout)
    comparisons.avg_pool2d_equal(operators, plain, without_dilation(case), dtype, layout)


@each_case
def test_batch_norm(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.batch_norm(operators, case, dtype, layout, relu=True, affine=torch.float32)


# --- Realistic sizes, compared on the device -----------------------------------------------------------------------

each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIDE, CHANNELS_OF_A_LAYER, BATCH = 112, 64, 16
POOLS = {
    "3x3, stride 2": square(3, 2, 1, 1, *(even(SIDE, 2),) * 2, *(even(SIDE // 2, 2),) * 2),
    "2x2, stride 2": square(2, 2, 0, 1, *(even(SIDE, 4),) * 2, *(even(SIDE // 2, 4),) * 2),
    "3x3, stride 1": square(3, 1, 1, 1, (0, 30, SIDE), (0, 71, SIDE), (0, 30, SIDE), (0, 71, SIDE)),
}
each_pool = pytest.mark.parametrize("pool", POOLS)


@pytest.fixture(scope="module", autouse=True)
def _release() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def activation(dtype: torch.dtype, side: int = SIDE, seed: int = 1) -> torch.Tensor:
    """As after a ReLU of values with few digits: many ties and zeros."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(BATCH, CHANNELS_OF_A_LAYER, side, side, generator=generator, device="cuda")
    return (values * 8).round().div(8).relu().to(dtype).contiguous(memory_format=torch.channels_last)


def same_as_plain(name: str, *arguments: object) -> tuple[torch.Tensor, ...]:
    operator = getattr(torch.ops.splitkern, name)
    ours = comparisons._as_tuple(operator(*arguments))
    again = comparisons._as_tuple(operator(*arguments))
    with forced_path("plain"):
        theirs = comparisons._as_tuple(operator(*arguments))
    for mine, repeated, other in zip(ours, again, theirs, strict=True):
        assert torch.equal(comparisons._bits(mine), comparisons._bits(repeated)), f"{name} gave different bits again"
        assert torch.equal(comparisons._bits(mine), comparisons._bits(other)), f"{name} differs from the plain kernel"
    return ours


@each_type
@each_pool
def test_large_pooling_has_the_bits_of_the_plain_kernels(dtype: torch.dtype, pool: str) -> None:
    g = POOLS[pool]
    input = activation(dtype)
    grad = torch.randn(BATCH, CHANNELS_OF_A_LAYER, *g.out_size, device="cuda").to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    size = list(input.shape)
    window = [list(g.kernel), list(g.stride), list(g.padding)]
    _, offsets = same_as_plain("patch_max_pool2d", input, *window, [1, 1], *g.bounds)
    same_as_plain("patch_max_pool2d_backward", grad, offsets, size, *window, [1, 1], *g.bounds)
    same_as_plain("patch_max_pool2d_gather", input, offsets, *window, [1, 1], *g.bounds)
    same_as_plain("patch_avg_pool2d", input, *window, False, None, *g.bounds)
    same_as_plain("patch_avg_pool2d_backward", grad, size, *window, True, None, *g.bounds)


@each_type
def test_one_patch_is_torchs_max_pooling(dtype: torch.dtype) -> None:
    input = activation(dtype)
    whole = [[0, SIDE], [0, SIDE], [0, SIDE // 2], [0, SIDE // 2]]
    values, _ = torch.ops.splitkern.patch_max_pool2d(input, [3, 3], [2, 2], [1, 1], [1, 1], *whole)
    assert torch.equal(values, F.max_pool2d(input, 3, 2, 1))


@each_type
@pytest.mark.parametrize("grid", [1, 2, 4])
def test_large_batch_norm(dtype: torch.dtype, grid: int) -> None:
    ops = torch.ops.splitkern
    input = activation(dtype) + 3
    grad = activation(dtype, seed=2) - 0.25
    bounds = list(even(SIDE, grid))
    weight, bias = (torch.randn(CHANNELS_OF_A_LAYER, device="cuda") for _ in range(2))
    output, mean, invstd, m2 = ops.patch_batch_norm(input, weight, bias, bounds, bounds, 1e-5, "relu")
    for mine, repeated in zip(ops.patch_batch_norm_stats(input, bounds, bounds), (mean, m2), strict=True):
        assert torch.equal(mine, repeated)

    boxes = [(slice(a, b), slice(c, d)) for a, b in pairwise(bounds) for c, d in pairwise(bounds)]
    for p, (rows, columns) in enumerate(boxes):
        patch = input[:, :, rows, columns].double()
        true_mean = patch.mean((0, 2, 3))
        true_m2 = (patch - true_mean[None, :, None, None]).square().sum((0, 2, 3))
        torch.testing.assert_close(mean[p].double(), true_mean, rtol=2**-22, atol=2**-22)
        torch.testing.assert_close(m2[p].double(), true_m2, rtol=2**-20, atol=0)
    count = BATCH * (SIDE // grid) ** 2
    torch.testing.assert_close(invstd.double(), (m2.double() / count + 1e-5).rsqrt(), rtol=2**-21, atol=0)

    parameters = (mean, invstd, weight, bias)
    applied = same_as_plain("patch_batch_norm_apply", input, *parameters, bounds, bounds, "relu")[0]
    assert torch.equal(applied, output)
    sums = ops.patch_batch_norm_backward_reduce(grad, input, *parameters, bounds, bounds, "relu")
    again = ops.patch_batch_norm_backward_reduce(grad, input, *parameters, bounds, bounds, "relu")
    with forced_path("plain"):
        plain_sums = ops.patch_batch_norm_backward_reduce(grad, input, *parameters, bounds, bounds, "relu")
    for mine, repeated, other in zip(sums, again, plain_sums, strict=True):
        assert torch.equal(mine, repeated)
        assert comparisons.relative_error(mine, other.double()) <= 2**-16  # both add hundreds of thousands of terms
    same_as_plain("patch_batch_norm_backward_apply", grad, input, *parameters, *sums, bounds, bounds, "relu")
    same_as_plain("patch_batch_norm_backward_apply", grad, input, *parameters, None, None, bounds, bounds, "relu")
