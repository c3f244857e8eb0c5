"""`splitkern bench training`: what fits, what is timed, and what a row says; not how good the figures are."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitkern.benchmarks import record as record_module
from splitkern.benchmarks import training
from splitkern.benchmarks.record import Record
from splitkern.benchmarks.report import markdown
from splitkern.benchmarks.training import TrainingBench, Trial, batches_of_interest, largest_batch
from splitkern.benchmarks.training_methods import PLAIN, TrainingCase, TrainingStep, check_split, methods
from splitkern.benchmarks.training_report import plot, report
from splitkern.cli import main
from splitkern.memory.step_bytes import StepBytes, resident_bytes

SIZE = 16
KNOWN = methods((0.5,))


class Tiny(nn.Module):
    """As a torchvision VGG is built: `features`, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3, 8, 8, 8, 8, 8):
            layers += [nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, nn.MaxPool2d(4))
        self.classifier = nn.Linear(8 * (SIZE // 4) ** 2, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.classifier(self.features(images).flatten(1))
        return scores


def case_of(budget: int) -> TrainingCase:
    return TrainingCase("vgg11", SIZE, budget, until="features.3")


def measured(name: str, batch: int, budget: int = 1 << 30) -> int:
    """Device bytes of two steps."""
    step = TrainingStep(case_of(budget), Tiny(), KNOWN[name], batch, budget)
    with StepBytes(step.model, step.optimizer, [step.images, step.classes]) as bytes_:
        step()
        step()
    return bytes_.peak_bytes


def bench_of(names: list[str], budget: int, record: Record | None = None, device: str = "cpu") -> TrainingBench:
    torch.manual_seed(0)
    chosen = {name: KNOWN[name] for name in names}
    header = {"benchmark": "training", "options": {}, "commit": None, "title": case_of(budget).text}
    record = record or Record({**header, "machine": {"device": "cpu", "processor": "one", "threads": 1, "torch": "2"}})
    return TrainingBench(replace(case_of(budget), device=device), chosen, record, network=Tiny())


# --- bytes --------------------------------------------------------------------------------------------------------


def test_step_bytes_counts_everything() -> None:
    """A linear layer, whose step can be counted by hand: weights, gradients, momentum, inputs, scores."""
    model = nn.Linear(1024, 256, bias=False)
    images = torch.ones(8, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    assert resident_bytes(model, optimizer, [images]) == 1024 * 256 * 4 + 8 * 1024 * 4
    with StepBytes(model, optimizer, [images]) as bytes_:
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            model(images).sum().backward()
            optimizer.step()
    weights, rest = 1024 * 256 * 4, 8 * 1024 * 4 + 8 * 256 * 4
    assert 3 * weights + rest - 8 * 256 * 4 <= bytes_.peak_bytes <= 3 * weights + rest + 1024
    assert resident_bytes(model, optimizer, [images]) == 3 * weights + 8 * 1024 * 4
    first_bytes = bytes_.peak_bytes
    with StepBytes(model, optimizer, [images]) as bytes_:
        optimizer.zero_grad(set_to_none=True)
        model(images).sum().backward()
        optimizer.step()
    assert bytes_.peak_bytes == pytest.approx(first_bytes, abs=1024), "gradients of the step before do not count twice"


def test_methods_train_alike_and_peers_save_memory() -> None:
    """Every method computes the same step; what it is there for shows in its bytes."""
    states = {}
    for name in ("plain", "splitkern", "layerwise", "save_on_cpu", "checkpoint"):
        torch.manual_seed(1)
        network = Tiny()
        step = TrainingStep(case_of(1 << 30), network, KNOWN[name], 8, 1 << 30)
        step()
        step()
        assert (step.plan is not None) == KNOWN[name].is_planned
        states[name] = step.model.state_dict()
        assert not torch.equal(states[name]["classifier.weight"], network.state_dict()["classifier.weight"])
    for name, state in states.items():
        for key, value in state.items():
            assert torch.allclose(value, states["plain"][key], rtol=1e-5, atol=1e-6), (name, key)
    plain = measured("plain", 64)
    assert measured("checkpoint", 64) < 0.9 * plain
    assert measured("splitkern", 64, plain * 9 // 10) < 0.92 * plain
    assert measured("save_on_cpu", 64) == pytest.approx(plain, rel=0.01), "on the CPU it saves nothing, as its row says"
    assert "copies nothing" in KNOWN["save_on_cpu"].cpu_note


# --- search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "need", [lambda n: 1000 + 70 * n, lambda n: 1000 + 70 * n + 40 * (n % 7), lambda n: 900 + n**2]
)
@pytest.mark.parametrize("first", [1, 8, 500])
@pytest.mark.parametrize("is_known", [True, False])
def test_largest_batch_is_the_last_that_fits(need: Callable[[int], int], first: int, is_known: bool) -> None:
    budget = 20_000

    def attempt(batch: int) -> Trial:
        return Trial(batch, need(batch) <= budget, need(batch) if is_known else None)

    found, trials = largest_batch(attempt, budget, fixed_bytes=500, first=first)
    assert need(found) <= budget < need(found + 1)
    assert len({trial.batch for trial in trials}) == len(trials) <= 20


def test_an_affine_need_takes_few_trials() -> None:
    found, trials = largest_batch(lambda n: Trial(n, 100 + 7 * n <= 9000, 100 + 7 * n), 9000, fixed_bytes=0)
    assert found == (9000 - 100) // 7
    assert len(trials) <= 6


def test_largest_batch_of_none_and_of_all() -> None:
    assert largest_batch(lambda n: Trial(n, False, None), 1)[0] == 0
    found, trials = largest_batch(lambda n: Trial(n, True, None), 1, at_most=100)
    assert found == 100
    assert max(trial.batch for trial in trials) == 100


def test_resolution_ends_the_search_early() -> None:
    found, trials = largest_batch(lambda n: Trial(n, n <= 777, None), 1, resolution=0.1)
    assert 700 <= found <= 777
    assert len(trials) < len(largest_batch(lambda n: Trial(n, n <= 777, None), 1)[1])


def test_batches_of_interest() -> None:
    assert batches_of_interest({"plain": 10, "a": 0, "b": 25}, 0) == [10, 25]
    assert batches_of_interest({"plain": 1, "a": 8, "b": 5}, 2) == [1, 2, 4, 5, 8]


# --- the bench ----------------------------------------------------------------------------------------------------


def test_bench_finds_and_times_under_the_budget(tmp_path: Path) -> None:
    budget = measured("plain", 24) + 1000
    names = ["plain", "splitkern", "splitkern-split", "checkpoint"]
    bench = bench_of(names, budget)
    largest = bench.find_largest(resolution=0.2)
    assert largest["plain"] in range(20, 26)
    assert min(largest["splitkern"], largest["checkpoint"]) > largest["plain"]
    for name in names:
        trials = bench.record.rows[f"largest {name}"]["trials"]
        assert any(not trial["fits"] and trial["reason"] for trial in trials)
        assert max(trial["batch"] for trial in trials if trial["fits"]) == largest[name]
    bench.time_batches(largest, points=0, rounds=2)
    at_plain = bench.record.rows[f"time {largest['plain']}"]
    assert set(at_plain["methods"]) == set(names)
    assert at_plain["methods"]["plain"]["slowdown"]["median"] == 0
    for row in bench.record.rows.values():
        for name, one in row.get("methods", {}).items():
            assert 0 < one["peak_bytes"] <= budget
            assert ("plan" in one) == KNOWN[name].is_planned
            assert one["images_per_s"] == pytest.approx(row["batch"] * 1e3 / one["step_ms"]["median"])
    text = report(bench.record.data, markdown)
    assert f"| {largest['checkpoint']} | {largest['checkpoint'] / largest['plain']:.2f} |" in text
    plot(tmp_path / "picture.png", bench.record.data)
    assert (tmp_path / "picture.png").stat().st_size > 10_000

    again = bench_of(names, budget, bench.record)
    before = json.dumps(bench.record.data)
    again.time_batches(again.find_largest(), points=0, rounds=2)
    assert json.dumps(again.record.data) == before, "rows that are there are not measured again"


def test_a_plan_that_takes_more_than_its_budget_is_made_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = measured("plain", 24)
    real, given = StepBytes.__exit__, []

    def larger(self: StepBytes, *args: Any) -> None:
        real(self, *args)
        if len(given) == 1:
            self.peak_bytes = budget + 3000

    monkeypatch.setattr(StepBytes, "__exit__", larger)
    compile_ = training.TrainingStep

    def recorded(case: Any, network: Any, method: Any, batch: int, planned: int) -> TrainingStep:
        given.append(planned)
        return compile_(case, network, method, batch, planned)

    monkeypatch.setattr(training, "TrainingStep", recorded)
    bench = bench_of(["plain", "splitkern"], budget)
    ready = bench._prepare(KNOWN["splitkern"], 26)
    assert given == [budget, budget - 3000]
    assert ready.spare_bytes == 3000
    assert ready.peak_bytes <= budget


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:2", 2)])
def test_the_cap_of_a_gpu_is_of_a_numbered_device(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch caps no device without a number, so that `--device cuda` failed in its first trial."""
    gpu, warmed, capped = torch.device("cuda", index), list[torch.device](), list[tuple[float, torch.device]]()
    monkeypatch.setattr(training, "_warm_up", warmed.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200 if device == gpu else 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1200))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: capped.append(given))
    bench = bench_of([PLAIN], 1 << 30, device=device)
    assert warmed == [gpu]
    assert training._held_bytes(bench._device) == 200
    with pytest.raises(MemoryError), training._capped(bench._device, 300):
        assert capped == [(0.25, gpu)]
        raise MemoryError
    assert capped[1:] == [(1.0, gpu)]


def test_a_step_is_made_before_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures for a plan takes memory beside the budget: under the cap it had none."""
    events: list[object] = []
    make, run = TrainingStep.__init__, TrainingStep.__call__

    @contextmanager
    def cap(device: torch.device, allowed_bytes: int) -> Iterator[None]:
        events.append(allowed_bytes)
        yield
        events.append("end")

    def made(self: TrainingStep, *args: Any) -> None:
        events.append("made")
        make(self, *args)

    def ran(self: TrainingStep) -> None:
        events.append("ran")
        run(self)

    monkeypatch.setattr(training, "_capped", cap)
    monkeypatch.setattr(training, "_held_bytes", lambda device: 500)
    monkeypatch.setattr(TrainingStep, "__init__", made)
    monkeypatch.setattr(TrainingStep, "__call__", ran)
    bench_of([PLAIN], 1 << 30)._prepare(KNOWN[PLAIN], 2)
    assert events == ["made", (1 << 30) + 500, "ran", "ran", "end"]


def test_a_peer_that_fails_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler here\nsecond line")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    bench = bench_of([PLAIN, "torch.compile-0.5"], measured("plain", 4))
    largest = bench.find_largest()
    assert largest["torch.compile-0.5"] == 0
    bench.time_batches(largest, points=0, rounds=1)
    assert "no compiler here" in bench.record.rows["largest torch.compile-0.5"]["message"]
    assert "no compiler here" in report(bench.record.data, markdown)


def test_memory_that_cannot_be_had_is_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainingStep.__call__

    def limited(self: TrainingStep) -> None:
        if len(self.images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        real(self)

    monkeypatch.setattr(TrainingStep, "__call__", limited)
    bench = bench_of([PLAIN], 1 << 30)
    assert bench.find_largest(at_most=16) == {PLAIN: 5}
    assert "out of memory" in bench.record.rows["largest plain"]["trials"][0]["reason"]


def test_a_budget_that_plain_pytorch_cannot_do_with() -> None:
    bench = bench_of([PLAIN, "splitkern", "checkpoint"], 1000)
    with pytest.raises(ValueError, match="trains nothing in this budget: a batch of 1 needs"):
        bench.find_largest()
    assert list(bench.record.rows) == ["largest plain"], "nothing else is tried"


def test_a_first_image_that_finds_no_memory_is_no_unlimited_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TrainingStep) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    with pytest.raises(ValueError, match=r"in this budget: a batch of 1: OutOfMemoryError: CUDA out of memory"):
        bench_of([PLAIN], 1 << 30).find_largest()


@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "much"], "--budget must be bytes"),
        (["--budget", "1GiB", "--methods", "plain,magic"], "torch.compile-0.1, got 'magic'"),
        (["--budget", "0"], "--budget must be above 0 bytes, got '0'"),
        (["--budget", "1GiB", "--methods", ""], "torch.compile-0.1, got ''"),
        (["--budget", "1GiB", "--grid", "500x500"], "500"),
        (["--budget", "1GiB", "--until", "layer9"], "layer9"),
        (["--budget", "1GiB", "--image-size", "99999999999"], f"at most {2**16}, got '99999999999'"),
        (["--budget", "1GiB", "--device", "abacus"], "abacus"),
        (["--budget", "1GiB", "--network", "vgg11", "--image-size", "16"], "vgg11 takes no images of 16 pixels"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(training, "TrainingBench", fail)
    assert main(["bench", "training", *arguments, "--save", str(tmp_path / "rows.json")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.torchvision
@pytest.mark.parametrize("network", ["resnet18", "vgg11"])
def test_a_split_is_checked_without_memory(network: str) -> None:
    check_split(TrainingCase(network, 64, 1 << 30, grid=(2, 2)))
    with pytest.raises(ValueError):
        check_split(TrainingCase(network, 64, 1 << 30, grid=(2, 999)))


@pytest.mark.torchvision
def test_out_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    command = ["bench", "training", "--image-size", "32", "--budget", "1GiB", "--methods", "plain", "--save", str(file)]
    assert main([*command, "--seconds", "1e-9", "--json"]) == 4
    captured = capsys.readouterr()
    assert "out of time after 0 rows; go on with --resume" in captured.err
    assert json.loads(captured.out)["rows"] == {}
    assert main([*command, "--seconds", "1e-9"]) == 4
    assert "largest batch" in capsys.readouterr().out


@pytest.mark.torchvision
def test_a_full_disk_prints_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replace_(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_module.os, "replace", replace_)
    monkeypatch.setattr(TrainingBench, "_largest_row", lambda *arguments: dict(LARGEST))
    file = tmp_path / "rows.json"
    command = ["bench", "training", "--image-size", "32", "--budget", "1GiB", "--methods", "plain", "--save", str(file)]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "plain PyTorch" in captured.out and f"{file} cannot be written: No space left" in captured.err
    assert not list(tmp_path.iterdir())


LARGEST = {"method": "plain", "text": "plain PyTorch", "note": "", "status": "ok", "largest": 7, "trials": []}


@pytest.mark.parametrize("is_evidence", [False, True])
def test_report_prints_a_training_record(is_evidence: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make gpu-evidence` keeps records of kernels and of training in one file."""
    record = bench_of([PLAIN], 1 << 30).record
    record.rows["largest plain"] = dict(LARGEST)
    kernels = {"benchmark": "pool", "machine": {"device": "d", "torch": "t"}, "commit": None, "rows": {}}
    steps = {"build": {}, "pool": {"record": kernels}, "training-vgg19": {"record": record.data}}
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"steps": steps} if is_evidence else record.data))
    assert main(["bench", "report", str(path), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert report(record.data, markdown) in text and "| plain PyTorch | 7 | 1.00 |" in text
    assert ("no row has been measured" in text) == is_evidence
