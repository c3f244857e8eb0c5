"""The sm_80 path: geometries with channels that it takes, for the CPU and for a GPU."""

from __future__ import annotations

from dataclasses import replace

from tests.kernel_checks.cases import GENERATED, NAMED, Case, square
from tests.kernel_checks.sm90 import LARGE

__all__ = ["BORDERS", "GENERATED_WIDE", "LARGE", "SMALL", "TILES", "wide"]


def wide(case: Case, in_channels: int, out_channels: int, batch: int = 2, groups: int = 1) -> Case:
    """The case with other channels: the path takes multiples of 16 bytes."""
    return replace(case, in_channels=in_channels, out_channels=out_channels, batch=batch, groups=groups)


# What has more patches than a launch holds, or channels of its own, comes elsewhere.
_GEOMETRIES = [case for case in NAMED if case.in_channels == 4 and case.groups == 1]
# One vector, tails of a stage, several stages.
_CHANNELS = [(8, 16), (16, 8), (24, 8), (40, 24), (8, 40)]
SMALL = [wide(case, *_CHANNELS[i % len(_CHANNELS)], batch=1 + len(case.name) % 2) for i, case in enumerate(_GEOMETRIES)]
GENERATED_WIDE = [
    wide(case, 8 * case.in_channels, 8 * case.groups, batch=case.batch, groups=case.groups) for case in GENERATED[::2]
]
BORDERS = next(case for case in NAMED if case.name == "uneven 2x2")

# 126 output pixels are two tiles of 64 or one of 128, whose rows span images; the last stages are part full. Named
# after the tiles that one multiprocessor is given.
_UNEVEN = (0, 4, 9), (0, 5, 7)
TILES = [
    Case(name, square(kernel, 1, kernel // 2, 1, *_UNEVEN, *_UNEVEN), 2, in_channels, out_channels)
    for name, kernel, in_channels, out_channels in (
        ("128x128", 3, 72, 72),
        ("128x64 and, of the weight, 64x128", 3, 40, 40),
        ("128x64 of the weight", 1, 40, 72),
        ("several tiles", 1, 72, 136),
    )
]
