"""The rows of `splitkern bench conv|pool|copy`, run on the CPU with its clock: what is computed, checked and recorded.

Only the timer differs from a run on a GPU: candidates, geometry, truths and records are the same code.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitkern.benchmarks import conv, copy, layers, pool
from splitkern.benchmarks import record as record_module
from splitkern.benchmarks.copy import COPY_CASES
from splitkern.benchmarks.gpu_timing import Ceilings, HostTimer, Sample, measure, measure_ceilings
from splitkern.benchmarks.layers import Cell, ConvLayer, PoolLayer
from splitkern.benchmarks.record import Record, RecordError
from splitkern.benchmarks.report import geometric_mean, markdown, report
from splitkern.benchmarks.rows import Check, DeviceLost, Setting, relative_error, run_rows
from splitkern.cli import bench_kernels, explain, main
from splitkern.cli.common import table
from tests.kernel_checks.comparisons import without_onednn

CONV = (
    ConvLayer("net.first", 3, 4, 12, kernel=7, stride=2, padding=3, count=1, inside=True),
    ConvLayer("net.body", 4, 6, 12, kernel=3, stride=1, padding=1, count=2, inside=True),
    ConvLayer("net.strided", 4, 6, 11, kernel=3, stride=2, padding=1, count=1, inside=True),
    ConvLayer("net.projection", 8, 16, 12, kernel=1, stride=2, padding=0, count=1, inside=True),
    ConvLayer("net.tail", 4, 6, 6, kernel=3, stride=1, padding=1, count=1, inside=False),
)
POOL = (
    PoolLayer("max2", "max", 3, 8, 2, 2),
    PoolLayer("max3", "max", 3, 10, 3, 2, 1),
    PoolLayer("avg2", "avg", 3, 8, 2, 2),
    PoolLayer("avg3", "avg", 3, 10, 3, 2, 1),
    PoolLayer("norm", "batch_norm", 3, 8),
    PoolLayer("norm relu", "batch_norm_relu", 3, 8),
)
CEILINGS = Ceilings(matmul_tflops=0.1, copy_gbps=10.0, to_device_gbps=None, from_device_gbps=None)


def setting(dtype: torch.dtype = torch.float32, **options: Any) -> Setting:
    return Setting(HostTimer(), CEILINGS, dtype, 0.5, **options)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands measure on the CPU, tiny layers."""
    monkeypatch.setattr(bench_kernels, "make_timer", HostTimer)
    sizes = {"link": False, "side": 16, "copy_bytes": 1024}
    monkeypatch.setattr(bench_kernels, "ceilings_options", lambda benchmark: sizes)
    monkeypatch.setattr(bench_kernels, "make_explain", lambda dtype: lambda cell: {"path": f"some {dtype} path"})
    monkeypatch.setattr(layers, "CONV_LAYERS", CONV)
    monkeypatch.setattr(layers, "POOL_LAYERS", POOL)


def conv_cells() -> list[Cell]:
    return [
        Cell(layer, direction, grid, 2)
        for layer in CONV
        for grid in ((1, 1), (2, 2), (3, 2), (4, 4))
        for direction in layers.CONV_PASSES
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_conv_row_is_right(dtype: torch.dtype) -> None:
    rows: dict[str, dict[str, Any]] = {}
    record = Record({"benchmark": "conv"})
    with without_onednn():
        assert run_rows(record, conv.conv_tasks(setting(dtype), conv_cells()), HostTimer())
    rows = record.rows
    assert len(rows) == 5 * 4 * 3
    for key, row in rows.items():
        assert row["status"] == "ok", f"{key}: {row.get('message')}"
        loop = ["loop"] if row["grid"] == [4, 4] else []
        assert list(row["candidates"]) == ["layer", "patch", "cudnn", *loop]
        for name in ("layer", "patch"):
            assert 0 <= row["candidates"][name]["error"] <= row["candidates"][name]["limit"] < 0.05
        assert ("loop_over_layer" in row) == bool(loop)
        milliseconds = {name: candidate["ms"]["median"] for name, candidate in row["candidates"].items()}
        assert row["cudnn_over_layer"] == pytest.approx(milliseconds["cudnn"] / milliseconds["layer"])
        assert row["tflops"] == pytest.approx(row["flop"] / milliseconds["layer"] / 1e9)
        assert row["matmul_share"] == pytest.approx(row["tflops"] / 0.1)
        assert row["bound"] == ("matmul" if row["flop"] / row["bytes"] >= 0.1 * 1e3 / 10 else "copy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pool_row_is_right(dtype: torch.dtype) -> None:
    cells = [
        Cell(layer, direction, grid, 2)
        for layer in POOL
        for grid in ((1, 1), (2, 2), (3, 2))
        for direction in layers.POOL_PASSES
    ]
    record = Record({"benchmark": "pool"})
    assert run_rows(record, pool.pool_tasks(setting(dtype), cells), HostTimer())
    assert len(record.rows) == 6 * 3 * 2
    for key, row in record.rows.items():
        assert row["status"] == "ok", f"{key}: {row.get('message')}"
        assert list(row["candidates"]) == ["layer", "patch", "torch"]
        if "max" in key and row["pass"] == "forward":
            assert row["candidates"]["layer"]["error"] == 0
        assert row["torch_over_layer"] > 0


def test_every_copy_row_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "COPY_CASES", tuple(replace(case, batch=2, channels=8, size=13) for case in COPY_CASES))
    record = Record({"benchmark": "copy"})
    assert run_rows(record, copy.copy_tasks(setting(torch.bfloat16), copy.copy_cases()), HostTimer())
    assert len(record.rows) == 2 * len(COPY_CASES)
    for key, row in record.rows.items():
        assert row["status"] == "ok", f"{key}: {row.get('message')}"
        ways = ["ours"] if "compressed" in key else ["ours", "engine", "kernel"]
        assert list(row["candidates"]) == [*ways, "torch"]  # cudaMemcpy2DAsync needs a device
        assert row["torch_over_ours"] > 0
        assert row["gbps"] > 0


def test_bytes_that_come_back_wrong_are_recorded_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_same_bits", lambda first, second: False)
    record = Record({"benchmark": "copy"})
    case = replace(COPY_CASES[0], batch=1, channels=2, size=4)
    run_rows(record, copy.copy_tasks(setting(), [case]), HostTimer())
    assert [row["status"] for row in record.rows.values()] == ["wrong", "wrong"]


def test_a_wrong_kernel_is_recorded_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = conv._layer_call

    def off_by_one_row(problem: conv.Problem, output: torch.Tensor) -> Any:
        call = real(problem, output)

        def run() -> None:
            call()
            output[:, :, -1] = 0

        return run

    monkeypatch.setattr(conv, "_layer_call", off_by_one_row)
    record = Record({"benchmark": "conv"})
    run_rows(record, conv.conv_tasks(setting(), [Cell(CONV[1], "forward", (2, 2), 2)]), HostTimer())
    (row,) = record.rows.values()
    assert row["status"] == "wrong"
    assert "layer: error" in row["message"]
    assert "patch" not in row["message"]


def test_what_is_not_written_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are poisoned with NaN: a kernel that does nothing has an infinite error."""
    monkeypatch.setattr(conv, "_layer_call", lambda problem, output: lambda: None)
    record = Record({"benchmark": "conv"})
    run_rows(record, conv.conv_tasks(setting(), [Cell(CONV[1], "forward", (2, 2), 2)]), HostTimer())
    (row,) = record.rows.values()
    assert row["status"] == "wrong"
    assert row["candidates"]["layer"]["error"] is None
    json.dumps(row, allow_nan=False)


def test_relative_error_of_what_is_not_finite() -> None:
    truth = torch.ones(4)
    for bad in (torch.nan, torch.inf):
        actual = torch.tensor([1.0, 1.0, bad, 1.0])
        assert not Check(relative_error(actual, truth), 1e9).passed
    assert relative_error(truth * 1.5, truth) == 0.5


class ScriptedTimer(HostTimer):
    """Says that the host is late until the spin is long enough, and logs which call is timed."""

    def __init__(self, late_below_us: float) -> None:
        super().__init__()
        self.late_below_us = late_below_us
        self.spins: list[float] = []

    def sample(self, call: Any, host_us: float) -> Sample:
        call()
        self.spins.append(host_us)
        return Sample(1.0, late=host_us < self.late_below_us)


def test_candidates_take_turns() -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    timings = measure(HostTimer(), calls, budget_ms=1e-9)
    assert "".join(log) == "aabbcc" + "abc" + "bca" + "cab"
    assert {timing.samples for timing in timings.values()} == {3}


def test_samples_with_a_late_host_are_taken_again() -> None:
    timer = ScriptedTimer(late_below_us=1000.0)
    (timing,) = measure(timer, {"call": lambda: None}, budget_ms=1e-9).values()
    assert timing.samples == 3
    assert not timing.gaps
    assert timer.spins[-1] >= 1000.0
    always = ScriptedTimer(late_below_us=float("inf"))
    (timing,) = measure(always, {"call": lambda: None}, budget_ms=1e-9).values()
    assert timing.gaps
    assert timing.samples == 3


def test_ceilings() -> None:
    found = measure_ceilings(HostTimer(), torch.float32, link=True, side=32, copy_bytes=4096, link_bytes=1024)
    assert found.matmul_tflops > 0
    assert found.copy_gbps > 0
    assert found.to_device_gbps is not None and found.to_device_gbps > 0
    assert found.flop_per_byte == pytest.approx(found.matmul_tflops * 1e3 / found.copy_gbps)


# --- the record -----------------------------------------------------------------------------------


def test_a_run_resumes_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    header = {"benchmark": "conv", "options": {}, "commit": "c", "machine": {}}
    ran: list[str] = []

    def task(name: str) -> Any:
        def run() -> dict[str, Any]:
            if name == "hangs":
                raise KeyboardInterrupt  # what a kill leaves behind: a row that has begun
            ran.append(name)
            return {"status": "ok", "candidates": {}}

        return name, {"layer": name}, run

    names = ["one", "hangs", "two"]
    record = Record(header, path)
    with pytest.raises(KeyboardInterrupt):
        run_rows(record, map(task, names), HostTimer())
    assert json.loads(path.read_text())["rows"]["hangs"]["status"] == "started"
    assert run_rows(Record(header, path, resume=True), map(task, names), HostTimer())
    rows = json.loads(path.read_text())["rows"]
    assert ran == ["one", "two"]
    assert [row["status"] for row in rows.values()] == ["ok", "lost", "ok"]


def test_a_run_with_other_options_is_not_resumed(tmp_path: Path) -> None:
    """The text lists what differs, and nothing that is the same but for a tuple that JSON holds as a list."""
    path = tmp_path / "record.json"
    header = {"benchmark": "conv", "options": {"grid": (2, 2), "batch": 8}, "commit": "c", "machine": {}}
    Record(header, path).put("row", {"status": "ok"})
    Record(header, path, resume=True)
    with pytest.raises(RecordError, match=r"resumed: options was \{'batch': 8\}, is \{'batch': 4\}$"):
        Record({**header, "options": {"grid": (2, 2), "batch": 4}}, path, resume=True)
    with pytest.raises(RecordError, match="commit was c, is d"):
        Record({**header, "commit": "d"}, path, resume=True)
    path.write_text("{}")
    with pytest.raises(RecordError, match="not a record"):
        Record(header, path, resume=True)
    assert list(tmp_path.iterdir()) == [path]


def test_no_row_begins_after_the_time() -> None:
    record = Record({"benchmark": "conv"})
    task = ("row", {}, lambda: {"status": "ok"})
    assert not run_rows(record, [task], HostTimer(), seconds=-1)
    assert not record.rows


def test_a_failing_row_is_recorded_and_the_next_one_runs() -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of\nmemory")

    record = Record({"benchmark": "conv"})
    tasks = [("fails", {"layer": "x"}, fails), ("runs", {}, lambda: {"status": "ok"})]
    assert run_rows(record, tasks, HostTimer())
    assert record.rows["fails"]["status"] == "error"
    assert record.rows["fails"]["message"] == "RuntimeError: out of memory"
    assert record.rows["runs"]["status"] == "ok"


def test_a_lost_device_ends_the_run() -> None:
    class Lost(HostTimer):
        def synchronize(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    def fails() -> dict[str, Any]:
        raise RuntimeError("launch failed")

    record = Record({"benchmark": "conv"})
    with pytest.raises(DeviceLost, match="illegal memory access"):
        run_rows(record, [("fails", {}, fails), ("never", {}, fails)], Lost())
    assert list(record.rows) == ["fails"]


HANGS = """
import sys, time
from pathlib import Path
from splitkern.benchmarks.gpu_timing import HostTimer
from splitkern.benchmarks.record import Record
from splitkern.benchmarks.rows import run_rows

header = {"benchmark": "conv", "options": {}, "commit": "c", "machine": {}}
record = Record(header, Path(sys.argv[1]), resume=True)
tasks = [("hangs", {}, lambda: time.sleep(600)), ("runs", {}, lambda: {"status": "ok"})]
run_rows(record, tasks, HostTimer(), row_seconds=0.5)
"""


def test_a_row_that_hangs_ends_the_process_and_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    command = [sys.executable, "-c", HANGS, str(path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert "Timeout" in process.stderr
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    assert [row["status"] for row in json.loads(path.read_text())["rows"].values()] == ["lost", "ok"]


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "pool", "copy"])
def test_without_a_gpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", name, "--save", str(tmp_path / "out.json")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_conv_command(on_the_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conv.json"
    command = ["bench", "conv", "--batch", "2", "--budget-ms", "0.1", "--save", str(path), "--commit", "abc"]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record == json.loads(path.read_text())
    assert record["commit"] == "abc"
    assert record["options"]["dtype"] == "bf16"
    assert record["ceilings"]["matmul_tflops"] > 0
    assert len(record["rows"]) == 2 * (3 * 4 - 1)  # without the tail and the images' gradient
    assert "[22/22] net.projection weight_grad 4x4 batch 2: ok" in captured.err

    # Everything is there: resuming measures nothing, and prints the same.
    before = path.read_bytes()
    assert main([*command, "--resume"]) == 0
    captured = capsys.readouterr()
    assert path.read_bytes() == before
    assert captured.err == ""
    for part in (
        "net.first",
        "3->4 7x7 stride 2 at 12",
        "cuDNN / one launch",
        "worst row",
        "some bf16 path",
        "commit abc",
    ):
        assert part in captured.out
    assert main(["bench", "report", str(path)]) == 0
    assert capsys.readouterr().out == captured.out
    assert main(["bench", "report", str(path), "--markdown", "--summary"]) == 0
    text = capsys.readouterr().out
    assert "| geometric mean | grid | batch | rows |" in text
    assert "net.first |" not in text.replace("net.first 0", "")


def test_out_of_time(on_the_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conv.json"
    assert main(["bench", "conv", "--batch", "2", "--seconds", "1e-9", "--save", str(path)]) == 4
    assert "out of time after" in capsys.readouterr().err


def test_choices_of_the_command(on_the_cpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "net.b*", "--passes", "forward", "--grids", "3x2", "--batch", "1"]
    assert main(["bench", "conv", *options, "--candidates", "layer,loop", "--dtype", "fp32", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"].values()
    assert list(row["candidates"]) == ["layer", "loop"]
    assert row["grid"] == [3, 2]


@pytest.mark.skipif(not explain.conv_paths(), reason="the library was built without the CUDA kernels")
def test_the_path_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "device_for", lambda name: explain.ARCHITECTURES["sm_90"])
    cell = Cell(ConvLayer("double", 3, 4, 8, 3, 1, 1, count=1, inside=True), "forward", (2, 2), 1)
    found = bench_kernels.make_explain("bf16")(cell)
    assert found["path"] in explain.conv_paths()
    assert found["reason"]


def test_pool_command(on_the_cpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pool", "--batch", "2", "--grids", "2x2", "--budget-ms", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "PyTorch / one launch" in text
    assert "max 3x3 stride 2, 3 at 10" in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["conv", "--resume"], "--resume needs --save FILE"),
        (["conv", "--layers", "x*"], "no layer matches 'x*'"),
        (["conv", "--passes", "sideways"], "must be some of forward, input_grad, weight_grad, got 'sideways'"),
        (["pool", "--grids", "2"], "must be ROWSxCOLUMNS"),
        (["copy", "--layers", "x*"], "no copy matches 'x*'"),
        (["report", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (["report", __file__], "must be a file of splitkern bench conv, pool, copy or training"),
    ],
)
def test_errors_are_one_line(
    on_the_cpu: None, command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *command]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


# --- the report -----------------------------------------------------------------------------------


def synthetic_row(layer: str, ratio: float, status: str = "ok") -> dict[str, Any]:
    timing = {"ms": {"lower": 0.9, "median": 1.0, "upper": 1.1}, "samples": 3, "host_us": 5.0, "gaps": False}
    row = {"layer": layer, "shape": "s", "pass": "forward", "grid": [2, 2], "batch": 32, "status": status}
    return {**row, "candidates": {"layer": timing}, "cudnn_over_layer": ratio}


def test_means_leave_out_what_is_wrong_and_say_so() -> None:
    # A share counts where it is that of the ceiling which bounds the layer.
    rows = {
        "a": {**synthetic_row("a", 4.0), "bound": "matmul", "matmul_share": 0.5, "copy_share": 0.1},
        "b": {**synthetic_row("b", 1.0), "bound": "copy", "matmul_share": 0.2, "copy_share": 0.8},
        "c": {**synthetic_row("c", 100.0, "wrong"), "message": "layer: error 1 over 0.01"},
    }
    machine = {"device": "GPU", "torch": "2.11", "cudnn": 1}
    record = {"benchmark": "conv", "machine": machine, "commit": "abc", "ceilings": vars(CEILINGS), "rows": rows}
    text = report(record, table, summary=True)
    mean = next(line for line in text.splitlines() if line.startswith("forward"))
    assert mean.split() == ["forward", "2x2", "32", "2", "2.00", "50%", "80%", "b", "1.00", "1"]
    assert "  c: wrong: layer: error 1 over 0.01" in text
    assert "1.0000 ±10%" not in text
    assert "1 ±10%" in report(record, table)
    assert "| forward | 2x2 | 32 | 2 | 2.00 | 50% | 80% | b 1.00 | 1 |" in report(record, markdown, summary=True)


def test_a_record_without_rows() -> None:
    machine = {"device": "GPU", "torch": "2.11"}
    record = {"benchmark": "conv", "machine": machine, "commit": None, "ceilings": None, "rows": {}}
    assert "no row has been measured" in report(record, table)


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "change", [{"grid": [1]}, {"candidates": []}, {"cudnn_over_layer": 0.0}, {"cudnn_over_layer": "fast"}]
)
def test_a_damaged_row_is_one_line(change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conv.json"
    good = {"layer": "b", "shape": "s", "pass": "forward", "grid": [2, 2], "batch": 32, "status": "ok"}
    record = {"benchmark": "conv", "machine": {"device": "d", "torch": "t"}, "commit": None, "rows": {"b": good}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    assert main(["bench", "report", str(path)]) == 0
    record["rows"] = {"b": good | change}
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["bench", "report", str(path)]) == 2
    captured = capsys.readouterr()
    assert "must be a file of splitkern bench" in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_full_disk_prints_what_was_measured(
    on_the_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []

    def replace_once(source: Path, target: Path) -> None:
        written.append(target)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_module.os, "replace", replace_once)
    command = ["bench", "pool", "--batch", "2", "--grids", "2x2", "--budget-ms", "0.1"]
    assert main([*command, "--save", str(tmp_path / "pool.json")]) == 2
    captured = capsys.readouterr()
    assert "max 2x2" in captured.out and "pool.json cannot be written: No space left" in captured.err
    assert main([*command, "--save", str(tmp_path)]) == 2
    assert f"--save {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err
