"""What the rows of every kernel benchmark share: tensors, comparison with a truth, and the run over all rows."""

from __future__ import annotations

import faulthandler
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitkern.benchmarks.gpu_timing import Call, Ceilings, Timer, measure
from splitkern.benchmarks.record import ERROR, OK, STARTED, WRONG, Record, Row

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class DeviceLost(RuntimeError):
    """The device no longer answers; a new process must go on."""


@dataclass(frozen=True)
class Setting:
    """How the rows of one run are measured.

    Attributes:
        timer: of the device.
        ceilings: measured in this run.
        dtype: of all tensors.
        budget_ms: time for each candidate of a row.
        candidates: which to measure; None for all.
    """

    timer: Timer
    ceilings: Ceilings
    dtype: torch.dtype
    budget_ms: float
    candidates: tuple[str, ...] | None = None

    @property
    def device(self) -> torch.device:
        """The timer's device."""
        return self.timer.device

    def wants(self, name: str) -> bool:
        """Whether a candidate is to be measured."""
        return self.candidates is None or name in self.candidates


def random_tensor(setting: Setting, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values on the device in the setting's type, channels_last if 4-D."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=setting.device) * scale
    values = values.to(setting.dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def poisoned_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same strides full of NaN (of 255s where the type has none), so that a gap shows."""
    value = 255 if dtype == torch.uint8 else math.nan
    return torch.empty_like(tensor, dtype=dtype).fill_(value)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual - truth‖ / ‖truth‖ in the truth's type; infinite if anything in it is not finite."""
    difference = torch.linalg.vector_norm(actual.to(truth.dtype) - truth)
    norm = torch.linalg.vector_norm(truth)
    error = (difference / norm).item() if norm.item() > 0 else difference.item()
    return float(error) if math.isfinite(error) else math.inf


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the truth that results in `dtype` are compared with."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def release_memory(setting: Setting) -> None:
    """Gives cached memory back where the next layer might not find a block that fits."""
    if setting.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(setting.device)
        if free < total // 2:
            torch.cuda.empty_cache()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No reduced precision and no search for algorithms: for truths."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms and keeps the fastest; precision stays as the user has set it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Check:
    """Error of a candidate beside what is allowed: twice PyTorch's in the same type, and √K·2⁻²⁴ for K terms."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN never does."""
        return self.error <= self.limit


def timed(setting: Setting, calls: dict[str, Call], checks: dict[str, Check], fewer: tuple[str, ...] = ()) -> Row:
    """Measures the candidates and returns the part of a row that all benchmarks have: status and candidates."""
    timings = measure(setting.timer, calls, budget_ms=setting.budget_ms, fewer=fewer)
    candidates: dict[str, Any] = {}
    for name, timing in timings.items():
        candidates[name] = timing.as_dict()
        if name in checks:
            candidates[name] |= {"error": _finite(checks[name].error), "limit": _finite(checks[name].limit)}
    wrong = [name for name, check in checks.items() if not check.passed]
    row: Row = {"status": WRONG if wrong else OK, "candidates": candidates}
    if wrong:
        texts = [f"{name}: error {checks[name].error:.2g} over {checks[name].limit:.2g}" for name in wrong]
        row["message"] = "; ".join(texts)
    return row


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def median_ms(row: Row, name: str) -> float | None:
    """Median of a candidate of a row, None where it was not measured."""
    candidate = row.get("candidates", {}).get(name)
    return None if candidate is None else float(candidate["ms"]["median"])


def add_ratios(row: Row, of: str, others: dict[str, str]) -> None:
    """Adds, for every pair of key and candidate, the candidate's time over that of `of`: above 1 `of` is faster."""
    mine = median_ms(row, of)
    for key, name in others.items():
        theirs = median_ms(row, name)
        if mine and theirs:
            row[key] = theirs / mine


def run_rows(
    record: Record,
    tasks: Iterable[tuple[str, Row, Callable[[], Row]]],
    timer: Timer,
    *,
    seconds: float = math.inf,
    row_seconds: float = 120.0,
    on_row: Callable[[str, Row], None] = lambda key, row: None,
) -> bool:
    """Runs every row that the record lacks.

    Args:
        record: where the rows go.
        tasks: key, description and measurement of each row.
        timer: of the device.
        seconds: begin no row after that time.
        row_seconds: a row that takes longer ends the process (the device hangs).
        on_row: called with every finished row.

    Returns:
        Whether every row is there.

    Raises:
        DeviceLost: the device no longer answers after a row, which is recorded as an error.
    """
    begin = time.monotonic()
    for key, description, task in tasks:
        if record.has(key):
            continue
        if time.monotonic() - begin > seconds:
            return False
        record.put(key, {**description, "status": STARTED})
        # A kernel that never ends cannot be interrupted from Python: this ends the process from a thread of its own.
        if math.isfinite(row_seconds):
            faulthandler.dump_traceback_later(row_seconds, exit=True, file=sys.__stderr__ or 2)
        row_begin = time.monotonic()
        try:
            with torch.no_grad():
                row = {**description, **task()}
        except Exception as error:  # whatever it is, the other rows are still worth measuring
            row = {**description, "status": ERROR, "message": _one_line(error)}
        finally:
            faulthandler.cancel_dump_traceback_later()
        row["seconds"] = round(time.monotonic() - row_begin, 3)
        record.put(key, row)
        on_row(key, row)
        if row["status"] == ERROR:
            _check_alive(timer)
    return True


def _check_alive(timer: Timer) -> None:
    try:
        timer.synchronize()
        torch.zeros(1, device=timer.device).add_(1).item()
    except RuntimeError as error:
        raise DeviceLost(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
