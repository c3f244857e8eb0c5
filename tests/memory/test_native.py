"""The memory library, by its own C++ checks (``native``): built alone, without torch and Python, under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_execution.conftest import ROOT, find_tool, locked, run

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
def program() -> Callable[..., Path]:
    """Builds a program of the checks with a sanitizer, once per session; incremental."""
    built: dict[tuple[str, str], Path] = {}

    def build(kind: str, target: str = "memory_checks") -> Path:
        if (kind, target) in built:
            return built[kind, target]
        if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
            pytest.skip("no C++ compiler")
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        assert cmake is not None and ninja is not None, "the build needs cmake and ninja: pip install cmake ninja"
        folder = ROOT / "build" / f"memory-{kind}"
        with locked(folder):
            run(
                cmake,
                *("-S", str(CHECKS), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
                f"-DSPLITKERN_MEMORY_SANITIZER={SANITIZERS[kind]}",
                f"-DSPLITKERN_THREADED_CHECKS={'ON' if kind == 'thread' else 'OFF'}",
            )
            run(cmake, "--build", str(folder), "--target", target, "--parallel", "2")
        built[kind, target] = folder / target
        return built[kind, target]

    return build


def selected(kind: str) -> list[str]:
    return [name for name in names() if kind != "thread" or name.startswith(THREADED)]


@pytest.mark.parametrize("kind", list(SANITIZERS))
def test_the_program_has_every_check(program: Callable[..., Path], kind: str) -> None:
    done = subprocess.run([program(kind)], stdout=subprocess.PIPE, text=True, check=True)
    assert {name for name in done.stdout.splitlines() if name in selected(kind)} == set(selected(kind))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SANITIZERS for name in selected(kind)])
def test_memory(program: Callable[..., Path], kind: str, name: str) -> None:
    # Leaks count as errors with the address sanitizer; an error of any sanitizer ends the program with a status.
    done = subprocess.run([program(kind), name], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def cuda_checks(program: Callable[..., Path]) -> Callable[[], Path]:
    """Builds the checks of the CUDA part; skips where there is no CUDA toolkit."""

    def build() -> Path:
        if not Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "include", "cuda_runtime_api.h").exists():
            pytest.skip("no CUDA toolkit: set CUDA_HOME")
        return program("address", "memory_cuda_checks")

    return build


def test_the_cuda_part_builds(cuda_checks: Callable[[], Path]) -> None:
    """Upstreams, events and their checks compile and link against the runtime alone, without a GPU and without nvcc."""
    done = subprocess.run([cuda_checks()], stdout=subprocess.PIPE, text=True, check=True)
    assert any(name.startswith("pool on CUDA") for name in done.stdout.splitlines())


@pytest.mark.gpu
def test_cuda(cuda_checks: Callable[[], Path]) -> None:
    program = cuda_checks()
    checks = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    # The driver maps memory where the address sanitizer would keep its gap.
    environment = {**os.environ, "ASAN_OPTIONS": "protect_shadow_gap=0"}
    for name in checks:
        done = subprocess.run([program, name], stderr=subprocess.PIPE, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
