"""The kernels of csrc/kernels/nhwc, executed by the CPU: vectors of every width, tails, the bits of the plain kernels.

The channel counts give each width: 16 bytes (8 and 24 halves, 4 and 8 floats), 8 (20 halves), 4 (6 halves), one
element (3). A part of a larger tensor keeps its alignment; a view that begins one channel late leaves single
elements, whatever the count.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from splitkern._library import forced_path
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import GENERATED, NAMED, ONE_PATCH_WITHOUT_PADDING, Case, even, square, without_dilation
from tests.kernel_checks.comparisons import Operators, random_tensor

BY_NAME = {case.name: case for case in NAMED}
# More columns and rows than one tile of threads, so that several blocks and their tails are seen.
WIDE = Case("wide 2x3", square(3, 2, 1, 1, (0, 9, 21), (0, 20, 44, 75), (0, 5, 11), (0, 10, 22, 38)))
CASES = [
    *(
        BY_NAME[name]
        for name in (
            "one pixel, padded 3x3",
            "uneven 2x2",
            "stride 2, 3x3",
            "stride 2, kernel 2: exact",
            "stride 3, kernel 2: gaps",
            "dilation 3, stride 2",
            "7x7, stride 2",
            "negative padding crops",
            "windows that see nothing",
            "bounds outside the intervals",
            "rectangular window",
            "5x3 patches",
            "150 row patches",
        )
    ),
    Case("stride 2, kernel 2, odd padding", square(2, 2, 1, 1, (0, 3, 8), (0, 6, 9), (0, 2, 5), (0, 3, 5))),
    Case(
        "stride 2, 3x3, every patch one input", square(3, 2, 1, 1, even(7, 4), even(9, 5), (0, 1, 2, 3, 4), even(5, 5))
    ),
    Case("stride 2, 3x3, cropped", square(3, 2, -3, 1, (0, 8, 17), (0, 5, 16), (0, 2, 6), (0, 3, 6))),
    WIDE,
    *GENERATED[:12],
]
CHANNELS = [8, 20, 6, 24, 3]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

each_case = pytest.mark.parametrize(
    ("case", "channels", "dtype"),
    [
        (case, CHANNELS[(i + 2 * j) % len(CHANNELS)], DTYPES[(i + j) % len(DTYPES)])
        for i, case in enumerate(CASES)
        for j in range(2)
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
LAYOUTS = ["channels_last", "channels_last part", "channels_last view"]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def with_channels(case: Case, channels: int) -> Case:
    return replace(case, in_channels=channels, out_channels=channels, groups=1)


class Plain(Operators):
    """The same operators with the plain kernels."""

    def __init__(self, operators: Operators, library: Path) -> None:
        super().__init__(operators.namespace)
        self.library = library

    def __call__(self, name: str, *arguments: object) -> object:
        with forced_path("plain", self.library):
            return super().__call__(name, *arguments)


@pytest.fixture(scope="module")
def plain(operators: Operators, host_library: Path) -> Plain:
    return Plain(operators, host_library)


@each_case
@each_layout
def test_max_pool2d(
    operators: Operators, plain: Operators, case: Case, channels: int, dtype: torch.dtype, layout: str
) -> None:
    comparisons.max_pool2d(operators, with_channels(case, channels), dtype, layout)
    comparisons.max_pool2d_equal(operators, plain, with_channels(case, channels), dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool2d_nan(operators: Operators, dtype: torch.dtype) -> None:
    comparisons.max_pool2d_nan(operators, with_channels(ONE_PATCH_WITHOUT_PADDING, 8), dtype, "channels_last")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_max_pool2d_of_every_pair_of_bit_patterns(operators: Operators, plain: Operators, dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormals, infinities and NaNs meet in 1x2 windows, with and without ties."""
    special = [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7F, 0x80, 0x7C00, 0xFC00, 0x7F80, 0xFF80, 0x7E00, 0xFFC0, 0x3C00]
    bits = torch.tensor([b - 0x10000 if b >= 0x8000 else b for b in special], dtype=torch.int16)
    pairs = torch.cartesian_prod(bits, bits).view(dtype)  # [225, 2]: a row of two pixels each
    input = pairs.reshape(1, 1, -1, 2).expand(1, 8, -1, 2).contiguous(memory_format=torch.channels_last)
    rows = [0, input.shape[2]]
    window = [[1, 2], [1, 2], [0, 0], [1, 1], rows, [0, 2], rows, [0, 1]]
    ours, plains = (o("patch_max_pool2d", input, *window) for o in (operators, plain))
    for mine, theirs in zip(ours, plains, strict=True):
        assert torch.equal(comparisons._bits(mine), comparisons._bits(theirs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_of_another_call_read_nothing(operators: Operators, plain: Operators, dtype: torch.dtype) -> None:
    """Every byte as an offset: those outside the window or its patch neither spread nor gather anything."""
    bounds = [[0, 9, 15], [0, 8, 15], [0, 5, 8], [0, 4, 8]]
    generator = torch.Generator().manual_seed(12)
    offsets = torch.randint(0, 256, (2, 8, 8, 8), generator=generator, dtype=torch.uint8)
    offsets[:, :, ::2] %= 9
    offsets = offsets.contiguous(memory_format=torch.channels_last)
    input = random_tensor((2, 8, 15, 15), dtype, "channels_last", generator)
    grad = random_tensor((2, 8, 8, 8), dtype, "channels_last", generator)
    window = [[3, 3], [2, 2], [1, 1], [1, 1], *bounds]
    for name, *arguments in (
        ("patch_max_pool2d_backward", grad, offsets, list(input.shape)),
        ("patch_max_pool2d_gather", input, offsets),
    ):
        ours, plains = (o(name, *arguments, *window) for o in (operators, plain))
        assert torch.equal(comparisons._bits(ours), comparisons._bits(plains)), name


@each_case
@each_layout
def test_avg_pool2d(
    operators: Operators, plain: Operators, case: Case, channels: int, dtype: torch.dtype, layout: str
) -> None:
    case = without_dilation(with_channels(case, channels))
    comparisons.avg_pool2d(operators, case, dtype, layout)
    comparisons.avg_pool2d_equal(operators, plain, case, dtype, layout)


@each_case
@each_layout
def test_batch_norm(operators: Operators, case: Case, channels: int, dtype: torch.dtype, layout: str) -> None:
    relu = channels != 20
    affine = {8: dtype, 20: None, 6: torch.float32, 24: torch.float32, 3: dtype}[channels]
    comparisons.batch_norm(operators, with_channels(case, channels), dtype, layout, relu=relu, affine=affine)


@pytest.mark.parametrize(
    ("dtype", "layout", "side", "channels"),
    [
        (torch.float16, "channels_last", 257, 64),
        (torch.bfloat16, "channels_last view", 91, 64),
        (torch.float32, "channels_last part", 257, 32),
    ],
    ids=str,
)
def test_pooling_in_two_parts(
    plain: Plain, operators: Operators, dtype: torch.dtype, layout: str, side: int, channels: int
) -> None:
    """Just enough outputs that a thread takes two parts of the channels (`parts_of` in pooling.h)."""
    case = Case("large", square(2, 2, 0, 1, (0, 100, 2 * side), (0, 2 * side), (0, 50, side), (0, side)), 1, channels)
    vector_bytes = dtype.itemsize if layout == "channels_last view" else 16
    vectors = channels * dtype.itemsize // vector_bytes
    assert side * side * vectors >= 2**19 and vectors // 2 * vector_bytes >= 64
    g = case.geometry
    generator = torch.Generator().manual_seed(14)
    input = random_tensor((1, channels, *g.in_size), dtype, layout, generator)
    grad = random_tensor((1, channels, *g.out_size), dtype, layout, generator)
    window = [[2, 2], [2, 2], [0, 0]]
    size = list(input.shape)
    _, offsets = operators.namespace.patch_max_pool2d(input, *window, [1, 1], *g.bounds)
    for name, *arguments in (
        ("patch_max_pool2d", input, *window, [1, 1], *g.bounds),
        ("patch_max_pool2d_backward", grad, offsets, size, *window, [1, 1], *g.bounds),
        ("patch_max_pool2d_gather", input, offsets, *window, [1, 1], *g.bounds),
        ("patch_avg_pool2d", input, *window, True, None, *g.bounds),
        ("patch_avg_pool2d_backward", grad, size, *window, True, None, *g.bounds),
    ):
        operator = getattr(operators.namespace, name)
        ours = operator(*arguments)
        with forced_path("plain", plain.library):
            theirs = operator(*arguments)
        for mine, other in zip(comparisons._as_tuple(ours), comparisons._as_tuple(theirs), strict=True):
            assert torch.equal(comparisons._bits(mine), comparisons._bits(other)), name


# Channel tiles: more than one, with a tail; shares of thousands of pixels; several segments.
NORMS = [
    Case("two channel tiles", square(1, 1, 0, 1, (0, 3, 8), (0, 5, 9), (0, 3, 8), (0, 5, 9)), 3, 96, 96),
    Case("tail of a tile", square(1, 1, 0, 1, (0, 6), (0, 2, 9), (0, 6), (0, 2, 9)), 2, 136, 136),
    Case("many segments", square(1, 1, 0, 1, (0, 40, 64), (0, 37, 64), (0, 40, 64), (0, 37, 64)), 3, 16, 16),
    Case("patches narrower than a block's lanes", square(1, 1, 0, 1, *(even(6, 3), even(40, 20)) * 2), 2, 8, 8),
]


@pytest.mark.parametrize("case", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_tiles(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    layout = LAYOUTS[NORMS.index(case) % 2]
    comparisons.batch_norm(operators, case, dtype, layout, relu=True, affine=torch.float32)


@pytest.mark.parametrize("channels", [8, 20, 3])
@pytest.mark.parametrize("mean", [0.0, 1000.0, -30000.0])
def test_batch_norm_statistics_far_from_zero(operators: Operators, channels: int, mean: float) -> None:
    """Deviations of one around a large mean, with a first pixel that is nothing like the others."""
    generator = torch.Generator().manual_seed(15)
    input = torch.randn(2, channels, 60, 50, generator=generator) + mean
    input[:, :, 0, 0] = 0
    input = input.contiguous(memory_format=torch.channels_last)
    rows, columns = [0, 17, 60], [0, 50]
    actual_mean, m2 = operators("patch_batch_norm_stats", input, rows, columns)
    patches = [input[:, :, a:b].double() for a, b in pairwise(rows)]
    true_mean = torch.stack([p.mean((0, 2, 3)) for p in patches])
    true_m2 = torch.stack([(p - p.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3)) for p in patches])
    assert (actual_mean - true_mean).norm().item() <= 2**-22 * (true_mean.abs() + 1).norm().item()
    # Inputs near a large mean carry its rounding: nothing but the summation may add to that.
    assert comparisons.relative_error(m2, true_m2) <= 2**-20


def test_batch_norm_of_constants_has_no_variance(operators: Operators) -> None:
    values = torch.tensor([0.1, 3.3, -700.7, 1e-20, 1e20, 0.0, 7.0, 1 / 3])
    input = values.reshape(1, 8, 1, 1).expand(3, 8, 37, 41).contiguous(memory_format=torch.channels_last)
    mean, m2 = operators("patch_batch_norm_stats", input, [0, 20, 37], [0, 41])
    assert torch.equal(mean, values.expand(2, 8))
    assert not m2.any()
