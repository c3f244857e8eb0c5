"""Loads the native operator library `_ops.so` and checks that it belongs to this Python package.

`splitkern/ops` calls `load` at import, which registers the operators as `torch.ops.splitkern.*`. torch must be imported
first: the library finds torch's symbols in the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from splitkern._version import __version__

_LIBRARY = Path(__file__).with_name("_ops.so")
_Tf32Query = ctypes.CFUNCTYPE(ctypes.c_int32)
_REBUILD = "rebuild it with `make build` in the source tree, or `pip install --no-build-isolation .`"


@dataclass(frozen=True)
class BuildInfo:
    """What the loaded native library was built from and for.

    Attributes:
        version: version of splitkern that the library was built as; equals `splitkern.__version__`.
        library: path of the loaded file.
        cuda_architectures: what the CUDA kernels were compiled for, `sm_...` (machine code) and `compute_...` (PTX,
            compiled by the driver); empty for a CPU-only build.
        cuda_compiler: nvcc's version, or None for a CPU-only build.
        cxx_compiler: the C++ compiler and its version.
        torch_target: oldest torch whose stable ABI the library keeps to.
        torch_headers: the torch whose headers it was compiled with.
    """

    version: str
    library: str
    cuda_architectures: tuple[str, ...]
    cuda_compiler: str | None
    cxx_compiler: str
    torch_target: str
    torch_headers: str


def _load(path: Path) -> BuildInfo:
    if not path.is_file():
        raise ImportError(f"splitkern: the native library {path} is missing; {_REBUILD}", path=str(path))
    try:
        library = ctypes.CDLL(str(path))
        describe = library.splitkern_build_info
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"splitkern: the native library {path} does not load beside torch {torch.__version__} "
            f"(torch 2.11 to 2.13 are supported): {error}; {_REBUILD}",
            path=str(path),
        ) from error
    describe.restype = ctypes.c_char_p
    text = json.loads(describe())
    if text["version"] != __version__:
        raise ImportError(
            f"splitkern: the native library {path} is version {text['version']}, "
            f"but the Python package is version {__version__}; {_REBUILD}",
            path=str(path),
        )
    return BuildInfo(
        version=text["version"],
        library=str(path),
        cuda_architectures=tuple(text["cuda_architectures"].split()),
        cuda_compiler=text["cuda_compiler"] or None,
        cxx_compiler=text["cxx_compiler"],
        torch_target=text["torch_target"],
        torch_headers=text["torch_headers"],
    )


def _allows_tf32() -> int:
    """Whether PyTorch lets fp32 convolutions round to tf32, however that was set (`torch.backends`, old or new names).

    The library asks at each fp32 convolution on CUDA; the stable ABI shows it no setting of PyTorch's.
    """
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch replaces the module by an object
    return int(conv.fp32_precision == "tf32")


_tf32_query = _Tf32Query(_allows_tf32)  # the library keeps its address, so it lives as long as the process


@functools.cache
def load() -> BuildInfo:
    """Loads the library, once, and returns what it says of itself; ImportError names the file and the reason."""
    info = _load(_LIBRARY)
    if info.cuda_compiler is not None:  # a CPU-only build has no kernels that could ask
        register = getattr(ctypes.CDLL(info.library), "splitkern_set_tf32_query", None)
        if register is None:
            raise ImportError(
                f"splitkern: the native library {info.library} is older than the Python package; {_REBUILD}",
                path=info.library,
            )
        register(_tf32_query)
    return info


def build_info() -> BuildInfo:
    """Returns what the loaded native library was built from and for.

    Returns:
        Versions, compilers and CUDA architectures, see `BuildInfo`.

    Example:
        >>> import splitkern as sk
        >>> sk.build_info().version == sk.__version__
        True
    """
    return load()


def copy_slots_address() -> int:
    """Address of what launches the kernels of compressed copies, for the copy pipeline on CUDA.

    Raises:
        RuntimeError: the library was built without the CUDA kernels.
    """
    path = build_info().library
    function = getattr(ctypes.CDLL(path), "splitkern_copy_slots", None)
    address = None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    if address is None:
        raise RuntimeError(f"splitkern: {path} was built without the CUDA kernels, which compressed copies need")
    return address


@contextlib.contextmanager
def forced_path(name: str, library: Path | None = None) -> Iterator[None]:
    """Makes every CUDA convolution inside the block take one path; a call that the path refuses raises RuntimeError.

    For tests and benchmarks. It holds for the whole process, so blocks of different threads must not overlap.

    Args:
        name: "plain", "depthwise", "first_layer", "sm80", "sm90", or "" for the automatic choice.
        library: another file that holds the kernels (the tests have one that runs them on the CPU); this package's
            library unless given.

    Raises:
        ValueError: no path has that name.
        RuntimeError: the library was built without the CUDA kernels.
    """
    path = Path(build_info().library) if library is None else library
    try:
        force = ctypes.CDLL(str(path)).splitkern_force_path
    except AttributeError:
        raise RuntimeError(f"splitkern: {path} was built without the CUDA kernels, so no path can be forced") from None
    if force(name.encode()) != 0:
        raise ValueError(f"splitkern: path must be plain, depthwise, first_layer, sm80 or sm90, got {name!r}")
    try:
        yield
    finally:
        force(None)


@functools.cache
def digest() -> str:
    """Of the loaded library's bytes: what was measured with one build does not hold for another."""
    with open(build_info().library, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
