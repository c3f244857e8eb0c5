"""Bugs in csrc/kernels/plain that the comparisons must notice."""

from __future__ import annotations

from functools import partial

import torch

from tests.host_execution.planting import Bug, Build
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import LONG_REDUCTION, NAMED, Case

UNEVEN = next(case for case in NAMED if case.name == "uneven 2x2")
STRIDED = next(case for case in NAMED if case.name == "stride 2, 3x3")


# The inputs are views with a margin, so that a bug that reads past a patch stays inside the allocation.
def conv2d(build: Build, case: Case) -> None:
    with build.forced_path("plain"):
        comparisons.conv2d(build.operators, case, torch.float32, "view")


def max_pool2d(build: Build, case: Case) -> None:
    comparisons.max_pool2d(build.operators, case, torch.float32, "view")


def avg_pool2d(build: Build, case: Case) -> None:
    comparisons.avg_pool2d(build.operators, case, torch.float32, "view")


def batch_norm(build: Build, case: Case) -> None:
    comparisons.batch_norm(build.operators, case, torch.float32, "view", relu=True, affine=torch.float32)


BUGS = [
    Bug(
        "reads one input of the next patch",
        *("plain/conv_forward.cu", "plain/geometry.h", "in_end - 1 - taps.origin", "in_end - taps.origin"),
        *(partial(conv2d, case=UNEVEN), "patch_conv2d: relative error"),
    ),
    Bug(
        "reads one input of the patch before",
        *("plain/conv_forward.cu", "plain/geometry.h", "= in_begin - taps.origin", "= in_begin - 1 - taps.origin"),
        *(partial(conv2d, case=UNEVEN), "patch_conv2d: relative error"),
    ),
    Bug(
        "begin padding of the wrong sign",
        *(
            "plain/conv_forward.cu",
            "plain/geometry.h",
            "output * window.stride - window.padding",
            "output * window.stride + window.padding",
        ),
        *(partial(conv2d, case=UNEVEN), "patch_conv2d: relative error"),
    ),
    Bug(
        "gradient from an output of the next patch",
        *("plain/conv_input_grad.cu", "plain/geometry.h", "output < out_end", "output <= out_end"),
        *(partial(conv2d, case=UNEVEN), "patch_conv2d_input_grad: relative error"),
    ),
    Bug(
        "last segment of the reduction dropped",
        *(
            "plain/conv_weight_grad.cu",
            "plain/conv_weight_grad.cu",
            "segment < params.segments;",
            "segment < params.segments - 1;",
        ),
        *(partial(conv2d, case=LONG_REDUCTION), "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "weight gradient takes a whole row of patches as one",
        *("plain/conv_weight_grad.cu", "plain/conv_weight_grad.cu", "in_row < rows.in_bounds[row_patch]", "in_row < 0"),
        *(partial(conv2d, case=UNEVEN), "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "last maximum wins",
        *("plain/max_pool.cu", "plain/max_pool.cu", "value > to_accumulator(best)", "value >= to_accumulator(best)"),
        *(partial(max_pool2d, case=UNEVEN), "patch_max_pool2d offsets"),
    ),
    Bug(
        "divisor leaves out the end padding",
        *("plain/avg_pool.cu", "plain/avg_pool.cu", "extent + window.padding - taps.origin", "extent - taps.origin"),
        *(partial(avg_pool2d, case=STRIDED), "patch_avg_pool2d: relative error"),
    ),
    Bug(
        "merged variance forgets that means differ",
        *("plain/batch_norm.cu", "plain/batch_norm.cu", "delta * delta *", "0 * delta *"),
        *(partial(batch_norm, case=UNEVEN), "patch_batch_norm_stats m2: relative error"),
    ),
]

# Changes nothing: so that the failures above come from the bugs and not from how the copies are built.
CONTROL = Bug(
    "none",
    *("plain/conv_forward.cu", "plain/geometry.h", "in_end - 1 - taps.origin", "in_end - 1 - taps.origin"),
    *(partial(conv2d, case=UNEVEN), ""),
)
