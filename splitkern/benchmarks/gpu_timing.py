"""Time of single calls on a GPU: device events, a cold L2 cache, candidates interleaved in one run, median and spread.

Every sample is preceded by a write and a read of more than the L2 cache and by a spin kernel that lasts until the host
has queued the whole call: what is measured is the device's time, launch gaps included, host time excluded (it is
reported beside).
`HostTimer` is the same over the CPU's clock: the tests run every row with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from splitkern.benchmarks.common import Quartiles, quartiles

Call = Callable[[], Any]

_MAX_SPIN_US = 20_000.0
_MIN_SAMPLES = 3
_MAX_SAMPLES = 60
_PATIENCE_MS = 1500.0


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate.

    Attributes:
        ms: lower quartile, median and upper quartile of the device's time in ms.
        samples: how many.
        host_us: time in which the host queues one call, in µs; above the device's time the call is launch-bound.
        gaps: whether the device had to wait for the host although it was given a head start (the call synchronises,
            or takes too long to queue): then `ms` holds host time too.
    """

    ms: Quartiles
    samples: int
    host_us: float
    gaps: bool

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"ms": self.ms._asdict()}


@dataclass(frozen=True)
class Sample:
    """One timed call; `late` if the host was still queueing when the device began."""

    ms: float
    late: bool


class Timer(Protocol):
    """Measures single calls on one device."""

    device: torch.device

    def synchronize(self) -> None:
        """Waits for the device."""

    def sample(self, call: Call, host_us: float) -> Sample:
        """Times one call that takes the host `host_us` to queue, from a cold cache."""


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


class DeviceTimer:
    """CUDA events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(2 * l2_bytes + l2_bytes // 2, 64 << 20) // 4
        self._written, self._read = (torch.zeros(size, dtype=torch.int32, device=device) for _ in range(2))
        self._value = 0
        self._begin, self._end = (_event() for _ in range(2))
        self._cycles_per_us = self._spin_rate()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def sample(self, call: Call, host_us: float) -> Sample:
        # The write evicts what the last call left. The read leaves the cache full of what needs no writing back, which
        # would otherwise go on at the expense of the call.
        self._value += 1
        self._written.fill_(self._value)
        self._read.max()
        _spin(int(min(_MAX_SPIN_US, 1.5 * host_us + 30.0) * self._cycles_per_us))
        self._begin.record()
        call()
        self._end.record()
        late = self._begin.query()
        self._end.synchronize()
        return Sample(self._begin.elapsed_time(self._end), late)

    def _spin_rate(self) -> float:
        cycles = 2_000_000
        for _ in range(2):  # the first finds the clock low
            self._begin.record()
            _spin(cycles)
            self._end.record()
            self._end.synchronize()
        return float(cycles / (self._begin.elapsed_time(self._end) * 1e3))


class HostTimer:
    """The CPU's clock; for tests, which need no device."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        return None

    def sample(self, call: Call, host_us: float) -> Sample:
        begin = time.perf_counter()
        call()
        return Sample((time.perf_counter() - begin) * 1e3, late=False)


def measure(
    timer: Timer,
    candidates: Mapping[str, Call],
    *,
    budget_ms: float,
    fewer: tuple[str, ...] = (),
) -> dict[str, Timing]:
    """Times the candidates in rounds, each once per round in an order that rotates.

    Args:
        timer: of the device on which they run.
        candidates: what to call, by name; a call queues all of its work on the current stream.
        budget_ms: time to spend on each candidate, about; at least 3 samples are taken, at most 60.
        fewer: candidates of which five samples are enough.

    Returns:
        A timing of each candidate.
    """
    host_us = {}
    for name, call in candidates.items():
        call()  # chooses algorithms, loads modules
        timer.synchronize()
        begin = time.perf_counter()
        call()
        host_us[name] = (time.perf_counter() - begin) * 1e6
        timer.synchronize()
    names = list(candidates)
    spin = dict(host_us)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    spent_ms = dict.fromkeys(names, 0.0)

    def wanted(name: str) -> bool:
        taken = len(samples[name])
        if taken < _MIN_SAMPLES:
            return taken == 0 or spent_ms[name] < _PATIENCE_MS  # a call of seconds is timed once
        return spent_ms[name] < budget_ms and taken < (5 if name in fewer else _MAX_SAMPLES)

    turn = 0
    while any(wanted(name) for name in names):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if not wanted(name):
                continue
            begin = time.perf_counter()
            sample = timer.sample(candidates[name], spin[name])
            if sample.late and spin[name] < _MAX_SPIN_US:
                spin[name] = min(2 * spin[name] + 20.0, _MAX_SPIN_US)
            else:
                samples[name].append(sample)
            spent_ms[name] += (time.perf_counter() - begin) * 1e3
        turn += 1
    return {
        name: Timing(
            ms=quartiles([sample.ms for sample in samples[name]]),
            samples=len(samples[name]),
            host_us=host_us[name],
            gaps=any(sample.late for sample in samples[name]),
        )
        for name in names
    }


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, measured in the same run; None where it was not measured.

    Attributes:
        matmul_tflops: matrix product of random 8192x8192 matrices in the benchmark's type.
        copy_gbps: copy of 2 GiB on the device, read and written bytes counted, in 10^9 bytes/s.
        to_device_gbps, from_device_gbps: copies of 512 MiB from and to pinned host memory.
    """

    matmul_tflops: float
    copy_gbps: float
    to_device_gbps: float | None
    from_device_gbps: float | None

    @property
    def flop_per_byte(self) -> float:
        """Arithmetic intensity below which a layer is bound by memory."""
        return self.matmul_tflops * 1e3 / self.copy_gbps


def measure_ceilings(
    timer: Timer,
    dtype: torch.dtype,
    *,
    link: bool,
    side: int = 8192,
    copy_bytes: int = 1 << 31,
    link_bytes: int = 1 << 29,
) -> Ceilings:
    """Measures the ceilings; smaller sizes are for tests.

    Args:
        timer: of the device.
        dtype: of the matrices.
        link: whether to measure the copies from and to the host.
        side: rows and columns of the matrices.
        copy_bytes, link_bytes: size of the copies.
    """
    device = timer.device
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=dtype)
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "matmul": lambda: torch.mm(a, b, out=product),
        "copy": lambda: target.copy_(source),
    }
    if link:
        pinned = torch.randint(0, 255, (link_bytes,), dtype=torch.uint8, pin_memory=device.type == "cuda")
        part = target[:link_bytes]
        calls["to device"] = lambda: part.copy_(pinned, non_blocking=True)
        calls["from device"] = lambda: pinned.copy_(part, non_blocking=True)
    timings = measure(timer, calls, budget_ms=150.0, fewer=("to device", "from device"))

    def rate(name: str, amount: float) -> float:
        return amount / (timings[name].ms.median * 1e-3)

    return Ceilings(
        matmul_tflops=rate("matmul", 2 * side**3) / 1e12,
        copy_gbps=rate("copy", 2 * copy_bytes) / 1e9,
        to_device_gbps=rate("to device", link_bytes) / 1e9 if link else None,
        from_device_gbps=rate("from device", link_bytes) / 1e9 if link else None,
    )


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: the GPU, its driver and libraries."""
    cudnn: Any = torch.backends.cudnn
    facts: dict[str, Any] = {
        "torch_cuda": torch.version.cuda,
        "cudnn": cudnn.version() if cudnn.is_available() else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return facts
