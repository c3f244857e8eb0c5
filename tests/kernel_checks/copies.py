"""The copy operators of one namespace and device against what they promise: the same bytes, and no others.

The compressed layout is built here once more, from its description in csrc/kernels/copy/params.h, and compared byte by
byte.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitkern.ops import compressed_bytes

SENTINEL = 0xAB
CHUNK_BYTES = 4096
METHODS = ("auto", "engine", "kernel")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


class Copies:
    """The operators of a namespace between `device` and host memory, pinned where the device is a GPU."""

    def __init__(self, namespace: Any, device: str = "cpu") -> None:
        self.namespace = namespace
        self.device = device

    def device_bytes(self, size: int) -> Tensor:
        return torch.full((size,), SENTINEL, dtype=torch.uint8, device=self.device)

    def host_bytes(self, size: int) -> Tensor:
        filled = torch.full((size,), SENTINEL, dtype=torch.uint8)
        return filled.pin_memory() if self.device == "cuda" and size > 0 else filled

    def run(self, name: str, src: Tensor, dst: Tensor, by: str | None = None) -> None:
        operator = getattr(self.namespace, name)
        if by is None:
            operator.default(src, dst)
        else:
            operator.by(src, dst, by=by)
        if self.device == "cuda":
            torch.cuda.synchronize()


def values(elements: int, dtype: torch.dtype, zeros: float, seed: int = 0) -> Tensor:
    """Random bits, a share of the elements all zero."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    bits = torch.randint(0, 256, (elements, size), generator=generator, dtype=torch.uint8)
    kept = torch.rand(elements, generator=generator) >= zeros
    return (bits * kept[:, None]).flatten().view(dtype)


# Shapes and strides in elements, with the offset of the first. Named for what they are.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "empty": ((0, 3), (3, 1), 0),
    "scalar": ((), (), 0),
    "one element, one dimension": ((1,), (5,), 3),
    "31 elements": ((31,), (1,), 0),
    "33 elements, misaligned": ((33,), (1,), 1),
    "one chunk of 2-byte elements": ((2048,), (1,), 0),
    "one element over a chunk": ((2049,), (1,), 0),
    "three chunks and a bit": ((4, 1543), (1543, 1), 0),
    "contiguous NCHW": ((2, 3, 8, 9), (216, 72, 9, 1), 0),
    "channels_last": ((2, 16, 5, 7), (560, 1, 112, 16), 0),
    "patch of channels_last": ((2, 16, 5, 7), (2560, 1, 256, 16), 1312),
    "patch of channels_last, odd channels": ((2, 3, 9, 7), (540, 1, 36, 3), 75),
    "patch of NCHW": ((2, 3, 9, 7), (540, 180, 15, 1), 33),
    "every other element": ((6, 40), (96, 2), 1),
    "transposed": ((33, 20), (1, 33), 0),
    "gap in every dimension": ((3, 4, 5, 6), (1200, 280, 42, 2), 7),
    "extents of 1": ((1, 64, 1, 8), (1, 8, 7, 1), 8),
    "8 dimensions": ((2,) * 8, (1, 3, 6, 12, 25, 50, 100, 200), 0),
}
EXPANDED = {
    "expanded rows": ((50, 40), (0, 1), 0),
    "expanded scalar": ((7, 9), (0, 0), 2),
}


def extent_of(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> int:
    """Elements that a parent must have."""
    if 0 in shape:
        return offset
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def place(
    make_bytes: Callable[[int], Tensor], dtype: torch.dtype, layout: tuple[tuple[int, ...], tuple[int, ...], int]
) -> tuple[Tensor, Tensor]:
    """A parent full of sentinels, and the view of it."""
    shape, strides, offset = layout
    parent = make_bytes((extent_of(*layout) + 17) * dtype.itemsize)
    return parent, parent.view(dtype).as_strided(shape, strides, offset)


def fill(view: Tensor, zeros: float = 0.5, seed: int = 0) -> None:
    shape, strides = view.shape, view.stride()
    if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        view = view[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    view.copy_(values(view.numel(), view.dtype, zeros, seed).reshape(view.shape))


def contiguous_strides(shape: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    """Of a dense tensor whose dimensions lie in this order, outermost first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def memory_order(view: Tensor) -> list[int]:
    """Dimensions by descending stride, extents of 1 in front: the order of a compressed buffer's elements."""
    return sorted(range(view.dim()), key=lambda dim: -view.stride(dim) if view.shape[dim] != 1 else -math.inf)


def bits(tensor: Tensor) -> Tensor:
    """So that NaNs compare equal; 16-byte elements as pairs."""
    host = tensor.detach().cpu().contiguous()
    if host.element_size() == 16:
        return torch.view_as_real(host).contiguous().view(torch.int64)
    return host.view(INTEGERS[host.element_size()])


def assert_untouched(name: str, parent: Tensor, view: Tensor) -> None:
    """Everything of `parent` outside `view`, a view of it, still is the sentinel."""
    view.copy_(torch.full((view.element_size(),), SENTINEL, dtype=torch.uint8).view(view.dtype)[0])
    assert bool((parent == SENTINEL).all()), f"{name} wrote outside its destination"


def plain(copies: Copies, name: str, dtype: torch.dtype, method: str) -> None:
    """offload into dense and strided host memory, prefetch into the like on the device."""
    layout = LAYOUTS.get(name) or EXPANDED[name]
    shape = layout[0]
    _, source = place(copies.device_bytes, dtype, layout)
    fill(source)
    hosts = {
        "the same order": (shape, contiguous_strides(shape, memory_order(source)), 0),
        "row-major order": (shape, contiguous_strides(shape, list(range(len(shape)))), 0),
        "a misaligned run": (shape, contiguous_strides(shape, memory_order(source)), 1),
        "a view": (shape, tuple(2 * s for s in contiguous_strides(shape, list(range(len(shape))))), 3),
    }
    for which, host_layout in hosts.items():
        case = f"{method} {name} {dtype} to {which}"
        parent, host = place(copies.host_bytes, dtype, host_layout)
        copies.run("offload", source, host, method)
        assert torch.equal(bits(host), bits(source)), f"offload by {case}: other bytes"
        if name not in EXPANDED:
            back_parent, back = place(copies.device_bytes, dtype, layout)
            copies.run("prefetch", host, back, method)
            assert torch.equal(bits(back), bits(source)), f"prefetch by {case}: other bytes"
            assert_untouched(f"prefetch by {case}", back_parent, back)
        assert_untouched(f"offload by {case}", parent, host)


def expected_buffer(view: Tensor) -> Tensor:
    """The compressed buffer of a tensor, as params.h describes it; what is not written stays the sentinel."""
    size = view.element_size()
    order = memory_order(view)
    flat = bits(view.permute(order) if view.dim() else view).flatten()
    extents = [*view.shape, *[0] * (8 - view.dim())]
    code = sum(dim << (4 * place) for place, dim in enumerate(order))
    header = struct.pack(
        "<8sIIqIIII8q6I", b"SPLKZERO", 1, size, view.numel(), CHUNK_BYTES, view.dim(), code, 0, *extents, *[0] * 6
    )
    buffer = torch.full((compressed_bytes(view),), SENTINEL, dtype=torch.uint8)
    buffer[:128] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    chunk_elements = CHUNK_BYTES // size
    at = 128
    for chunk in flat.split(chunk_elements) if len(flat) else ():
        kept = chunk != 0
        padded = torch.zeros(chunk_elements, dtype=torch.uint8)
        padded[: len(chunk)] = kept
        mask = (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)
        packed = chunk[kept].contiguous().view(torch.uint8)
        packed = torch.cat([packed, torch.zeros(-len(packed) % 16, dtype=torch.uint8)])
        buffer[at : at + len(mask)] = mask
        buffer[at + len(mask) : at + len(mask) + len(packed)] = packed
        at += len(mask) + CHUNK_BYTES
    return buffer


def compressed(copies: Copies, name: str, dtype: torch.dtype, zeros: float = 0.5) -> None:
    """offload_compressed byte by byte, and back into the same strides and into others."""
    layout = LAYOUTS.get(name) or EXPANDED[name]
    shape = layout[0]
    _, source = place(copies.device_bytes, dtype, layout)
    fill(source, zeros)
    case = f"{name} {dtype}"
    expected = expected_buffer(source)
    buffer = copies.host_bytes(len(expected) + 32)
    copies.run("offload_compressed", source, buffer)
    assert torch.equal(buffer[: len(expected)], expected), f"offload_compressed of {case}: other bytes"
    assert bool((buffer[len(expected) :] == SENTINEL).all()), f"offload_compressed of {case} wrote behind its buffer"
    row_major = (shape, contiguous_strides(shape, list(range(len(shape)))), 0)
    reverse = (shape, contiguous_strides(shape, list(reversed(range(len(shape))))), 5)
    for target in [row_major, reverse] if name in EXPANDED else [layout, row_major, reverse]:
        parent, back = place(copies.device_bytes, dtype, target)
        copies.run("prefetch_compressed", buffer, back)
        assert torch.equal(bits(back), bits(source)), f"prefetch_compressed of {case} to {target}: other bytes"
        assert_untouched(f"prefetch_compressed of {case}", parent, back)


def round_trip(copies: Copies, source: Tensor) -> None:
    """Every bit pattern of `source` survives, plainly and compressed."""
    on_device = source.to(copies.device)
    host = copies.host_bytes(source.numel() * source.element_size()).view(source.dtype).reshape(source.shape)
    copies.run("offload", on_device, host)
    back = torch.empty_like(on_device)
    copies.run("prefetch", host, back)
    assert torch.equal(bits(back), bits(source)), f"{source.dtype}: other bytes"
    buffer = copies.host_bytes(compressed_bytes(source))
    copies.run("offload_compressed", on_device, buffer)
    back = torch.empty_like(on_device)
    copies.run("prefetch_compressed", buffer, back)
    assert torch.equal(bits(back), bits(source)), f"{source.dtype} compressed: other bytes"


def more_chunks_than_warps(copies: Copies, library: Path) -> None:
    """One block per kernel, so that 16 warps share out 40 chunks and a bit; plainly, in units of 2 and of 16 bytes."""
    tune = ctypes.CDLL(str(library)).splitkern_tune_copy
    elements = 40 * CHUNK_BYTES // 2 + 5
    tune(-1, 1, 1, 1)
    try:
        for first in (0, 1):
            source = values(elements + 1, torch.bfloat16, 0.5)[first : elements + first]
            round_trip(copies, source)
            host = copies.host_bytes(2 * elements).view(torch.bfloat16)
            on_device = copies.device_bytes(2 * elements + 2).view(torch.bfloat16)[first : elements + first]
            on_device.copy_(source)
            copies.run("offload", on_device, host, "kernel")
            assert torch.equal(bits(host), bits(source)), "offload by one block: other bytes"
            on_device.zero_()
            copies.run("prefetch", host, on_device, "kernel")
            assert torch.equal(bits(on_device), bits(source)), "prefetch by one block: other bytes"
    finally:
        tune(-1, -1, -1, -1)


def every_16_bit_pattern(copies: Copies) -> None:
    """NaN payloads, both zeros, subnormals: all 65,536 patterns of each 16-bit type."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16, torch.int16):
        round_trip(copies, patterns.view(dtype))
    for dtype in (torch.float32, torch.int32):  # as the upper and as the lower half of wider elements
        round_trip(copies, (patterns.to(torch.int32) << 16).view(dtype))
        round_trip(copies, (patterns.to(torch.int32) & 0xFFFF).view(dtype))


def special_floats(copies: Copies) -> None:
    """Signed zeros, infinities, quiet and signalling NaNs with payloads, subnormals."""
    single = [
        0x00000000,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x7FC00001,
        0xFFC12345,
        0x7F800001,
        0xFFBFFFFF,
        1,
        0x80000001,
    ]
    double = [0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF8000000000001, 0xFFF0000000000001, 1, (1 << 63) + 1, 1 << 32]
    for patterns, dtype, integer in ((single, torch.float32, "<I"), (double, torch.float64, "<Q")):
        raw = bytearray(b"".join(struct.pack(integer, pattern) for pattern in patterns * 29))
        round_trip(copies, torch.frombuffer(raw, dtype=dtype))


def foreign_buffer(copies: Copies, damage: Callable[[Tensor], None], dtype: torch.dtype = torch.float32) -> Tensor:
    """What prefetch_compressed leaves in a view after `damage` to the buffer; around it nothing has changed."""
    layout = LAYOUTS["patch of channels_last, odd channels"]
    _, source = place(copies.device_bytes, dtype, layout)
    fill(source)
    buffer = copies.host_bytes(compressed_bytes(source))
    copies.run("offload_compressed", source, buffer)
    damage(buffer)
    parent, back = place(copies.device_bytes, dtype, layout)
    copies.run("prefetch_compressed", buffer, back)
    result = back.clone()
    assert_untouched("prefetch_compressed of a damaged buffer", parent, back)
    return result


def damage_header(byte: int) -> Callable[[Tensor], None]:
    def damage(buffer: Tensor) -> None:
        buffer[byte] ^= 1

    return damage


def damage_everything_else(buffer: Tensor) -> None:
    """Random masks and values, so that masks claim more elements than there are."""
    generator = torch.Generator().manual_seed(3)
    buffer[128:] = torch.randint(0, 256, (len(buffer) - 128,), generator=generator, dtype=torch.uint8)
    buffer[-600:] = 0xFF
