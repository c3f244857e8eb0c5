"""`splitkern bench`: what it reports, not how good the figures are."""

from __future__ import annotations

import argparse
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitkern.benchmarks import live, record, step
from splitkern.benchmarks.budget import Curve, Point
from splitkern.benchmarks.common import prefix, quartiles
from splitkern.benchmarks.record import Record, RecordError, check_writable, replacing
from splitkern.cli import bench_budget, main
from splitkern.training.loop import build_model

pytestmark = pytest.mark.torchvision

LIVE = ["bench", "live", "--model", "resnet18", "--until", "layer1", "--image-size", "64", "--batch", "2"]
STEP = ["bench", "step", "--until", "layer1", "--image-size", "32", "--batch", "2", "--pairs", "2", "--warmup", "1"]


def test_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "live.json"
    assert main([*LIVE, "--grid", "2x2", "--json", "--save", str(path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(path.read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert "--grid 2x2" in record["command"]
    assert record["commit"] is None or len(record["commit"]) >= 7
    (result,) = record["results"]
    unsplit, split = result["unsplit"], result["split"]
    join_bytes = 2 * 64 * 16 * 16 * 4
    assert unsplit["join_bytes"] == split["join_bytes"] == join_bytes
    assert unsplit["input_bytes"] == split["input_bytes"] == 2 * 3 * 64 * 64 * 4
    assert unsplit["parameter_gradient_bytes"] == unsplit["parameter_bytes"] == split["parameter_bytes"]
    assert result["ratio"] == split["peak_bytes"] / unsplit["peak_bytes"]
    # conv1's output and BatchNorm's, and the join with its gradient, are the least that unsplit holds at its peak.
    assert unsplit["peak_bytes"] > 2 * (2 * 64 * 32 * 32 * 4) + 2 * join_bytes
    assert 2 * join_bytes < split["peak_bytes"] < unsplit["peak_bytes"]


def test_live_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LIVE, "--grid", "2x2"]) == 0
    text = capsys.readouterr().out
    for part in ("resnet18 until layer1", "grid 2x2", "peak live bytes", "the join and its gradient", "parameters"):
        assert part in text


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STEP, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["case"]["memory_format"] for result in results] == ["contiguous", "channels_last"]
    for result in results:
        names = ["unsplit", "unsplit again", "split, order=patch", "split, order=layer"]
        assert list(result["variants"]) == names
        assert result["pairs"] == 2
        assert result["variants"]["unsplit"]["ratio"]["median"] == 1.0
        for variant in result["variants"].values():
            step = variant["step_ms"]
            assert 0 < step["lower"] <= step["median"] <= step["upper"]


def test_step_of_a_compiled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STEP, "--compiled", "--memory-format", "contiguous", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert list(result["variants"]) == ["split, order=patch", "split, order=patch again", "compiled, budget=None"]
    assert result["base"] == "split, order=patch" and result["variants"][result["base"]]["ratio"]["median"] == 1.0
    assert result["case"]["compiled"]


def test_step_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STEP, "--memory-format", "contiguous", "--order", "patch"]) == 0
    text = capsys.readouterr().out
    assert "unsplit again" in text
    assert "2 interleaved rounds" in text
    assert "order=layer" not in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "live", "--until", "layer2"], "--until needs --model"),
        ([*LIVE, "--until", "layer9"], "conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, got 'layer9'"),
        (["bench", "live", "--model", "vgg11", "--until", "features.99"], "features.0 to features.20"),
        ([*LIVE, "--order", "layer"], "recompute=True with order='layer'"),
        ([*LIVE, "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        ([*LIVE, "--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        ([*LIVE, "--device", "xpu"], "--device must be cpu, cuda or cuda:N, got 'xpu'"),
        ([*STEP, "--device", "mps"], "--device must be cpu, cuda or cuda:N, got 'mps'"),
        ([*LIVE, "--batch", "100000000"], f"must be a whole number of at most {2**20}, got '100000000'"),
        ([*STEP, "--image-size", "99999999999"], f"must be a whole number of at most {2**16}, got '99999999999'"),
        ([*STEP, "--recompute", "--order", "layer"], "--recompute with --order layer is not possible"),
        (["bench", "budget", "--resume"], "--resume needs --save FILE"),
        (["bench", "training", "--budget", "1GiB", "--resume"], "--resume needs --save FILE"),
    ],
)
def test_errors_are_one_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: no memory\nException raised from x"), MemoryError()]
)
def test_no_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(live, "measure_live", fail)
    assert main(LIVE) == 2
    text = "MemoryError" if isinstance(error, MemoryError) else "DefaultCPUAllocator: no memory"
    assert capsys.readouterr().err.splitlines()[-1] == f"splitkern bench: error: {text}"


@pytest.mark.parametrize(
    "command",
    [
        [*LIVE, "--save"],
        [*STEP, "--save"],
        ["bench", "budget", "--save"],
        ["bench", "budget", "--plot"],
        ["bench", "training", "--budget", "1GiB", "--save"],
        ["bench", "training", "--budget", "1GiB", "--plot"],
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured")

    for module, name in ((live, "measure_live"), (step, "measure_step"), (bench_budget, "_fill")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr("splitkern.cli.bench_training._measure", fail)
    assert main([*command, str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"splitkern bench: error: {command[-1]} {tmp_path} cannot be written: Is a directory\n"
    assert captured.out == ""
    assert main([*command, "/dev/null/file"]) == 2
    assert f"{command[-1]} /dev/null/file cannot be written" in capsys.readouterr().err


def full(source: Path, target: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "live.json"
    file.write_text("as it was")
    monkeypatch.setattr(record.os, "replace", full)
    assert main([*LIVE, "--grid", "2x2", "--save", str(file)]) == 2
    captured = capsys.readouterr()
    assert "peak live bytes" in captured.out
    assert f"--save {file} cannot be written: No space left on device" in captured.err
    assert file.read_text() == "as it was" and list(tmp_path.iterdir()) == [file]


def curve() -> Curve:
    return Curve("paper", "vgg19", (1, 1), "none", 8, 100.0, {0.05: 8}, {0.05: 0}, [Point(8, 100.0)])


def fill(args: argparse.Namespace, record: Record) -> None:
    if not record.has("paper vgg19 1x1 none"):
        record.put("paper vgg19 1x1 none", curve().as_row())


def test_budget_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_budget, "_fill", fill)
    file = tmp_path / "budget.json"
    command = ["bench", "budget", "--save", str(file)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "plain batch 8" in first
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == first
    content = json.loads(file.read_text())
    content["rows"] = {"row": {"machine": "paper"}}
    file.write_text(json.dumps(content))
    assert main([*command, "--resume"]) == 2
    assert "a row of it is no curve of bench budget" in capsys.readouterr().err


def test_budget_on_a_full_disk_prints_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_budget, "_fill", fill)
    monkeypatch.setattr(record.os, "replace", full)
    assert main(["bench", "budget", "--save", str(tmp_path / "budget.json")]) == 2
    captured = capsys.readouterr()
    assert "plain batch 8" in captured.out and "budget.json cannot be written: No space left" in captured.err
    assert not list(tmp_path.iterdir())


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    with pytest.raises(KeyboardInterrupt), replacing(link) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with replacing(link) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert link.is_symlink() and file.read_text() == "new" and stat.S_IMODE(file.stat().st_mode) == 0o640
    check_writable(tmp_path / "folder" / "new")
    assert not list((tmp_path / "folder").iterdir())


def test_a_pipe_or_a_device_is_written_itself(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), Path("/dev/stdout")):
        check_writable(path)  # and does not wait for a reader
        with replacing(path) as there:
            assert there == path
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


def test_a_file_that_is_protected_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(PermissionError):
        check_writable(file)


@pytest.mark.parametrize("rows", ['{"a": 1}', "[]", '{"a": []}'])
def test_what_is_no_record_is_not_resumed(rows: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(f'{{"rows": {rows}}}')
    with pytest.raises(RecordError, match="not a record of a benchmark"):
        Record({"benchmark": "b", "options": {}, "commit": None, "machine": {}}, file, resume=True)


@pytest.mark.parametrize(("name", "until"), [("vgg11_bn", "features.10"), ("resnet18", "layer2")])
def test_prefix_is_the_models_own_beginning(name: str, until: str) -> None:
    model = build_model(name, class_count=2).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(until).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    images = torch.randn(1, 3, 64, 64)
    model(images)
    part = prefix(model, until)
    assert torch.equal(part(images), seen[0])
    assert isinstance(part.get_submodule(until), nn.Module)


def test_quartiles() -> None:
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert quartiles([7]) == (7, 7, 7)
