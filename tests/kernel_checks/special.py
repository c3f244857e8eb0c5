"""Geometries for the first layer's kernels and for those of few channels per group."""

from __future__ import annotations

from dataclasses import replace

from tests.kernel_checks.cases import GENERATED, NAMED, Case, even, square
from tests.kernel_checks.first_principles import Geometry

_ONE_LAUNCH = [case for case in NAMED if case.name not in ("150 row patches", "66 column patches")]

# Several tiles a patch, tiles that end inside a patch, blocks that take several tiles.
_TILED = [
    Case("3x3, tiled", square(3, 1, 1, 1, (0, 7, 40), (0, 21, 43), (0, 6, 40), (0, 22, 43)), 2, 3, 64),
    Case("7x7 stride 2, tiled", square(7, 2, 3, 1, (0, 33, 66), (0, 40, 72), (0, 17, 33), (0, 20, 36)), 2, 3, 64),
    Case("3x3, one wide row", square(3, 1, 1, 1, (0, 1), (0, 300), (0, 1), (0, 300)), 1, 3, 8),
    Case("3x3, one high column", square(3, 1, 1, 1, (0, 300), (0, 1), (0, 300), (0, 1)), 1, 4, 8),
    Case("channel tail", square(3, 1, 1, 1, (0, 9), (0, 7, 19), (0, 9), (0, 7, 19)), 2, 3, 72),
    Case("two blocks of channels", square(5, 1, 2, 1, (0, 9), (0, 7, 19), (0, 9), (0, 7, 19)), 1, 2, 128),
    Case("11x11 stride 4", square(11, 4, 2, 1, (0, 35), (0, 39), (0, 8), (0, 9)), 1, 3, 16),
    Case("5x5 dilation 3", square(5, 1, 6, 3, (0, 9, 21), (0, 20), (0, 10, 21), (0, 20)), 1, 3, 16),
    Case("2x7", Geometry((2, 7), (1, 2), (0, 3), (2, 1), (0, 9, 21), (0, 20), (0, 10, 19), (0, 10)), 1, 1, 16),
]
FIRST_LAYER = [
    *_TILED,
    *(
        replace(case, in_channels=1 + i % 4, out_channels=8 * (1 + i % 3), groups=1)
        for i, case in enumerate([*_ONE_LAUNCH, *GENERATED[:24]])
    ),
]
FIRST_LAYER_BY_NAME = {case.name: case for case in FIRST_LAYER}

# (groups, input channels of a group, output channels of a group)
DEPTHWISE_GROUPS = [(16, 1, 1), (8, 1, 1), (40, 1, 1)]
UNALIGNED_DEPTHWISE = (3, 1, 1)
SMALL_GROUPS = [(4, 4, 4), (2, 1, 2), (3, 2, 5), (2, 12, 4), (2, 5, 1), (20, 4, 8)]

# Runs that end inside a row, rows that end inside a band, and the kernels that keep their inputs in registers.
WIDER = [
    Case("3x3, wide", square(3, 1, 1, 1, (0, 7, 20), (0, 9, 23), (0, 6, 20), (0, 10, 23))),
    Case("3x3 stride 2, wide", square(3, 2, 1, 1, (0, 9, 21), (0, 12, 23), (0, 5, 11), (0, 6, 12))),
    Case("5x5, wide", square(5, 1, 2, 1, (0, 7, 15), (0, 8, 17), (0, 7, 15), (0, 9, 17))),
    Case("7x7, wide", square(7, 1, 3, 1, (0, 6, 13), (0, 7, 15), (0, 6, 13), (0, 7, 15))),
    Case("3x3, cropped", square(3, 1, -2, 1, (0, 6, 14), (0, 5, 16), (0, 4, 10), (0, 3, 12))),
]


def with_groups(case: Case, groups: tuple[int, int, int]) -> Case:
    count, inputs, outputs = groups
    return replace(case, groups=count, in_channels=count * inputs, out_channels=count * outputs)


_CASES = [*WIDER, *_ONE_LAUNCH, *GENERATED[:24]]
DEPTHWISE = [with_groups(case, DEPTHWISE_GROUPS[i % 3]) for i, case in enumerate(_CASES)]
GROUPED = [with_groups(case, SMALL_GROUPS[i % len(SMALL_GROUPS)]) for i, case in enumerate(_CASES)]

# Of the sizes that the kernels are for.
LARGE_FIRST_LAYER = [
    Case("VGG-19", square(3, 1, 1, 1, (0, 224), (0, 224), (0, 224), (0, 224)), 4, 3, 64),
    Case("VGG-19, 4x4", square(3, 1, 1, 1, even(224, 4), even(224, 4), even(224, 4), even(224, 4)), 4, 3, 64),
    Case(
        "VGG-19, 3x2 uneven",
        square(3, 1, 1, 1, (0, 50, 131, 224), (0, 99, 224), (0, 50, 131, 224), (0, 99, 224)),
        4,
        3,
        64,
    ),
    Case("ResNet-50", square(7, 2, 3, 1, (0, 224), (0, 224), (0, 112), (0, 112)), 4, 3, 64),
    Case("ResNet-50, 2x2", square(7, 2, 3, 1, (0, 112, 224), (0, 112, 224), (0, 56, 112), (0, 56, 112)), 4, 3, 64),
    Case("ResNet-50, 4x4", square(7, 2, 3, 1, even(224, 4), even(224, 4), even(112, 4), even(112, 4)), 4, 3, 64),
]
LARGE_DEPTHWISE = [
    Case("3x3, 256", square(3, 1, 1, 1, (0, 28, 56), (0, 28, 56), (0, 28, 56), (0, 28, 56)), 4, 256, 256, 256),
    Case("3x3 stride 2, 96", square(3, 2, 1, 1, (0, 56, 112), (0, 112), (0, 28, 56), (0, 56)), 4, 96, 96, 96),
    Case("5x5, 240", square(5, 1, 2, 1, (0, 28), (0, 15, 28), (0, 28), (0, 15, 28)), 4, 240, 240, 240),
    Case("7x7, 96", square(7, 1, 3, 1, (0, 28, 56), (0, 56), (0, 28, 56), (0, 56)), 4, 96, 96, 96),
    Case("32 groups of 4", square(3, 1, 1, 1, (0, 28, 56), (0, 28, 56), (0, 28, 56), (0, 28, 56)), 4, 128, 128, 32),
    Case("32 groups of 4, stride 2", square(3, 2, 1, 1, (0, 28, 56), (0, 56), (0, 14, 28), (0, 28)), 4, 128, 128, 32),
]
