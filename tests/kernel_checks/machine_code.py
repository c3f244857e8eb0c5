"""What the compiled kernels hold: their instructions, read from cuobjdump, and what they must hold."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "csrc" / "kernels" / "budgets.h"
LOCAL_MEMORY = {"LDL", "STL"}  # what registers spill to, and where arrays go that are indexed at run time


@dataclass(frozen=True)
class Budget:
    """One row of csrc/kernels/budgets.h."""

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    instructions: frozenset[str]

    def covers(self, mangled: str, target: str) -> bool:
        """Whether the row is about the function; as cmake/check_budgets.awk decides it."""
        named = all(f"{len(part)}{part}" in mangled for part in self.kernel.split("::"))
        return named and self.target in ("all", target)


@dataclass(frozen=True)
class Function:
    """One kernel of one target: the mnemonics that occur in it, without their suffixes."""

    mangled: str
    target: str
    mnemonics: frozenset[str]


def budgets(text: str) -> list[Budget]:
    """Reads the rows of csrc/kernels/budgets.h."""
    rows = re.findall(r'^ *\{"([^"]+)", "([^"]+)", (\d+), (\d+), "([^"]*)"\},', text, re.MULTILINE)
    assert len(rows) == len(re.findall(r'^ *\{"', text, re.MULTILINE)), "a row of budgets.h has another form"
    return [
        Budget(kernel, target, int(registers), int(shared), frozenset(instructions.split()))
        for kernel, target, registers, shared, instructions in rows
    ]


def find_cuobjdump() -> str | None:
    """cuobjdump of the triton package, which comes with torch for CUDA, else of a toolkit on the PATH."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    return shutil.which("cuobjdump")


def functions(lines: Iterable[str]) -> Iterator[Function]:
    """Reads what `cuobjdump -sass` prints."""
    target, mangled = "", ""
    found: set[str] = set()
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    for line in lines:
        if match := instruction.match(line):
            found.add(match[1])
        elif "Function : " in line:
            if mangled:
                yield Function(mangled, target, frozenset(found))
            mangled, found = line.split("Function : ")[1].strip(), set()
        elif line.startswith("arch = "):
            if mangled:
                yield Function(mangled, target, frozenset(found))
            mangled, found = "", set()
            target = line.split(" = ")[1].strip()
    if mangled:
        yield Function(mangled, target, frozenset(found))


def disassemble(cuobjdump: str, file: Path, target: str) -> list[Function]:
    """Every kernel of one target (`sm_90a`) in a library or object."""
    command = [cuobjdump, "-sass", "-arch", target, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        found = list(functions(process.stdout))
        errors = process.stderr.read()
    assert process.returncode == 0, f"{' '.join(command)}\n{errors}"
    return found


def violations(found: Iterable[Function], rows: Iterable[Budget]) -> list[str]:
    """What is wrong: local memory anywhere, or a kernel without an instruction that its row asks for."""
    rows = list(rows)
    wrong = []
    for function in found:
        where = f"{function.mangled} for {function.target}"
        if local := sorted(function.mnemonics & LOCAL_MEMORY):
            wrong.append(f"{where} uses local memory: {', '.join(local)}")
        row = next((row for row in rows if row.covers(function.mangled, function.target)), None)
        missing = sorted(row.instructions - function.mnemonics) if row else []
        if missing:
            wrong.append(f"{where} lacks {', '.join(missing)}")
    return wrong
