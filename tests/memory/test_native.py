"""The memory library, by its own C++ checks (``native``): built alone, without torch and Python, under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_execution.conftest import ROOT, find_tool, run

CHECKS = ROOT / "tests" / "memory" / "native"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
# What has threads of its own runs under ThreadSanitizer too; the rest would only be slow there.
THREADED = ("pool", "pipeline")


def names() -> list[str]:
    """The checks, read from the sources: collecting tests must not compile."""
    sources = [path.read_text() for path in sorted(CHECKS.glob("*.cpp"))]
    marks = re.findall(r'CHECK_NAMED\(\s*\w+,\s*"([^"]*)"\)', "".join(sources))
    assert marks and len(set(marks)) == len(marks)
    return marks


@pytest.fixture(scope="session")
def program() -> Callable[[str], Path]:
    """Builds the checks, once per kind of build and session; incremental."""
    built: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind in built:
            return built[kind]
        if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
            pytest.skip("no C++ compiler")
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        assert cmake is not None and ninja is not None, "the build needs cmake and ninja: pip install cmake ninja"
        folder = ROOT / "build" / f"memory-{kind}"
        run(
            cmake,
            *("-S", str(ROOT / "csrc" / "memory"), "-B", str(folder), "-G", "Ninja"),
            *(f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DSPLITKERN_MEMORY_CHECKS=ON"),
            f"-DSPLITKERN_MEMORY_SANITIZER={SANITIZERS[kind]}",
        )
        run(cmake, "--build", str(folder), "--target", "memory_checks", "--parallel", "2")
        built[kind] = folder / "memory_checks"
        return built[kind]

    return build


@pytest.mark.parametrize("kind", list(SANITIZERS))
def test_the_program_has_every_check(program: Callable[[str], Path], kind: str) -> None:
    done = subprocess.run([program(kind)], stdout=subprocess.PIPE, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(names())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("kind", list(SANITIZERS))
def test_memory(program: Callable[[str], Path], kind: str, name: str) -> None:
    if kind == "thread" and not name.startswith(THREADED):
        pytest.skip("has no threads")
    # Leaks count as errors with the address sanitizer; an error of any sanitizer ends the program with a status.
    done = subprocess.run([program(kind), name], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
