"""Measured durations: which operations are measured, what the disk keeps, what a bad entry costs. No test depends on a
time: a timer counts instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitkern as sk
from splitkern import _library
from splitkern.benchmarks import gpu_timing
from splitkern.benchmarks.gpu_timing import Sample
from splitkern.memory import profile as profiles
from splitkern.memory.allocated_bytes import AllocatedBytes
from splitkern.memory.capture import CapturedStep, capture
from splitkern.memory.profile import (
    DurationCache,
    Measured,
    default_folder,
    key_of,
    label,
    measure_link,
    measure_step,
)

CPU = torch.device("cpu")
MEASURED = Measured(12.5, 7, 1024)


class CountingTimer:
    """Calls, and says that the n-th one took n ms."""

    def __init__(self) -> None:
        self.device = CPU
        self.calls = 0

    def synchronize(self) -> None:
        return None

    def sample(self, call: Callable[[], Any], host_us: float) -> Sample:
        call()
        self.calls += 1
        return Sample(float(self.calls), late=False)


@pytest.fixture(scope="module")
def step() -> CapturedStep:
    """Two equal convolutions and one of other strides, with everything around them."""
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5)),
    )
    targets = torch.zeros(2, dtype=torch.int64)
    return capture(model, torch.randn(2, 4, 8, 8), loss=nn.functional.cross_entropy, targets=targets)


def test_equal_operations_are_measured_once(step: CapturedStep) -> None:
    timer = CountingTimer()
    seen: list[tuple[int, int]] = []
    profile = measure_step(step, timer=timer, budget_ms=0.0, progress=lambda *done: seen.append(done))
    keys = [json.dumps(key_of(step, one, CPU)) for one in step.operations]
    different = len(set(keys))
    assert different < len(step.operations) == len(profile.operations)
    assert (profile.measured, profile.cached) == (different, 0)
    assert seen == [(done + 1, different) for done in range(different)]
    by_key = dict(zip(keys, profile.durations_us, strict=True))
    assert [by_key[key] for key in keys] == profile.durations_us
    assert len(set(profile.durations_us)) == different  # the timer never says the same twice
    assert timer.calls == 3 * different
    # The middle of three samples, in µs.
    assert profile.durations_us[0] == 2000.0 and profile.operations[0].samples == 3
    assert profile.label == label(CPU) and "torch" in profile.label and profile.label.startswith("measured: ")


def test_key_tells_strides_arguments_types_and_machine_apart(step: CapturedStep) -> None:
    convolutions = [one for one in step.operations if one.target == "conv2d"]
    first, second, strided = (key_of(step, one, CPU) for one in convolutions)
    # The first one's weight is another tensor, of the same shape.
    assert first == second
    assert first["arguments"] != strided["arguments"] and first["reads"] == strided["reads"]
    box = step.tensors[convolutions[0].reads[0]]
    for change in (
        {"strides_bytes": box.strides_bytes[::-1]},
        {"dtype": torch.float64},
        {"sizes": (1, *box.sizes[1:])},
    ):
        tensors = list(step.tensors)
        tensors[convolutions[0].reads[0]] = dataclasses.replace(box, **change)
        assert key_of(dataclasses.replace(step, tensors=tuple(tensors)), convolutions[0], CPU) != first
    assert str(torch.__version__) == first["torch"] and "thread" in first["device"]


def test_another_build_of_the_kernels_is_measured_anew(step: CapturedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = step.operations[0]
    first = key_of(step, operation, CPU)
    assert first["library"] == hashlib.sha256(Path(sk.build_info().library).read_bytes()).hexdigest()
    monkeypatch.setattr(_library, "digest", lambda: "another")
    assert key_of(step, operation, CPU) == first | {"library": "another"}


def test_second_run_measures_nothing(step: CapturedStep, tmp_path: Path) -> None:
    cache = DurationCache(tmp_path / "cache")
    first = measure_step(step, timer=CountingTimer(), budget_ms=0.0, cache=cache)
    timer = CountingTimer()
    second = measure_step(step, timer=timer, budget_ms=0.0, cache=cache)
    assert timer.calls == 0 and (second.measured, second.cached) == (0, first.measured)
    assert second.operations == first.operations


def test_an_operation_that_fails_is_named(step: CapturedStep) -> None:
    tensors = list(step.tensors)
    place = next(one for one in step.operations if one.target == "conv2d").reads[0]
    tensors[place] = dataclasses.replace(tensors[place], sizes=(2, 3, 8, 8))
    broken = dataclasses.replace(step, tensors=tuple(tensors))
    with pytest.raises(RuntimeError, match=r"\(conv2d\) of module 0 cannot be measured on cpu: "):
        measure_step(broken, timer=CountingTimer(), budget_ms=0.0)


def test_a_gpu_is_current_while_it_is_measured(step: CapturedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's events are of the current device: of another one they told nothing of the step's."""
    gpu, current, seen = torch.device("cuda", 1), [torch.device("cuda", 0)], set[torch.device]()
    run = CapturedStep.runnable

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class NotingTimer(CountingTimer):
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            seen.add(current[-1])

        def sample(self, call: Callable[[], Any], host_us: float) -> Sample:
            seen.add(current[-1])
            return super().sample(call, host_us)

    def on_the_cpu(self: CapturedStep, index: int, device: torch.device) -> Callable[[], None]:
        assert device == gpu
        return run(self, index, CPU)

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(gpu_timing, "DeviceTimer", NotingTimer)
    monkeypatch.setattr(CapturedStep, "runnable", on_the_cpu)
    monkeypatch.setattr(profiles, "AllocatedBytes", lambda device: AllocatedBytes(CPU))
    monkeypatch.setattr(profiles, "device_text", str)
    monkeypatch.setattr(profiles, "_random_state_kept", lambda device: nullcontext())
    profile = measure_step(step, device=gpu, budget_ms=0.0)
    assert profile.measured > 0 and seen == {gpu} and current == [torch.device("cuda", 0)]


def entry(cache: DurationCache) -> Path:
    """The only file of a cache."""
    (file,) = [path for path in cache.folder.rglob("*") if path.is_file()]
    return file


def test_cache_keeps_and_replaces(tmp_path: Path) -> None:
    cache = DurationCache(tmp_path)
    key = {"call": "x", "reads": [[[1, 2], [2, 1], "torch.float32"]]}
    assert cache.get(key) is None
    cache.put(key, MEASURED)
    assert cache.get(key) == MEASURED
    assert cache.get({**key, "call": "y"}) is None
    cache.put(key, dataclasses.replace(MEASURED, duration_us=1.0))
    found = cache.get(key)
    assert found is not None and found.duration_us == 1.0
    assert entry(cache).suffix == ".json"  # and no temporary file stays


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": "splitkern.duration", "version": 1}',
        b"version 1",
        b"other key",
        b"negative",
        b"nan",
    ],
    ids=lambda content: content.decode(errors="replace")[:12] or "empty",
)
def test_bad_entries_are_ignored_with_a_warning(tmp_path: Path, content: bytes) -> None:
    cache, key = DurationCache(tmp_path), {"call": "x"}
    cache.put(key, MEASURED)
    file = entry(cache)
    good = json.loads(file.read_text())
    changes: dict[bytes, dict[str, Any]] = {
        b"version 1": {"version": 1},
        b"other key": {"key": {"call": "y"}},
        b"negative": {"duration_us": -1.0},
        b"nan": {"duration_us": float("nan")},
    }
    file.write_bytes(json.dumps(good | changes[content]).encode() if content in changes else content)
    with pytest.warns(RuntimeWarning, match=r"is ignored and will be measured anew"):
        assert cache.get(key) is None
    cache.put(key, MEASURED)
    assert cache.get(key) == MEASURED


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DurationCache(tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        cache.put({"call": "x"}, MEASURED)


def test_a_writer_that_dies_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key = DurationCache(tmp_path), {"call": "x"}
    cache.put(key, MEASURED)

    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        cache.put(key, dataclasses.replace(MEASURED, duration_us=1.0))
    assert cache.get(key) == MEASURED


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "splitkern" / "durations"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == Path.home() / ".cache" / "splitkern" / "durations"


def test_link_on_the_cpu() -> None:
    rates = measure_link(CPU, size_bytes=1 << 16, rounds=2)
    assert rates.size_bytes == 1 << 16
    for name in ("offload_gbps", "prefetch_gbps", "offload_computing_gbps", "prefetch_computing_gbps"):
        assert 0 < getattr(rates, name) < float("inf"), name


@pytest.mark.parametrize("argument", ["size_bytes", "rounds"])
def test_link_refuses_nothing_to_copy(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        measure_link(CPU, **{argument: 0})


@pytest.mark.gpu
def test_on_a_gpu(step: CapturedStep) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    profile = measure_step(step, device=device, budget_ms=1.0)
    assert all(one.duration_us > 0 and one.workspace_bytes >= 0 for one in profile.operations)
    assert torch.cuda.get_device_name(device) in profile.label
    rates = measure_link(device, size_bytes=8 << 20, rounds=2)
    assert min(rates.offload_computing_gbps, rates.prefetch_computing_gbps) > 0


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_that_is_no_good_costs_one_warning_each_way(tmp_path: Path, is_file: bool) -> None:
    """A step has hundreds of operations."""
    keys = [{"call": str(number)} for number in range(20)]
    cache = DurationCache(tmp_path / "folder")
    if is_file:
        (tmp_path / "folder").write_text("")
    else:
        for key in keys:
            cache.put(key, MEASURED)
        for file in cache.folder.rglob("*.json"):
            file.write_text("damaged")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for key in keys:
            assert cache.get(key) is None
            cache.put(key, MEASURED)
    texts = [str(one.message) for one in told]
    assert len(texts) == 1 + is_file and all(str(cache.folder) in text for text in texts)
    assert told[0].filename == __file__
