"""The pool from Python: its bindings, with an allocator of PyTorch's as its upstream, and its CUDA part."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from tests.host_execution.conftest import ROOT

KIB = 1024
CUDA_CHECKS = ROOT / "tests" / "memory" / "native" / "cuda"


@pytest.fixture
def core() -> Any:
    import splitkern._core as core

    return core


class TorchUpstream:
    """Blocks that are tensors: every allocator of PyTorch's works like this."""

    def __init__(self) -> None:
        self.blocks: dict[int, torch.Tensor] = {}
        self.calls: list[int] = []
        self.fails = False

    def allocate(self, size_bytes: int, alignment_bytes: int) -> int:
        self.calls.append(size_bytes)
        if self.fails:
            raise RuntimeError("PyTorch has no memory")
        tensor = torch.empty(size_bytes + alignment_bytes, dtype=torch.uint8)
        address = -(-tensor.data_ptr() // alignment_bytes) * alignment_bytes
        self.blocks[address] = tensor
        return address

    def free(self, address: int, size_bytes: int) -> None:
        assert self.blocks.pop(address).numel() >= size_bytes

    def pool(self, core: Any, **options: Any) -> Any:
        return core.Pool.from_functions(self.allocate, self.free, ordered_on=None, cuda_device=None, **options)


def test_arena_and_allocations(core: Any) -> None:
    pool = core.Pool.host(limit_bytes=64 * KIB, block_bytes=4 * KIB, alignment_bytes=256, tracks=True)
    with pool.reserve(10 * KIB + 1, tag="step") as arena:
        assert arena.base % 256 == 0
        assert arena.slot(512, 1024) == arena.base + 512
        arena.touch(512, 1024)
        assert arena.touched_bytes == 1536
        arena.reset_touched()
        assert arena.touched_bytes == 0
        with pytest.raises(core.InvalidArgument, match=r"Arena::slot.*10241 bytes.*2 bytes at offset 10240"):
            arena.slot(10 * KIB, 2)
        address = pool.allocate(1000, tag="scratch")
        assert [(a.size_bytes, a.is_planned, a.tag) for a in pool.outstanding()] == [
            (10 * KIB + 1, True, "step"),
            (1000, False, "scratch"),
        ]
        assert '"scratch"' in pool.leak_report()
        statistics = pool.statistics
        assert (statistics.planned.current_bytes, statistics.dynamic.current_bytes) == (10 * KIB + 256, KIB)
        assert statistics.all.current_count == 2 and "current_bytes" in repr(statistics.all)
        pool.free(address)
    assert arena.is_released
    with pytest.raises(core.InvalidArgument, match="released"):
        arena.slot(0, 1)
    assert pool.statistics.all.current_bytes == 0
    assert pool.trim() == pool.statistics.upstream_peak_bytes
    pool.reset_peaks()
    assert pool.statistics.upstream_peak_bytes == 0


def test_errors_are_of_python(core: Any) -> None:
    pool = core.Pool.host(limit_bytes=4 * KIB, block_bytes=KIB)
    address = pool.allocate(1000)
    with pytest.raises(MemoryError, match=r"MemoryPool::allocate: no 4000 bytes \(4096 with alignment\)") as refusal:
        pool.allocate(4000)
    error = refusal.value
    assert isinstance(error, core.OutOfMemory)
    assert (error.asked_bytes, error.current_bytes, error.limit_bytes) == (4096, 1024, 4096)
    pool.free(address)
    with pytest.raises(ValueError, match="freed already"):
        pool.free(address)
    with pytest.raises(ValueError, match=r"add_stream made known \(0\), got 5"):
        pool.allocate(1, stream=5)
    with pytest.raises(ValueError, match="size_bytes must not be negative, got -1"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="alignment_bytes must be a power of two, got 48"):
        core.Pool.host(alignment_bytes=48)
    assert pool.add_stream(5) and not pool.add_stream(5)
    pool.free(pool.allocate(1, stream=5), stream=5)
    pool.order_after(0, 5)
    pool.remove_stream(5)
    pool.free(pool.allocate(4 * KIB))


def test_an_upstream_in_python(core: Any) -> None:
    upstream = TorchUpstream()
    pool = upstream.pool(core, block_bytes=8 * KIB)
    address = pool.allocate(3 * KIB)
    assert upstream.calls == [8 * KIB] and address in upstream.blocks
    upstream.fails = True
    with pytest.raises(core.OutOfMemory, match="PyTorch has no memory"):
        pool.reserve(16 * KIB)
    upstream.fails = False
    with pool.reserve(16 * KIB):
        assert len(upstream.blocks) == 2
    pool.free(address)
    gc.collect()
    del pool
    assert not upstream.blocks, "blocks that the pool's end did not give back"


def test_callbacks(core: Any) -> None:
    pool = core.Pool.host(limit_bytes=4 * KIB, block_bytes=4 * KIB, tracks=True)
    cached = [pool.allocate(KIB) for _ in range(4)]
    needed: list[int] = []

    def free_one(missing_bytes: int) -> bool:
        needed.append(missing_bytes)
        if cached:
            pool.free(cached.pop())
            return True
        return False

    pool.set_failure_callback(free_one)
    address = pool.allocate(2 * KIB)
    assert needed == [2 * KIB] * 2 and len(cached) == 2

    def fail(missing_bytes: int) -> bool:
        raise KeyError(missing_bytes)

    pool.set_failure_callback(fail)
    with pytest.raises(KeyError):
        pool.allocate(2 * KIB)
    pool.set_failure_callback(None)
    with pytest.raises(core.OutOfMemory):
        pool.allocate(2 * KIB)
    pool.free(address)


def test_leaks_are_reported_at_the_end(core: Any) -> None:
    leaks: list[tuple[int, str]] = []

    def report(leaked: list[Any]) -> None:
        leaks.extend((allocation.size_bytes, allocation.tag) for allocation in leaked)
        raise RuntimeError("swallowed")

    pool = core.Pool.host(tracks=True)
    pool.set_leak_callback(report)
    pool.allocate(100, tag="one")
    pool.free(pool.allocate(200, tag="two"))
    del pool
    assert leaks == [(100, "one")]


def test_an_arena_keeps_its_pool_alive(core: Any) -> None:
    upstream = TorchUpstream()
    arena = upstream.pool(core).reserve(KIB)
    gc.collect()
    assert upstream.blocks
    del arena
    gc.collect()
    assert not upstream.blocks


def test_threads_and_an_upstream_that_collects_garbage(core: Any) -> None:
    """Deadlocks where the pool's lock is held while Python runs, or Python's while the pool's is waited for."""

    class Held:
        def __init__(self, pool: Any) -> None:
            self.pool, self.address = pool, pool.allocate(KIB)
            self.itself = self  # only the garbage collector frees it

        def __del__(self) -> None:
            self.pool.free(self.address)

    class Collecting(TorchUpstream):
        def allocate(self, size_bytes: int, alignment_bytes: int) -> int:
            gc.collect()
            return super().allocate(size_bytes, alignment_bytes)

        def free(self, address: int, size_bytes: int) -> None:
            gc.collect()
            super().free(address, size_bytes)

    upstream = Collecting()
    pool = upstream.pool(core, limit_bytes=64 * KIB, block_bytes=KIB)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                try:
                    Held(pool)
                    pool.free(pool.allocate(2 * KIB))
                    pool.trim()
                except core.OutOfMemory:
                    gc.collect()
        except BaseException as error:
            errors.append(error)

    gc.collect()
    gc.freeze()  # what is not of this test needs no looking through
    try:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    finally:
        gc.unfreeze()
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not errors
    gc.collect()
    assert pool.statistics.all.current_bytes == 0
    pool.trim()
    assert not upstream.blocks


def test_the_pool_ends_with_its_last_reference(core: Any) -> None:
    pool = core.Pool.host()
    end = weakref.ref(pool)
    del pool
    assert end() is None
