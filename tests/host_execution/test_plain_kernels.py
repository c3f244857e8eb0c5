"""The plain CUDA kernels, executed by the CPU, against the definition of each operator in fp64."""

from __future__ import annotations

import pytest
import torch

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

EVERY = [*NAMED, EMPTY, *GENERATED]
BY_NAME = {case.name: case for case in EVERY}


def layout_of(index: int) -> str:
    """Every layout comes up for every kind of case."""
    return LAYOUTS[index % len(LAYOUTS)]


def dtype_of(index: int) -> torch.dtype:
    return DTYPES[index // len(LAYOUTS) % len(DTYPES)]


each_case = pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [(case, dtype_of(i + 7 * i // 20), layout_of(i)) for i, case in enumerate(EVERY)],
    ids=lambda value: str(value).removeprefix("torch."),
)
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
typical = pytest.mark.parametrize("case", [BY_NAME["groups"], BY_NAME["stride 2, 3x3"]], ids=str)


@each_case
def test_conv2d(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.conv2d(operators, case, dtype, layout)


@typical
@each_type
@each_layout
def test_conv2d_types_and_layouts(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.conv2d(operators, case, dtype, layout)
    comparisons.conv2d(operators, case, dtype, layout, activation="relu")


@each_case
def test_max_pool2d(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.max_pool2d(operators, case, dtype, layout)


@typical
@each_type
@each_layout
def test_max_pool2d_types_and_layouts(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.max_pool2d(operators, case, dtype, layout)


@each_type
def test_max_pool2d_nan(operators: Operators, dtype: torch.dtype) -> None:
    comparisons.max_pool2d_nan(operators, ONE_PATCH_WITHOUT_PADDING, dtype)


@each_case
def test_max_pool2d_equals_the_cpu_operator(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    import splitkern.ops  # noqa: F401  (registers the operators; everything else here runs without them)

    comparisons.max_pool2d_equal(operators, Operators(torch.ops.splitkern), case, dtype, layout)


@each_case
def test_avg_pool2d(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.avg_pool2d(operators, without_dilation(case), dtype, layout)


@typical
@each_type
@each_layout
def test_avg_pool2d_types_and_layouts(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.avg_pool2d(operators, case, dtype, layout)


@each_case
def test_batch_norm(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.batch_norm(operators, case, dtype, layout, relu=False, affine=dtype)


@typical
@each_type
@each_layout
def test_batch_norm_types_and_layouts(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.batch_norm(operators, case, dtype, layout, relu=True, affine=torch.float32)
    comparisons.batch_norm(operators, case, dtype, layout, relu=True, affine=None)


def test_expanded_gradient(operators: Operators) -> None:
    """What ``output.sum().backward()`` hands over: a tensor whose strides are all zero."""
    comparisons.conv2d_expanded_gradient(operators, BY_NAME["uneven 2x2"])


def test_more_patches_on_both_axes_than_one_launch_holds(operators: Operators) -> None:
    comparisons.conv2d(operators, MANY_ON_BOTH_AXES, torch.float32, "channels_last")


def test_long_reductions_are_cut_into_many_segments(operators: Operators) -> None:
    comparisons.conv2d(operators, LONG_REDUCTION, torch.float32, "channels_last")
    comparisons.batch_norm(operators, LONG_REDUCTION, torch.float32, "channels_last", relu=True, affine=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float16, "Half"), (torch.bfloat16, "BFloat16")], ids=["fp16", "bf16"]
)
def test_narrow_types_convert_as_torch_does(operators: Operators, dtype: torch.dtype, name: str) -> None:
    """Every bit pattern through a 1x1 average pool (widen, divide, round), and halves that must round to even."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, 256, 256)
    for divisor in (1, 3, 4096):
        bounds = [[0, 256]] * 4
        actual = operators("patch_avg_pool2d", every, [1, 1], [1, 1], [0, 0], True, divisor, *bounds)
        expected = ((every.float() + 0) / divisor).to(dtype)  # a sum begins at +0, so -0 becomes +0
        same = (actual.view(torch.int16) == expected.view(torch.int16)) | (actual.isnan() & expected.isnan())
        assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} bit patterns differ"


@pytest.mark.large
def test_offsets_beyond_32_bits(operators: Operators) -> None:
    """Views whose elements lie up to 2^32 elements apart; only the touched pages are ever allocated."""
    step = 2**30
    parents = [torch.empty(4 * step, dtype=torch.float16) for _ in range(2)]
    far_input, far_output = (parent.as_strided((1, 2, 4, 4), (0, 8, 2, step)) for parent in parents)
    near = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(7)).half()
    far_input.copy_(near)
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(8)).half()
    window = [[1, 1], [1, 1], [1, 1], 1, [0, 2, 4], [0, 3, 4], [0, 2, 4], [0, 3, 4]]
    ops = operators.namespace
    ops.patch_conv2d.out(far_input, weight, None, *window, "none", output=far_output)
    assert torch.equal(far_output, ops.patch_conv2d(near, weight, None, *window, "none"))
    ops.patch_conv2d_input_grad.out(far_input, weight, [1, 2, 4, 4], *window, output=far_output)
    assert torch.equal(far_output, ops.patch_conv2d_input_grad(near, weight, [1, 2, 4, 4], *window))
    far_grad = ops.patch_conv2d_weight_grad(far_output, far_input, [2, 2, 3, 3], *window)
    assert torch.equal(far_grad, ops.patch_conv2d_weight_grad(far_output.clone(), near, [2, 2, 3, 3], *window))
