"""The Hopper path: geometries that it takes, and its tiles."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from tests.kernel_checks.cases import Case, even, square
from tests.kernel_checks.first_principles import Geometry

GEMM_TILES = range(8)
WEIGHT_GRAD_TILES = range(7)

_3X3 = square(3, 1, 1, 1, (0, 4, 9), (0, 5, 7), (0, 4, 9), (0, 5, 7))

# Small enough for the CPU; channels are multiples of 8, and most tiles span images.
SMALL = [
    Case("one pixel", square(1, 1, 0, 1, (0, 1), (0, 1), (0, 1), (0, 1)), 1, 8, 8),
    Case("one pixel, padded 3x3", square(3, 1, 1, 1, (0, 1), (0, 1), (0, 1), (0, 1)), 2, 8, 16),
    Case("uneven 2x2", _3X3, 3, 16, 24),
    Case("channel tails", _3X3, 2, 72, 40),
    Case("many output channels", square(1, 1, 0, 1, (0, 3, 5), (0, 4), (0, 3, 5), (0, 4)), 3, 16, 136),
    Case("stride 2, 3x3", square(3, 2, 1, 1, (0, 5, 11), (0, 6, 12), (0, 3, 6), (0, 3, 6)), 2, 16, 8),
    Case("stride 2, kernel 2: exact", square(2, 2, 0, 1, (0, 4, 10), (0, 6, 8), (0, 2, 5), (0, 3, 4)), 2, 8, 16),
    Case("stride 3, kernel 2: gaps", square(2, 3, 0, 1, (0, 6, 11), (0, 4, 11), (0, 2, 4), (0, 1, 4)), 2, 8, 16),
    Case("stride 2, kernel 1", square(1, 2, 0, 1, (0, 5, 9), (0, 2, 8), (0, 3, 5), (0, 1, 4)), 2, 24, 8),
    Case("dilation 2", square(3, 1, 2, 2, (0, 4, 9), (0, 6, 10), (0, 4, 9), (0, 6, 10)), 2, 8, 8),
    Case("dilation 3, stride 2", square(3, 2, 3, 3, (0, 7, 13), (0, 6, 13), (0, 4, 7), (0, 3, 7)), 2, 8, 8),
    Case("dilation 2, stride 2", square(3, 2, 2, 2, (0, 7, 13), (0, 6, 13), (0, 4, 7), (0, 3, 7)), 2, 8, 8),
    Case("7x7, stride 2", square(7, 2, 3, 1, (0, 8, 16), (0, 6, 15), (0, 4, 8), (0, 3, 8)), 1, 8, 8),
    Case("negative padding crops", square(3, 1, -2, 1, (0, 6, 12), (0, 5, 11), (0, 3, 6), (0, 3, 6)), 2, 8, 8),
    Case("windows that see nothing", square(2, 1, 6, 1, (0, 2, 5), (0, 3, 6), (0, 3, 12), (0, 9, 13)), 2, 8, 8),
    Case("bounds outside the intervals", square(3, 1, 1, 1, (0, 1, 9), (0, 8, 9), (0, 7, 9), (0, 2, 9)), 2, 8, 8),
    Case(
        "rectangular window",
        Geometry((3, 1), (2, 1), (1, 0), (1, 1), (0, 4, 9), (0, 3, 5), (0, 2, 5), (0, 3, 5)),
        *(2, 8, 8),
    ),
    Case("even 2x2", square(3, 1, 1, 1, even(8, 2), even(6, 2), even(8, 2), even(6, 2)), 3, 16, 24),
    Case("even 1x4", square(3, 1, 1, 1, (0, 5), even(12, 4), (0, 5), even(12, 4)), 2, 16, 8),
    Case("even, stride 2", square(3, 2, 1, 1, even(8, 2), even(12, 2), even(4, 2), even(6, 2)), 2, 8, 16),
    Case("5x3 patches", square(3, 1, 1, 1, even(17, 5), even(11, 3), even(17, 5), even(11, 3)), 1, 8, 8),
]

# For the kernels that keep a window's pixels in shared memory: wide ones (over 64 output channels), narrow ones, and
# those with resident weights (64 channels at most on both sides), which want rows of 22 pixels at least.
WINDOW = [
    Case("resident, uneven", square(3, 1, 1, 1, (0, 3, 7), (0, 24, 50), (0, 3, 7), (0, 24, 50)), 2, 24, 40),
    Case("resident, strips", square(3, 1, 1, 1, (0, 3), (0, 250), (0, 3), (0, 250)), 1, 8, 8),
    Case("narrow, two channel blocks", square(3, 1, 1, 1, (0, 5), (0, 24, 47), (0, 5), (0, 24, 47)), 1, 72, 16),
    Case("wide, channel tails", square(3, 1, 1, 1, (0, 4, 9), (0, 5, 7), (0, 4, 9), (0, 5, 7)), 3, 72, 136),
    Case("wide, full rows", square(3, 1, 1, 1, (0, 9, 17), (0, 27), (0, 9, 17), (0, 27)), 2, 8, 72),
    Case("dilation 2", square(3, 1, 2, 2, (0, 4, 9), (0, 26, 50), (0, 4, 9), (0, 26, 50)), 1, 8, 72),
    Case("5x5", square(5, 1, 2, 1, (0, 4, 9), (0, 24, 50), (0, 4, 9), (0, 24, 50)), 1, 16, 24),
    Case("negative padding crops", square(3, 1, -2, 1, (0, 6, 12), (0, 25, 51), (0, 3, 6), (0, 23, 45)), 2, 8, 8),
    Case("bounds outside the intervals", square(3, 1, 1, 1, (0, 1, 9), (0, 8, 30), (0, 7, 9), (0, 2, 30)), 2, 8, 72),
]

_28 = (0, 14, 28)
# Of the sizes that the path is for.
LARGE = [
    Case("3x3, 64 to 64", square(3, 1, 1, 1, (0, 28, 56), (0, 28, 56), (0, 28, 56), (0, 28, 56)), 4, 64, 64),
    Case("3x3, 128 to 128, 4x4", square(3, 1, 1, 1, even(28, 4), even(28, 4), even(28, 4), even(28, 4)), 4, 128, 128),
    Case("3x3, 256 to 512, uneven", square(3, 1, 1, 1, (0, 5, 17), (0, 9, 19), (0, 5, 17), (0, 9, 19)), 7, 256, 512),
    Case("3x3, 512 to 512", square(3, 1, 1, 1, (0, 7, 14), (0, 7, 14), (0, 7, 14), (0, 7, 14)), 3, 512, 512),
    Case("3x3, stride 2, 128 to 128", square(3, 2, 1, 1, (0, 28, 56), (0, 28, 56), _28, _28), 3, 128, 128),
    Case("1x1, 256 to 64", square(1, 1, 0, 1, _28, _28, _28, _28), 5, 256, 64),
    Case("1x1, 64 to 256", square(1, 1, 0, 1, _28, _28, _28, _28), 5, 64, 256),
    Case(
        "1x1, stride 2, 256 to 512", square(1, 2, 0, 1, (0, 14, 28), (0, 14, 28), (0, 7, 14), (0, 7, 14)), 3, 256, 512
    ),
    Case("7x7, stride 2, 8 to 64", square(7, 2, 3, 1, (0, 32, 64), (0, 32, 64), (0, 16, 32), (0, 16, 32)), 2, 8, 64),
    Case("3x3, tails, 72 to 200", square(3, 1, 1, 1, (0, 11, 23), (0, 12, 25), (0, 11, 23), (0, 12, 25)), 3, 72, 200),
    Case("12x10 patches", square(3, 1, 1, 1, even(60, 12), even(70, 10), even(60, 12), even(70, 10)), 2, 64, 64),
]


@contextlib.contextmanager
def tuned(library: Path, **knobs: int) -> Iterator[None]:
    """Overrides members of the path's Tuning inside the block."""
    tune = ctypes.CDLL(str(library)).splitkern_tune_sm90
    for name, value in knobs.items():
        assert tune(name.encode(), value) == 0, name
    try:
        yield
    finally:
        for name in knobs:
            tune(name.encode(), -1)
