"""The direct kernels for groups of few channels, executed by the CPU, against the definition in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitkern._library import forced_path
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import Case, even, square
from tests.kernel_checks.comparisons import LAYOUTS, Operators
from tests.kernel_checks.special import (
    DEPTHWISE,
    DEPTHWISE_GROUPS,
    GROUPED,
    SMALL_GROUPS,
    UNALIGNED_DEPTHWISE,
    WIDER,
    with_groups,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MANY = even(150, 150)


@pytest.fixture(autouse=True)
def few_multiprocessors(host_library: Path) -> Iterator[None]:
    """So few that blocks take several turns."""
    device = ctypes.CDLL(str(host_library)).splitkern_host_set_device
    device(ctypes.c_int32(80), ctypes.c_int32(1), ctypes.c_int64(101376))
    with forced_path("depthwise", host_library):
        yield
    device(ctypes.c_int32(90), ctypes.c_int32(132), ctypes.c_int64(232448))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i // 3 % 3]) for i, case in enumerate(DEPTHWISE)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_depthwise(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, case, dtype, "channels_last")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[(i + i // 6) % 3]) for i, case in enumerate(GROUPED)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_small_groups(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, case, dtype, "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "groups", [DEPTHWISE_GROUPS[0], UNALIGNED_DEPTHWISE, SMALL_GROUPS[0], SMALL_GROUPS[2]], ids=str
)
def test_types_and_layouts(operators: Operators, groups: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    comparisons.conv2d(operators, with_groups(WIDER[0], groups), dtype, layout)
    comparisons.conv2d(operators, with_groups(WIDER[1], groups), dtype, layout, activation="relu")


@pytest.mark.parametrize("groups", [DEPTHWISE_GROUPS[1], SMALL_GROUPS[0]], ids=str)
def test_more_patches_than_one_launch_takes(
    operators: Operators, host_library: Path, groups: tuple[int, int, int]
) -> None:
    """The weight gradient of such a call is the plain path's."""
    case = with_groups(Case("", square(3, 1, 1, 1, MANY, (0, 2, 4), MANY, (0, 2, 4)), batch=1), groups)
    with forced_path("", host_library):
        comparisons.conv2d(operators, case, torch.float32, "channels_last")


def test_expanded_gradient(operators: Operators) -> None:
    """What ``output.sum().backward()`` hands over: a tensor whose strides are all zero."""
    comparisons.conv2d_expanded_gradient(operators, with_groups(WIDER[0], (4, 2, 2)))


@pytest.mark.parametrize(
    ("channels", "weight_channels", "groups", "reason"),
    [(16, 16, 1, "the channels are in one group"), (32, 16, 2, "the groups have 16 input and 8 output channels")],
)
def test_what_is_refused(operators: Operators, channels: int, weight_channels: int, groups: int, reason: str) -> None:
    image, weight = torch.ones(1, channels, 4, 4), torch.ones(16, weight_channels, 1, 1)
    window = [[1, 1], [0, 0], [1, 1], groups, [0, 4], [0, 4], [0, 4], [0, 4]]
    with pytest.raises(RuntimeError, match=reason):
        operators("patch_conv2d", image, weight, None, *window, "none")
