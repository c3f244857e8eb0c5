"""The comparisons notice bugs: each of these, planted in a copy of the kernels, must fail one."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.host_execution.conftest import ROOT, load, run
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import LONG_REDUCTION, NAMED, Case
from tests.kernel_checks.comparisons import Operators

UNEVEN = next(case for case in NAMED if case.name == "uneven 2x2")
STRIDED = next(case for case in NAMED if case.name == "stride 2, 3x3")


# The inputs are views with a margin, so that a bug that reads past a patch stays inside the allocation.
def conv2d(operators: Operators, case: Case) -> None:
    comparisons.conv2d(operators, case, torch.float32, "view")


def max_pool2d(operators: Operators, case: Case) -> None:
    comparisons.max_pool2d(operators, case, torch.float32, "view")


def avg_pool2d(operators: Operators, case: Case) -> None:
    comparisons.avg_pool2d(operators, case, torch.float32, "view")


def batch_norm(operators: Operators, case: Case) -> None:
    comparisons.batch_norm(operators, case, torch.float32, "view", relu=True, affine=torch.float32)


@dataclass(frozen=True)
class Bug:
    name: str
    kernels: str  # the plain/*.cu that is compiled with the bug
    file: str
    right: str
    wrong: str
    check: Callable[[Operators, Case], None]
    case: Case
    noticed_in: str

    def __str__(self) -> str:
        return self.name


BUGS = [
    Bug(
        "reads one input of the next patch",
        *("conv_forward", "geometry.h", "in_end - 1 - taps.origin", "in_end - taps.origin"),
        *(conv2d, UNEVEN, "patch_conv2d: relative error"),
    ),
    Bug(
        "reads one input of the patch before",
        *("conv_forward", "geometry.h", "= in_begin - taps.origin", "= in_begin - 1 - taps.origin"),
        *(conv2d, UNEVEN, "patch_conv2d: relative error"),
    ),
    Bug(
        "begin padding of the wrong sign",
        *(
            "conv_forward",
            "geometry.h",
            "output * window.stride - window.padding",
            "output * window.stride + window.padding",
        ),
        *(conv2d, UNEVEN, "patch_conv2d: relative error"),
    ),
    Bug(
        "gradient from an output of the next patch",
        *("conv_input_grad", "geometry.h", "output < out_end", "output <= out_end"),
        *(conv2d, UNEVEN, "patch_conv2d_input_grad: relative error"),
    ),
    Bug(
        "last segment of the reduction dropped",
        *("conv_weight_grad", "conv_weight_grad.cu", "segment < params.segments;", "segment < params.segments - 1;"),
        *(conv2d, LONG_REDUCTION, "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "weight gradient takes a whole row of patches as one",
        *("conv_weight_grad", "conv_weight_grad.cu", "in_row < rows.in_bounds[row_patch]", "in_row < 0"),
        *(conv2d, UNEVEN, "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "last maximum wins",
        *("max_pool", "max_pool.cu", "value > to_accumulator(best)", "value >= to_accumulator(best)"),
        *(max_pool2d, UNEVEN, "patch_max_pool2d offsets"),
    ),
    Bug(
        "divisor leaves out the end padding",
        *("avg_pool", "avg_pool.cu", "extent + window.padding - taps.origin", "extent - taps.origin"),
        *(avg_pool2d, STRIDED, "patch_avg_pool2d: relative error"),
    ),
    Bug(
        "merged variance forgets that means differ",
        *("batch_norm", "batch_norm.cu", "delta * delta *", "0 * delta *"),
        *(batch_norm, UNEVEN, "patch_batch_norm_stats m2: relative error"),
    ),
]
CONTROL = Bug(
    "none", "conv_forward", "geometry.h", "in_end - 1 - taps.origin", "in_end - 1 - taps.origin", conv2d, UNEVEN, ""
)


def build_with(bug: Bug, host_build: Path, folder: Path) -> Operators:
    """The library with one file of kernels compiled from a changed copy, in a namespace of its own."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    changed = source / "kernels" / "plain" / bug.file
    text = changed.read_text()
    assert text.count(bug.right) == 1, f"{bug.file} must hold {bug.right!r} once for the bug to be planted"
    changed.write_text(text.replace(bug.right, bug.wrong))

    namespace = "splitkern_" + "".join(c if c.isalnum() else "_" for c in bug.name)
    again = {f"plain_{bug.kernels}.cpp", "library.cpp"}
    objects = []
    for entry in json.loads((host_build / "compile_commands.json").read_text()):
        if "_ops_host_execution.dir" not in entry["command"]:
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
    return load(library, namespace)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bug_is_noticed(bug: Bug, host_build: Path, tmp_path: Path) -> None:
    operators = build_with(bug, host_build, tmp_path)
    with pytest.raises(AssertionError, match=bug.noticed_in):
        bug.check(operators, bug.case)


def test_unchanged_copy_passes(host_build: Path, tmp_path: Path) -> None:
    """So that the failures above come from the bugs and not from how the copies are built."""
    CONTROL.check(build_with(CONTROL, host_build, tmp_path), CONTROL.case)
