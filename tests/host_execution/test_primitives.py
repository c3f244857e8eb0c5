"""The host implementation of the primitives, by small kernels of its own (the C++ files in ``kernels``)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_execution.conftest import ROOT

KERNELS = ROOT / "tests" / "host_execution" / "kernels"


def names(folder: Path) -> list[str]:
    """The checks in a folder, read from the sources: collecting tests must not compile."""
    sources = [path.read_text() for path in sorted(folder.glob("*.cpp"))]
    marks = re.findall(r'CHECK_NAMED\(\w+,\s*"([^"]*)"\)', "".join(sources))
    assert marks and len(set(marks)) == len(marks)
    return marks


@pytest.fixture(scope="session")
def checks(build_target: Callable[[str], Path]) -> Path:
    return build_target("primitive_checks")


def test_the_program_has_every_check(checks: Path) -> None:
    done = subprocess.run([checks], stdout=subprocess.PIPE, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(names(KERNELS))


@pytest.mark.parametrize("name", names(KERNELS))
def test_primitive(checks: Path, name: str) -> None:
    done = subprocess.run([checks, name], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
