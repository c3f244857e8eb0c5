"""Compressed copies of some slots: the launcher that the copy pipeline calls, with its kernels run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitkern import ops
from splitkern.ops.copy import compressed_bytes

Copy = Callable[[bool, Tensor, Tensor, int, int], None]


@pytest.fixture
def copy_slots(host_library: Path) -> Copy:
    """(to the host, plain memory, compressed buffer, first slot, end)."""
    function = ctypes.CDLL(str(host_library)).splitkern_copy_slots

    def copy(to_host: bool, plain: Tensor, buffer: Tensor, begin: int, end: int) -> None:
        text = ctypes.create_string_buffer(256)
        code = function(
            ctypes.c_int32(to_host),
            ctypes.c_void_p(plain.data_ptr()),
            ctypes.c_void_p(buffer.data_ptr()),
            ctypes.c_int64(plain.numel()),
            ctypes.c_int32(plain.element_size()),
            ctypes.c_int64(begin),
            ctypes.c_int64(end),
            ctypes.c_int32(0),
            None,
            text,
            ctypes.c_int64(len(text)),
        )
        if code != 0:
            raise RuntimeError(text.value.decode())

    return copy


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranges", [[(0, 5)], [(0, 1), (1, 3), (3, 5)], [(3, 5), (0, 2), (2, 3)]])
def test_ranges_of_slots_make_the_whole(dtype: torch.dtype, ranges: list[tuple[int, int]], copy_slots: Copy) -> None:
    """The same bytes as the operator writes, in whichever order the ranges come; and back."""
    count = 4 * 4096 // dtype.itemsize + 37
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).relu().to(dtype)
    # What neither writes is 7 in both.
    expected = ops.offload_compressed(values, torch.full((compressed_bytes(values),), 7, dtype=torch.uint8))
    buffer = torch.full_like(expected, 7)
    for begin, end in ranges:
        copy_slots(True, values, buffer, begin, end)
    assert torch.equal(buffer, expected)
    back = torch.full_like(values, 3)
    for begin, end in ranges:
        before = back.clone()
        copy_slots(False, back, buffer, begin, end)
        moved = slice(begin * 4096 // dtype.itemsize, end * 4096 // dtype.itemsize)
        assert torch.equal(back[moved], values[moved])
        back[moved] = before[moved]
        assert torch.equal(back, before)
        back[moved] = values[moved]
    assert torch.equal(back, values)


def test_other_elements_are_refused(copy_slots: Copy) -> None:
    values = torch.zeros(16, dtype=torch.complex128)
    with pytest.raises(RuntimeError, match="elements of 16 bytes"):
        copy_slots(True, values, torch.empty(8192, dtype=torch.uint8), 0, 1)
