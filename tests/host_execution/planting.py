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
class Bug:
    """``right`` occurs once in ``file`` and becomes ``wrong``; ``compiled`` are the sources that then differ.

    ``check`` must raise AssertionError or RuntimeError whose text matches ``noticed_in``, in one of the schedules.
    Paths are relative to csrc/kernels.
    """

    name: str
    compiled: str | tuple[str, ...]
    file: str
    right: str
    wrong: str
    check: Callable[[Build], None]
    noticed_in: str
    schedules: Sequence[int] = (1,)

    def __str__(self) -> str:
        return self.name


def build_with(bug: Bug, host_build: Path, folder: Path) -> Build:
    """The library with some kernels compiled from a changed copy, its operators in a namespace of their own."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    changed = source / "kernels" / bug.file
    text = changed.read_text()
    assert text.count(bug.right) == 1, f"{bug.file} must hold {bug.right!r} once for the bug to be planted"
    changed.write_text(text.replace(bug.right, bug.wrong))

    namespace = "splitkern_" + "".join(c if c.isalnum() else "_" for c in bug.name)
    compiled = (bug.compiled,) if isinstance(bug.compiled, str) else bug.compiled
    again = {f"kernels/{path}".replace("/", "_").replace(".", "_") + ".cpp" for path in compiled} | {"library.cpp"}
    objects = []
    for entry in json.loads((host_build / "compile_commands.json").read_text()):
        if not any(target in entry["command"] for target in ("_ops_host_execution.dir", "host_execution_machine.dir")):
            continue
        path = Path(entry["file"])
        if path.parent.name != "host_execution" or path.name not in again:
            objects.append(str(host_build / entry["output"]))
            continue
        again.remove(path.name)
        target = str(folder / f"{path.stem}.o")
        words = [word.replace(str(ROOT / "csrc"), str(source)) for word in shlex.split(entry["command"])]
        words[words.index("-o") + 1] = target
        run(*words, f"-DSPLITKERN_HOST_NAMESPACE={namespace}", "-O0" if path.name == "library.cpp" else "-O2")
        compiler = words[0]
        objects.append(target)
    assert not again, f"the build has no command for {again}"
    library = folder / f"{namespace}.so"
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    run(compiler, "-shared", "-Wl,--no-undefined", "-o", str(library), *objects, str(torch_library))
    return Build(load(library, namespace), library)
