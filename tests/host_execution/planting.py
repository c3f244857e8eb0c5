"""Plants a bug in a copy of the kernels and builds the library that executes them on the CPU from it.

The lists of bugs are in the modules ``bugs_*.py`` beside this file, one per folder of kernels; test_planted_bugs.py
runs them all.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from splitkern._library import forced_path
from tests.host_execution.conftest import ROOT, load, run
from tests.kernel_checks.comparisons import Operators

# For a bug that shows in some orders of the threads only.
SEVERAL_SCHEDULES = range(1, 9)


@dataclass(frozen=True)
class Build:
    """A library of host execution: its operators, and its file for what is not an operator."""

    operators: Operators
    library: Path

    def set_schedule(self, seed: int) -> None:
        """All later launches run in the order that follows from the seed."""
        ctypes.CDLL(str(self.library)).splitkern_host_set_schedule(ctypes.c_uint64(seed))

    def set_device(self, compute_capability: int = 90, multiprocessors: int = 132, shared_bytes: int = 232448) -> None:
        """The device that the library pretends to run on."""
        ctypes.CDLL(str(self.library)).splitkern_host_set_device(
            ctypes.c_int32(compute_capability), ctypes.c_int32(multiprocessors), ctypes.c_int64(shared_bytes)
        )

    def forced_path(self, name: str) -> AbstractContextManager[None]:
        """Every convolution in the block takes this path, see `splitkern._library.forced_path`."""
        return forced_path(name, self.library)


@dataclass(frozen=True)
class Change:
    """``right`` occurs once in ``file`` and becomes ``wrong``; ``compiled`` are the sources that then differ.

    Paths are relative to csrc/kernels.
    """

    name: str
    compiled: str | tuple[str, ...]
    file: str
    right: str
    wrong: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Bug(Change):
    """In one of the schedules ``check`` must raise AssertionError or RuntimeError, its text matching ``noticed_in``."""

    check: Callable[[Build], None]
    noticed_in: str
    schedules: Sequence[int] = (1,)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Race(Change):
    """A barrier is taken out: ThreadSanitizer must name a line of ``file`` when race_check runs ``check``.

    Where the compiler leaves no lines, ``named_in`` is what the report must match instead: the kernel.
    """

    check: str
    named_in: str = ""

    def __str__(self) -> str:
        return self.name


def changed_objects(
    change: Change, host_build: Path, folder: Path, targets: tuple[str, ...], again: set[str], *flags: str
) -> tuple[str, list[str]]:
    """The compiler, and the targets' objects; those that the change affects are compiled from a changed copy."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    changed = source / "kernels" / change.file
    text = changed.read_text()
    assert text.count(change.right) == 1, f"{change.file} must hold {change.right!r} once for the bug to be planted"
    changed.write_text(text.replace(change.right, change.wrong))

    compiled = (change.compiled,) if isinstance(change.compiled, str) else change.compiled
    again = again | {f"kernels/{path}".replace("/", "_").replace(".", "_") + ".cpp" for path in compiled}
    compiler = ""
    objects = []
    for entry in json.loads((host_build / "compile_commands.json").read_text()):
        if not any(f"/{target}.dir/" in entry["output"] for target in targets):
            continue
        path = Path(entry["file"])
        words = shlex.split(entry["command"])
        if path.parent.name != "host_execution" or path.name not in again:
            objects.append(str(host_build / entry["output"]))
            continue
        again.remove(path.name)
        compiler = words[0]
        objects.append(str(folder / f"{path.stem}.o"))
        words = [word.replace(str(ROOT / "csrc"), str(source)) for word in words]
        words[words.index("-o") + 1] = objects[-1]
        run(*words, *flags)
    assert not again, f"the build has no command for {again}"
    return compiler, objects


def build_with(bug: Bug, host_build: Path, folder: Path) -> Build:
    """The library with some kernels compiled from a changed copy, its operators in a namespace of their own."""
    namespace = "splitkern_" + "".join(c if c.isalnum() else "_" for c in bug.name)
    compiler, objects = changed_objects(
        *(bug, host_build, folder, ("_ops_host_execution", "host_execution_machine"), {"namespace.cpp"}),
        *("-O0", f'-DSPLITKERN_HOST_NAMESPACE="{namespace}"'),
    )
    library = folder / f"{namespace}.so"
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    run(compiler, "-shared", "-Wl,--no-undefined", "-o", str(library), *objects, str(torch_library))
    return Build(load(library, namespace), library)


def build_race_check_with(race: Race, host_build: Path, folder: Path) -> Path:
    """The program that runs the kernels under ThreadSanitizer, some of them compiled from a changed copy."""
    compiler, objects = changed_objects(race, host_build, folder, ("race_check", "race_check_machine"), set())
    program = folder / "race_check"
    run(compiler, "-fsanitize=thread", "-o", str(program), *objects)
    return program
