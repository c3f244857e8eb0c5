"""The sm_80 convolution path, executed by the CPU, against the definition of each operator in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitkern import _library
from splitkern._library import forced_path
from tests.kernel_checks import comparisons, first_principles
from tests.kernel_checks.cases import GENERATED, NAMED, Case, even, square
from tests.kernel_checks.comparisons import Operators, assert_accurate, random_tensor

BY_NAME = {case.name: case for case in NAMED}
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
LAYOUTS = ["channels_last", "aligned channels_last view"]

each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def sm80(host_library: Path) -> Iterator[Callable[[int], None]]:
    """Every convolution takes the path, fp32 may be tf32; sets the number of multiprocessors.

    One multiprocessor is what makes the launch choose the largest tile that the shape fills.
    """
    library = ctypes.CDLL(str(host_library))
    allow = _library._Tf32Query(lambda: 1)
    library.splitkern_set_tf32_query(allow)

    def set_device(multiprocessors: int) -> None:
        library.splitkern_host_set_device(
            ctypes.c_int32(80), ctypes.c_int32(multiprocessors), ctypes.c_int64(163 * 1024)
        )

    set_device(1)
    with forced_path("sm80", host_library):
        yield set_device
    library.splitkern_set_tf32_query(None)
    library.splitkern_host_set_device(ctypes.c_int32(90), ctypes.c_int32(132), ctypes.c_int64(232448))


def wide(case: Case, in_channels: int, out_channels: int, batch: int = 2, groups: int = 1) -> Case:
    """The case with channels that the path takes."""
    return replace(case, in_channels=in_channels, out_channels=out_channels, batch=batch, groups=groups)


GEOMETRIES = [
    "one patch",
    "one pixel",
    "one pixel, padded 3x3",
    "uneven 2x2",
    "stride 2, 3x3",
    "stride 2, kernel 2: exact",
    "stride 3, kernel 2: gaps",
    "stride 2, kernel 1",
    "dilation 2",
    "dilation 3, stride 2",
    "negative padding crops",
    "wide end padding",
    "windows that see nothing",
    "bounds outside the intervals",
    "rectangular window",
    "5x3 patches",
]
# Channels in turn: one vector, tails of a stage, several stages.
CHANNELS = [(8, 16), (16, 8), (24, 8), (40, 24), (8, 40)]


@pytest.mark.parametrize(
    ("name", "channels", "dtype", "layout"),
    [
        (name, CHANNELS[i % len(CHANNELS)], DTYPES[i % len(DTYPES)], LAYOUTS[i % len(LAYOUTS)])
        for i, name in enumerate(GEOMETRIES)
    ],
)
def test_geometries(
    operators: Operators, name: str, channels: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    comparisons.conv2d(operators, wide(BY_NAME[name], *channels, batch=1 + len(name) % 2), dtype, layout)


@pytest.mark.parametrize("index", range(0, len(GENERATED), 2))
def test_generated_geometries(operators: Operators, index: int) -> None:
    case = GENERATED[index]
    groups = case.groups
    chosen = wide(case, groups * 8 * case.in_channels // groups, groups * 8, batch=case.batch, groups=groups)
    comparisons.conv2d(operators, chosen, DTYPES[index % 3], LAYOUTS[index // 2 % 2])
