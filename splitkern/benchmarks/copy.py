"""`splitkern bench copy`: offload and prefetch between a device view and pinned host memory, plain and compressed.

Candidates: "ours", which chooses between "engine" (a copy engine) and "kernel" (a kernel that moves the bytes itself),
both also measured alone where nothing is compressed; "torch", `Tensor.copy_` (of a strided view it first makes a
contiguous copy on the device); "memcpy2d", cudaMemcpy2DAsync of every image of a channels_last view. A slowdown is that
of a convolution which runs on another stream while ours copies.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splitkern.benchmarks.gpu_timing import Call
from splitkern.benchmarks.record import Row
from splitkern.benchmarks.rows import Check, Setting, add_ratios, median_ms, timed
from splitkern.geometry import even_bounds
from splitkern.ops import compressed_bytes

DIRECTIONS = ("offload", "prefetch")
CANDIDATES = ("ours", "engine", "kernel", "torch", "memcpy2d")


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
    """Ours both ways, for one case, by each way of copying that there is; prefetch writes `restored`."""

    offload: dict[str, Call]
    prefetch: dict[str, Call]
    restored: Tensor


def _ours(setting: Setting, case: CopyCase, view: Tensor) -> _Pair:
    ops = torch.ops.splitkern
    # Back into a view of the same strides, as a patch is read again.
    parent = torch.zeros(view.shape[0] * view.stride(0), dtype=view.dtype, device=view.device)
    restored = parent.as_strided(view.shape, view.stride())
    if case.zeros is not None:
        size = compressed_bytes(view)
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=setting.device.type == "cuda")
        return _Pair(
            {"ours": lambda: ops.offload_compressed(view, packed)},
            {"ours": lambda: ops.prefetch_compressed(packed, restored)},
            restored,
        )
    host = _host_like(setting, view, case)
    ways = {"ours": "auto", "engine": "engine", "kernel": "kernel"}
    return _Pair(
        {name: partial(ops.offload.by, view, host, by=by) for name, by in ways.items()},
        {name: partial(ops.prefetch.by, host, restored, by=by) for name, by in ways.items()},
        restored,
    )


def load_memcpy2d() -> Callable[..., int]:
    """cudaMemcpy2DAsync, from the runtime library that PyTorch has loaded."""
    major = str(torch.version.cuda).partition(".")[0]
    function = ctypes.CDLL(f"libcudart.so.{major}").cudaMemcpy2DAsync
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    return function


def memcpy2d(function: Callable[..., int], target: Tensor, source: Tensor, stream: int) -> None:
    """Copies a channels_last view image by image: its rows are runs of bytes, equally far apart.

    Args:
        function: cudaMemcpy2DAsync.
        target, source: [N, C, H, W] of one type, both with channel stride 1 and column stride C.
        stream: handle of the CUDA stream.

    Raises:
        RuntimeError: with the status, if CUDA refuses.
    """
    count, channels, rows, columns = source.shape
    size = source.element_size()
    kind = 1 if source.device.type == "cpu" else 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
    pitches = [tensor.stride(2) * size for tensor in (target, source)]
    for image in range(count):
        at = [tensor.data_ptr() + image * tensor.stride(0) * size for tensor in (target, source)]
        status = function(at[0], pitches[0], at[1], pitches[1], columns * channels * size, rows, kind, stream)
        if status != 0:
            raise RuntimeError(f"cudaMemcpy2DAsync returned {status}")


def measure_slowdown(
    device: torch.device, dtype: torch.dtype, copy: Call, copy_ms: float, *, size: int = 56, channels: int = 256
) -> float:
    """How much longer convolutions take while copies run on another stream: 0.02 is 2 %.

    Args:
        device: a CUDA device.
        dtype: of the convolution.
        copy: queues one copy on the current stream.
        copy_ms: its duration, so that enough of them are queued.
        size, channels: of the convolution; smaller ones are for tests.
    """
    input = torch.randn(32, channels, size, size, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype) / 48
    input, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (input, weight))
    output = torch.empty_like(input)
    bounds = [[0, size // 2, size]] * 4
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
    return statistics.median(together) / statistics.median(alone) - 1


def measure_copy(setting: Setting, case: CopyCase, direction: str) -> Row:
    """Checks that the bytes come back as they went, and times one direction.

    Returns:
        The row: "status", "candidates", "bytes" (of the view), of ours "gbps", "link_share" (above 1 where compression
        beats the link) and "slowdown", and the ratio to PyTorch's.
    """
    view = _make_view(setting, case)
    ours = _ours(setting, case, view)
    offloads = direction == "offload"
    mine_by_way = ours.offload if offloads else ours.prefetch
    calls: dict[str, Call] = {}
    checks: dict[str, Check] = {}
    for name in mine_by_way:
        if not setting.wants(name):
            continue
        ours.restored.zero_()
        try:
            ours.offload[name]()
            ours.prefetch[name]()
            setting.timer.synchronize()
        except RuntimeError:
            if name != "engine":
                raise
            continue  # strides for which it would need too many calls
        checks[name] = Check(0.0 if _same_bits(ours.restored, view) else 1.0, 0.0)
        calls[name] = mine_by_way[name]
    host = _host_like(setting, view, case)
    host.copy_(view)
    source, target = (view, host) if offloads else (host, ours.restored)
    if setting.wants("torch"):
        calls["torch"] = lambda: target.copy_(source, non_blocking=True)
    on_gpu = setting.device.type == "cuda"
    # In NCHW an image's channels are not as far apart as its rows: that is no two-dimensional copy.
    if on_gpu and case.channels_last and setting.wants("memcpy2d"):
        function, stream = load_memcpy2d(), torch.cuda.current_stream().cuda_stream
        calls["memcpy2d"] = lambda: memcpy2d(function, target, source, stream)
    row = timed(setting, calls, checks)
    row["bytes"] = view.numel() * view.element_size()
    mine = median_ms(row, "ours")
    link = setting.ceilings.from_device_gbps if offloads else setting.ceilings.to_device_gbps
    if mine:
        row["gbps"] = row["bytes"] / mine / 1e6
        if link:
            row["link_share"] = row["gbps"] / link
        if on_gpu:
            row["slowdown"] = measure_slowdown(setting.device, setting.dtype, calls["ours"], mine)
    others = ("engine", "kernel", "torch", "memcpy2d")
    add_ratios(row, "ours", {f"{name}_over_ours": name for name in others})
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
