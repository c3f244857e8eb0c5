"""The host implementation of the primitives, by small kernels of its own (the C++ files in ``kernels``)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_execution.conftest import ROOT

SOURCES = sorted((ROOT / "tests" / "host_execution" / "kernels").glob("*.cpp"))


def names() -> list[str]:
    """The checks, read from the sources: collecting tests must not compile."""
    marks = [
        line.split('"')[1] for source in SOURCES for line in source.read_text().splitlines() if "CHECK_NAMED(" in line
    ]
    assert marks and len(set(marks)) == len(marks)
    return marks


@pytest.fixture(scope="session")
def checks(build_target: Callable[[str], Path]) -> Path:
    return build_target("primitive_checks")


def test_the_program_has_every_check(checks: Path) -> None:
    done = subprocess.run([checks], stdout=subprocess.PIPE, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(names())


@pytest.mark.parametrize("name", names())
def test_primitive(checks: Path, name: str) -> None:
    done = subprocess.run([checks, name], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
