"""`scripts/gpu_evidence.py` without a GPU: steps, limits, resuming, what is read from logs; and what the steps run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from splitkern.cli import main as splitkern
from tests.ops_cuda import lost_device, sanitizer_subset

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_evidence", ROOT / "scripts" / "gpu_evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_evidence = load_script()
HEADER = {"benchmark": "evidence", "device": "Test GPU", "commit": "abc", "machine": {"device": "Test GPU"}}


def step(name: str, code: str, limit_s: float = 60, **options: Any) -> Any:
    return gpu_evidence.Step(name, [sys.executable, "-c", textwrap.dedent(code)], limit_s, **options)


def run(path: Path, steps: list[Any], *, resume: bool = False, seconds: float = 600) -> tuple[bool, dict[str, Any]]:
    evidence = gpu_evidence.Evidence(path, HEADER, resume=resume)
    passed = evidence.run(steps, seconds=seconds, tell=lambda text: None)
    return passed, json.loads(path.read_text())["steps"]


# A benchmark that measures three rows; the second takes the process with it the first time.
BENCH = """
    import json, os, sys
    path = sys.argv[sys.argv.index("--save") + 1]
    assert "--resume" in sys.argv and sys.argv[sys.argv.index("--commit") + 1] == "abc"
    try:
        record = json.load(open(path))
    except FileNotFoundError:
        record = {"benchmark": "conv", "rows": {}}
    for row in record["rows"].values():
        if row["status"] == "started":
            row["status"] = "lost"
    for name in ("one", "two", "three"):
        if name in record["rows"]:
            continue
        record["rows"][name] = {"status": "started"}
        json.dump(record, open(path, "w"))
        if name == "two":
            os._exit(1)
        record["rows"][name] = {"status": "ok"}
        json.dump(record, open(path, "w"))
"""


def test_outcomes(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    steps = [
        step("passes", "print('fine')", read=lambda log: {"said": log.strip()}),
        step("fails", "print('why'); raise SystemExit(7)"),
        step("hangs", "import time; print('before', flush=True); time.sleep(600)", 1.5),
        gpu_evidence.Step("missing", [], 0, missing="no such program"),
    ]
    passed, found = run(path, steps)
    assert not passed
    assert found["passes"]["outcome"] == "passed"
    assert found["passes"]["said"] == "fine"
    assert (found["fails"]["outcome"], found["fails"]["exit_code"]) == ("failed", 7)
    assert found["fails"]["log_tail"] == ["why"]
    assert found["hangs"]["outcome"] == "timed out"
    assert found["hangs"]["log_tail"] == ["before"]
    assert found["hangs"]["seconds"] < 30
    assert found["missing"] == {"outcome": "unavailable", "message": "no such program"}


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(pid_file)!r}, "w").write(str(child.pid))
        time.sleep(600)
    """
    run(tmp_path / "evidence.json", [step("hangs", code, 10)])
    status = Path(f"/proc/{pid_file.read_text()}/status")

    def gone() -> bool:
        try:
            return "zombie" in status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    # A signal is on its way when kill returns: on a busy machine the process may still be seen running.
    deadline = time.monotonic() + 60
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone()


def test_resume_repeats_only_what_has_not_passed(tmp_path: Path) -> None:
    path, runs = tmp_path / "evidence.json", tmp_path / "runs"
    count = f"open({str(runs)!r}, 'a').write('x')"
    run(path, [step("passes", count), step("fails", "raise SystemExit(1)")])
    passed, found = run(path, [step("passes", count), step("fails", count)], resume=True)
    assert passed
    assert runs.read_text() == "xx"
    assert [entry["outcome"] for entry in found.values()] == ["passed", "passed"]
    with pytest.raises(gpu_evidence.UserError, match="begun with another commit"):
        gpu_evidence.Evidence(path, {**HEADER, "commit": "def"}, resume=True)


def test_nothing_begins_without_time(tmp_path: Path) -> None:
    passed, found = run(tmp_path / "evidence.json", [step("never", "raise SystemExit('ran')")], seconds=1)
    assert not passed
    assert found["never"] == {"outcome": "not run", "message": "no time was left"}


def test_a_benchmark_goes_on_in_a_new_process(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    passed, found = run(path, [step("conv", BENCH, record=True)])
    assert not passed
    assert found["conv"]["record"]["rows"] == {
        "one": {"status": "ok"}, "two": {"status": "lost"}, "three": {"status": "ok"},
    }  # fmt: skip
    assert found["conv"]["counts"] == {"ok": 2, "lost": 1}
    assert (found["conv"]["outcome"], found["conv"]["exit_code"]) == ("failed", 0)


def test_a_benchmark_resumes_from_the_evidence(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    begun = {"outcome": "running", "record": {"benchmark": "conv", "rows": {"one": {"status": "ok", "kept": 1}}}}
    path.write_text(json.dumps({**HEADER, "steps": {"conv": begun}}))
    _, found = run(path, [step("conv", BENCH.replace('== "two"', '== "none"'), record=True)], resume=True)
    rows = found["conv"]["record"]["rows"]
    assert rows["one"] == {"status": "ok", "kept": 1}
    assert list(rows) == ["one", "two", "three"]
    assert found["conv"]["outcome"] == "passed"


def test_rows_arrive_while_a_benchmark_runs(tmp_path: Path) -> None:
    """A run that is cut off keeps the rows that were measured."""
    path = tmp_path / "evidence.json"
    hangs = BENCH.replace("os._exit(1)", "__import__('time').sleep(600)")
    passed, found = run(path, [step("conv", hangs, 4, record=True)])
    assert not passed
    assert found["conv"]["outcome"] == "timed out"
    assert found["conv"]["record"]["rows"] == {"one": {"status": "ok"}, "two": {"status": "started"}}


def test_reading_pytest() -> None:
    log = """
[gw1] [ 10%] PASSED tests/ops_cuda/test_cuda_ops.py::test_conv2d[torch.float32-uneven 2x2]
[gw0] [ 20%] FAILED tests/ops_cuda/test_cuda_ops.py::test_conv2d[torch.float32-groups]
tests/ops_cuda/test_copy.py::test_streams PASSED                   [ 33%]
tests/ops_cuda/test_copy.py::test_more SKIPPED (needs two GPUs)    [ 66%]
DEVICE LOST tests/ops_cuda/test_copy.py::test_x - an illegal memory access was encountered
FAILED tests/ops_cuda/test_cuda_ops.py::test_conv2d[torch.float32-groups] - AssertionError: off
"""
    found = gpu_evidence.read_tests(log)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert [line.split()[0] for line in found["failures"]] == ["DEVICE", "FAILED"]


def test_reading_this_pytest(tmp_path: Path) -> None:
    """The format is the installed pytest's, whichever that is."""
    (tmp_path / "tests").mkdir()
    source = "import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_it(x): assert x == 'c'\n"
    (tmp_path / "tests" / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", "tests"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    found = gpu_evidence.read_tests(log)
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert len(found["failures"]) == 1


def test_reading_the_sanitizer_and_doctor() -> None:
    log = "========= COMPUTE-SANITIZER\n68 calls on cuda, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_evidence.read_sanitizer(log) == {"summary": ["ERROR SUMMARY: 0 errors"]}
    assert gpu_evidence.read_doctor('a warning\n{"usable": true}\n') == {"findings": {"usable": True}}


def test_choice_and_limits_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = gpu_evidence.make_steps(gpu_evidence.parse(["--jobs", "1", "--budget-ms", "20"]))
    assert [s.name for s in gpu_evidence.select(steps, "tests,bench,memcheck")] == [
        "tests", "conv", "pool", "copy", "training-vgg19", "training-resnet50", "memcheck",
    ]  # fmt: skip
    monkeypatch.setattr(gpu_evidence, "LIBRARIES", {"one": "__init__.py"})
    assert next(s.name for s in gpu_evidence.select(steps, None)) == "doctor"
    monkeypatch.setattr(gpu_evidence, "LIBRARIES", {"one": "__init__.py", "other": "nowhere.so"})
    steps = gpu_evidence.make_steps(gpu_evidence.parse(["--jobs", "1"]))
    assert next(s.name for s in gpu_evidence.select(steps, None)) == "build"
    assert steps[0].environment == {"SPLITKERN_ONLY": "other"}
    gpu_evidence.set_limits(steps, "conv=77")
    assert next(s for s in steps if s.name == "conv").limit_s == 77
    for bad in ("conv", "nothing=3"):
        with pytest.raises(gpu_evidence.UserError, match=r"--limits must be STEP=SECONDS"):
            gpu_evidence.set_limits(steps, bad)
    with pytest.raises(gpu_evidence.UserError, match="got 'everything'"):
        gpu_evidence.select(steps, "everything")


@pytest.mark.torchvision  # the networks that `bench training` trains
@pytest.mark.parametrize("options", [[], ["--full", "--budget-ms", "20"]], ids=["core", "full"])
def test_the_steps_are_commands_that_splitkern_has(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benches = [s for s in gpu_evidence.make_steps(gpu_evidence.parse(options)) if s.record]
    assert [s.name for s in benches] == ["conv", "pool", "copy", "training-vgg19", "training-resnet50"]
    for bench in benches:
        assert bench.command[1:3] == ["-m", "splitkern"]
        arguments = ["--save", "/nowhere/x.json", "--resume", "--seconds", "9", "--commit", "abc"]
        assert splitkern([*bench.command[3:], *arguments]) == 2
        assert "torch finds no GPU" in capsys.readouterr().err  # and not: unrecognized arguments


def test_evidence_path(tmp_path: Path) -> None:
    new = gpu_evidence.evidence_path(tmp_path, "NVIDIA H200", "abc", resume=True)
    assert new.name.startswith("nvidia-h200-20")
    older, newer = tmp_path / "nvidia-h200-2026-01-01.json", tmp_path / "nvidia-h200-2026-01-02.json"
    older.write_text(json.dumps({"commit": "abc"}))
    newer.write_text(json.dumps({"commit": "def"}))
    assert gpu_evidence.evidence_path(tmp_path, "NVIDIA H200", "abc", resume=True) == older
    assert gpu_evidence.evidence_path(tmp_path, "NVIDIA H200", "abc", resume=False) == new


def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / "gpu_evidence.py"), "--out", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 2
    assert "needs a GPU that torch sees: torch finds no GPU; nothing was written" in process.stderr
    assert not list(tmp_path.iterdir())


def test_the_whole_chain_with_a_faked_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command to the report: only the probe and the steps' programs are replaced."""
    monkeypatch.setattr(gpu_evidence, "probe", lambda: {"device": "Test GPU"})
    record = """
        import json, sys
        machine = {"device": "Test GPU", "torch": "2.11", "cudnn": 9}
        timing = {"ms": {"lower": 0.9, "median": 1.0, "upper": 1.1}, "samples": 3, "host_us": 5.0, "gaps": False}
        row = {"layer": "net.body", "shape": "s", "pass": "forward", "grid": [2, 2], "batch": 32, "status": "ok",
               "candidates": {"layer": timing}, "cudnn_over_layer": 1.25, "bound": "matmul", "matmul_share": 0.5}
        record = {"benchmark": "conv", "machine": machine, "commit": "abc", "ceilings": None, "rows": {"key": row}}
        json.dump(record, open(sys.argv[sys.argv.index("--save") + 1], "w"))
    """
    steps = [step("doctor", "print('{}')", read=gpu_evidence.read_doctor), step("conv", record, record=True)]
    monkeypatch.setattr(gpu_evidence, "make_steps", lambda options: steps)
    log = tmp_path / "log.txt"
    arguments = ["--out", str(tmp_path / "results"), "--commit", "abc", "--log", str(log)]
    assert gpu_evidence.main(arguments) == 0
    (path,) = (tmp_path / "results").iterdir()
    data = json.loads(path.read_text())
    assert (data["device"], data["commit"], data["dirty"]) == ("Test GPU", "abc", False)
    assert "==> doctor: passed" in log.read_text()
    capsys.readouterr()
    assert splitkern(["bench", "report", str(path), "--markdown"]) == 0
    assert "| forward | 2x2 | 32 | 1 | 1.25 | 50% | net.body 1.25 |" in capsys.readouterr().out


def test_the_sanitizer_subset_is_right_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizer_subset.main("cpu") == 0
    assert "0 wrong" in capsys.readouterr().out


def test_the_sanitizer_subset_sees_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitizer_subset, "_error", lambda actual, expected: float("nan"))
    assert sanitizer_subset.main("cpu") == 1
    assert "WRONG patch_conv2d" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_ends_when_its_device_is_lost(
    lost: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    ended: list[int] = []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(lost_device, "_is_lost", lambda: lost)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(os, "write", lambda descriptor, text: len(text))

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    call = pytest.CallInfo.from_call(fail, "call")
    hook = lost_device.pytest_runtest_makereport(request.node, call)
    next(hook)
    report = pytest.TestReport.from_item_and_call(request.node, call)
    with pytest.raises(StopIteration) as result:
        hook.send(report)
    assert result.value.value is report
    assert ended == ([13] if lost else [])
