"""Largest batch and throughput of training under an equal byte budget, by real steps, for every method.

A batch fits where two steps stay within the budget, by the allocator's own account (on CUDA under a cap of that size,
too). Times are of interleaved steps: each round runs every method once, in an order that rotates.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from splitkern.benchmarks.common import quartiles
from splitkern.benchmarks.networks import CLASS_COUNT
from splitkern.benchmarks.record import ERROR, OK, Record, Row
from splitkern.benchmarks.training_methods import PLAIN, Method, TrainingCase, TrainingStep, cudnn_benchmark
from splitkern.memory.compile import BudgetError
from splitkern.memory.report import bytes_text
from splitkern.memory.step_bytes import StepBytes

LARGEST_BATCH = 4096
_FIRST_BATCH = 8
_PREDICTED_TRIALS = 6
_PLANS_PER_TRIAL = 3
_STEPS_PER_TRIAL = 2


@dataclass(frozen=True)
class Trial:
    """A batch tried.

    Attributes:
        batch: images.
        fits: whether its steps stayed within the budget.
        needed_bytes: what they took; of a planned method that does not fit, the smallest budget that would do. None
            where that is not known: a planned method takes what it is given, and an allocation that failed is not seen.
        reason: why it does not fit.
    """

    batch: int
    fits: bool
    needed_bytes: int | None
    reason: str = ""


class _TooLarge(Exception):
    """A batch that does not fit; a plan for fewer bytes, by `excess_bytes`, might do."""

    def __init__(self, reason: str, needed_bytes: int | None = None, excess_bytes: int = 0) -> None:
        super().__init__(reason)
        self.needed_bytes, self.excess_bytes = needed_bytes, excess_bytes


@dataclass
class Ready:
    """A step that has run within the budget.

    Attributes:
        step: to call.
        peak_bytes: device bytes that it took.
        spare_bytes: what a planned method's plan leaves of the budget, for the allocator's rounding and for the loss.
    """

    step: TrainingStep
    peak_bytes: int
    spare_bytes: int

    def as_row(self) -> dict[str, Any]:
        """What is to be said of it, for JSON."""
        plan = self.step.plan
        row: dict[str, Any] = {"peak_bytes": self.peak_bytes}
        return row if plan is None else {**row, "spare_bytes": self.spare_bytes, "plan": plan.summary()}


class OutOfTime(Exception):
    """The time is over, and rows are missing: a resumed run goes on with them."""


class TrainingBench:
    """Tries and times methods on one network under one budget.

    Args:
        case: what is trained.
        methods: by name, plain PyTorch among them.
        record: takes a row as soon as it is there; rows that it holds are not measured again.
        network: what to train, on the CPU; the case's torchvision network unless given.
        on_change: told what comes next.
    """

    def __init__(
        self,
        case: TrainingCase,
        methods: Mapping[str, Method],
        record: Record,
        *,
        network: nn.Module | None = None,
        on_change: Callable[[str], None] = lambda text: None,
        seconds: float = math.inf,
    ) -> None:
        from splitkern.training.loop import build_model

        self._end = time.monotonic() + seconds

        self.case, self.methods, self.record = case, methods, record
        self._say = on_change
        self._device = torch.device(case.device)
        if self._device.type == "cuda":
            # With its number, which the allocator's cap wants.
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            self._device = torch.device("cuda", index)
            _warm_up(self._device)
        torch.manual_seed(0)
        self._network = build_model(case.network, class_count=CLASS_COUNT) if network is None else network
        # Parameters, their gradients and momentum do not depend on the batch.
        self._fixed_bytes = 3 * sum(
            parameter.numel() * parameter.element_size() for parameter in self._network.parameters()
        )
        self._spare_bytes = dict.fromkeys(methods, 0)

    # --- largest batches ------------------------------------------------------------------------------------------

    def find_largest(self, *, at_most: int = LARGEST_BATCH, resolution: float = 0.0) -> dict[str, int]:
        """The largest batch of every method, 0 where none fits or the method cannot run here.

        Args:
            at_most: no larger batch is tried.
            resolution: share of the answer by which the next batch that was found not to fit may lie above it.

        Raises:
            ValueError: not even one image fits plain PyTorch, with which all is compared.
        """
        found: dict[str, int] = {}
        for name, method in self.methods.items():
            key = f"largest {name}"
            if not self.record.has(key):
                self._require_time()
                self._say(f"largest batch, {name}")
                self.record.put(key, self._largest_row(method, found.get(PLAIN, 0), at_most, resolution))
            found[name] = self.record.rows[key].get("largest", 0)
            if name == PLAIN and not found[name]:
                raise ValueError(
                    "plain PyTorch, with which all is compared, trains nothing in this budget: "
                    f"{_why_nothing_fits(self.record.rows[key])}"
                )
        return found

    def _require_time(self) -> None:
        if time.monotonic() > self._end:
            raise OutOfTime

    def _largest_row(self, method: Method, first: int, at_most: int, resolution: float) -> Row:
        note = method.cpu_note if self._device.type == "cpu" else ""
        row: Row = {"method": method.name, "text": method.text, "note": note}

        def attempt(batch: int) -> Trial:
            self._say(f"largest batch, {method.name}: {batch}")
            return self._try(method, batch)

        try:
            largest, trials = largest_batch(
                attempt,
                self.case.budget,
                fixed_bytes=self._fixed_bytes,
                first=first or _FIRST_BATCH,
                at_most=at_most,
                resolution=resolution,
            )
        except Exception as error:  # a peer may fail in its own way: that is its result
            return {**row, "status": ERROR, "message": _one_line(error)}
        return {**row, "status": OK, "largest": largest, "trials": [asdict(trial) for trial in trials]}

    def _try(self, method: Method, batch: int) -> Trial:
        with _emptied(self._device):
            try:
                ready = self._prepare(method, batch)
            except _TooLarge as error:
                return Trial(batch, False, error.needed_bytes, str(error))
            return Trial(batch, True, None if method.is_planned else ready.peak_bytes)

    def _prepare(self, method: Method, batch: int) -> Ready:
        """Makes a step and runs it within the budget, beside what is on the device already.

        Raises:
            _TooLarge: it does not fit.
        """
        for left in reversed(range(_PLANS_PER_TRIAL)):
            try:
                return self._run_within(method, batch)
            except _TooLarge as error:
                if left == 0 or not error.excess_bytes:
                    raise
                # A plan fills its budget. What comes on top (the loss, rounding) is left to it from here on.
                self._spare_bytes[method.name] += error.excess_bytes
            _empty(self._device)
        raise AssertionError("the last one returns or raises")

    def _run_within(self, method: Method, batch: int) -> Ready:
        budget, spare_bytes = self.case.budget, self._spare_bytes[method.name]
        try:
            held_bytes = _held_bytes(self._device)
            # Not under the cap: what measures for a plan takes memory beside what it plans.
            step = TrainingStep(self.case, self._network, method, batch, budget - spare_bytes)
            counting = StepBytes(step.model, step.optimizer, [step.images, step.classes])
            with _capped(self._device, held_bytes + budget), counting as measured:
                for _ in range(_STEPS_PER_TRIAL):
                    step()
        except BudgetError as error:
            needed_bytes = error.smallest_bytes + spare_bytes
            raise _TooLarge(f"the smallest budget is {bytes_text(needed_bytes)}", needed_bytes) from None
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise _TooLarge(_one_line(error), excess_bytes=budget // 50 if method.is_planned else 0) from None
        excess_bytes = measured.peak_bytes - budget
        if excess_bytes > 0:
            reason = f"its steps took {bytes_text(measured.peak_bytes)}"
            raise _TooLarge(reason, measured.peak_bytes, excess_bytes if method.is_planned else 0)
        return Ready(step, measured.peak_bytes, spare_bytes)

    # --- times ----------------------------------------------------------------------------------------------------

    def time_batches(self, largest: Mapping[str, int], *, points: int, rounds: int, warmup: int = 1) -> None:
        """Times every method at every batch that is of interest and fits it.

        Args:
            largest: largest batch by method.
            points: batches between plain PyTorch's largest and the largest of all, beside those that are largest.
            rounds: that count.
            warmup: rounds before them.
        """
        plain = largest[PLAIN]
        for batch in batches_of_interest(largest, points):
            key = f"time {batch}"
            if not self.record.has(key):
                self._require_time()
                names = [name for name, most in largest.items() if most >= batch]
                self.record.put(key, {"status": OK, **self._time(batch, names, plain, rounds, warmup)})

    def _time(self, batch: int, names: Sequence[str], plain: int, rounds: int, warmup: int) -> Row:
        with _emptied(self._device):
            ready: dict[str, Ready] = {}
            refused: dict[str, str] = {}
            for name in names:
                self._say(f"batch {batch}: preparing {name}")
                try:
                    ready[name] = self._prepare(self.methods[name], batch)
                except _TooLarge as error:
                    refused[name] = str(error)
            base = ready.get(PLAIN) if batch == plain else None
            if base is None:
                base = self._prepare(self.methods[PLAIN], plain)
            steps = {name: one.step for name, one in ready.items() if one is not base}
            times_ms = self._rounds({"": base.step, **steps}, batch, rounds, warmup)
            base_ms = times_ms.pop("")
            if PLAIN in ready and ready[PLAIN] is base:
                times_ms[PLAIN] = base_ms
            return {
                "batch": batch,
                "rounds": rounds,
                "plain_batch": plain,
                "plain_ms": quartiles(base_ms)._asdict(),
                "methods": {
                    name: {
                        "step_ms": quartiles(own_ms)._asdict(),
                        "images_per_s": batch * 1e3 / quartiles(own_ms).median,
                        "slowdown": quartiles(
                            [own / batch / (other / plain) - 1 for own, other in zip(own_ms, base_ms, strict=True)]
                        )._asdict(),
                        **ready[name].as_row(),
                    }
                    for name, own_ms in times_ms.items()
                },
                "refused": refused,
            }

    def _rounds(
        self, steps: Mapping[str, TrainingStep], batch: int, rounds: int, warmup: int
    ) -> dict[str, list[float]]:
        names = list(steps)
        times_ms: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(warmup + rounds):
            self._say(f"batch {batch}: round {turn + 1} of {warmup + rounds}")
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                duration_ms = _timed(steps[name], self._device)
                if turn >= warmup:
                    times_ms[name].append(duration_ms)
        return times_ms


def _why_nothing_fits(row: Row) -> str:
    if row["status"] != OK:
        return str(row["message"])
    trial = row["trials"][-1]
    needed_bytes = trial["needed_bytes"]
    if needed_bytes is None:  # the allocation failed
        return f"a batch of {trial['batch']}: {trial['reason']}"
    return f"a batch of {trial['batch']} needs {bytes_text(needed_bytes)}"


def largest_batch(
    attempt: Callable[[int], Trial],
    budget: int,
    *,
    fixed_bytes: int = 0,
    first: int = _FIRST_BATCH,
    at_most: int = LARGEST_BATCH,
    resolution: float = 0.0,
) -> tuple[int, list[Trial]]:
    """The largest batch that fits, taking it that smaller ones fit too.

    The first trials go where the line through the needs of the last two predicts the end; what they leave open is
    doubled and bisected.

    Args:
        attempt: tries a batch.
        budget: in bytes, for the prediction.
        fixed_bytes: about what does not grow with the batch.
        first: batch to begin with.
        at_most: no larger one is tried.
        resolution: the next batch that was found not to fit lies at most one image, or this share, above the answer.

    Returns:
        The batch, 0 where none fits, and all trials.
    """
    low, high = 0, at_most + 1
    trials: list[Trial] = []
    batch = min(first, at_most)
    while True:
        trial = attempt(batch)
        trials.append(trial)
        low, high = (batch, high) if trial.fits else (low, batch)
        if high - low <= max(1, int(resolution * low)):
            return low, trials
        is_bounded = high <= at_most
        middle = (low + high) // 2 if is_bounded else min(2 * low, at_most)
        predicted = _predict(trials, budget, fixed_bytes) if len(trials) <= _PREDICTED_TRIALS else None
        batch = middle if predicted is None else predicted
        batch = min(max(batch, low + 1), high - 1, 4 * low if low and not is_bounded else high - 1)


def _predict(trials: Sequence[Trial], budget: int, fixed_bytes: int) -> int | None:
    """The batch that would fill the budget; None where that is not to be told."""
    needs = [(trial.batch, trial.needed_bytes) for trial in trials if trial.needed_bytes is not None]
    if not needs or needs[-1][0] != trials[-1].batch:
        return None
    batch, needed_bytes = needs[-1]
    other, other_bytes = needs[-2] if len(needs) > 1 else (0, fixed_bytes)
    slope = (needed_bytes - other_bytes) / (batch - other)
    return None if slope <= 0 else max(0, math.floor(batch + (budget - needed_bytes) / slope))


def batches_of_interest(largest: Mapping[str, int], points: int) -> list[int]:
    """What to time: every method's largest batch, plain PyTorch's, and points between that and the largest of all.

    Args:
        largest: by method; 0 for none.
        points: how many, in equal ratios.

    Returns:
        Batches, rising.

    Example:
        >>> batches_of_interest({"plain": 8, "other": 64}, 2)
        [8, 16, 32, 64]
    """
    plain, most = largest[PLAIN], max(largest.values())
    between = {round(plain * (most / plain) ** (step / (points + 1))) for step in range(1, points + 1)}
    return sorted({batch for batch in largest.values() if batch > 0} | between)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3


@contextmanager
def _emptied(device: torch.device) -> Iterator[None]:
    """Nothing compiled and no memory cached, before and behind; cuDNN in benchmark mode."""
    torch.compiler.reset()
    _empty(device)
    with cudnn_benchmark(device):
        yield
    torch.compiler.reset()
    _empty(device)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _warm_up(device: torch.device) -> None:
    """Makes cuBLAS take what it keeps for good, a workspace for each of the two threads of a step, before it counts."""
    matrix = torch.ones(64, 64, device=device, requires_grad=True)
    torch.mm(matrix, matrix).sum().backward()  # type: ignore[no-untyped-call]


def _held_bytes(device: torch.device) -> int:
    """What the allocator holds; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    _empty(device)
    return torch.cuda.memory_reserved(device)


@contextmanager
def _capped(device: torch.device, allowed_bytes: int) -> Iterator[None]:
    """On CUDA the allocator gets so much and no more."""
    if device.type != "cuda":
        yield
        return
    _empty(device)
    total_bytes = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes / total_bytes), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Compilers wrap the error, and the CPU's allocator has no exception of its own."""
    while error is not None:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if "out of memory" in text or "DefaultCPUAllocator" in text:
            return True
        error = error.__cause__
    return False


def _one_line(error: BaseException) -> str:
    """What went wrong; what a compiler says stands in the second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
