"""The native library and the packages made of it: what it links, what it was built for, and where it installs.

The tests that build (a configuration, a wheel) need the source tree and the build tools, and are skipped without them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile

import splitkern as sk
from splitkern import _library

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
LIBRARY = Path(sk.build_info().library)
WITH_CUDA = sk.build_info().cuda_compiler is not None

can_build = pytest.mark.skipif(
    LIBRARY.parent != ROOT / "splitkern" or any(importlib.util.find_spec(tool) is None for tool in ("cmake", "ninja")),
    reason="splitkern was not built here: it runs from an installed wheel, or the build tools are absent",
)
built_with_cuda = pytest.mark.skipif(not WITH_CUDA, reason="this is a CPU-only build")


def symbols_from_elsewhere(library: Path) -> set[str]:
    """Returns the undefined symbols that the C and C++ run-time libraries (which version theirs) do not provide."""
    with open(library, "rb") as file:
        elf = ELFFile(file)
        versions = elf.get_section_by_name(".gnu.version")
        return {
            symbol.name
            for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
            if symbol["st_shndx"] == "SHN_UNDEF"
            and symbol["st_info"]["bind"] != "STB_WEAK"
            and symbol.name
            and versions.get_symbol(index)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
        }


def exported_functions(library: Path) -> set[str]:
    """Returns the defined symbols that other libraries would link to; weak ones are libstdc++'s templates."""
    with open(library, "rb") as file:
        return {
            symbol.name
            for symbol in ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
        }


def needed_libraries(library: Path) -> set[str]:
    with open(library, "rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return {re.sub(r"\.so.*", "", tag.needed) for tag in dynamic.iter_tags("DT_NEEDED")}


def outside_the_stable_abi(library: Path) -> set[str]:
    """Returns the symbols that neither the run-time libraries nor torch's stable C functions account for."""
    return {
        name
        for name in symbols_from_elsewhere(library)
        if not re.match(r"(aoti_torch_|torch)_[a-z]|aoti_torch_[a-z]", name)
    }


def test_uses_nothing_but_the_stable_abi():
    assert outside_the_stable_abi(LIBRARY) == set()
    assert any(name.startswith("aoti_torch_") for name in symbols_from_elsewhere(LIBRARY))


def test_the_symbol_check_sees_python_and_unstable_torch():
    found = outside_the_stable_abi(TORCH / "lib" / "libtorch_python.so")
    assert "PyObject_GetAttrString" in found
    assert any(name.startswith("_ZN3c10") for name in found)


def test_needs_no_python_and_no_cuda_library():
    runtime = {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    assert needed_libraries(LIBRARY) - runtime == {"libtorch_cpu"}


def test_exports_what_python_calls_and_nothing_else():
    of_the_kernels = {"conv_paths", "explain_conv2d", "explain_copy", "explain_layer", "force_path", "set_tf32_query"}
    of_the_kernels |= {"copy_slots", "tune_copy", "tune_sm90"}
    expected = {"build_info", *(of_the_kernels if WITH_CUDA else ())}
    assert exported_functions(LIBRARY) == {f"splitkern_{name}" for name in expected}


def test_build_info_matches_the_package():
    info = sk.build_info()
    assert info.version == sk.__version__
    assert info.torch_target == "2.11"
    assert re.match(r"\w+ \d+\.\d+", info.cxx_compiler)
    assert bool(info.cuda_architectures) == WITH_CUDA


def operator_names() -> list[str]:
    """Of the native library; what Dynamo sees a split model as (`split_...`) is made of other operators, in Python."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("splitkern::")]
    return [name for name in names if not name.startswith("splitkern::split_")]


def test_every_operator_has_a_cpu_kernel():
    names = operator_names()
    assert "splitkern::patch_conv2d" in names and "splitkern::patch_conv2d.out" in names
    assert [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")] == []


@built_with_cuda
def test_every_operator_has_a_cuda_kernel_also_without_a_gpu():
    assert [n for n in operator_names() if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")] == []


def compiled_code(library: Path) -> list[set[str]]:
    """Returns, for each CUDA source, what its fat binary holds: "sm_80" (machine code), "compute_80" (PTX), ..."""
    with open(library, "rb") as file:
        data = ELFFile(file).get_section_by_name(".nv_fatbin").data()
    sources = []
    position = data.find(struct.pack("<I", 0xBA55ED50))
    while position >= 0:
        header_bytes, payload_bytes = struct.unpack_from("<HQ", data, position + 6)
        entry, end = position + header_bytes, position + header_bytes + payload_bytes
        held = set()
        while entry < end:
            kind, _, entry_header_bytes, entry_bytes = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            held.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}")
            entry += entry_header_bytes + entry_bytes
        sources.append(held)
        position = data.find(struct.pack("<I", 0xBA55ED50), end)
    return sources


@built_with_cuda
def test_every_cuda_source_is_compiled_for_every_architecture():
    expected = {name.rstrip("a") for name in sk.build_info().cuda_architectures}  # the suffix is in the code's flags
    sources = compiled_code(LIBRARY)
    assert expected in sources
    for_hopper_alone = {"sm_90"}  # csrc/kernels/sm90
    assert all(held in (expected, for_hopper_alone) for held in sources), sources
    hopper_sources = list((ROOT / "csrc" / "kernels" / "sm90").glob("*.cu")) if "sm_90" in expected else []
    assert sources.count(for_hopper_alone) == len(hopper_sources)


# --- A library that does not belong to the package -------------------------------------------------------------------


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder that holds a copy of the package, to be spoilt."""
    ignore = shutil.ignore_patterns("__pycache__", "_ops.so*")
    shutil.copytree(Path(sk.__file__).parent, tmp_path / "splitkern", ignore=ignore)
    (tmp_path / "splitkern" / "_ops.so").symlink_to(LIBRARY)
    return tmp_path


def import_in(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import splitkern; print(splitkern.__file__)"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_an_unspoilt_copy_imports(package_copy: Path):
    result = import_in(package_copy)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == package_copy / "splitkern" / "__init__.py"


def test_a_library_of_another_version_is_refused(package_copy: Path):
    version_file = package_copy / "splitkern" / "_version.py"
    version_file.write_text(version_file.read_text().replace(sk.__version__, "99.0.0"))
    result = import_in(package_copy)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: splitkern: the native library")
    assert f"is version {sk.__version__}, but the Python package is version 99.0.0" in message
    assert "pip install --no-build-isolation ." in message


def test_a_missing_library_is_named(package_copy: Path):
    library = package_copy / "splitkern" / "_ops.so"
    library.unlink()
    message = import_in(package_copy).stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: splitkern: the native library {library} is missing; rebuild it with")


def test_a_damaged_library_is_named_with_the_reason(package_copy: Path):
    library = package_copy / "splitkern" / "_ops.so"
    library.unlink()
    library.write_bytes(b"not a library")
    message = import_in(package_copy).stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: splitkern: the native library {library} does not load beside torch")
    assert "file too short" in message or "invalid ELF header" in message


def test_a_library_of_something_else_is_refused(package_copy: Path):
    library = package_copy / "splitkern" / "_ops.so"
    library.unlink()
    library.symlink_to(TORCH / "lib" / "libc10.so")
    message = import_in(package_copy).stderr.splitlines()[-1]
    assert message.startswith("ImportError: splitkern: the native library")
    assert "undefined symbol: splitkern_build_info" in message


def test_a_library_from_before_the_tf32_query_is_refused(monkeypatch: pytest.MonkeyPatch):
    older = dataclasses.replace(sk.build_info(), library=str(TORCH / "lib" / "libc10.so"), cuda_compiler="nvcc 13.0.88")
    monkeypatch.setattr(_library, "_load", lambda path: older)
    with pytest.raises(ImportError, match=r"libc10\.so is older than the Python package; rebuild it"):
        _library.load.__wrapped__()


# --- Configuring: which toolkit is taken -----------------------------------------------------------------------------


def find_tool(name: str) -> str:
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.is_file() else shutil.which(name)
    assert found is not None
    return found


@pytest.fixture
def configure(tmp_path: Path):
    """Returns a function that configures the build in an empty folder, with a PATH that holds a C++ compiler only."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "nm", "objcopy", "objdump", "readelf", "strip"):
        found = shutil.which(tool)
        if found is not None:
            (path / tool).symlink_to(found)

    def run(*options: str, nvcc: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        if nvcc is not None:
            (path / "nvcc").write_text(nvcc)
            (path / "nvcc").chmod(0o755)
        command = [
            *(find_tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
            *("-S", str(ROOT), "-B", str(tmp_path / "build"), "-DSPLITKERN_VERSION=0"),
            f"-DSPLITKERN_TORCH_INCLUDE={TORCH / 'include'}",
            f"-DSPLITKERN_TORCH_LIB={TORCH / 'lib'}",
            *options,
        ]
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDACXX", "CC", "CXX")}
        return subprocess.run(
            command, env={**kept, **variables, "PATH": str(path)}, capture_output=True, text=True, check=False
        )

    return run


def splitkern_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("splitkern:")]


@can_build
def test_without_nvcc_the_build_is_for_the_cpu_and_says_so_in_one_line(configure):
    result = configure()
    assert result.returncode == 0, result.stderr
    assert splitkern_lines(result) == [
        "splitkern: no nvcc found, so this is a CPU-only build (set CUDA_HOME to build the CUDA kernels)"
    ]


@can_build
def test_cuda_that_is_insisted_on_but_missing_is_an_error(configure):
    result = configure("-DSPLITKERN_CUDA=ON")
    assert result.returncode != 0
    assert "SPLITKERN_CUDA is ON, but there is no nvcc" in result.stderr


@can_build
def test_a_cuda_home_without_nvcc_is_named(configure, tmp_path: Path):
    result = configure(CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f'CUDA_HOME is "{tmp_path}", which holds no bin/nvcc' in " ".join(result.stderr.split())
    assert "this is a CPU-only build" in result.stderr


@can_build
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_an_nvcc_that_is_a_wrapper_script_leads_to_its_toolkit(configure):
    result = configure(nvcc=f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    assert result.returncode == 0, result.stderr
    (line,) = splitkern_lines(result)
    assert re.fullmatch(r"splitkern: CUDA \d+\.\d+\.\d+ for 80-real;90a-real;100-real;120-real;80-virtual", line)


@can_build
def test_a_torch_folder_without_torch_is_named(configure, tmp_path: Path):
    result = configure(f"-DSPLITKERN_TORCH_INCLUDE={tmp_path}")
    assert result.returncode != 0
    assert f'got "{tmp_path}"' in " ".join(result.stderr.split())


# --- The launcher of nvcc ---------------------------------------------------------------------------------------------


def launch_compiler(folder: Path, compiler: str) -> subprocess.CompletedProcess[str]:
    """Runs cmake/compile_kernel.sh around a shell script that stands for nvcc and writes the object `kernel.o`."""
    script = folder / "compiler.sh"
    script.write_text(compiler)
    command = ["sh", str(ROOT / "cmake" / "compile_kernel.sh"), "sh", str(script), "-o", "kernel.o"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@can_build
def test_a_clean_compilation_is_silent_and_keeps_its_report(tmp_path: Path):
    result = launch_compiler(tmp_path, "echo 'ptxas info    : Used 40 registers' >&2; touch kernel.o")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "Used 40 registers" in (tmp_path / "kernel.o.ptxas.txt").read_text()


@can_build
def test_a_note_that_wgmma_was_serialised_fails_the_compilation(tmp_path: Path):
    note = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    result = launch_compiler(tmp_path, f"echo '{note}' >&2; touch kernel.o")
    assert result.returncode != 0
    assert "C7510" in result.stderr
    assert not (tmp_path / "kernel.o").exists()


@can_build
def test_a_failed_compilation_shows_its_error(tmp_path: Path):
    result = launch_compiler(tmp_path, "echo 'kernel.cu(3): error: expected a \";\"' >&2; exit 2")
    assert result.returncode == 2
    assert "kernel.cu(3): error" in result.stderr


# --- The wheel -------------------------------------------------------------------------------------------------------


@can_build
def test_a_wheel_installs_and_runs_where_there_is_no_compiler(tmp_path: Path):
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    build = [sys.executable, *pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name == f"splitkern-{sk.__version__}-{python_tag}-{python_tag}-linux_x86_64.whl"

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, *pip, "install", "--no-index", "--no-deps", str(wheel)], check=True)
    # torch and numpy come from this environment; a path file does not bring in its editable installs.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "packages_of_this_environment.pth").write_text(sysconfig.get_paths()["purelib"])

    empty = tmp_path / "empty"
    empty.mkdir()
    variables = {"PATH": str(environment / "bin"), "HOME": str(empty)}
    assert not any(shutil.which(tool, path=variables["PATH"]) for tool in ("cc", "gcc", "c++", "g++", "clang", "nvcc"))
    doctor = [environment / "bin" / "splitkern", "doctor", "--json"]
    result = subprocess.run(doctor, cwd=empty, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    findings = json.loads(result.stdout)
    assert findings["usable"]
    assert Path(findings["build"]["library"]) == site / "splitkern" / "_ops.so"
    assert next(path["name"] for path in findings["paths"] if path["available"]) == "cpu"
