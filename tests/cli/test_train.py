"""`splitkern train` from its arguments to its files."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Subset

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import splitkern.training
from splitkern.cli import main
from splitkern.training import load_checkpoint
from tests.training.small import small_data

pytestmark = pytest.mark.torchvision

UNSPLIT = ["--image-size", "32", "--batch", "16", "--epochs", "2", "--device", "cpu"]
SMALL = [*UNSPLIT, "--until", "layer1"]


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *, image_size: int, root: Path | None) -> Any:
        assert name == "digits"
        assert root is None
        return small_data(image_size)

    monkeypatch.setattr(splitkern.training, "load_data", load)


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_compare_writes_everything(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["train", "--compare", "--out", str(out), *SMALL]) == 0
    table = capsys.readouterr().out
    for text in ("unsplit", "split", "split/unsplit", "test accuracy", "peak live bytes of a step", "step time"):
        assert text in table
    assert sorted(path.name for path in out.iterdir()) == [
        "baseline.pt",
        "checkpoint.pt",
        "live_bytes.png",
        "results.json",
    ]
    assert is_png(out / "live_bytes.png")
    record = json.loads((out / "results.json").read_text())
    results = record["results"]
    assert list(results) == ["unsplit", "split"]
    assert results["split"]["peak_bytes"] < results["unsplit"]["peak_bytes"]
    ratio = results["split"]["peak_bytes"] / results["unsplit"]["peak_bytes"]
    assert record["split_to_unsplit"]["peak_bytes"] == pytest.approx(ratio)
    assert f"{ratio:.3f}" in table
    config = load_checkpoint(out / "checkpoint.pt")["split"]
    assert config["grid"] == [2, 2]
    assert config["until"] == "layer1"
    assert config["recompute"] is True


def test_budget(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--compare", "--out", str(tmp_path), *SMALL, "--epochs", "1", "--precision", "bf16"]
    assert main([*command, "--budget", "1GiB", "--host-budget", "1GiB", "--strategy", "default"]) == 0
    captured = capsys.readouterr()
    assert "planning the memory of a step" in captured.err
    assert "left alone: it fits" in captured.err
    for text in ("left alone: it fits", "predicted by the plan", "arena", "all device memory of a step, measured"):
        assert text in captured.out
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["options"]["budget"] == {"device_bytes": 1 << 30, "host_bytes": 1 << 30, "strategy": "default"}
    unsplit, split = record["results"]["unsplit"], record["results"]["split"]
    assert unsplit["plan"] is None
    assert 0 < split["plan"]["arena_bytes"] < split["plan"]["peak_bytes"] <= 1 << 30
    assert split["plan"]["arena_bytes"] < split["device_peak_bytes"] <= 1 << 30
    assert load_checkpoint(tmp_path / "checkpoint.pt")["split"]["grid"] == [2, 2]


def test_budget_that_is_too_small(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "out"), *SMALL, "--budget", "20MiB"]) == 2
    error = capsys.readouterr().err
    assert "the smallest that would do is" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_second_run_and_resume(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--out", str(tmp_path), *SMALL, "--json"]
    first = second = third = None
    assert main([*command, "--resume"]) == 0
    captured = capsys.readouterr()
    assert "isn't there yet: the split run begins at the beginning" in captured.err
    first = json.loads(captured.out)["results"]["split"]
    assert main([*command, "--resume"]) == 0
    second = json.loads(capsys.readouterr().out)["results"]["split"]
    assert second == first, "a finished run is only shown again"
    assert main(command) == 0
    third = json.loads(capsys.readouterr().out)["results"]["split"]
    assert third["loss"] == first["loss"], "the same arguments give the same run"
    assert third["median_step_ms"] != first["median_step_ms"]


def test_no_split(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--no-split", "--out", str(tmp_path), *UNSPLIT, "--epochs", "1"]) == 0
    assert "split/unsplit" not in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "baseline.pt")["split"] is None


@pytest.mark.parametrize("earlier", [False, True], ids=["", "beside the checkpoint of an earlier run"])
@pytest.mark.parametrize("at_step", [2, 5])
def test_interruption_keeps_the_checkpoint_and_says_how_to_go_on(
    few_digits: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    at_step: int,
    earlier: bool,
) -> None:
    from splitkern.training import loop

    out = tmp_path / "out"
    if earlier:
        out.mkdir()
        (out / "checkpoint.pt").write_text("of another run")

    steps = 0
    real_step = loop._Run._step

    def interrupted_step(self: Any, *args: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == at_step:
            raise KeyboardInterrupt
        return real_step(self, *args)

    monkeypatch.setattr(loop._Run, "_step", interrupted_step)
    assert main(["train", "--out", str(out), *SMALL]) == 130
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if at_step == 2:
        assert "no epoch was finished" in error
        assert list(out.iterdir() if earlier else tmp_path.iterdir()) == ([out / "checkpoint.pt"] if earlier else [])
    else:
        hint = f"the finished epochs are in {out / 'checkpoint.pt'}; go on with the same command and --resume"
        assert hint in error
        assert load_checkpoint(out / "checkpoint.pt")["epoch"] == 1
        steps = at_step - 2
        assert main(["train", "--out", str(out), *SMALL, "--resume"]) == 130
        assert hint in capsys.readouterr().err, "also where the resumed run finished no epoch of its own"
        monkeypatch.setattr(loop._Run, "_step", real_step)
        assert main(["train", "--out", str(out), *SMALL, "--resume"]) == 0
        assert load_checkpoint(out / "checkpoint.pt")["epoch"] == 2


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("splitkern train: error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10"], "needs the folder that holds it (--root)"),
        (["--data", "cifar10", "--root", "nowhere"], "data folder nowhere"),
        (["--data", "imagenet-folder", "--root", "nowhere"], "data folder nowhere"),
        (["--precision", "fp16", "--device", "cpu"], "precision fp16 needs a GPU"),
        (["--device", "abacus"], "'abacus'"),
        (["--budget", "much"], "--budget must be bytes such as 16GiB"),
        (["--host-budget", "1GiB"], "--host-budget needs --budget"),
        (["--strategy", "layerwise"], "--strategy needs --budget"),
        (["--no-split", "--compare"], "--compare needs a split model"),
        (["--model", "vgg11", "--image-size", "16"], "vgg11 takes no images of 16 pixels"),
        (["--until", "layer9"], "layer9"),
        (["--grid", "40x40"], "40"),
        (["--order", "layer", "--recompute"], "recompute=True with order='layer'"),
        (["--norm", "image"], "norm='image' with order='patch'"),
        (["--no-split", "--grid", "2x2", "--until", "layer1"], "so it excludes --grid, --until"),
        (["--no-split", "--boundary", "zero", "--no-recompute"], "so it excludes --boundary, --no-recompute"),
        (["--no-split", "--norm", "patch", "--evaluation", "split"], "so it excludes --norm, --evaluation"),
        (["--no-split", "--depth", "0.5", "--order", "patch"], "so it excludes --depth, --order"),
        (["--wiggle", "0.1"], "--wiggle needs --boundary stochastic, got --boundary zero"),
        (["--until", ""], "--until must name a module of the model, got ''"),
        (["--root", "nowhere"], "--data digits comes with scikit-learn and excludes --root, got --root nowhere"),
        (["--device", ""], "device must be cpu, cuda or cuda:N, got ''"),
        (["--batch", "1", "--image-size", "32", "--device", "cpu"], "batch 1 of image_size 32: Expected more than 1"),
        (["--seed", str(2**63)], "--seed: must be a whole number of at most"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "deep" / "out"), *arguments]) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == [], "no empty folder stays"


def test_out_that_is_a_file(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out"
    path.write_text("a file")
    assert main(["train", "--out", str(path), *SMALL]) == 2
    assert f"--out {path} is no folder" in one_line(capsys)
    assert main(["train", "--out", str(path / "below"), *SMALL]) == 2
    assert f"--out {path / 'below'} cannot be written: Not a directory" in one_line(capsys)
    assert path.read_text() == "a file"


@pytest.mark.parametrize("name", ["", "checkpoint.pt", "results.json"])
def test_out_that_cannot_be_written_is_found_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(splitkern.training, "load_data", load)
    out = Path("/proc") if name == "" else tmp_path  # nobody can make files in /proc, root can't either
    if name:
        (tmp_path / name).mkdir()
    assert main(["train", "--out", str(out), *SMALL]) == 2
    assert f"--out {out} cannot be written: {name}" in one_line(capsys)


def test_full_disk(
    few_digits: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--no-split", "--out", str(tmp_path / "out"), *UNSPLIT, "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert main(command) == 2
        assert f"--out {tmp_path / 'out'} cannot be written: No space left" in one_line(capsys)
        assert list(tmp_path.iterdir()) == []
    out = tmp_path / "out"
    out.mkdir()
    (out / "baseline.pt.tmp").symlink_to("/dev/full")
    assert main(command) == 2
    assert f"checkpoint {out / 'baseline.pt'} cannot be written: No space left on device" in one_line(capsys)
    assert list(out.iterdir()) == []
    (out / ".results.json").symlink_to("/dev/full")
    assert main(command) == 2
    assert f"--out {out} cannot be written: No space left on device" in one_line(capsys)
    assert sorted(path.name for path in out.iterdir()) == ["baseline.pt", "live_bytes.png"]


def test_one_step_has_no_median(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data()
    few = dataclasses.replace(data, train=Subset(data.train, range(16)))
    monkeypatch.setattr(splitkern.training, "load_data", lambda *_, **__: few)
    command = ["train", "--compare", "--out", str(tmp_path), *SMALL, "--epochs", "1"]
    assert main(command) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step time, median")]
    assert row.split() == ["step", "time,", "median", "-", "-", "-"]
    assert main([*command, "--json"]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "results.json").read_text()):
        assert "NaN" not in text
        record = json.loads(text)
        assert record["results"]["split"]["median_step_ms"] is None
        assert record["split_to_unsplit"]["median_step_ms"] is None


def test_damaged_checkpoint(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 and no more")
    assert main(["train", "--out", str(tmp_path), *SMALL, "--resume"]) == 2
    assert f"checkpoint {path} is damaged" in one_line(capsys)


def test_checkpoint_of_another_split(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--out", str(tmp_path), *SMALL, "--epochs", "1"]
    assert main(command) == 0
    capsys.readouterr()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert main([*command, "--grid", "1x2", "--resume"]) == 2
    message = one_line(capsys)
    assert "grid=[2, 2]" in message
    assert "grid=[1, 2]" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
