"""Which kernels a convolution takes: the choice, and forcing it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitkern._library import forced_path
from tests.kernel_checks.comparisons import Operators

WINDOW = [[1, 1], [1, 1], [1, 1], 1, [0, 4], [0, 4], [0, 4], [0, 4]]


def convolve(operators: Operators, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    image = torch.ones(1, 2, 4, 4, dtype=dtype)
    weight = torch.ones(3, 2, 3, 3, dtype=dtype)
    return operators("patch_conv2d", image, weight, None, *WINDOW, "none")


def test_the_plain_path_takes_what_it_is_forced_to(operators: Operators, host_library: Path) -> None:
    automatic = convolve(operators)
    with forced_path("plain", host_library):
        assert torch.equal(convolve(operators), automatic)


@pytest.mark.parametrize("path", ["depthwise", "first_layer", "sm80", "sm90"])
def test_a_forced_path_that_refuses_raises_and_is_forgotten_afterwards(
    operators: Operators, host_library: Path, path: str
) -> None:
    """No fast path has fp64."""
    with (
        pytest.raises(RuntimeError, match=f"splitkern::patch_conv2d: the path {path} was forced, but"),
        forced_path(path, host_library),
    ):
        convolve(operators)
    convolve(operators)


def test_an_unknown_path_is_refused(host_library: Path) -> None:
    rule = "path must be plain, depthwise, first_layer, sm80 or sm90, got 'sm70'"
    with pytest.raises(ValueError, match=rule), forced_path("sm70", host_library):
        pass
