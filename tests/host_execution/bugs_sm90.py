"""Bugs in csrc/kernels/sm90 that the comparisons must notice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from tests.host_execution.planting import SEVERAL_SCHEDULES, Bug, Build
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import Case, square
from tests.kernel_checks.sm90 import SMALL, WINDOW, tuned

UNEVEN = next(case for case in SMALL if case.name == "uneven 2x2")
STRIDED = next(case for case in SMALL if case.name == "stride 2, 3x3")
RESIDENT = next(case for case in WINDOW if case.name == "resident, uneven")
# More steps than a block has stages.
LONG = Case("long", STRIDED.geometry, 2, 264, 8)
# More boxes than a block has places for.
MANY_BOXES = replace(RESIDENT, geometry=square(3, 1, 1, 1, (0, 24), (0, 24), (0, 24), (0, 24)), batch=4)
WIDE = next(case for case in WINDOW if case.name == "wide, channel tails")


# The inputs are views with a margin, so that a bug that reads past a patch stays inside the allocation.
def conv2d(build: Build, case: Case, multiprocessors: int = 132, **knobs: int) -> None:
    build.set_device(multiprocessors=multiprocessors)
    with build.forced_path("sm90"), tuned(build.library, **knobs):
        comparisons.conv2d(build.operators, case, torch.bfloat16, "aligned channels_last view")


im2col = partial(conv2d, window=0)
window = partial(conv2d, window=1)
GEMM = ("sm90/conv_gemm_forward_bf16.cu", "sm90/conv_gemm_input_grad_bf16.cu")
FORWARD_ERROR = "patch_conv2d: relative error"

BUGS = [
    Bug(
        "im2col walk one output short",
        *(("sm90/conv_forward.cu", *GEMM), "sm90/geometry.h"),
        *("(walk.outputs - 1) * walk.step", "(walk.outputs - 2) * walk.step"),
        *(partial(im2col, case=UNEVEN), FORWARD_ERROR),
    ),
    Bug(
        "operand of one more row than the patch",
        *(GEMM, "sm90/geometry.h"),
        *("map.rows = static_cast<int32_t>(rows.operand_extent);", "map.rows = rows.operand_extent + 1;"),
        *(partial(im2col, case=UNEVEN), FORWARD_ERROR),
    ),
    Bug(
        "outputs staged without a fence",
        *(GEMM, "sm90/conv_gemm.h", "    fence_async_shared();\n", ""),
        *(partial(im2col, case=UNEVEN), FORWARD_ERROR),
    ),
    Bug(
        "producer waits for the wrong phase",
        *(GEMM, "sm90/conv_gemm.h", "ring.parity ^ 1);", "ring.parity);"),
        *(partial(im2col, case=UNEVEN), "deadlock"),
    ),
    Bug(
        "stage released while it is read",
        *(GEMM, "sm90/conv_gemm.h", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        *(partial(im2col, case=LONG), "deadlock|patch_conv2d: (relative error|different bits)", SEVERAL_SCHEDULES),
    ),
    Bug(
        "window's outputs staged without the swizzle",
        *("sm90/window.cu", "sm90/window.cu", "(chunk ^ (pixel & 7)) * 16", "chunk * 16"),
        *(partial(window, case=WIDE), FORWARD_ERROR),
    ),
    Bug(
        "window reads one pixel further right",
        *("sm90/window.cu", "sm90/window.cu"),
        *(
            "static_cast<int32_t>(problem.columns.lower) + strip",
            "static_cast<int32_t>(problem.columns.lower) + 1 + strip",
        ),
        *(partial(window, case=WIDE), FORWARD_ERROR),
    ),
    Bug(
        "resident window gives a box back while its outputs leave from it",
        *("sm90/window.cu", "sm90/window.cu"),
        *(
            "if (staged_box >= 0 && thread == 0) {\n          tma_store_wait_read<0>();",
            "if (staged_box >= 0 && thread == 0) {",
        ),
        *(
            partial(window, case=MANY_BOXES, multiprocessors=1),
            "patch_conv2d.*(relative error|different bits|differs)",
            SEVERAL_SCHEDULES,
        ),
    ),
    Bug(
        "last partial sum of a tile dropped",
        *("sm90/partial_sums.cu", "sm90/partial_sums.cu", "block <= last;", "block < last;"),
        *(partial(window, case=RESIDENT), "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "window weight gradient with the taps of a row two pixels apart",
        *("sm90/window_weight_grad.cu", "sm90/window_weight_grad.cu"),
        *("(params.offset_column_step * kPixelBytes)", "(2 * params.offset_column_step * kPixelBytes)"),
        *(partial(window, case=RESIDENT), "patch_conv2d_weight_grad: relative error"),
    ),
]
