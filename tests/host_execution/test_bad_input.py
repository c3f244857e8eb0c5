"""Inputs that the fast paths cannot take, or not in one launch: the automatic choice still computes them right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import EMPTY, NAMED, Case
from tests.kernel_checks.comparisons import LAYOUTS, Operators

UNEVEN = next(case for case in NAMED if case.name == "uneven 2x2")
MANY = next(case for case in NAMED if case.name == "150 row patches")
CHANNELS = [(16, 8), (12, 10), (3, 16), (9, 7)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("in_channels", "out_channels"), CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_layout_and_alignment(
    operators: Operators, dtype: torch.dtype, in_channels: int, out_channels: int, layout: str
) -> None:
    case = replace(UNEVEN, in_channels=in_channels, out_channels=out_channels, batch=1)
    comparisons.conv2d(operators, case, dtype, layout)


def test_more_patches_than_one_launch_holds(operators: Operators) -> None:
    comparisons.conv2d(operators, replace(MANY, in_channels=8, out_channels=8), torch.bfloat16, "channels_last")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_empty_batch(operators: Operators, layout: str) -> None:
    case: Case = replace(EMPTY, in_channels=16, out_channels=16)
    comparisons.conv2d(operators, case, torch.bfloat16, layout)


def test_a_last_run_of_one_column_at_an_unaligned_place(operators: Operators) -> None:
    """65 patches in a row are two launches; the second begins where no tensor map can."""
    starts = [0, *range(2, 66), 66]
    generator = torch.Generator().manual_seed(12)
    parent = torch.randn(1, 4, 66, 12, generator=generator).half()
    image = parent.permute(0, 3, 1, 2)[:, :8]  # columns 12 elements apart
    weight = torch.randn(8, 8, 1, 1, generator=generator).half()
    window = [[1, 1], [0, 0], [1, 1], 1, [0, 4], starts, [0, 4], starts]
    output = operators.namespace.patch_conv2d(image, weight, None, *window, "none")
    expected = torch.nn.functional.conv2d(image.double(), weight.double())
    assert comparisons.relative_error(output, expected) < 1e-3


WINDOW = [[1, 1], [0, 0], [1, 1], 1, [0, 2**20], [0, 2**20], [0, 2**20], [0, 2**20]]


def test_an_output_that_does_not_fit_names_the_operator(operators: Operators) -> None:
    """2^62 bytes are more than any machine maps; the operator works afterwards."""
    ops = operators.namespace
    image, weight = torch.ones(1, 1, 1, 1).expand(1, 1, 2**20, 2**20), torch.ones(2**20, 1, 1, 1)
    with pytest.raises(
        RuntimeError, match=r"splitkern::patch_conv2d: .*out of memory: .* a tensor of size .1, 1048576, "
    ):
        ops.patch_conv2d(image, weight, None, *WINDOW, "none")
    one = [[1, 1], [0, 0], [1, 1], 1, [0, 1], [0, 1], [0, 1], [0, 1]]
    assert ops.patch_conv2d(image[..., :1, :1], weight[:3], None, *one, "none").tolist() == [[[[1.0]]] * 3]


def test_a_workspace_that_does_not_fit_names_the_operator(operators: Operators) -> None:
    ops = operators.namespace
    grad_output = torch.ones(1, 1, 1, 1).expand(1, 2**20, 1, 1)
    image = torch.ones(1, 1, 1, 1).expand(1, 2**20, 1, 1)
    output = torch.ones(2**21).as_strided((2**20, 2**20, 1, 1), (1, 1, 1, 1))
    one = [[1, 1], [0, 0], [1, 1], 1, [0, 1], [0, 1], [0, 1], [0, 1]]
    with pytest.raises(RuntimeError, match=r"splitkern::patch_conv2d_weight_grad.*out of memory: "):
        ops.patch_conv2d_weight_grad.out(grad_output, image, [2**20, 2**20, 1, 1], *one, False, output=output)
