"""The Hopper convolution path, executed by the CPU, against the definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitkern._library import forced_path
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import Case
from tests.kernel_checks.comparisons import Operators
from tests.kernel_checks.sm90 import GEMM_TILES, SMALL, WEIGHT_GRAD_TILES, WINDOW, tuned

BY_NAME = {case.name: case for case in SMALL}


@pytest.fixture(autouse=True)
def forced(host_library: Path) -> Iterator[None]:
    with forced_path("sm90", host_library):
        yield


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_geometry(operators: Operators, case: Case) -> None:
    index = SMALL.index(case)
    layout = "aligned channels_last view" if index % 2 else "channels_last"
    comparisons.conv2d(operators, case, torch.bfloat16 if index % 4 < 2 else torch.float16, layout)


def test_bias_and_relu(operators: Operators) -> None:
    comparisons.conv2d(operators, BY_NAME["channel tails"], torch.bfloat16, "channels_last", activation="relu")


@pytest.mark.parametrize("layout", ["channels_last", "aligned channels_last view"])
@pytest.mark.parametrize("name", ["even 2x2", "even 1x4", "even, stride 2"])
def test_equal_patches_as_one_problem(operators: Operators, host_library: Path, name: str, layout: str) -> None:
    """All patches of a whole tensor are one problem, of a view those of a row."""
    with tuned(host_library, window=0):
        comparisons.conv2d(operators, BY_NAME[name], torch.bfloat16, layout)


@pytest.mark.parametrize("tile", GEMM_TILES)
def test_every_tile_of_forward_and_input_gradient(operators: Operators, host_library: Path, tile: int) -> None:
    with tuned(host_library, gemm_tile=tile):
        comparisons.conv2d(operators, BY_NAME["channel tails"], torch.bfloat16, "channels_last")


@pytest.mark.parametrize("tile", WEIGHT_GRAD_TILES)
def test_every_tile_of_the_weight_gradient(operators: Operators, host_library: Path, tile: int) -> None:
    with tuned(host_library, weight_grad_tile=tile, weight_grad_segments=3):
        comparisons.conv2d(operators, BY_NAME["channel tails"], torch.float16, "channels_last")


@pytest.mark.parametrize("case", WINDOW, ids=str)
def test_window_kernels(operators: Operators, host_library: Path, case: Case) -> None:
    index = WINDOW.index(case)
    layout = "aligned channels_last view" if index % 2 else "channels_last"
    with tuned(host_library, window=1):
        comparisons.conv2d(operators, case, torch.float16 if index % 4 < 2 else torch.bfloat16, layout)


@pytest.mark.parametrize("case", [WINDOW[0], WINDOW[2], WINDOW[3]], ids=str)
def test_window_kernels_with_bias_and_relu(operators: Operators, host_library: Path, case: Case) -> None:
    with tuned(host_library, window=1):
        comparisons.conv2d(operators, case, torch.bfloat16, "channels_last", activation="relu")


def test_window_weight_gradient_ignores_inputs_that_no_window_reads(operators: Operators, host_library: Path) -> None:
    image = torch.ones(1, 8, 6, 10).half().contiguous(memory_format=torch.channels_last)
    image[:, 3, :, 6:] = float("inf")
    gradient = torch.ones(1, 8, 4, 4).half().contiguous(memory_format=torch.channels_last)
    window = [[1, 1], [0, 0], [1, 1], 1, [0, 6], [0, 10], [0, 4], [0, 4]]
    with tuned(host_library, window=1):
        found = operators.namespace.patch_conv2d_weight_grad(gradient, image, [8, 8, 3, 3], *window)
    assert torch.equal(found, torch.full_like(found, 16.0))
