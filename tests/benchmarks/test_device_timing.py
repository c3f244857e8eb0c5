"""What times and copies on a GPU, run here against stand-ins for PyTorch's streams and events."""

from __future__ import annotations

import contextlib
import ctypes
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitkern.benchmarks import copy
from splitkern.benchmarks.gpu_timing import DeviceTimer, device_facts


class Log:
    """What was queued, in order."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.late = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()
            log.entries.append("event")

        def query(self) -> bool:
            return log.late

        def synchronize(self) -> None:
            log.entries.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class Stream:
        cuda_stream = 7

        def wait_stream(self, other: Any) -> None:
            log.entries.append("order")

    def sleep(cycles: int) -> None:
        log.entries.append(("spin", cycles))
        time.sleep(cycles / 2e9)  # as a device of 2 GHz

    properties = SimpleNamespace(
        L2_cache_size=50 << 20, major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(log.entries.append("side")))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.entries.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return log


def test_a_sample_flushes_the_cache_and_gives_the_host_a_head_start(device: Log) -> None:
    timer = DeviceTimer(torch.device("cpu"))
    for buffer in (timer._written, timer._read):
        assert buffer.nbytes >= 2 * (50 << 20)
    device.entries.clear()
    before = int(timer._written[0])
    sample = timer.sample(lambda: device.entries.append("call"), host_us=100.0)
    spin, cycles = device.entries[0]
    assert spin == "spin"
    # Longer than the host needs, by the rate that the timer measured.
    assert cycles == int((1.5 * 100.0 + 30.0) * timer._cycles_per_us)
    assert device.entries[1:] == ["event", "call", "event", "wait"]
    assert int(timer._written[-1]) != before  # written anew, not found equal
    assert sample.ms > 0
    assert not sample.late
    device.late = True
    assert timer.sample(lambda: None, host_us=1.0).late
    timer.synchronize()
    assert device.entries[-1] == "synchronize"


def test_facts(device: Log) -> None:
    facts = device_facts(torch.device("cuda", 0))
    assert facts["compute_capability"] == "9.0"
    assert facts["multiprocessors"] == 132


def test_slowdown_measures_convolutions_beside_enough_copies(device: Log) -> None:
    device_type = torch.device("cpu")
    found = copy.measure_slowdown(
        device_type, torch.float32, lambda: device.entries.append("copy"), copy_ms=0.5, size=4, channels=2
    )
    assert -1 < found < 100
    assert device.entries.count("copy") > 5  # in the five rounds that have copies
    first = device.entries.index("copy")
    assert device.entries[first - 3 : first] == [("spin", 4_000_000), "order", "side"]


def strided_copy(target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int,
                 kind: int, stream: int) -> int:  # fmt: skip
    """What cudaMemcpy2DAsync is documented to do."""
    assert stream == 7
    assert kind in (1, 2)
    assert width <= target_pitch and width <= source_pitch
    for row in range(rows):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
    return 0


@pytest.mark.parametrize("patch", [(0, 9, 0, 7), (2, 6, 3, 7), (8, 9, 6, 7)], ids=["whole", "inner", "one"])
def test_memcpy2d_of_a_view(patch: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = patch
    parent = torch.randn(3, 5, 9, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    view = parent[:, :, top:bottom, left:right]
    host = torch.empty(view.shape, dtype=view.dtype, memory_format=torch.channels_last)
    copy.memcpy2d(strided_copy, host, view, 7)
    assert torch.equal(host, view)
    back = torch.zeros_like(parent)
    copy.memcpy2d(strided_copy, back[:, :, top:bottom, left:right], host, 7)
    assert torch.equal(back[:, :, top:bottom, left:right], view)
    assert int((back != 0).sum()) == int((view != 0).sum())  # nothing beside it


def test_memcpy2d_refused() -> None:
    with pytest.raises(RuntimeError, match="cudaMemcpy2DAsync returned 11"):
        copy.memcpy2d(lambda *arguments: 11, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
