"""What CI finds out about the CUDA kernels without a GPU, each gate with a violation that it must notice.

The gates: warnings, spills, local memory and lost asynchronous schedules stop the compilation, and so does a kernel
that overruns its row of csrc/kernels/budgets.h; the table and the kernels name each other; the machine code holds the
instructions that the table asks for.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import splitkern as sk
from tests.kernel_checks.machine_code import (
    BUDGETS,
    ROOT,
    Budget,
    Function,
    budgets,
    disassemble,
    find_cuobjdump,
    functions,
    violations,
)

LIBRARY = Path(sk.build_info().library)
BUILD = ROOT / "build"
TARGETS = [name for name in sk.build_info().cuda_architectures if name in ("sm_80", "sm_90a")]

built_with_cuda = pytest.mark.skipif(
    sk.build_info().cuda_compiler is None or LIBRARY.parent != ROOT / "splitkern",
    reason="splitkern was not built here with nvcc",
)


def check_budgets(*reports: Path, table: Path = BUDGETS, complete: bool = False) -> tuple[int, str]:
    command = ["awk", "-v", f"complete={int(complete)}", "-f", str(ROOT / "cmake" / "check_budgets.awk"), str(table)]
    done = subprocess.run([*command, *map(str, reports)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


# --- The table ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compile_commands() -> list[list[str]]:
    """How the build compiles each .cu, without the launcher; the reports lie beside the objects."""
    entries = json.loads((BUILD / "compile_commands.json").read_text())
    return [shlex.split(entry["command"]) for entry in entries if entry["file"].endswith(".cu")]


@built_with_cuda
def test_every_kernel_keeps_to_its_row_and_every_row_has_a_kernel(compile_commands: list[list[str]]) -> None:
    reports = [BUILD / f"{command[command.index('-o') + 1]}.ptxas.txt" for command in compile_commands]
    assert len(reports) >= 7
    assert check_budgets(*reports, complete=True) == (0, "")


def kernels_with_dynamic_shared_memory(folder: Path) -> dict[str, Path]:
    found = {}
    for file in [*sorted(folder.glob("*.cu")), *sorted(folder.glob("*.h"))]:
        for text in file.read_text().split("__global__")[1:]:
            match = re.search(r"(\w+)\(const __grid_constant__", text)
            assert match is not None, (
                f"{file.relative_to(ROOT)}: a kernel takes its parameters by const __grid_constant__"
            )
            if "dynamic_shared<" in text:
                found[match[1]] = file
    return found


KERNEL_FOLDERS = [path for path in sorted((ROOT / "csrc" / "kernels").iterdir()) if path.is_dir()]


@pytest.mark.parametrize("folder", KERNEL_FOLDERS, ids=lambda path: path.name)
def test_every_kernel_with_dynamic_shared_memory_holds_it_against_its_row(folder: Path) -> None:
    """ptxas does not see dynamic shared memory, so the sources compare it with the table: by static_assert, or in the
    refusal where the amount depends on the call."""
    text = "\n".join(file.read_text() for file in [*folder.glob("*.cu"), *folder.glob("*.h")])
    for kernel, file in kernels_with_dynamic_shared_memory(folder).items():
        assert re.search(rf'shared_budget\("(\w+::)?{kernel}"\)', text), f"{file.relative_to(ROOT)}: {kernel}"


def test_kernels_with_dynamic_shared_memory_are_found(tmp_path: Path) -> None:
    (tmp_path / "some.cu").write_text(
        "__global__ void a_kernel(const __grid_constant__ Params params) { int value; }\n"
        "__global__ void __launch_bounds__(32)\n    b_kernel(const __grid_constant__ Params params) {\n"
        "  Storage& storage = dynamic_shared<Storage>();\n}\n"
    )
    assert list(kernels_with_dynamic_shared_memory(tmp_path)) == ["b_kernel"]


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9splitkern7kernels4sm8011some_kernelIfEEvNS0_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN9splitkern7kernels4sm8011some_kernelIfEEvNS0_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("row", "change", "complaint"),
    [
        ('{"sm80::some_kernel", "sm_80", 40, 1024, ""},', None, None),
        ('{"some_kernel", "all", 40, 1024, ""},', None, None),
        ('{"sm80::some_kernel", "sm_80", 39, 1024, ""},', None, "takes 40 registers, its budget is 39"),
        (
            '{"sm80::some_kernel", "sm_80", 40, 1023, ""},',
            None,
            "takes 1024 bytes of static shared memory, its budget is 1023",
        ),
        ('{"sm80::some_kernel", "sm_90a", 40, 1024, ""},', None, "for sm_80 has no row"),
        ('{"sm90::some_kernel", "all", 40, 1024, ""},', None, "for sm_80 has no row"),
        ('{"some", "all", 40, 1024, ""},', None, "no kernel was compiled for the row some, all"),
        (
            '{"some_kernel", "all", 40, 1024, ""},',
            ("0 bytes stack frame", "8 bytes stack frame"),
            "keeps data in local memory:    8 bytes stack frame",
        ),
        (
            '{"some_kernel", "all", 40, 1024, ""},',
            ("0 bytes spill loads", "4 bytes spill loads"),
            "keeps data in local memory:    0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads",
        ),
        ("", None, "holds no row"),
    ],
)
def test_a_report_is_held_against_the_table(
    tmp_path: Path, row: str, change: tuple[str, str] | None, complaint: str | None
) -> None:
    table, report = tmp_path / "budgets.h", tmp_path / "kernel.o.ptxas.txt"
    table.write_text(f"inline constexpr KernelBudget kBudgets[] = {{\n    {row}\n}};\n")
    report.write_text(REPORT.replace(*change) if change else REPORT)
    status, text = check_budgets(report, table=table, complete=True)
    if complaint is None:
        assert (status, text) == (0, "")
    else:
        assert status == 1
        assert complaint in text


# --- The compilation ------------------------------------------------------------------------------------------------

PLANTED = """\
#include "kernels/budgets.h"
#include "kernels/primitives.h"
namespace splitkern::kernels {{
struct PlantedParams {{
  static constexpr const char* kOperator = "planted";
  float* values;
  int32_t which;
}};
{kernel}
void launch_planted(const PlantedParams& params) {{
  launch(&max_pool_kernel, Dim3{{1, 1, 1}}, Dim3{{256, 1, 1}}, 0, nullptr, params);
}}
}}
"""
# The kernels take the name of one that has a row without shared memory and with few registers.
HEAD = "__global__ void max_pool_kernel(const __grid_constant__ PlantedParams params)"
CLEAN = HEAD + " { params.values[thread_index()] = 1; }"
LOCAL_ARRAY = (
    HEAD
    + """ {
  float kept[64];
  for (int32_t i = 0; i < 64; ++i) kept[i] = params.values[i];
  for (int32_t i = 0; i < params.which; ++i) kept[i * params.which % 64] += kept[i % 64];
  params.values[thread_index()] = kept[params.which % 64];
}"""
)
MANY_VALUES = """ {
  float kept[96];
#pragma unroll
  for (int32_t i = 0; i < 96; ++i) kept[i] = params.values[i * params.which];
  block_barrier();
#pragma unroll
  for (int32_t i = 0; i < 96; ++i) params.values[i * params.which + 1] = kept[95 - i] * kept[i];
}"""
SPILLS = HEAD.replace("void", "void __launch_bounds__(1024, 2)") + MANY_VALUES
TOO_MANY_REGISTERS = HEAD + MANY_VALUES
SHARED = (
    HEAD
    + """ {
  __shared__ float shared[256];
  shared[thread_index()] = params.values[thread_index()];
  block_barrier();
  params.values[thread_index()] = shared[255 - thread_index()];
}"""
)
UNUSED = HEAD + " { int32_t unused = 1; params.values[0] = 1; }"
OVER_SHARED_BUDGET = (
    CLEAN
    + """
struct Storage { float values[64]; };
static_assert(sizeof(Storage) <= shared_budget("max_pool_kernel"));"""
)
NO_ROW = CLEAN + '\nstatic_assert(0 <= shared_budget("planted_kernel"));'


@pytest.fixture
def compile_planted(
    compile_commands: list[list[str]], tmp_path: Path
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Compiles a kernel for sm_80 with the options and through the launcher of the build."""
    (command,) = [words for words in compile_commands if any(word.endswith("plain/max_pool.cu") for word in words)]

    def run(kernel: str) -> subprocess.CompletedProcess[str]:
        source = tmp_path / "planted.cu"
        source.write_text(PLANTED.format(kernel=kernel))
        words, skip = [], False
        for word in command:
            if skip or word.startswith("--generate-code"):
                skip = False
            elif word in ("-o", "-MF", "-MT", "-c"):
                skip = word != "-c"
            elif word not in ("-MD",) and not word.endswith(".cu"):
                words.append(word)
        script = str(ROOT / "cmake" / "compile_kernel.sh")
        if script not in words:
            words = ["sh", script, *words]
        words += ["-gencode", "arch=compute_80,code=sm_80", "-o", str(tmp_path / "planted.o"), "-c", str(source)]
        return subprocess.run(words, cwd=BUILD, capture_output=True, text=True)

    return run


@built_with_cuda
@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (LOCAL_ARRAY, "local memory|stack frame"),
        (SPILLS, "[Ss]pill"),
        (TOO_MANY_REGISTERS, "registers, its budget is"),
        (SHARED, "takes 1024 bytes of static shared memory, its budget is 0"),
        (UNUSED, "unused"),
        (OVER_SHARED_BUDGET, "static assertion failed"),
        (NO_ROW, "the kernel has no row in kBudgets"),
    ],
    ids=["local array", "spills", "registers", "static shared memory", "warning", "dynamic shared memory", "no row"],
)
def test_the_compilation_fails_at(
    compile_planted: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path, kernel: str, complaint: str
) -> None:
    result = compile_planted(kernel)
    assert result.returncode != 0
    assert re.search(complaint, result.stderr), result.stderr
    assert not (tmp_path / "planted.o").exists()


@built_with_cuda
def test_a_clean_kernel_compiles(
    compile_planted: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """So that the failures above come from what is planted."""
    result = compile_planted(CLEAN)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "planted.o").exists()


# --- The machine code -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    tool = find_cuobjdump()
    if tool is None:
        # torch for CUDA brings triton, which brings cuobjdump: there its absence is a broken environment.
        assert torch.version.cuda is None, "cuobjdump must be in the triton package or on the PATH"
        pytest.skip("no cuobjdump: neither triton nor a CUDA toolkit with it is here")
    return tool


@built_with_cuda
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_hold_their_instructions_and_no_local_memory(cuobjdump: str, target: str) -> None:
    rows = budgets(BUDGETS.read_text())
    found = disassemble(cuobjdump, LIBRARY, target)
    assert violations(found, rows) == []
    for row in rows:  # every row that asks for instructions has been held against something
        if row.instructions and row.target in ("all", target):
            assert any(row.covers(function.mangled, target) for function in found), row


def test_the_matrix_paths_are_asked_for_their_instructions() -> None:
    """A row that lost its instructions would let a kernel fall back to scalar code unseen."""
    rows = budgets(BUDGETS.read_text())
    for path, needed in (("sm90", {"HGMMA", "UTMALDG"}), ("sm80", {"HMMA", "LDGSTS"})):
        if (ROOT / "csrc" / "kernels" / path).is_dir():
            asked = [row for row in rows if row.kernel.startswith(f"{path}::") and needed <= row.instructions]
            assert len(asked) >= 2, f"the {path} kernels"


SASS = """\
Fatbin elf code:
arch = sm_90a
code version = [1,8]
\t\tFunction : _ZN9splitkern7kernels4sm9011conv_kernelENS0_6ParamsE
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 UTMALDG.2D.IM2COL [UR4], [UR6] ;             /* 0x00000a00ff017b82 */
        /*0020*/              @UP1 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x00000a00ff017b82 */
        /*0030*/                   EXIT ;                                        /* 0x000000000000794d */
"""
CONV = Budget("sm90::conv_kernel", "sm_90a", 168, 0, frozenset({"HGMMA", "UTMALDG"}))


def test_reads_the_disassembly() -> None:
    assert list(functions(SASS.splitlines())) == [
        Function(
            "_ZN9splitkern7kernels4sm9011conv_kernelENS0_6ParamsE",
            "sm_90a",
            frozenset({"LDC", "UTMALDG", "HGMMA", "EXIT"}),
        )
    ]
    assert violations(functions(SASS.splitlines()), [CONV]) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("HGMMA.64x256x16.F32.BF16", "FFMA", "for sm_90a lacks HGMMA"),
        ("UTMALDG.2D.IM2COL", "LDG.E.128", "for sm_90a lacks UTMALDG"),
        ("EXIT", "STL [R1]", "uses local memory: STL"),
        ("LDC R1", "LDL R1", "uses local memory: LDL"),
    ],
)
def test_a_kernel_without_its_instructions_is_noticed(right: str, wrong: str, complaint: str) -> None:
    (found,) = violations(functions(SASS.replace(right, wrong).splitlines()), [CONV])
    assert found.endswith(complaint)


@built_with_cuda
def test_a_kernel_that_was_really_compiled_without_them_is_noticed(
    compile_planted: Callable[[str], subprocess.CompletedProcess[str]], cuobjdump: str, tmp_path: Path
) -> None:
    assert compile_planted(CLEAN).returncode == 0
    row = Budget("max_pool_kernel", "sm_80", 255, 0, frozenset({"HMMA", "LDGSTS"}))
    (found,) = violations(disassemble(cuobjdump, tmp_path / "planted.o", "sm_80"), [row])
    assert found.endswith("for sm_80 lacks HMMA, LDGSTS")
