"""Geometries to check: named ones for what is known to be hard, generated ones for the rest."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.kernel_checks.first_principles import Geometry


@dataclass(frozen=True)
class Case:
    name: str
    geometry: Geometry
    batch: int = 2
    in_channels: int = 4
    out_channels: int = 6
    groups: int = 1

    def __str__(self) -> str:
        return self.name


def even(extent: int, parts: int) -> tuple[int, ...]:
    return tuple(i * extent // parts for i in range(parts + 1))


def square(
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    in_rows: tuple[int, ...],
    in_columns: tuple[int, ...],
    out_rows: tuple[int, ...],
    out_columns: tuple[int, ...],
) -> Geometry:
    pair = (kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation)
    return Geometry(*pair, in_rows, in_columns, out_rows, out_columns)


_3X3 = square(3, 1, 1, 1, (0, 4, 9), (0, 5, 7), (0, 4, 9), (0, 5, 7))
_MANY = even(150, 150)  # more patches on an axis than a parameter struct holds (64): several launches

NAMED = [
    Case("one patch", square(3, 1, 1, 1, (0, 7), (0, 5), (0, 7), (0, 5))),
    Case("one pixel", square(1, 1, 0, 1, (0, 1), (0, 1), (0, 1), (0, 1))),
    Case("one pixel, padded 3x3", square(3, 1, 1, 1, (0, 1), (0, 1), (0, 1), (0, 1))),
    Case("uneven 2x2", _3X3),
    Case("groups", _3X3, in_channels=4, out_channels=6, groups=2),
    Case("depthwise", _3X3, in_channels=5, out_channels=5, groups=5),
    Case("depthwise, multiplied", _3X3, in_channels=3, out_channels=6, groups=3),
    Case("stride 2, 3x3", square(3, 2, 1, 1, (0, 5, 11), (0, 6, 12), (0, 3, 6), (0, 3, 6))),
    Case("stride 2, kernel 2: exact", square(2, 2, 0, 1, (0, 4, 10), (0, 6, 8), (0, 2, 5), (0, 3, 4))),
    Case("stride 3, kernel 2: gaps", square(2, 3, 0, 1, (0, 6, 11), (0, 4, 11), (0, 2, 4), (0, 1, 4))),
    Case("stride 2, kernel 1", square(1, 2, 0, 1, (0, 5, 9), (0, 2, 8), (0, 3, 5), (0, 1, 4))),
    Case("dilation 2", square(3, 1, 2, 2, (0, 4, 9), (0, 6, 10), (0, 4, 9), (0, 6, 10))),
    Case("dilation 3, stride 2", square(3, 2, 3, 3, (0, 7, 13), (0, 6, 13), (0, 4, 7), (0, 3, 7))),
    Case("7x7, stride 2", square(7, 2, 3, 1, (0, 8, 16), (0, 6, 15), (0, 4, 8), (0, 3, 8))),
    Case("negative padding crops", square(3, 1, -2, 1, (0, 6, 12), (0, 5, 11), (0, 3, 6), (0, 3, 6))),
    Case("wide end padding", square(3, 1, 0, 1, (0, 3, 6), (0, 2, 6), (0, 4, 9), (0, 3, 8))),
    Case("windows that see nothing", square(2, 1, 6, 1, (0, 2, 5), (0, 3, 6), (0, 3, 12), (0, 9, 13))),
    Case("bounds outside the intervals", square(3, 1, 1, 1, (0, 1, 9), (0, 8, 9), (0, 7, 9), (0, 2, 9))),
    Case(
        "rectangular window",
        Geometry((3, 1), (2, 1), (1, 0), (1, 1), (0, 4, 9), (0, 3, 5), (0, 2, 5), (0, 3, 5)),
    ),
    Case("5x3 patches", square(3, 1, 1, 1, even(17, 5), even(11, 3), even(17, 5), even(11, 3))),
    Case("150 row patches", square(3, 1, 1, 1, _MANY, (0, 2, 4), _MANY, (0, 2, 4)), 1, 2, 2),
    Case("66 column patches", square(2, 1, 1, 1, even(6, 3), even(66, 66), even(6, 3), even(66, 66)), 1, 1, 2),
    Case("single image and channel", _3X3, batch=1, in_channels=1, out_channels=1),
]
EMPTY = Case("empty batch", _3X3, batch=0)
# Launches along both axes. What cuts the axes into launches is one function, so that the convolution stands for all;
# the reference takes each patch by itself, which is slow for so many.
MANY_ON_BOTH_AXES = Case(
    "70x66 patches", square(2, 1, 1, 1, even(70, 70), even(66, 66), even(70, 70), even(66, 66)), 1, 1, 2
)


def _bounds(draw: random.Random, extent: int, parts: int) -> tuple[int, ...]:
    return (0, *sorted(draw.sample(range(1, extent), parts - 1)), extent)


def _generate(seed: int) -> Case:
    draw = random.Random(seed)
    axes = []
    for _ in range(2):
        parts = draw.randint(1, 4)
        axes.append(
            (
                draw.randint(1, 4),
                draw.randint(1, 3),
                draw.randint(-3, 4),
                draw.randint(1, 3),
                _bounds(draw, draw.randint(parts, 14), parts),
                _bounds(draw, draw.randint(parts, 10), parts),
            )
        )
    rows, columns = axes
    groups = draw.choice([1, 1, 2, 3])
    return Case(
        f"generated {seed}",
        Geometry(
            (rows[0], columns[0]),
            (rows[1], columns[1]),
            (rows[2], columns[2]),
            (rows[3], columns[3]),
            rows[4],
            columns[4],
            rows[5],
            columns[5],
        ),
        batch=draw.randint(1, 3),
        in_channels=groups * draw.randint(1, 3),
        out_channels=groups * draw.randint(1, 3),
        groups=groups,
    )


GENERATED = [_generate(seed) for seed in range(40)]


def without_dilation(case: Case) -> Case:
    """Average pooling has none."""
    return replace(case, geometry=replace(case.geometry, dilation=(1, 1)))


ONE_PATCH_WITHOUT_PADDING = Case("no padding", square(3, 2, 0, 1, (0, 15), (0, 11), (0, 7), (0, 5)), in_channels=3)
# Two output channels and one input channel leave the weight gradient far more terms than results.
LONG_REDUCTION = Case("long reduction", square(3, 1, 1, 1, (0, 40, 64), (0, 30, 64), (0, 40, 64), (0, 30, 64)), 4, 1, 2)
