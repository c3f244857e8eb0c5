"""Counts what PyTorch's allocator gives out while code runs, scratch inside operators included.

The executor's accounting, its report and `splitkern bench training` call it. It reads the allocator's own events by
way of torch's profiler, on any device; :mod:`splitkern.memory.live_bytes` sees only what the dispatcher sees, and tells
which operator made it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_LABEL = "splitkern.allocated:"
_turn = threading.Lock()


@contextmanager
def _no_word_of_gpus() -> Iterator[None]:
    """Keeps a profiler that knows GPUs from writing, on a machine without one, that it found none."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ or torch.cuda.is_available():
        yield
        return
    os.environ[name] = "5"  # nothing
    try:
        yield
    finally:
        del os.environ[name]


class AllocatedBytes:
    """Counts the bytes that the allocator of a device gives out and takes back inside a `with` block.

    Counts the allocations of the calling thread, and of autograd's backward pass that it starts. What was allocated
    before the block does not count, also where it is freed inside it. One block at a time in a process, others wait:
    there is one profiler.

    Attributes:
        peak_bytes: most bytes at a time beyond what was allocated when the block began; at least 0.
        current_bytes: of these, bytes that were still there at its end.
        peak_in: for every label in order, (name, most bytes at a time beyond those when the label was entered).

    Args:
        device: whose allocator.

    Raises:
        RuntimeError: torch's profiler is running already.

    Example:
        >>> import torch
        >>> with AllocatedBytes(torch.device("cpu")) as allocated:
        ...     kept = torch.empty(1 << 20, dtype=torch.uint8)
        ...     gone = torch.empty(1 << 20, dtype=torch.uint8)
        ...     del gone
        >>> allocated.peak_bytes >> 20, allocated.current_bytes >> 20
        (2, 1)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profile: profile | None = None
        self.peak_bytes = 0
        self.current_bytes = 0
        self.peak_in: list[tuple[str, int]] = []

    def __enter__(self) -> AllocatedBytes:
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            raise RuntimeError("allocations are counted by torch's profiler, and one is running already: end it first")
        _turn.acquire()
        # Of the CPU alone, also for a GPU's allocator, which runs there: nothing of CUPTI is needed.
        activities = [ProfilerActivity.CPU]
        with warnings.catch_warnings(), _no_word_of_gpus():
            # That events of earlier cycles are dropped: there is one cycle.
            warnings.simplefilter("ignore")
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Names a part of the block, for `peak_in`; parts do not nest."""
        with torch.profiler.record_function(_LABEL + name):
            yield

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = self._profile
        assert running is not None and running.profiler is not None
        try:
            running.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        finally:
            _turn.release()
        results = running.profiler.kineto_results
        self._profile = None
        if kind is None:
            assert results is not None
            self._read(results.events())

    def _read(self, events: list[Any]) -> None:
        device_type = torch.device(self._device.type).type.upper()
        allocated = sorted(
            (event.start_ns(), event.nbytes())
            for event in events
            if event.name() == "[memory]" and event.device_type().name == device_type
        )
        labels = sorted(
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name().removeprefix(_LABEL))
            for event in events
            if event.name().startswith(_LABEL) and event.device_type().name == "CPU"
        )
        position = level = 0

        def advance(until_ns: int | None) -> int:
            """Takes the events before a time; returns the highest level from here on."""
            nonlocal position, level
            highest = level
            while position < len(allocated) and (until_ns is None or allocated[position][0] < until_ns):
                level += allocated[position][1]
                highest = max(highest, level)
                position += 1
            self.peak_bytes = max(self.peak_bytes, highest)
            return highest

        for begin_ns, end_ns, name in labels:
            advance(begin_ns)
            before = level
            self.peak_in.append((name, advance(end_ns) - before))
        advance(None)
        self.current_bytes = level
