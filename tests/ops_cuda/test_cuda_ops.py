"""Every operator on a GPU: against its definition in fp64, and around what only a device has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import splitkern.ops  # noqa: F401  (registers the operators)
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import (
    EMPTY,
    GENERATED,
    LONG_REDUCTION,
    MANY_ON_BOTH_AXES,
    NAMED,
    ONE_PATCH_WITHOUT_PADDING,
    Case,
    without_dilation,
)
from tests.kernel_checks.comparisons import DTYPES, LAYOUTS, Operators

pytestmark = pytest.mark.gpu

EVERY = [*NAMED, EMPTY, *GENERATED, LONG_REDUCTION]
each_case = pytest.mark.parametrize("case", EVERY, ids=str)
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(torch.ops.splitkern, "cuda")


@each_case
@each_type
def test_conv2d(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, case, dtype, LAYOUTS[EVERY.index(case) % len(LAYOUTS)])


@each_type
def test_conv2d_of_more_patches_on_both_axes_than_one_launch_holds(operators: Operators, dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, MANY_ON_BOTH_AXES, dtype, "channels_last")


@each_layout
@each_type
def test_conv2d_relu(operators: Operators, dtype: torch.dtype, layout: str) -> None:
    comparisons.conv2d(operators, NAMED[3], dtype, layout, activation="relu")


@each_case
@each_type
def test_max_pool2d(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.max_pool2d(operators, case, dtype, LAYOUTS[EVERY.index(case) % len(LAYOUTS)])


@each_type
def test_max_pool2d_nan(operators: Operators, dtype: torch.dtype) -> None:
    comparisons.max_pool2d_nan(operators, ONE_PATCH_WITHOUT_PADDING, dtype)


@each_case
@each_type
def test_max_pool2d_equals_the_cpu(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.max_pool2d_equal(operators, Operators(torch.ops.splitkern), case, dtype, "contiguous")


@each_case
@each_type
def test_avg_pool2d(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.avg_pool2d(operators, without_dilation(case), dtype, LAYOUTS[EVERY.index(case) % len(LAYOUTS)])


@each_case
@each_type
def test_batch_norm(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    layout = LAYOUTS[EVERY.index(case) % len(LAYOUTS)]
    comparisons.batch_norm(operators, case, dtype, layout, relu=False, affine=dtype)


@each_layout
@each_type
def test_batch_norm_relu(operators: Operators, dtype: torch.dtype, layout: str) -> None:
    comparisons.batch_norm(operators, NAMED[3], dtype, layout, relu=True, affine=torch.float32)


def test_expanded_gradient(operators: Operators) -> None:
    comparisons.conv2d_expanded_gradient(operators, NAMED[3])


def test_runs_on_the_current_stream() -> None:
    """Work queued behind a long kernel on a side stream must see that kernel's result."""
    ops = torch.ops.splitkern
    window = [[1, 1], [0, 0], [1, 1], 1, [0, 64], [0, 64], [0, 64], [0, 64]]
    weight = torch.eye(8, device="cuda").reshape(8, 8, 1, 1)
    input = torch.zeros(4, 8, 64, 64, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        input.fill_(3.0)
        output = ops.patch_conv2d(input, weight, None, *window, "none")
    stream.synchronize()
    assert torch.equal(output, torch.full_like(output, 3.0))


def test_captures_into_a_cuda_graph() -> None:
    ops = torch.ops.splitkern
    window = [[1, 1], [1, 1], [1, 1], 1, [0, 9, 16], [0, 16], [0, 9, 16], [0, 16]]
    input = torch.randn(2, 4, 16, 16, device="cuda")
    weight = torch.randn(6, 4, 3, 3, device="cuda")
    output = torch.empty(2, 6, 16, 16, device="cuda")
    ops.patch_conv2d.out(input, weight, None, *window, "none", output=output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.patch_conv2d.out(input, weight, None, *window, "none", output=output)
        weight_grad = ops.patch_conv2d_weight_grad(output, input, [6, 4, 3, 3], *window)
    input.copy_(torch.randn_like(input))
    graph.replay()
    expected = ops.patch_conv2d(input, weight, None, *window, "none")
    assert torch.equal(output, expected)
    assert torch.equal(weight_grad, ops.patch_conv2d_weight_grad(expected, input, [6, 4, 3, 3], *window))


def test_mixed_devices_are_refused_and_the_device_stays_usable() -> None:
    ops = torch.ops.splitkern
    window = [[1, 1], [0, 0], [1, 1], 1, [0, 4], [0, 4], [0, 4], [0, 4]]
    input, weight = torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="weight"):
        ops.patch_conv2d(input, weight, None, *window, "none")
    output = ops.patch_conv2d(input, weight.cuda(), None, *window, "none")
    torch.cuda.synchronize()
    assert torch.equal(output, input)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """The operators follow their tensors, whichever device is current, and leave the current one alone."""
    ops = torch.ops.splitkern
    window = [[1, 1], [0, 0], [1, 1], 1, [0, 4], [0, 4], [0, 4], [0, 4]]
    input, weight = (torch.ones(shape, device="cuda:1") for shape in ((1, 1, 4, 4), (1, 1, 1, 1)))
    output = ops.patch_conv2d(input, weight, None, *window, "none")
    assert output.device == input.device
    assert torch.equal(output, input)
    assert torch.cuda.current_device() == 0


@pytest.mark.large
def test_more_than_2_31_elements() -> None:
    """Tensors of 2^31 elements and more: the last rows of the last channel come out as those of a small call."""
    ops = torch.ops.splitkern
    side = 32776
    assert 2 * side * side > 2**31
    input = torch.empty(1, 2, side, side, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    input.fill_(0.5)
    tail = 8  # the last patch, in rows and columns
    input[..., -tail:, -tail:] = torch.randn(1, 2, tail, tail, generator=torch.Generator().manual_seed(9)).half().cuda()
    small = input[..., -tail:, -tail:].float()
    bounds = [0, side - tail, side]

    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(10)).half().cuda()
    window = [[1, 1], [1, 1], [1, 1], 1, bounds, bounds, bounds, bounds]
    output = ops.patch_conv2d(input, weight, None, *window, "none")
    torch.testing.assert_close(
        output[..., -tail:, -tail:].float(), F.conv2d(small, weight.float(), padding=1), rtol=2e-3, atol=2e-3
    )
    ops.patch_conv2d_input_grad.out(input, weight, list(input.shape), *window, output=output)
    expected = F.conv_transpose2d(small, weight.float(), padding=1)
    torch.testing.assert_close(output[..., -tail:, -tail:].float(), expected, rtol=2e-3, atol=2e-3)

    # All but the last patch as zeros leaves a sum that a small call gives.
    grad_output = output.zero_()
    grad_output[..., -tail:, -tail:] = 1
    weight_grad = ops.patch_conv2d_weight_grad(grad_output, input, list(weight.shape), *window)
    local = [[1, 1], [1, 1], [1, 1], 1, [0, tail], [0, tail], [0, tail], [0, tail]]
    few = ops.patch_conv2d_weight_grad(
        torch.ones(1, 2, tail, tail, dtype=torch.float16, device="cuda"), small.half(), list(weight.shape), *local
    )
    torch.testing.assert_close(weight_grad.float(), few.float(), rtol=2e-3, atol=2e-3)
    del grad_output, output

    mean, m2 = ops.patch_batch_norm_stats(input, bounds, bounds)
    torch.testing.assert_close(mean[-1], small.mean((0, 2, 3)))
    torch.testing.assert_close(m2[-1], ((small - small.mean((0, 2, 3), keepdim=True)) ** 2).sum((0, 2, 3)))
    assert torch.equal(mean[:-1], torch.full_like(mean[:-1], 0.5))
    assert not m2[:-1].any()

    halves = [0, (side - tail) // 2, side // 2]
    pool = [[2, 2], [2, 2], [0, 0], [1, 1], bounds, bounds, halves, halves]
    values, offsets = ops.patch_max_pool2d(input, *pool)
    expected, _ = F.max_pool2d(small, 2, return_indices=True)
    assert torch.equal(values[..., -tail // 2 :, -tail // 2 :].float(), expected)
    spread = ops.patch_max_pool2d_backward(values, offsets, list(input.shape), *pool)
    assert torch.equal(ops.patch_max_pool2d_gather(spread, offsets, *pool), values)
