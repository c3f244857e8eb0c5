"""The copy kernels, executed by the CPU: gather, scatter, compression and decompression, byte by byte.

The copy engine is a loop over memcpy here, which refuses the boxes that the CUDA runtime refuses.
"""

from __future__ import annotations

import pytest
import torch

from tests.host_execution.planting import Build
from tests.kernel_checks import copies as checks
from tests.kernel_checks.comparisons import Operators
from tests.kernel_checks.copies import DTYPES, EXPANDED, LAYOUTS, METHODS, Copies

NAMES = [*LAYOUTS, *EXPANDED]


@pytest.fixture(scope="module")
def copies(operators: Operators) -> Copies:
    return Copies(operators.namespace)


def dtype_of(index: int) -> torch.dtype:
    return DTYPES[index % len(DTYPES)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype_of(i)) for i, name in enumerate(NAMES)], ids=lambda value: str(value)
)
def test_plain_copies(copies: Copies, name: str, dtype: torch.dtype, method: str) -> None:
    checks.plain(copies, name, dtype, method)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128], ids=str)
@pytest.mark.parametrize("name", ["patch of channels_last, odd channels", "three chunks and a bit"])
def test_plain_copies_of_every_element_size(copies: Copies, name: str, dtype: torch.dtype) -> None:
    checks.plain(copies, name, dtype, "kernel")


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype_of(i + 1)) for i, name in enumerate(NAMES)], ids=lambda value: str(value)
)
def test_compressed_copies(copies: Copies, name: str, dtype: torch.dtype) -> None:
    checks.compressed(copies, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
def test_compressed_copies_of_every_element_size(copies: Copies, dtype: torch.dtype, zeros: float) -> None:
    checks.compressed(copies, "three chunks and a bit", dtype, zeros)
    checks.compressed(copies, "patch of channels_last", dtype, zeros)


def test_every_16_bit_pattern(copies: Copies) -> None:
    checks.every_16_bit_pattern(copies)


def test_special_floats(copies: Copies) -> None:
    checks.special_floats(copies)


def test_more_chunks_than_warps(copies: Copies) -> None:
    """So that warps come back for a second chunk, with the mask that they fetched ahead."""
    checks.round_trip(copies, checks.values(140 * 512 + 3, torch.float64, 0.5))


@pytest.mark.parametrize(
    "byte", [0, 7, 8, 12, 16, 25, 28, 32, 36, 40, 48, 104, 127], ids=lambda byte: f"header byte {byte}"
)
def test_foreign_header_fills_the_destination(copies: Copies, byte: int) -> None:
    result = checks.foreign_buffer(copies, checks.damage_header(byte))
    assert bool((checks.bits(result) == -1).all())
    assert bool(result.isnan().all())


def test_damaged_masks_write_nothing_outside(copies: Copies) -> None:
    for dtype in DTYPES:
        checks.foreign_buffer(copies, checks.damage_everything_else, dtype)


def test_schedules_do_not_matter(operators: Operators, host_library: object) -> None:
    from pathlib import Path

    assert isinstance(host_library, Path)
    build = Build(operators, host_library)
    copies = Copies(operators.namespace)
    try:
        for seed in range(1, 9):
            build.set_schedule(seed)
            checks.compressed(copies, "patch of channels_last, odd channels", torch.bfloat16)
            checks.plain(copies, "patch of NCHW", torch.bfloat16, "kernel")
    finally:
        build.set_schedule(1)


@pytest.mark.large
def test_more_than_2_31_elements(copies: Copies) -> None:
    """Indices that 32 bits cannot hold: a view of bytes too far apart for memory, but for the touched pages."""
    parent = torch.zeros(2, 2**30 + 2048, dtype=torch.uint8)
    view = parent.as_strided((2, 2**30 + 1024), (2**30 + 2048, 1), 1)
    view[0, 17], view[1, -1] = 5, 6
    checks.round_trip(copies, view)
