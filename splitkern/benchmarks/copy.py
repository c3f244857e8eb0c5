"""`splitkern bench copy`: offload and prefetch between a device view and pinned host memory, plain and compressed.

Candidates: "ours"; "torch", `Tensor.copy_` (of a strided view it first makes a contiguous copy on the device);
"memcpy2d", cudaMemcpy2DAsync of every image where the view has runs of bytes that it can copy. A slowdown is that of a
convolution which runs on another stream while ours copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

import splitkern.ops
from splitkern.benchmarks.gpu_timing import Call
from splitkern.benchmarks.record import Row
from splitkern.benchmarks.rows import Check, Setting, add_ratios, median_ms, timed
from splitkern.geometry import even_bounds

DIRECTIONS = ("offload", "prefetch")
CANDIDATES = ("ours", "torch", "memcpy2d")


@dataclass(frozen=True)
class CopyCase:
    """One view of a [batch, channels, size, size] tensor, and whether it travels compressed.

    Attributes:
        name: of the row.
        grid: patches in rows and columns; the view is one of the inner ones.
        channels_last: layout of the tensor.
        zeros: share of zeros; None where the copy is not compressed.
    """

    name: str
    batch: int
    channels: int
    size: int
    grid: int = 1
    channels_last: bool = True
    zeros: float | None = None

    @property
    def text(self) -> str:
        """What is copied."""
        layout = "NHWC" if self.channels_last else "NCHW"
        patch = f", one patch of {self.grid}x{self.grid}" if self.grid > 1 else ""
        zeros = f", {self.zeros:.0%} zeros" if self.zeros is not None else ""
        return f"{layout} {self.batch}x{self.channels}x{self.size}x{self.size}{patch}{zeros}"


COPY_CASES = (
    CopyCase("contiguous", 32, 64, 224),
    CopyCase("contiguous small", 32, 64, 56),
    CopyCase("patch", 32, 64, 224, grid=2),
    CopyCase("patch", 32, 64, 224, grid=4),
    CopyCase("patch narrow", 128, 64, 56, grid=4),
    CopyCase("patch NCHW", 32, 64, 224, grid=4, channels_last=False),
    CopyCase("compressed", 32, 64, 224, zeros=0.0),
    CopyCase("compressed", 32, 64, 224, zeros=0.5),
    CopyCase("compressed", 32, 64, 224, zeros=0.9),
    CopyCase("compressed patch", 128, 64, 224, grid=4, zeros=0.5),
)


def copy_cases(pattern: str = "*") -> list[CopyCase]:
    """The cases whose name matches a shell pattern.

    Raises:
        ValueError: if there is none.
    """
    found = [case for case in COPY_CASES if fnmatchcase(case.name, pattern)]
    if not found:
        names = ", ".join(dict.fromkeys(case.name for case in COPY_CASES))
        raise ValueError(f"no copy matches {pattern!r}; there are {names}")
    return found


def _make_view(setting: Setting, case: CopyCase) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(5)
    shape = (case.batch, case.channels, case.size, case.size)
    values = torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)
    if case.zeros is not None:
        draw = torch.rand(shape, generator=generator, device=setting.device)
        values = values.masked_fill(draw < case.zeros, 0.0)
    if case.channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    bounds = even_bounds(case.size, case.grid)
    begin, end = bounds[case.grid // 2], bounds[case.grid // 2 + 1]
    return values[:, :, begin:end, begin:end]


def _same_bits(first: Tensor, second: Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    dense = [tensor.contiguous().view(integer) for tensor in (first, second)]
    return torch.equal(*dense)


def _host_like(setting: Setting, view: Tensor, case: CopyCase) -> Tensor:
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return torch.empty(
        view.shape, dtype=view.dtype, memory_format=layout, pin_memory=setting.device.type == "cuda"
    )  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """Ours both ways, for one case."""

    offload: Call
    prefetch: Call
    restored: Tensor  # what prefetch writes


def _ours(setting: Setting, case: CopyCase, view: Tensor) -> _Pair:
    ops = torch.ops.splitkern
    # Back into a view of the same strides, as a patch is read again.
    parent = torch.zeros(view.shape[0] * view.stride(0), dtype=view.dtype, device=view.device)
    restored = parent.as_strided(view.shape, view.stride())
    pin = setting.device.type == "cuda"
    if case.zeros is None:
        host = _host_like(setting, view, case)
        return _Pair(lambda: ops.offload(view, host), lambda: ops.prefetch(host, restored), restored)
    compressed_bytes: Callable[[Tensor], int] = splitkern.ops.compressed_bytes  # type: ignore[attr-defined]
    size = compressed_bytes(view)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    return _Pair(
        lambda: ops.offload_compressed(view, packed), lambda: ops.prefetch_compressed(packed, restored), restored
    )


class _Memcpy2D:
    """cudaMemcpy2DAsync, from the runtime library that PyTorch has loaded."""

    def __init__(self) -> None:
        major = str(torch.version.cuda).partition(".")[0]
        self._function = ctypes.CDLL(f"libcudart.so.{major}").cudaMemcpy2DAsync
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        self._function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]

    def __call__(self, target: Tensor, source: Tensor, run_dims: int) -> None:
        """Copies every image; the last `run_dims` dimensions in memory order are one run of bytes."""
        strides = source.stride()
        order = sorted(range(1, 4), key=lambda dim: -strides[dim])
        row_dims, run = order[: 3 - run_dims], order[3 - run_dims :]
        rows, width = 1, source.element_size()
        for dim in row_dims:
            rows *= source.shape[dim]
        for dim in run:
            width *= source.shape[dim]
        pitches = [tensor.stride(row_dims[-1]) * tensor.element_size() for tensor in (target, source)]
        kind = 1 if source.device.type == "cpu" else 2
        stream = torch.cuda.current_stream().cuda_stream
        for image in range(source.shape[0]):
            target_at, source_at = (
                tensor.data_ptr() + image * tensor.stride(0) * tensor.element_size() for tensor in (target, source)
            )
            status = self._function(target_at, pitches[0], source_at, pitches[1], width, rows, kind, stream)
            if status != 0:
                raise RuntimeError(f"cudaMemcpy2DAsync returned {status}")


def _measure_slowdown(setting: Setting, copy: Call, copy_ms: float) -> float | None:
    """How much longer convolutions take while copies run on another stream: 0.02 is 2 %. None without a device."""
    if setting.device.type != "cuda":
        return None
    input = torch.randn(32, 256, 56, 56, device=setting.device).to(setting.dtype)
    weight = torch.randn(256, 256, 3, 3, device=setting.device).to(setting.dtype) / 48
    input, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (input, weight))
    output = torch.empty_like(input)
    bounds = [[0, 28, 56]] * 4
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def convolutions(count: int, copies: int) -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(4_000_000)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(copies):
                copy()
        begin.record()
        for _ in range(count):
            torch.ops.splitkern.patch_conv2d.out(
                input, weight, None, [1, 1], [1, 1], [1, 1], 1, *bounds, "none", output=output
            )
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    convolutions(3, 1)
    one_ms = convolutions(10, 0) / 10
    count = max(3, min(200, int(10.0 / one_ms)))
    alone, together = [], []
    for _ in range(5):
        alone.append(convolutions(count, 0))
        together.append(convolutions(count, int(1.5 * count * one_ms / copy_ms) + 1))
    return sorted(together)[2] / sorted(alone)[2] - 1


def measure_copy(setting: Setting, case: CopyCase, direction: str) -> Row:
    """Checks that the bytes come back as they went, and times one direction.

    Returns:
        The row: "status", "candidates", "bytes" (of the view), of ours "gbps", "link_share" (above 1 where compression
        beats the link) and "slowdown", and the ratio to PyTorch's.
    """
    view = _make_view(setting, case)
    ours = _ours(setting, case, view)
    ours.offload()
    ours.prefetch()
    setting.timer.synchronize()
    checks = {"ours": Check(0.0 if _same_bits(ours.restored, view) else 1.0, 0.0)}
    host = _host_like(setting, view, case)
    host.copy_(view)
    offloads = direction == "offload"
    calls: dict[str, Call] = {}
    if setting.wants("ours"):
        calls["ours"] = ours.offload if offloads else ours.prefetch
    source, target = (view, host) if offloads else (host, ours.restored)
    if setting.wants("torch"):
        calls["torch"] = lambda: target.copy_(source, non_blocking=True)
    if setting.wants("memcpy2d") and setting.device.type == "cuda":
        copy_2d = _Memcpy2D()
        # NHWC: a patch's row is one run; NCHW: an image's channels are not equally far apart as its rows.
        if case.channels_last:
            calls["memcpy2d"] = lambda: copy_2d(target, source, 2)
    row = timed(setting, calls, checks if setting.wants("ours") else {})
    row["bytes"] = view.numel() * view.element_size()
    mine = median_ms(row, "ours")
    link = setting.ceilings.from_device_gbps if offloads else setting.ceilings.to_device_gbps
    if mine:
        row["gbps"] = row["bytes"] / mine / 1e6
        if link:
            row["link_share"] = row["gbps"] / link
        slowdown = _measure_slowdown(setting, calls["ours"], mine)
        if slowdown is not None:
            row["slowdown"] = slowdown
    add_ratios(row, "ours", {"torch_over_ours": "torch", "memcpy2d_over_ours": "memcpy2d"})
    return row


def copy_tasks(
    setting: Setting, cases: Sequence[CopyCase], directions: Sequence[str] = DIRECTIONS
) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    """Key, description and measurement of every row."""
    for case in cases:
        for direction in directions:

            def task(case: CopyCase = case, direction: str = direction) -> Row:
                return measure_copy(setting, case, direction)

            description: dict[str, Any] = {"layer": case.name, "pass": direction, "shape": case.text}
            yield f"{direction} {case.name}, {case.text}", description, task
