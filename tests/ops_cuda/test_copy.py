"""The copy operators on a GPU: bytes in every layout, pinned memory, streams, captured graphs, damaged buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import splitkern as sk
from splitkern import ops
from tests.kernel_checks import copies as checks
from tests.kernel_checks.copies import DTYPES, EXPANDED, LAYOUTS, METHODS, Copies

pytestmark = pytest.mark.gpu

NAMES = [*LAYOUTS, *EXPANDED]


@pytest.fixture(scope="module")
def copies() -> Copies:
    return Copies(torch.ops.splitkern, "cuda")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_plain_copies(copies: Copies, name: str, method: str) -> None:
    for dtype in (*DTYPES, torch.complex128):
        checks.plain(copies, name, dtype, method)


@pytest.mark.parametrize("name", NAMES)
def test_compressed_copies(copies: Copies, name: str) -> None:
    for dtype in DTYPES:
        checks.compressed(copies, name, dtype)


@pytest.mark.parametrize("zeros", [0.0, 0.03, 0.97, 1.0])
def test_few_and_many_zeros(copies: Copies, zeros: float) -> None:
    for dtype in DTYPES:
        checks.compressed(copies, "three chunks and a bit", dtype, zeros)


def test_every_16_bit_pattern(copies: Copies) -> None:
    checks.every_16_bit_pattern(copies)


def test_special_floats(copies: Copies) -> None:
    checks.special_floats(copies)


def test_more_chunks_than_warps(copies: Copies) -> None:
    checks.more_chunks_than_warps(copies, Path(sk.build_info().library))


def test_large_copies(copies: Copies) -> None:
    """Every block and warp comes back for more."""
    source = checks.values(8_000_009, torch.bfloat16, 0.5)
    checks.round_trip(copies, source)
    image = source[:8_000_000].cuda().reshape(5, 125, 100, 128).permute(0, 3, 1, 2)
    patch = image[:, :, 1:64, 50:99]
    host = torch.empty(patch.shape, dtype=patch.dtype).contiguous(memory_format=torch.channels_last).pin_memory()
    for method in METHODS:
        host.zero_()
        ops.offload(patch, host, by=method)
        torch.cuda.synchronize()
        assert torch.equal(checks.bits(host), checks.bits(patch)), method
        target = torch.zeros_like(image)
        ops.prefetch(host, target[:, :, 1:64, 50:99], by=method)
        expected = torch.zeros_like(image)
        expected[:, :, 1:64, 50:99] = patch
        assert torch.equal(checks.bits(target), checks.bits(expected)), method


def test_the_gpu_writes_the_buffer_that_the_cpu_writes() -> None:
    """So that a buffer may be written on one and read on the other."""
    x = checks.values(100_003, torch.float16, 0.7)
    on_cpu = torch.zeros(ops.compressed_bytes(x), dtype=torch.uint8)
    ops.offload_compressed(x, on_cpu)
    on_gpu = torch.zeros(ops.compressed_bytes(x), dtype=torch.uint8).pin_memory()
    ops.offload_compressed(x.cuda(), on_gpu)
    torch.cuda.synchronize()
    assert torch.equal(on_gpu, on_cpu)
    assert torch.equal(checks.bits(ops.prefetch_compressed(on_gpu, torch.empty_like(x))), checks.bits(x))


@pytest.mark.parametrize("byte", [0, 8, 12, 16, 25, 32, 36, 40, 127])
def test_foreign_header_fills_the_destination(copies: Copies, byte: int) -> None:
    assert bool(checks.foreign_buffer(copies, checks.damage_header(byte)).isnan().all())


def test_damaged_masks_write_nothing_outside(copies: Copies) -> None:
    for dtype in DTYPES:
        checks.foreign_buffer(copies, checks.damage_everything_else, dtype)


# --- Host memory ----------------------------------------------------------------------------------


def test_pageable_host_memory_is_refused() -> None:
    x = torch.ones(64, device="cuda")
    pageable, bytes_ = torch.empty(64), torch.empty(ops.compressed_bytes(x), dtype=torch.uint8)
    text = r"must be pinned host memory \(tensor\.pin_memory\(\)\), got pageable memory"
    for call, name, argument in (
        (lambda: ops.offload(x, pageable), "offload", "dst"),
        (lambda: ops.prefetch(pageable, x), "prefetch", "src"),
        (lambda: ops.offload_compressed(x, bytes_), "offload_compressed", "dst"),
        (lambda: ops.prefetch_compressed(bytes_, x), "prefetch_compressed", "src"),
    ):
        with pytest.raises(ValueError, match=f"splitkern::{name}: {argument} {text}"):
            call()
    with pytest.raises(RuntimeError, match=f"splitkern::offload: dst {text}"):
        torch.ops.splitkern.offload(x, pageable)
    with pytest.raises(ValueError, match=r"splitkern::offload: dst must be a host \(CPU\) tensor, got one on cuda:0"):
        ops.offload(x, torch.empty_like(x))
    with pytest.raises(ValueError, match=r"splitkern::prefetch: src must be a host \(CPU\) tensor, got one on cuda:0"):
        ops.prefetch(x, pageable)
    assert torch.equal(ops.offload(x, torch.empty(64).pin_memory(), by="engine").cuda(), x), "the device stays usable"


def test_memory_of_which_only_a_part_is_pinned_is_refused() -> None:
    cudart = torch.cuda.cudart()
    host = torch.zeros(4, 4096, dtype=torch.uint8)
    page = -host.data_ptr() % 4096
    run = host.view(-1)[page : page + 3 * 4096]
    torch.cuda.check_error(cudart.cudaHostRegister(run.data_ptr(), 4096, 0))
    try:
        x = torch.ones(3 * 4096, dtype=torch.uint8, device="cuda")
        ops.offload(x[:4096], run[:4096])
        with pytest.raises(RuntimeError, match="must be pinned host memory"):
            torch.ops.splitkern.offload(x, run)
        torch.cuda.synchronize()
        assert bool((run[:4096] == 1).all())
        assert bool((run[4096:] == 0).all())
    finally:
        torch.cuda.synchronize()
        torch.cuda.check_error(cudart.cudaHostUnregister(run.data_ptr()))


# --- Streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["engine", "kernel", "compressed"])
def test_copies_keep_the_order_of_the_current_stream(method: str) -> None:
    """Queued behind a long kernel on a side stream, a copy sees its result, and the next copy sees the first."""
    x = torch.zeros(3, 5, 1111, dtype=torch.bfloat16, device="cuda")[:, 1:4]
    back = torch.zeros_like(x)
    host = torch.zeros(x.shape, dtype=x.dtype).pin_memory()
    buffer = torch.zeros(ops.compressed_bytes(x), dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        if method == "compressed":
            ops.offload_compressed(x, buffer)
            x.fill_(5.0)
            ops.prefetch_compressed(buffer, back)
        else:
            ops.offload(x, host, by=method)
            x.fill_(5.0)
            ops.prefetch(host, back, by=method)
    stream.synchronize()
    assert bool((back == 3.0).all())


def test_offload_beside_computation() -> None:
    """Copies on one stream and convolutions on another, ordered by events alone."""
    side = torch.cuda.Stream()
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 24
    x = torch.randn(8, 64, 56, 56, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    layers = [x]
    hosts, copied = [], []
    for _ in range(6):
        y = ops.patch_conv2d(layers[-1], weight, padding=1, activation="relu")
        ready = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(side):
            side.wait_event(ready)
            buffer = torch.empty(ops.compressed_bytes(y), dtype=torch.uint8).pin_memory()
            ops.offload_compressed(y, buffer)
            copied.append(side.record_event())
        layers.append(y)
        hosts.append(buffer)
    for y, buffer, event in zip(layers[1:], hosts, copied, strict=True):
        event.synchronize()
        back = ops.prefetch_compressed(buffer, torch.empty_like(y))
        assert torch.equal(checks.bits(back), checks.bits(y))
        assert ops.bytes_on_link(buffer) < ops.compressed_bytes(y)


@pytest.mark.parametrize("method", ["engine", "kernel", "compressed"])
def test_captures_into_a_cuda_graph(method: str) -> None:
    x = torch.randn(2, 30, 64, device="cuda")[:, 3:20]
    back = torch.zeros_like(x)
    host = torch.zeros(x.shape).pin_memory()
    buffer = torch.zeros(ops.compressed_bytes(x), dtype=torch.uint8).pin_memory()

    def there_and_back() -> None:
        if method == "compressed":
            ops.offload_compressed(x, buffer)
            ops.prefetch_compressed(buffer, back)
        else:
            ops.offload(x, host, by=method)
            ops.prefetch(host, back, by=method)

    there_and_back()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there_and_back()
    x.copy_(torch.randn_like(x))
    back.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(back, x)


@pytest.mark.large
def test_more_than_2_31_elements(copies: Copies) -> None:
    """Indices that 32 bits cannot hold, in every kernel: bytes, in rows that no vector fits."""
    parent = torch.zeros(3, 2**30 + 1027, dtype=torch.uint8, device="cuda")
    view = parent[:, 1 : 2**30 + 1026]
    view[0, 17], view[1, -1], view[2, 12345], view[2, -1] = 5, 6, 7, 8
    host = torch.zeros(view.shape, dtype=torch.uint8).pin_memory()
    copies.run("offload", view, host, "kernel")
    back = torch.full_like(parent, 3)
    copies.run("prefetch", host, back[:, 1 : 2**30 + 1026], "kernel")
    assert torch.equal(back[:, 1 : 2**30 + 1026], view)
    assert bool((back[:, 0] == 3).all())
    buffer = torch.empty(ops.compressed_bytes(view), dtype=torch.uint8).pin_memory()
    copies.run("offload_compressed", view, buffer)
    back.fill_(3)
    copies.run("prefetch_compressed", buffer, back[:, 1 : 2**30 + 1026])
    assert torch.equal(back[:, 1 : 2**30 + 1026], view)
    assert bool((back[:, -1] == 3).all())
