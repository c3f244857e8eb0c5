"""Counts the bytes of distinct storages that are alive while PyTorch code runs.

`splitkern train`, `splitkern bench live` and the tests use it. It sees what the dispatcher sees: a storage counts
from the operator that returned it until its last reference is gone. Scratch space inside an operator isn't seen.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"


class Sample(NamedTuple):
    """Live bytes right after one event.

    Attributes:
        event: index of the event, from 0.
        offset_ms: time since the block was entered, in milliseconds.
        live_bytes: bytes alive after the event.
        operator: operator that allocated the storage which the event allocates or frees.
    """

    event: int
    offset_ms: float
    live_bytes: int
    operator: str


class _Event(NamedTuple):
    offset_ms: float
    delta_bytes: int
    allocation: int
    operator: str


@dataclass
class _Allocation:
    index: int
    size_bytes: int
    operator: str


class LiveBytes(TorchDispatchMode):
    """Counts distinct storages allocated inside a `with` block, and when each one dies.

    A storage counts once, however many tensors view it: views and results of in-place operators cost nothing. Storages
    that exist before the block aren't counted. Everything counted belongs to the category "activations" until `assign`
    moves it to another one; that may happen after the fact, because whether a storage ends as a parameter's gradient
    shows only at the end of backward.

    Works through `backward()`: autograd runs its operators under the caller's dispatch modes.

    Args:
        exclude: tensors whose storages never count, even if an operator returns them.

    Example:
        >>> import torch
        >>> from splitkern.memory import LiveBytes
        >>> x = torch.zeros(256)
        >>> with LiveBytes() as live:
        ...     y = (x + 1) * 2
        >>> live.peak_bytes, live.current_bytes
        (2048, 1024)
    """

    def __init__(self, *, exclude: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._excluded = [tensor.untyped_storage() for tensor in exclude]
        self._excluded_keys = {storage._cdata for storage in self._excluded}
        self._lock = threading.RLock()
        self._alive: dict[int, _Allocation] = {}
        self._category: dict[int, str] = {}
        self._events: list[_Event] = []
        self._marks: list[tuple[float, str]] = []
        self._count = 0
        self._begin = 0.0
        self._recording = True

    def __enter__(self) -> LiveBytes:
        if self._begin:
            raise RuntimeError("LiveBytes: a counter is for one block, make another for the next one")
        self._begin = time.perf_counter()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        self._recording = False
        self._excluded.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs: set[int] | None = None
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            with self._lock:
                known = self._alive.get(key)
            if known is not None:
                self._resize(known, storage.nbytes())
                continue
            if inputs is None:
                inputs = {
                    argument.untyped_storage()._cdata
                    for argument in tree_leaves((args, kwargs))
                    if isinstance(argument, torch.Tensor) and argument.layout == torch.strided
                }
            if key not in inputs and key not in self._excluded_keys:
                self._allocate(key, storage, str(func))
        return result

    def mark(self, name: str) -> None:
        """Notes the moment `name` (such as "backward") in the timeline, for plots."""
        self._marks.append((self._offset_ms(), name))

    def assign(self, category: str, tensors: Iterable[torch.Tensor | None]) -> None:
        """Moves the storages of `tensors` that are alive and counted to `category`, for their whole lifetime.

        Args:
            category: any name but "activations", such as "parameter gradients".
            tensors: tensors that are alive; None and tensors from before the block are skipped.
        """
        if category == ACTIVATIONS:
            raise ValueError(f'LiveBytes.assign: category must not be "{ACTIVATIONS}", which holds everything else')
        for tensor in tensors:
            if tensor is None:
                continue
            with self._lock:
                allocation = self._alive.get(tensor.untyped_storage()._cdata)
                if allocation is not None:
                    self._category[allocation.index] = category

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes alive at once, over what isn't assigned to a category."""
        return self.peak_of(ACTIVATIONS)

    @property
    def current_bytes(self) -> int:
        """Bytes alive now (after the block: at its end), over what isn't assigned to a category."""
        return self.current_of(ACTIVATIONS)

    def peak_of(self, *categories: str) -> int:
        """Largest number of bytes alive at once in `categories` together (none given: in all)."""
        return max((sample.live_bytes for sample in self.timeline(*categories)), default=0)

    def current_of(self, *categories: str) -> int:
        """Bytes alive at the end in `categories` together (none given: in all)."""
        samples = self.timeline(*categories)
        return samples[-1].live_bytes if samples else 0

    def peak_sample(self, *categories: str) -> Sample | None:
        """The first event at which the peak is reached (None without events)."""
        return max(self.timeline(*categories), key=lambda sample: sample.live_bytes, default=None)

    @property
    def categories(self) -> list[str]:
        """Names of the categories, "activations" first."""
        return [ACTIVATIONS, *sorted(set(self._category.values()))]

    @property
    def marks(self) -> list[tuple[float, str]]:
        """(offset in ms, name) of every `mark`."""
        return list(self._marks)

    def timeline(self, *categories: str) -> list[Sample]:
        """Live bytes after every allocation and free in `categories` together (none given: in all)."""
        with self._lock:
            events = list(self._events)
        live = 0
        samples: list[Sample] = []
        for event in events:
            if categories and self._category.get(event.allocation, ACTIVATIONS) not in categories:
                continue
            live += event.delta_bytes
            samples.append(Sample(len(samples), event.offset_ms, live, event.operator))
        return samples

    def _offset_ms(self) -> float:
        return (time.perf_counter() - self._begin) * 1e3

    def _allocate(self, key: int, storage: torch.UntypedStorage, operator: str) -> None:
        with self._lock:
            allocation = _Allocation(self._count, storage.nbytes(), operator)
            self._count += 1
            self._alive[key] = allocation
            self._events.append(_Event(self._offset_ms(), allocation.size_bytes, allocation.index, operator))
            # The storage's Python object lives as long as the storage itself, also while only C++ (autograd's saved
            # tensors) refers to it, so the finalizer runs when the memory is really released.
            weakref.finalize(storage, self._free, key).atexit = False

    def _resize(self, allocation: _Allocation, size_bytes: int) -> None:
        if size_bytes == allocation.size_bytes:
            return
        with self._lock:
            delta_bytes = size_bytes - allocation.size_bytes
            self._events.append(_Event(self._offset_ms(), delta_bytes, allocation.index, allocation.operator))
            allocation.size_bytes = size_bytes

    def _free(self, key: int) -> None:
        with self._lock:
            allocation = self._alive.pop(key)
            if self._recording:
                self._events.append(
                    _Event(self._offset_ms(), -allocation.size_bytes, allocation.index, allocation.operator)
                )
