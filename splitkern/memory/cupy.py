"""Serves CuPy from a pool: arrays, planned slots and scratch then share one limit.

>>> import cupy
>>> from splitkern.memory.cupy import CuPyAllocator
>>> cupy.cuda.set_allocator(CuPyAllocator(pool))

CuPy is imported when an allocator is made, never before.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any, Protocol

# cudaStreamPerThread: one handle that means another stream in every thread, so nothing can be ordered by it.
_PER_THREAD_STREAM = 2


class StreamOrderedPool(Protocol):
    """What the allocator needs of a pool: `splitkern._core.Pool` has it. Streams are `cudaStream_t` as integers."""

    def add_stream(self, stream: int) -> bool: ...
    def remove_stream(self, stream: int) -> None: ...
    def allocate(self, size_bytes: int, stream: int, tag: str) -> int: ...
    def free(self, address: int, stream: int) -> None: ...


class CuPyAllocator:
    """A function for `cupy.cuda.set_allocator` or `cupy.cuda.using_allocator` that allocates from a pool.

    An array's memory is allocated on the stream that is current when the array is made, and freed, in stream order, on
    the stream that is current in the thread where its last reference goes (on its own stream, where another device is
    current there). Where the two differ, the pool orders the free after both. CuPy's own rule stays: who uses an array
    on a third stream, synchronises before dropping it.

    Every array holds the allocator, and so the pool. A stream that was seen is known to the pool and kept alive until
    `forget`. May be called from any thread.

    Args:
        pool: a pool of memory of this device, with CUDA events.
        device: number of the pool's device. CuPy calls the allocator for whichever device is current; another one is
            refused.
        tag: what the pool's leak report calls these allocations.

    Raises:
        ImportError: CuPy is not installed, or does not load.
        ValueError: `device` is negative.

    Example:
        >>> with cupy.cuda.using_allocator(CuPyAllocator(pool)):
        ...     squares = cupy.arange(10) ** 2
    """

    def __init__(self, pool: StreamOrderedPool, *, device: int = 0, tag: str = "cupy") -> None:
        if device < 0:
            raise ValueError(f"CuPyAllocator: device must not be negative, got {device}")
        self._cuda: Any = importlib.import_module("cupy").cuda
        self._pool = pool
        self._device = device
        self._tag = tag
        self._streams: dict[int, Any] = {}

    def __call__(self, size_bytes: int) -> Any:
        """Allocates on CuPy's current stream.

        Args:
            size_bytes: bytes, not negative; the pool rounds them up to its alignment.

        Returns:
            A `cupy.cuda.MemoryPointer` to memory that is freed with its last reference.

        Raises:
            MemoryError: the pool's limit or its upstream do not allow it.
            RuntimeError: another device is current.
            ValueError: the current stream is the per-thread default stream; or a negative size.
        """
        current = self._cuda.runtime.getDevice()
        if current != self._device:
            raise RuntimeError(
                f"CuPyAllocator: the pool's memory is of device {self._device}, but device {current} is current; "
                "use one pool and allocator for each device"
            )
        stream = self._current_stream()
        address = self._pool.allocate(size_bytes, stream, self._tag)
        owner = _Allocation(self, address, stream)
        memory = self._cuda.UnownedMemory(address, size_bytes, owner, self._device)
        return self._cuda.MemoryPointer(memory, 0)

    def forget(self, stream: Any) -> None:
        """Removes a stream from the pool, so that it may be destroyed. Arrays made on it stay valid.

        Args:
            stream: a `cupy.cuda.Stream` (or its kin) that was current in an allocation or free. Nothing happens where
                the allocator has not seen it.

        Raises:
            ValueError: an arena of the pool is bound to the stream.
        """
        if stream.ptr in self._streams:
            self._pool.remove_stream(stream.ptr)
            del self._streams[stream.ptr]

    def _current_stream(self) -> int:
        stream = self._cuda.get_current_stream()
        handle = int(stream.ptr)
        if handle == _PER_THREAD_STREAM:
            raise ValueError(
                "CuPyAllocator: the current stream must be one that means the same in every thread, got the per-thread "
                "default stream (ptr 2); use the default stream or a cupy.cuda.Stream"
            )
        if handle not in self._streams:  # two threads at once do the same twice, which is harmless
            self._pool.add_stream(handle)
            self._streams[handle] = stream
        return handle

    def _free(self, address: int, allocated_on: int) -> None:
        # An array may go while anything is current. Where that cannot order the free, its own stream does, as CuPy's
        # pool would have it; the default stream where that has been forgotten, so nothing runs on it any more.
        stream = allocated_on if allocated_on in self._streams else 0
        if self._cuda.runtime.getDevice() == self._device:
            with contextlib.suppress(ValueError):
                stream = self._current_stream()
        self._pool.free(address, stream)


class _Allocation:
    """The owner that CuPy's memory keeps: its end frees the memory."""

    def __init__(self, allocator: CuPyAllocator, address: int, stream: int) -> None:
        self._allocator = allocator
        self._address = address
        self._stream = stream

    def __del__(self) -> None:
        # At the end of the interpreter CuPy may be half gone; the end of the pool gives everything back.
        if not sys.is_finalizing():
            self._allocator._free(self._address, self._stream)
