"""Durations of a captured step's operations, measured one by one at their real shapes on the machine at hand, and the
rates of its link.

`splitkern plan --measure` calls it; measured durations are kept on disk, so that a second plan of the same network
measures nothing. Machines that are not at hand: cost_model.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitkern import _library
from splitkern.memory.allocated_bytes import AllocatedBytes

if TYPE_CHECKING:
    from splitkern.benchmarks.gpu_timing import Timer
    from splitkern.memory.capture import CapturedOperation, CapturedStep

_FORMAT, _VERSION = "splitkern.duration", 2


@dataclass(frozen=True)
class Measured:
    """One operation.

    Attributes:
        duration_us: median of the samples.
        samples: how many.
        workspace_bytes: device memory that it allocated while it ran, results that it returns included.
    """

    duration_us: float
    samples: int
    workspace_bytes: int


@dataclass(frozen=True)
class Profile:
    """A step measured.

    Attributes:
        operations: one per operation of the step, in its order.
        label: what `Graph.durations_from` says of them.
        measured: how many different operations were measured now.
        cached: how many came from the disk.
    """

    operations: Sequence[Measured]
    label: str
    measured: int
    cached: int

    @property
    def durations_us(self) -> list[float]:
        """Durations alone."""
        return [one.duration_us for one in self.operations]

    @property
    def workspace_bytes(self) -> list[int]:
        """Workspaces alone."""
        return [one.workspace_bytes for one in self.operations]


class DurationCache:
    """Measured operations on disk, one small file each, named by a digest of its key.

    Files appear by renaming, so that any number of processes may read and write the folder; a file that cannot be read
    or holds something else is ignored, and written anew. The first one that cannot be read, and the first that cannot
    be written, are told by a warning: what is wrong is mostly wrong with the folder, and a step has hundreds of files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Opens the cache; nothing is written before the first `put`.

        Args:
            folder: where; `default_folder()` unless given.
        """
        self.folder = default_folder() if folder is None else folder
        self._told: set[str] = set()

    def _file(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:34]}.json"

    def get(self, key: Mapping[str, Any]) -> Measured | None:
        """What was measured under a key, or None."""
        file = self._file(key)
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
            if (entry["format"], entry["version"]) != (_FORMAT, _VERSION) or entry["key"] != key:
                raise ValueError("it is of another format, version or key")
            found = Measured(float(entry["duration_us"]), int(entry["samples"]), int(entry["workspace_bytes"]))
            if not 0 <= found.duration_us < float("inf") or found.samples < 1 or found.workspace_bytes < 0:
                raise ValueError(f"its values are out of range: {found}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{type(error).__name__}: {error}"
            self._warn("read", f"{file} is ignored and will be measured anew ({text}), as all like it in {self.folder}")
            return None
        return found

    def put(self, key: Mapping[str, Any], measured: Measured) -> None:
        """Keeps a measurement; a folder that cannot be written costs a warning, not the measurement."""
        file = self._file(key)
        entry = {
            "format": _FORMAT,
            "version": _VERSION,
            "key": key,
            "duration_us": measured.duration_us,
            "samples": measured.samples,
            "workspace_bytes": measured.workspace_bytes,
        }
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, file)
        except OSError as error:
            self._warn("write", f"{file} cannot be written: {error.strerror}; nothing is kept in {self.folder}")
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _warn(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/splitkern/durations`, else `~/.cache/splitkern/durations`.

    Source: XDG Base Directory Specification; a relative path in the variable is to be ignored.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "splitkern" / "durations"


def device_text(device: torch.device) -> str:
    """What a duration depends on beside the operation and torch: the GPU, or the processor and its threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from splitkern.benchmarks.common import machine

    threads = torch.get_num_threads()
    return f"{machine(device)['processor']}, {threads} thread{'' if threads == 1 else 's'}"


def label(device: torch.device) -> str:
    """What `Graph.durations_from` says of durations measured on a device."""
    return f"measured: {device_text(device)}, torch {torch.__version__}"


def key_of(step: CapturedStep, operation: CapturedOperation, device: torch.device) -> dict[str, Any]:
    """All that the duration of an operation depends on, as JSON holds it."""
    call = operation.best_call

    def tensors(places: Sequence[int]) -> list[Any]:
        boxes = (step.tensors[place] for place in places)
        return [[list(box.sizes), list(box.strides), str(box.dtype)] for box in boxes]

    return {
        "call": str(call.overload),
        "arguments": [repr(call.args), repr(sorted(call.kwargs.items())), repr(call.results), repr(call.preload)],
        "reads": tensors(operation.reads),
        "writes": tensors(operation.writes),
        "device": device_text(device),
        "torch": str(torch.__version__),
        "library": _library.digest(),
        "precision": _precision(device),
    }


def _precision(device: torch.device) -> str:
    """The settings by which PyTorch chooses between kernels of one type."""
    if device.type != "cuda":
        return torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    flags = {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn_tf32": cudnn.allow_tf32,
        "cudnn_benchmark": cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return json.dumps(flags, sort_keys=True)


def measure_step(
    step: CapturedStep,
    *,
    device: torch.device | None = None,
    cache: DurationCache | None = None,
    budget_ms: float = 20.0,
    timer: Timer | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Profile:
    """Measures every operation of a step, each different one once.

    One operation at a time, from a cold cache on CUDA, with tensors of its shapes and strides: what a step of all of
    them takes beside (launches, contention with copies) is not in it.

    Args:
        step: captured.
        device: where to measure; the step's own unless given.
        cache: measurements to use and to add to; None measures everything and keeps nothing.
        budget_ms: time to spend on each, about; at least 3 samples are taken, of calls of seconds one.
        timer: measures single calls; the device's own unless given.
        progress: told (how many are done, how many there are).

    Returns:
        A measurement of every operation.

    Raises:
        RuntimeError: where an operation does not run; the text names it and its module.
    """
    device = step.device if device is None else device
    with _current(device):  # the timer's events are of the device that is current
        return _measure_step(step, device, cache, budget_ms, timer, progress)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _measure_step(
    step: CapturedStep,
    device: torch.device,
    cache: DurationCache | None,
    budget_ms: float,
    timer: Timer | None,
    progress: Callable[[int, int], Any] | None,
) -> Profile:
    from splitkern.benchmarks.gpu_timing import DeviceTimer, HostTimer

    if timer is None:
        timer = DeviceTimer(device) if device.type == "cuda" else HostTimer()
    keys = [key_of(step, operation, device) for operation in step.operations]
    names = [json.dumps(key, sort_keys=True) for key in keys]
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        first.setdefault(name, index)
    found: dict[str, Measured] = {}
    new: dict[str, int] = {}
    for done, (name, index) in enumerate(first.items()):
        before = cache.get(keys[index]) if cache is not None else None
        if before is None:
            found[name] = _measure(step, index, device, timer, budget_ms)
            new[name] = index
        else:
            found[name] = before
        if progress is not None:
            progress(done + 1, len(first))
    workspaces = measure_workspaces(step, list(new.values()), device=device)
    for (name, index), workspace_bytes in zip(new.items(), workspaces, strict=True):
        found[name] = replace(found[name], workspace_bytes=workspace_bytes)
        if cache is not None:
            cache.put(keys[index], found[name])
    return Profile([found[name] for name in names], label(device), len(new), len(first) - len(new))


def _measure(step: CapturedStep, index: int, device: torch.device, timer: Timer, budget_ms: float) -> Measured:
    from splitkern.benchmarks.gpu_timing import measure

    with _named(step, index, device), _random_state_kept(device):
        timing = measure(timer, {"operation": step.runnable(index, device)}, budget_ms=budget_ms)["operation"]
    return Measured(timing.ms.median * 1e3, timing.samples, 0)


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Operations that draw, such as dropout, leave the random state as it was."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def _named(step: CapturedStep, index: int, device: torch.device) -> Iterator[None]:
    """What goes wrong names the operation."""
    operation = step.operations[index]
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        where = f" of module {operation.module}" if operation.module else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"{operation.name} ({operation.target}){where} cannot be measured on {device}: {reason}"
        ) from error


def measure_workspaces(
    step: CapturedStep, indices: Sequence[int] | None = None, *, device: torch.device | None = None
) -> list[int]:
    """Measures what operations allocate while they run: scratch, and results that have no destination to go to.

    Args:
        step: captured.
        indices: of the operations; all of them unless given, equal ones measured once.
        device: where to measure; the step's own unless given.

    Returns:
        Most bytes at a time, of each, by the allocator's own events.

    Raises:
        RuntimeError: where an operation does not run; the text names it and its module.
    """
    device = step.device if device is None else device
    chosen = list(range(len(step.operations))) if indices is None else list(indices)
    names = [json.dumps(key_of(step, step.operations[index], device), sort_keys=True) for index in chosen]
    first: dict[str, int] = {}
    for index, name in zip(chosen, names, strict=True):
        first.setdefault(name, index)
    if not first:
        return []
    with _random_state_kept(device), AllocatedBytes(device) as allocated:
        for name, index in first.items():
            with _named(step, index, device):
                run = step.runnable(index, device)
                if device.type == "cuda":
                    run()  # the first call of a shape may allocate more: it chooses algorithms
                with allocated.label(name):
                    run()
    most = dict(allocated.peak_in)
    return [most[name] - _taken_bytes(step, index) for index, name in zip(chosen, names, strict=True)]


def _taken_bytes(step: CapturedStep, index: int) -> int:
    """Of what an operation allocates, the gradient that it hands out."""
    operation = step.operations[index]
    if not operation.is_taken:
        return 0
    return step.storages[step.tensors[operation.writes[0]].storage].size_bytes


@dataclass(frozen=True)
class LinkRates:
    """Copies between device and pinned host memory, in 10^9 bytes per second; medians.

    On the CPU, where nothing is offloaded, both are a copy within its memory.

    Attributes:
        offload_gbps, prefetch_gbps: to the host and back, with nothing else running.
        offload_computing_gbps, prefetch_computing_gbps: the same while matrix products run: what a plan can count on.
        size_bytes: of one copy.
    """

    offload_gbps: float
    prefetch_gbps: float
    offload_computing_gbps: float
    prefetch_computing_gbps: float
    size_bytes: int


def measure_link(device: torch.device, *, size_bytes: int = 128 << 20, rounds: int = 5) -> LinkRates:
    """Measures the link both ways, idle and while computing.

    Args:
        device: whose link.
        size_bytes: of one copy.
        rounds: copies that count, each way; one more comes before them.

    Raises:
        ValueError: where `size_bytes` or `rounds` is not positive.
        RuntimeError: where the device or pinned memory cannot be had.
    """
    for name, value in (("size_bytes", size_bytes), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    on_device = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    on_host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copy_ms = _cuda_copy_ms if device.type == "cuda" else _host_copy_ms

    def gbps(source: torch.Tensor, target: torch.Tensor, computing: bool) -> float:
        times_ms = [copy_ms(source, target, device, computing) for _ in range(rounds + 1)]
        return size_bytes / (statistics.median(times_ms[1:]) * 1e6)

    return LinkRates(
        offload_gbps=gbps(on_device, on_host, False),
        prefetch_gbps=gbps(on_host, on_device, False),
        offload_computing_gbps=gbps(on_device, on_host, True),
        prefetch_computing_gbps=gbps(on_host, on_device, True),
        size_bytes=size_bytes,
    )


def _host_copy_ms(source: torch.Tensor, target: torch.Tensor, device: torch.device, computing: bool) -> float:
    """One copy on this thread, with another thread multiplying matrices or not."""
    enough, begun = threading.Event(), threading.Event()

    def compute() -> None:
        matrix = torch.ones(256, 256)
        while not enough.is_set():
            torch.mm(matrix, matrix)
            begun.set()

    thread = threading.Thread(target=compute, name="splitkern link")
    if computing:
        thread.start()
        begun.wait()
    try:
        begin = time.perf_counter()
        target.copy_(source)
        return (time.perf_counter() - begin) * 1e3
    finally:
        enough.set()
        if computing:
            thread.join()


def _cuda_copy_ms(source: torch.Tensor, target: torch.Tensor, device: torch.device, computing: bool) -> float:
    """One copy on a stream of its own, while the current stream multiplies matrices or not."""
    from splitkern import ops

    copy = ops.offload if source.device.type == "cuda" else ops.prefetch

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    products = 8
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        matrix = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
        while True:
            torch.cuda.synchronize(device)
            begin, end, computed = event(), event(), event()
            if computing:
                for _ in range(products):
                    torch.mm(matrix, matrix)
                computed.record()
            with torch.cuda.stream(stream):
                begin.record()
                copy(source, target)
                end.record()
            end.synchronize()
            # Only a copy that ended before the products did was under load all the time.
            if not computing or not computed.query() or products > 1 << 14:
                torch.cuda.synchronize(device)
                return float(begin.elapsed_time(end))
            products *= 2
