"""The command itself: help, versions, wrong arguments, missing packages, interruption."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

import splitkern
from splitkern.cli import main
from splitkern.cli.common import UserError, grid, integer, mib, number, require, table


def test_python_m_splitkern() -> None:
    process = subprocess.run([sys.executable, "-m", "splitkern", "--version"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"splitkern {splitkern.__version__}\n"


@pytest.mark.parametrize("command", [[], ["--help"]])
def test_help_names_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    text = capsys.readouterr().out
    for name in ("train", "doctor", "bench"):
        assert name in text


@pytest.mark.parametrize("command", [["train"], ["doctor"], ["bench"], ["bench", "live"], ["bench", "step"]])
def test_help_of_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: splitkern {' '.join(command)}")


def test_help_imports_no_heavy_package() -> None:
    code = "import sys; from splitkern.cli import main; main(['train', '--help']); " + (
        "print([name for name in ('torchvision', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == "[]", process.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--grid", "2"], "argument --grid: must be ROWSxCOLUMNS, both at least 1, such as 2x2; got '2'"),
        (["train", "--grid", "0x2"], "got '0x2'"),
        (["train", "--grid", "2x-2"], "got '2x-2'"),
        (["train", "--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["train", "--batch", "many"], "argument --batch: must be a whole number of at least 1, got 'many'"),
        (["train", "--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        (["train", "--lr", "inf"], "argument --lr: must be a number above 0, got 'inf'"),
        (["train", "--wiggle", "0.5"], "argument --wiggle: must be a number at least 0 and below 0.5, got '0.5'"),
        (["train", "--depth", "0"], "argument --depth: must be a number above 0 and at most 1, got '0'"),
        (["train", "--until", "layer1", "--depth", "0.5"], "not allowed with argument"),
        (["train", "--model", "alexnet"], "invalid choice: 'alexnet'"),
        (["train", "--image-size", "4"], "at least 8, got '4'"),
        (["bench"], "required: BENCHMARK"),
    ],
)
def test_wrong_arguments(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for command in (["train"], ["bench", "live"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "needs torchvision" in error
        assert "pip install 'splitkern[demo]'" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "splitkern", "--version"], stdout=full, stderr=PIPE, text=True, env=environment
        )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("splitkern: error: ")
    assert line.endswith("No space left on device")


def test_output_that_nobody_reads() -> None:
    command = [sys.executable, "-m", "splitkern", "train", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait() == 1


def test_require_passes_over_what_is_there() -> None:
    require("json", "torch")
    with pytest.raises(UserError, match="needs splitkern_no_such_package"):
        require("splitkern_no_such_package")


def test_argument_types() -> None:
    assert grid("5X3") == (5, 3)
    assert integer(0)("0") == 0
    assert number(above=0, at_most=1)("1") == 1.0


def test_table_and_units() -> None:
    assert mib(3 * 2**19) == "1.5 MiB"
    assert table(["", "a"], [["x", "1.0"], ["long", "10.0"]]).splitlines() == [
        "         a",
        "----  ----",
        "x      1.0",
        "long  10.0",
    ]
