"""The direct kernels for groups of few channels, executed by the CPU, against the definition in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitkern._library import forced_path
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import GENERATED, NAMED, Case, even, square
from tests.kernel_checks.comparisons import LAYOUTS, Operators

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (groups, input channels of a group, output channels of a group)
DEPTHWISE = [(16, 1, 1), (8, 1, 1), (40, 1, 1), (3, 1, 1)]
GROUPED = [(4, 4, 4), (2, 1, 2), (3, 2, 5), (2, 12, 4), (2, 5, 1), (20, 4, 8)]


def with_groups(case: Case, groups: tuple[int, int, int]) -> Case:
    count, inputs, outputs = groups
    return replace(case, groups=count, in_channels=count * inputs, out_channels=count * outputs)


# Runs that end inside a row, rows that end inside a band, and the kernels that keep their inputs in registers.
WIDER = [
    Case("3x3, wide", square(3, 1, 1, 1, (0, 7, 20), (0, 9, 23), (0, 6, 20), (0, 10, 23))),
    Case("3x3 stride 2, wide", square(3, 2, 1, 1, (0, 9, 21), (0, 12, 23), (0, 5, 11), (0, 6, 12))),
    Case("5x5, wide", square(5, 1, 2, 1, (0, 7, 15), (0, 8, 17), (0, 7, 15), (0, 9, 17))),
    Case("7x7, wide", square(7, 1, 3, 1, (0, 6, 13), (0, 7, 15), (0, 6, 13), (0, 7, 15))),
    Case("3x3, cropped", square(3, 1, -2, 1, (0, 6, 14), (0, 5, 16), (0, 4, 10), (0, 3, 12))),
]
CASES = [*WIDER, *(case for case in NAMED if case.name not in ("150 row patches", "70x66 patches")), *GENERATED[:24]]
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
    ("case", "groups", "dtype"),
    [(case, DEPTHWISE[i % 3], DTYPES[i // 3 % 3]) for i, case in enumerate(CASES)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_depthwise(operators: Operators, case: Case, groups: tuple[int, int, int], dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, with_groups(case, groups), dtype, "channels_last")


@pytest.mark.parametrize(
    ("case", "groups", "dtype"),
    [(case, GROUPED[i % len(GROUPED)], DTYPES[(i + i // 6) % 3]) for i, case in enumerate(CASES)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_small_groups(operators: Operators, case: Case, groups: tuple[int, int, int], dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, with_groups(case, groups), dtype, "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [DEPTHWISE[0], DEPTHWISE[3], GROUPED[0], GROUPED[2]], ids=str)
def test_types_and_layouts(operators: Operators, groups: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    comparisons.conv2d(operators, with_groups(WIDER[0], groups), dtype, layout)
    comparisons.conv2d(operators, with_groups(WIDER[1], groups), dtype, layout, activation="relu")


@pytest.mark.parametrize("groups", [DEPTHWISE[1], GROUPED[0]], ids=str)
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
