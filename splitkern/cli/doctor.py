"""`splitkern doctor`: what this machine has, which operator paths splitkern can use on it, and why not the others.

Every path that is called available has just computed a small convolution, compared with PyTorch's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from splitkern._library import BuildInfo, build_info
from splitkern._version import __version__

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as PyTorch sees it; `code` says which compiled code it runs, or why none."""

    name: str
    compute_capability: str
    memory_bytes: int
    code: str


@dataclass(frozen=True)
class OperatorPath:
    """One implementation of the operators, and why it can or cannot be used here."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Findings:
    """Everything the command reports. `usable` decides the exit code."""

    usable: bool
    splitkern: str
    python: str
    torch: str
    torch_cuda: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    build: BuildInfo
    paths: tuple[OperatorPath, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `splitkern doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the findings.

    Args:
        args: parsed options: `json`.

    Returns:
        0 when splitkern can be used on this machine, 1 when not.
    """
    findings = examine()
    if args.json:
        print(json.dumps(dataclasses.asdict(findings), indent=2))
    else:
        print(_as_text(findings))
    return 0 if findings.usable else 1


def examine() -> Findings:
    """Looks at torch, the driver, the GPUs and the native library, and tries every operator path."""
    build = build_info()
    gpus = tuple(_gpus(build.cuda_architectures))
    paths = (_cpu_path(), _plain_cuda_path(build, gpus))
    return Findings(
        usable=any(path.available for path in paths),
        splitkern=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        driver=_driver_version(_DRIVER_FILE),
        gpus=gpus,
        build=build,
        paths=paths,
    )


def code_for_device(architectures: tuple[str, ...], major: int, minor: int) -> str | None:
    """Returns the compiled code that a GPU runs, or None where the library holds none for it.

    Machine code runs on GPUs of the same major and the same or a higher minor compute capability (with an `a` suffix:
    only on exactly that one); PTX is compiled by the driver for any later GPU.
    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".

    Args:
        architectures: names such as `sm_80`, `sm_90a`, `compute_80`.
        major: the GPU's major compute capability.
        minor: the GPU's minor compute capability.

    Example:
        >>> code_for_device(("sm_80", "compute_80"), 8, 6)
        'sm_80'
        >>> code_for_device(("sm_80", "compute_80"), 9, 0)
        'compute_80'
    """
    best: tuple[bool, int, str] | None = None
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", name)
        if match is None:
            continue
        of = (int(match[2]), int(match[3]))
        machine_code = match[1] == "sm"
        if match[4]:
            runs = of == (major, minor)
        elif machine_code:
            runs = of[0] == major and of[1] <= minor
        else:
            runs = of <= (major, minor)
        if runs:
            best = max(best or (False, -1, ""), (machine_code, of[0] * 10 + of[1], name))
    return None if best is None else best[2]


def _gpus(architectures: tuple[str, ...]) -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        code = code_for_device(architectures, properties.major, properties.minor)
        gpus.append(
            Gpu(
                name=properties.name,
                compute_capability=f"{properties.major}.{properties.minor}",
                memory_bytes=properties.total_memory,
                code=code or f"none of {' '.join(architectures) or 'this CPU-only build'} runs on it",
            )
        )
    return gpus


def _driver_version(file: Path) -> str | None:
    """Returns the NVIDIA kernel driver's version, e.g. "580.65.06", or None where no driver is loaded."""
    try:
        match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.read_text())
    except OSError:
        return None
    return None if match is None else match[1]


def _cpu_path() -> OperatorPath:
    failure = _try_convolution(torch.device("cpu"))
    return OperatorPath("cpu", failure is None, failure or "a trial convolution equals PyTorch's")


def _plain_cuda_path(build: BuildInfo, gpus: tuple[Gpu, ...]) -> OperatorPath:
    reason = _why_no_cuda(build, gpus)
    if reason is None:
        reason = _try_convolution(torch.device("cuda", torch.cuda.current_device()))
    return OperatorPath("cuda plain", reason is None, reason or "a trial convolution equals PyTorch's")


def _why_no_cuda(build: BuildInfo, gpus: tuple[Gpu, ...]) -> str | None:
    if build.cuda_compiler is None:
        return "splitkern was built without nvcc; set CUDA_HOME to a CUDA 13 toolkit and rebuild"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not gpus:
        return "PyTorch sees no CUDA device (torch.cuda.is_available() is False)"
    gpu = gpus[torch.cuda.current_device()]
    if code_for_device(build.cuda_architectures, *map(int, gpu.compute_capability.split("."))) is None:
        return f"{gpu.name} has compute capability {gpu.compute_capability}: {gpu.code}"
    return None


def _try_convolution(device: torch.device) -> str | None:
    """Returns None where a split 3x3 convolution equals PyTorch's of each half, else what went wrong."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 8, 6, generator=generator).to(device)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(device)
    halves = [torch.nn.functional.conv2d(half, weight, padding=1) for half in image.chunk(2, dim=2)]
    try:
        result = torch.ops.splitkern.patch_conv2d(
            image, weight, None, [1, 1], [1, 1], [1, 1], 1, [0, 4, 8], [0, 6], [0, 4, 8], [0, 6], "none"
        )
    except (RuntimeError, AttributeError) as error:  # AttributeError: the operator is not registered
        return f"a trial convolution failed: {str(error).splitlines()[0]}"
    expected = torch.cat(halves, dim=2)
    error_size = ((result - expected).norm() / expected.norm()).item()
    tolerance = 1e-2 if device.type == "cuda" else 1e-5  # PyTorch may compute its side in tf32 on CUDA
    return None if error_size <= tolerance else f"a trial convolution is off by {error_size:.1e} (relative L2)"


def _as_text(findings: Findings) -> str:
    build = findings.build
    compiled_by = build.cxx_compiler if build.cuda_compiler is None else f"{build.cxx_compiler}, {build.cuda_compiler}"
    compiled_for = " ".join(build.cuda_architectures) or "the CPU only"
    torch_cuda = f"built with CUDA {findings.torch_cuda}" if findings.torch_cuda else "built without CUDA"
    lines = [
        f"splitkern   {findings.splitkern}",
        f"library     {build.library}",
        f"            compiled by {compiled_by} for {compiled_for}",
        f"            torch stable ABI {build.torch_target}, headers {build.torch_headers}",
        f"Python      {findings.python}",
        f"torch       {findings.torch}, {torch_cuda}",
        f"driver      {findings.driver or 'no NVIDIA driver is loaded'}",
    ]
    for index, gpu in enumerate(findings.gpus):
        memory_gib = gpu.memory_bytes / 2**30
        lines.append(
            f"GPU {index}       {gpu.name}, compute capability {gpu.compute_capability}, "
            f"{memory_gib:.1f} GiB; runs {gpu.code}"
        )
    if not findings.gpus:
        lines.append("GPU         none visible to PyTorch")
    lines.append("")
    lines.append("Operator paths")
    for path in findings.paths:
        lines.append(f"  {path.name:<12}{'available' if path.available else 'not available'}: {path.reason}")
    lines.append("")
    lines.append("splitkern is usable here." if findings.usable else "splitkern is not usable here.")
    return "\n".join(lines)
