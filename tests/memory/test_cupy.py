"""CuPy served from a pool: against a stand-in for CuPy, and against CuPy's own classes where it is installed."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from splitkern.memory.cupy import CuPyAllocator


class Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class UnownedMemory:
    """As CuPy's: keeps its owner alive, and owns nothing itself."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        self.ptr, self.size, self.device_id = ptr, size, device_id
        self._owner = owner


class MemoryPointer:
    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset


class Device:
    """What is current, for the stand-in."""

    def __init__(self) -> None:
        self.number = 0
        self.stream = Stream(0)

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before


class Pool:
    """Records every call; addresses count up. The contract of the pool's binding, as far as the allocator uses it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.streams = {0}
        self.live: dict[int, int] = {}
        self.limit_bytes = 1 << 20

    def add_stream(self, stream: int) -> bool:
        self.calls.append(("add_stream", stream))
        known = stream in self.streams
        self.streams.add(stream)
        return not known

    def remove_stream(self, stream: int) -> None:
        self.calls.append(("remove_stream", stream))
        self.streams.remove(stream)

    def allocate(self, size_bytes: int, stream: int, tag: str) -> int:
        if stream not in self.streams:
            raise ValueError(f"unknown stream {stream}")
        if size_bytes > self.limit_bytes:
            raise MemoryError("limit")
        if size_bytes == 0:
            return 0
        address = 4096 * (len(self.calls) + 1)
        self.calls.append(("allocate", size_bytes, stream, tag))
        self.live[address] = size_bytes
        return address

    def free(self, address: int, stream: int) -> None:
        if stream not in self.streams:
            raise ValueError(f"unknown stream {stream}")
        self.calls.append(("free", address, stream))
        if address:
            del self.live[address]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A stand-in for CuPy, as far as the allocator uses it."""
    device = Device()
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        runtime=types.SimpleNamespace(getDevice=lambda: device.number),
        get_current_stream=lambda: device.stream,
        UnownedMemory=UnownedMemory,
        MemoryPointer=MemoryPointer,
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return device


def test_an_allocation_is_freed_with_its_last_reference(device: Device) -> None:
    pool = Pool()
    pointer = CuPyAllocator(pool)(1000)
    assert pool.calls == [("add_stream", 0), ("allocate", 1000, 0, "cupy")]
    assert (pointer.mem.size, pointer.mem.device_id) == (1000, 0)
    address = pointer.ptr
    memory = pointer.mem
    del pointer
    assert pool.live == {address: 1000}, "freed while a view holds the memory"
    del memory
    assert pool.calls[2:] == [("free", address, 0)]
    assert not pool.live


def test_streams_are_the_ones_that_are_current(device: Device) -> None:
    pool = Pool()
    allocate = CuPyAllocator(pool, tag="scratch")
    with device.using(Stream(7)):
        pointer = allocate(10)
        again = allocate(20)
    address = pointer.ptr
    with device.using(Stream(8)):
        del pointer
    assert pool.calls[:3] == [("add_stream", 7), ("allocate", 10, 7, "scratch"), ("allocate", 20, 7, "scratch")]
    assert pool.calls[3:] == [("add_stream", 8), ("free", address, 8)]
    del again
    assert pool.calls[-1][0] == "free" and pool.calls[-1][2] == 0


def test_a_stream_lives_until_it_is_forgotten(device: Device) -> None:
    class Counted(Stream):
        alive = 0

        def __init__(self, ptr: int) -> None:
            super().__init__(ptr)
            Counted.alive += 1

        def __del__(self) -> None:
            Counted.alive -= 1

    pool = Pool()
    allocate = CuPyAllocator(pool)
    with device.using(Counted(7)):
        pointer = allocate(10)
    gc.collect()
    assert Counted.alive == 1, "a stream ended that the pool may still record on"
    allocate.forget(Stream(9))
    assert ("remove_stream", 9) not in pool.calls
    allocate.forget(Stream(7))
    gc.collect()
    assert Counted.alive == 0 and pool.calls[-1] == ("remove_stream", 7)
    address = pointer.ptr
    del pointer  # its stream is forgotten, but another one is current
    assert pool.calls[-1] == ("free", address, 0)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("why", ["another device", "per-thread stream"])
def test_a_free_that_the_current_stream_cannot_order(device: Device, why: str, forgotten: bool) -> None:
    pool = Pool()
    allocate = CuPyAllocator(pool)
    stream = Stream(7)
    with device.using(stream):
        pointer = allocate(10)
    address = pointer.ptr
    if forgotten:
        allocate.forget(stream)
    if why == "another device":
        device.number, device.stream = 1, Stream(11)
    else:
        device.stream = Stream(2)
    del pointer
    assert pool.calls[-1] == ("free", address, 0 if forgotten else 7)
    assert pool.streams == ({0} if forgotten else {0, 7}), "a stream of another device was added"


def test_what_is_refused(device: Device) -> None:
    pool = Pool()
    with pytest.raises(ValueError, match="device must not be negative, got -1"):
        CuPyAllocator(pool, device=-1)
    allocate = CuPyAllocator(pool, device=1)
    with pytest.raises(RuntimeError, match="memory is of device 1, but device 0 is current"):
        allocate(10)
    device.number = 1
    with device.using(Stream(2)), pytest.raises(ValueError, match="per-thread default"):
        allocate(10)
    with pytest.raises(MemoryError):
        allocate(pool.limit_bytes + 1)
    assert [call for call in pool.calls if call[0] != "add_stream"] == []


def test_an_empty_allocation(device: Device) -> None:
    pool = Pool()
    pointer = CuPyAllocator(pool)(0)
    assert (pointer.ptr, pointer.mem.device_id) == (0, 0)
    del pointer
    assert not pool.live


def test_nothing_leaks_where_the_memory_object_fails(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no memory object")

    monkeypatch.setattr(sys.modules["cupy"].cuda, "UnownedMemory", fail)
    pool = Pool()
    with pytest.raises(RuntimeError, match="no memory object"):
        CuPyAllocator(pool)(10)
    gc.collect()
    assert not pool.live


def test_cupy_is_imported_only_when_an_allocator_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError):
        CuPyAllocator(Pool())


def real_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        pytest.skip(f"CuPy does not import: {error}")
    return cupy


def test_the_classes_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: only what is current comes from the test."""
    cupy = real_cupy()
    device = Device()
    allocate = CuPyAllocator(pool := Pool())
    monkeypatch.setattr(
        allocate,
        "_cuda",
        types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDevice=lambda: device.number),
            get_current_stream=lambda: device.stream,
            UnownedMemory=cupy.cuda.UnownedMemory,
            MemoryPointer=cupy.cuda.MemoryPointer,
        ),
    )
    empty = allocate(0)
    pointer = allocate(1000)
    assert isinstance(pointer, cupy.cuda.MemoryPointer) and isinstance(pointer.mem, cupy.cuda.UnownedMemory)
    assert (pointer.ptr, pointer.mem.size, pointer.device_id) == (next(iter(pool.live)), 1000, 0)
    view = pointer + 100
    del pointer, empty
    assert pool.live, "freed while a view holds the memory"
    with device.using(Stream(7)):
        del view
    assert not pool.live and pool.calls[-1][2] == 7


@pytest.mark.gpu
def test_arrays_of_cupy_on_a_gpu() -> None:
    cupy = real_cupy()
    core: Any = pytest.importorskip("splitkern._core")
    pool = core.Pool.device(0, limit_bytes=1 << 28)
    allocate: Callable[[int], Any] = CuPyAllocator(pool)
    with cupy.cuda.using_allocator(allocate):
        total = 0
        for round_ in range(8):
            with cupy.cuda.Stream(non_blocking=True):
                total += int((cupy.arange(1 << 20) + round_).sum())
    assert total == 8 * sum(range(1 << 20)) + (1 << 20) * sum(range(8))
    gc.collect()
    assert pool.statistics.dynamic.current_bytes == 0
    assert pool.statistics.dynamic.total_count > 0
