"""Builds the native libraries by calling CMake (CMakeLists.txt defines the build) and packs them into ``splitkern/``.

``_ops.so`` holds no Python symbol and uses only torch's stable ABI: one file serves every supported Python and torch.
``_core`` is a Python extension module (pybind11) for the Python that builds it, and does not know torch. A wheel is
therefore for one Python and every supported torch.

Read from the environment, at build time only: ``CUDA_HOME``, ``CC``, ``CXX``, ``CUDACXX``, ``CMAKE_ARGS`` (more
arguments for CMake, e.g. ``-DSPLITKERN_CUDA=OFF`` or ``-DCMAKE_CUDA_ARCHITECTURES=90a-real``),
``CMAKE_BUILD_PARALLEL_LEVEL``, and ``SPLITKERN_ONLY`` (``_ops`` or ``_core``: builds that library alone, in place,
beside one that is there already).
"""

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"splitkern: the build needs setuptools 77 or newer, got {setuptools.__version__}: "
        "pip install 'setuptools>=77,<82'"
    )

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build"
LIBRARIES = {"_ops": "_ops.so", "_core": f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"}


def chosen_libraries() -> list[str]:
    """Returns the names of the libraries to build."""
    only = os.environ.get("SPLITKERN_ONLY")
    if only is not None and only not in LIBRARIES:
        raise SystemExit(f"splitkern: SPLITKERN_ONLY must be one of {', '.join(LIBRARIES)}, got {only!r}")
    return list(LIBRARIES) if only is None else [only]


def find_tool(name: str) -> str:
    """Returns the path of cmake or ninja, from the Python package of that name, else from the PATH."""
    spec = importlib.util.find_spec(name)
    candidates = [Path(sys.prefix) / "bin" / name]
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "data" / "bin" / name)
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"splitkern: the build needs {name}: pip install {name}")
    return found


def find_torch() -> Path:
    """Returns torch's folder without importing it: only its headers and the names of its libraries are used."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "splitkern: the build needs torch 2.11 to 2.13 in this environment: pip install 'torch>=2.11,<2.14'"
        )
    return Path(spec.origin).parent


def find_pybind11() -> Path:
    """Returns the folder of pybind11's CMake package."""
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise SystemExit("splitkern: the build needs pybind11: pip install 'pybind11>=3,<4'")
    return Path(spec.origin).parent / "share" / "cmake" / "pybind11"


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"splitkern: the native build failed: {shlex.join(command)}")


def build_libraries(version: str) -> list[Path]:
    """Configures and builds in ``build/`` (incremental), and returns the paths of the libraries."""
    torch_folder = find_torch()
    arguments = [
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DSPLITKERN_TORCH_INCLUDE={torch_folder / 'include'}",
        f"-DSPLITKERN_TORCH_LIB={torch_folder / 'lib'}",
        f"-DSPLITKERN_VERSION={version}",
        f"-Dpybind11_DIR={find_pybind11()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    cmake = find_tool("cmake")
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))

    # Configure when anything that decides how has changed, and then afresh: CMake keeps compilers and options in its
    # cache. Changes of CMakeLists.txt and new source files are ninja's to notice.
    choices = {name: os.environ.get(name) for name in ("CUDA_HOME", "CC", "CXX", "CUDACXX")}
    configure = [cmake, "--fresh", "--log-level=NOTICE", "-S", str(ROOT), "-B", str(BUILD), *arguments]
    key = json.dumps([configure, choices, shutil.which("nvcc")], indent=1)
    BUILD.mkdir(exist_ok=True)
    key_file = BUILD / "configured_with.json"
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        if not key_file.is_file() or key_file.read_text() != key:
            key_file.unlink(missing_ok=True)
            run(configure)
            key_file.write_text(key)
        run([cmake, "--build", str(BUILD), "--target", *chosen_libraries(), "--parallel", jobs])
    return [BUILD / LIBRARIES[name] for name in chosen_libraries()]


class CMakeBuild(build_ext):
    """Builds the libraries and copies them to the source tree (editable) or the wheel's tree."""

    def run(self) -> None:
        libraries = build_libraries(self.distribution.get_version())
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        for library in libraries:
            target = package / "splitkern" / library.name
            if target.is_file() and target.read_bytes() == library.read_bytes():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: running processes keep their file.
            partial = target.with_name(f"{library.name}.{os.getpid()}")
            shutil.copyfile(library, partial)
            partial.replace(target)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "splitkern" / LIBRARIES[name]) for name in chosen_libraries()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuild(build):
    """Empties the folder that becomes the wheel, so that a module deleted from the sources is not packed."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "splitkern", ignore_errors=True)
        super().run()


setup(
    # Never compiled by setuptools; it only says that the package is not pure Python.
    ext_modules=[Extension("splitkern._core", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    options={"build": {"build_base": "build/python"}},
    zip_safe=False,
)
