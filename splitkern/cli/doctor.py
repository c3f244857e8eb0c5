"""`splitkern doctor`: what this machine has, which operator paths splitkern can use on it, and why not the others.

Every path that is called available has just computed a small convolution, compared with PyTorch's. With `--explain`
instead: which kernels a given call would take, on this GPU or on another one.
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

from splitkern._library import BuildInfo, build_info, forced_path
from splitkern._version import __version__
from splitkern.cli import explain as explanations
from splitkern.cli import link as links
from splitkern.cli.common import UserError, mib

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
    """Everything the command reports. `usable` decides the exit code; `link` is measured, or says why not."""

    usable: bool
    splitkern: str
    python: str
    torch: str
    torch_cuda: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    build: BuildInfo
    paths: tuple[OperatorPath, ...]
    link: links.Link | str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `splitkern doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--explain",
        metavar="SHAPE",
        help=f"say which kernels a call takes, and why: {explanations.USAGE}",
    )
    parser.add_argument(
        "--architecture",
        metavar="SM",
        help=f"with --explain: a GPU other than this machine's, one of {', '.join(explanations.ARCHITECTURES)}",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the findings, or the explanation that was asked for.

    Args:
        args: parsed options: `json`, `explain`, `architecture`.

    Returns:
        0 when splitkern can be used on this machine (or has explained), 1 when not.

    Raises:
        UserError: for a shape or an architecture that `--explain` cannot take.
    """
    if args.explain is not None:
        return _explain(args.explain, args.architecture, args.json)
    if args.architecture is not None:
        raise UserError("--architecture needs --explain")
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
    paths = (_cpu_path(), *_cuda_paths(build, gpus))
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
        link=_link(build, gpus),
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


def _link(build: BuildInfo, gpus: tuple[Gpu, ...]) -> links.Link | str:
    """Copies of the current GPU to and from pinned host memory, or why none were made."""
    reason = _why_no_cuda(build, gpus)
    if reason is not None:
        return reason
    try:
        return links.measure(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:  # of the allocations and of the copies
        return str(error).splitlines()[0]


def _cpu_path() -> OperatorPath:
    failure = _try_convolution(torch.device("cpu"))
    return OperatorPath("cpu", failure is None, failure or "a trial convolution equals PyTorch's")


# What a path computes in its trial: dtype, input channels per group, groups.
_TRIALS: dict[str, tuple[torch.dtype, int, int]] = {
    "plain": (torch.float32, 3, 1),
    "depthwise": (torch.bfloat16, 1, 16),
    "first_layer": (torch.bfloat16, 3, 1),
    "sm80": (torch.bfloat16, 16, 1),
    "sm90": (torch.bfloat16, 16, 1),
}


def _cuda_paths(build: BuildInfo, gpus: tuple[Gpu, ...]) -> list[OperatorPath]:
    """The plain path first, then the others as the library prefers them."""
    reason = _why_no_cuda(build, gpus)
    names = sorted(explanations.conv_paths() or ("plain",), key=lambda name: name != "plain")
    paths = []
    for name in names:
        failure = reason
        if failure is None:
            with forced_path(name):
                failure = _try_convolution(torch.device("cuda", torch.cuda.current_device()), *_TRIALS[name])
        paths.append(OperatorPath(f"cuda {name}", failure is None, failure or "a trial convolution equals PyTorch's"))
    return paths


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


def _try_convolution(
    device: torch.device, dtype: torch.dtype = torch.float32, channels: int = 3, groups: int = 1
) -> str | None:
    """Returns None where a split 3x3 convolution equals PyTorch's of each half, else what went wrong."""
    generator = torch.Generator().manual_seed(0)
    format = torch.channels_last
    image = torch.randn(1, channels * groups, 8, 6, generator=generator).to(device, dtype, memory_format=format)
    weight = torch.randn(16, channels, 3, 3, generator=generator).to(device, dtype, memory_format=format)
    halves = [
        torch.nn.functional.conv2d(half, weight.float(), padding=1, groups=groups)
        for half in image.float().chunk(2, dim=2)
    ]
    try:
        result = torch.ops.splitkern.patch_conv2d(
            image, weight, None, [1, 1], [1, 1], [1, 1], groups, [0, 4, 8], [0, 6], [0, 4, 8], [0, 6], "none"
        )
    except (RuntimeError, AttributeError) as error:  # AttributeError: the operator is not registered
        return f"a trial convolution failed: {str(error).splitlines()[0]}"
    expected = torch.cat(halves, dim=2)
    error_size = ((result.float() - expected).norm() / expected.norm()).item()
    tolerance = 1e-2 if device.type == "cuda" else 1e-5  # on CUDA results are rounded to bf16, PyTorch's side to tf32
    return None if error_size <= tolerance else f"a trial convolution is off by {error_size:.1e} (relative L2)"


def _explain(text: str, architecture: str | None, as_json: bool) -> int:
    shape = explanations.parse(text)
    device = explanations.device_for(architecture)
    found = explanations.explain(shape, device)
    if as_json:
        answer = {
            "shape": dataclasses.asdict(shape),
            "device": dataclasses.asdict(device),
            "passes": [dataclasses.asdict(one) for one in found],
        }
        print(json.dumps(answer, indent=2))
        return 0
    print(f"on {device.name}, {device.multiprocessors} multiprocessors")
    width = max(len(one.operation) for one in found) + 2
    for one in found:
        because, *others = one.reason.split("; not ")
        print(f"{one.operation:<{width}}{because}")
        for other in others:
            print(f"{'':<{width}}  not {other}")
        if one.workspace_bytes:
            print(f"{'':<{width}}  workspace {mib(one.workspace_bytes)}")
    return 0


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
    link = findings.link
    lines.append(f"copies      {link.text if isinstance(link, links.Link) else f'not measured: {link}'}")
    lines.append("")
    lines.append("Operator paths")
    for path in findings.paths:
        lines.append(f"  {path.name:<18}{'available' if path.available else 'not available'}: {path.reason}")
    lines.append("")
    lines.append("splitkern is usable here." if findings.usable else "splitkern is not usable here.")
    return "\n".join(lines)
