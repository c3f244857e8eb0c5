"""The copy kernels, executed by the CPU: gather, scatter, compression and decompression, byte by byte.

The copy engine is a loop over memcpy here, which refuses the boxes that the CUDA runtime refuses.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitkern.ops import compressed_bytes, explain_copy
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


def test_more_chunks_than_warps(copies: Copies, host_library: Path) -> None:
    """So that warps come back for a second chunk, with the mask that they fetched ahead."""
    checks.more_chunks_than_warps(copies, host_library)


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


def test_schedules_do_not_matter(operators: Operators, host_library: Path) -> None:
    build = Build(operators, host_library)
    copies = Copies(operators.namespace)
    try:
        for seed in range(1, 9):
            build.set_schedule(seed)
            checks.compressed(copies, "patch of channels_last, odd channels", torch.bfloat16)
            checks.plain(copies, "patch of NCHW", torch.bfloat16, "kernel")
    finally:
        build.set_schedule(1)


def test_what_is_chosen_and_why(host_library: Path) -> None:
    image = torch.empty(4, 64, 56, 56, dtype=torch.bfloat16, memory_format=torch.channels_last)
    flat = torch.empty(4, 64, 56, 56, dtype=torch.bfloat16)
    for device, host_format, expected in (
        (image, torch.channels_last, "engine: one run of 1605632 bytes"),
        (image[..., :28], torch.channels_last, "engine: rows of 3584 bytes in 1 engine call"),
        (image[..., :14], torch.channels_last, "kernel: rows of 1792 bytes, and the engine takes at least 2048"),
        (flat[..., :28], torch.contiguous_format, "kernel: rows of 56 bytes, and the engine takes at least 2048"),
        (image, torch.contiguous_format, "kernel: rows of 2 bytes, and the engine takes at least 2048"),
        (image[:0], torch.channels_last, "nothing to copy"),
        (image[:1, :1, :1, :1], torch.channels_last, "engine: one run of 2 bytes"),
    ):
        host = torch.empty(device.shape, dtype=device.dtype, memory_format=host_format)
        assert explain_copy(device, host, library=host_library) == expected
    scattered = torch.empty_strided((2, 30, 3, 2048), (1 << 20, 9001, 3000, 1))
    reason = explain_copy(scattered, torch.empty(2, 30, 3, 2048), library=host_library)
    assert reason == "kernel: 60 engine calls for rows of 8192 bytes, and at most 16 are worth their start"


def test_an_engine_that_would_need_too_many_calls_is_refused(copies: Copies) -> None:
    source = torch.empty_strided((300, 300, 3, 2), (7000, 23, 7, 3), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"splitkern::offload: by must be 'kernel' or 'auto' for strides"):
        copies.run("offload", source, torch.empty(300, 300, 3, 2, dtype=torch.uint8), "engine")


@pytest.mark.large
def test_more_than_2_31_elements(copies: Copies) -> None:
    """Indices that 32 bits cannot hold: bytes in two rows that no vector fits."""
    parent = torch.zeros(2, 2**30 + 1027, dtype=torch.uint8)
    view = parent[:, 1 : 2**30 + 1026]
    view[0, 17], view[1, 12345], view[1, -1] = 5, 6, 7
    host = torch.zeros(view.shape, dtype=torch.uint8)
    copies.run("offload", view, host, "kernel")
    assert torch.equal(host, view)
    back = torch.full_like(parent, 3)
    copies.run("prefetch", host, back[:, 1 : 2**30 + 1026], "kernel")
    assert torch.equal(back[:, 1 : 2**30 + 1026], view)
    assert bool((back[:, 0] == 3).all())
    del host
    buffer = torch.empty(compressed_bytes(view), dtype=torch.uint8)
    copies.run("offload_compressed", view, buffer)
    back.fill_(3)
    copies.run("prefetch_compressed", buffer, back[:, 1 : 2**30 + 1026])
    assert torch.equal(back[:, 1 : 2**30 + 1026], view)
