"""The copy bandwidth that `splitkern doctor` shows, measured with the package's own operators."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from splitkern import ops

SIZE_BYTES = 128 << 20
ROUNDS = 5


@dataclass(frozen=True)
class Link:
    """Bandwidth between a GPU and pinned host memory, contiguous copies, in 10^9 bytes/s; medians."""

    from_device_gbps: float
    to_device_gbps: float
    size_bytes: int

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{self.from_device_gbps:.1f} GB/s from the GPU, {self.to_device_gbps:.1f} GB/s to it "
            f"(pinned memory, {self.size_bytes >> 20} MiB, contiguous)"
        )


def measure(device: torch.device, size_bytes: int = SIZE_BYTES, clock: Callable[[], Any] | None = None) -> Link:
    """Copies back and forth a few times.

    Args:
        device: a CUDA device.
        size_bytes: of one copy.
        clock: makes an event with `record`, `synchronize` and `elapsed_time`; default: a CUDA event. For tests.

    Raises:
        RuntimeError: where the device or pinned memory cannot be had.
    """
    on_device = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    on_host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    make_event = clock or (lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]

    def gbps(copy: Callable[[], Any]) -> float:
        rates: list[float] = []
        for _ in range(ROUNDS + 1):
            begin, end = make_event(), make_event()
            begin.record()
            copy()
            end.record()
            end.synchronize()
            rates.append(size_bytes / begin.elapsed_time(end) / 1e6)
        return statistics.median(rates[1:])  # the first finds the link asleep

    return Link(
        from_device_gbps=gbps(lambda: ops.offload(on_device, on_host)),
        to_device_gbps=gbps(lambda: ops.prefetch(on_host, on_device)),
        size_bytes=size_bytes,
    )
