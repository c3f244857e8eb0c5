"""Builds the library that executes the CUDA kernels on the CPU, once per session."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernel_checks.comparisons import Operators, without_onednn

ROOT = Path(__file__).resolve().parents[2]


def find_tool(name: str) -> str | None:
    """cmake or ninja: beside this Python, from the Python package of that name, else from the PATH."""
    spec = importlib.util.find_spec(name)
    candidates = [Path(sys.prefix) / "bin" / name]
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "data" / "bin" / name)
    return next((str(path) for path in candidates if path.is_file()), shutil.which(name))


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A build folder for one process at a time: those of pytest-xdist share it, and the second finds all built."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: handing them to a thread pool costs more than all the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", autouse=True)
def yardstick() -> Iterator[None]:
    """PyTorch's own result in the same type, which bounds the error."""
    with without_onednn():
        yield


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> None:
    """Every test sees the same device and the same order of threads, whatever ran before it."""
    if {"operators", "host_library"} & set(request.fixturenames):
        library = ctypes.CDLL(str(request.getfixturevalue("host_library")))
        library.splitkern_host_set_schedule(ctypes.c_uint64(1))
        library.splitkern_host_set_device(ctypes.c_int32(90), ctypes.c_int32(132), ctypes.c_int64(232448))


@pytest.fixture(scope="session")
def host_build() -> Path:
    """The build folder of the library, built without CUDA; incremental."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        pytest.skip("no C++ compiler")
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    assert cmake is not None and ninja is not None, "the build needs cmake and ninja: pip install cmake ninja"
    torch_folder = Path(torch.__file__).parent
    # torch's version is part of the path: objects built against one torch's headers are not another's.
    build = ROOT / "build" / f"host_execution-{torch.__version__}"
    with locked(build):
        run(
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            *("-DSPLITKERN_BUILD_HOST_EXECUTION=ON", "-DSPLITKERN_CUDA=OFF", "-DSPLITKERN_VERSION=test"),
            f"-DSPLITKERN_TORCH_INCLUDE={torch_folder / 'include'}",
            f"-DSPLITKERN_TORCH_LIB={torch_folder / 'lib'}",
        )
        run(cmake, "--build", str(build), "--target", "_ops_host_execution", "--parallel", "2")
    return build


@pytest.fixture(scope="session")
def build_target(host_build: Path) -> Callable[[str], Path]:
    """Builds another target of that folder and returns its file."""

    def build(name: str) -> Path:
        cmake = find_tool("cmake")
        assert cmake is not None
        with locked(host_build):
            run(cmake, "--build", str(host_build), "--target", name, "--parallel", "2")
        return host_build / name

    return build


def load(library: Path, namespace: str) -> Operators:
    torch.ops.load_library(library)
    found: Any = getattr(torch.ops, namespace)
    return Operators(found)


@pytest.fixture(scope="session")
def host_library(host_build: Path) -> Path:
    return host_build / "_ops_host_execution.so"


@pytest.fixture(scope="session")
def operators(host_library: Path) -> Operators:
    return load(host_library, "splitkern_host")
