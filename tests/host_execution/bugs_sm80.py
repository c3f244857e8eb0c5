"""Bugs in csrc/kernels/sm80 that the comparisons must notice."""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from splitkern import _library
from tests.host_execution.planting import SEVERAL_SCHEDULES, Bug, Build
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import NAMED, Case, square

UNEVEN = (0, 4, 9), (0, 5, 7)
BORDERS = Case("uneven 2x2", square(3, 1, 1, 1, *UNEVEN, *UNEVEN), 1, 40, 40)
STRIDED = Case("stride 2, 3x3", next(c for c in NAMED if c.name == "stride 2, 3x3").geometry, 1, 40, 40)
LONG = Case("long", square(1, 1, 0, 1, (0, 20, 33), (0, 30), (0, 20, 33), (0, 30)), 1, 8, 8)


# Few multiprocessors, so that tiles are large, and yet more than one share of a reduction.
def conv2d(build: Build, case: Case, dtype: torch.dtype = torch.bfloat16) -> None:
    build.set_device(80, 4, 163 * 1024)
    library = ctypes.CDLL(str(build.library))
    allow = _library._Tf32Query(lambda: 1)
    library.splitkern_set_tf32_query(allow)
    try:
        with build.forced_path("sm80"):
            comparisons.conv2d(build.operators, case, dtype, "aligned channels_last view", tf32=dtype == torch.float32)
    finally:
        library.splitkern_set_tf32_query(None)


GATHER = "sm80/gather.cu"
WEIGHT_GRAD = "sm80/weight_grad.cu"

BUGS = [
    Bug(
        "sm80: gathers one source behind the patch",
        *(GATHER, "sm80/gather_kernel.h", "position < end", "position <= end"),
        *(partial(conv2d, case=BORDERS), "patch_conv2d: relative error"),
    ),
    Bug(
        "sm80: input gradient takes the taps of another class",
        *("sm80/gather_paths.cu", "sm80/gather_paths.cu", "static_cast<int32_t>(tap);", "0;"),
        *(partial(conv2d, case=STRIDED), "patch_conv2d_input_grad: relative error"),
    ),
    Bug(
        "sm80: no barrier between a stage's arrival and its use",
        *(
            GATHER,
            "sm80/tiles.h",
            "multiply(sums, fragments[0]);\n      copy_async_wait<kStages - 2>();\n      block_barrier();",
            "multiply(sums, fragments[0]);\n      copy_async_wait<kStages - 2>();",
        ),
        # The operator runs twice: where the race does not spoil a result, it spoils the next.
        *(partial(conv2d, case=BORDERS), "patch_conv2d.*(relative error|different bits|differs)"),
        SEVERAL_SCHEDULES,
    ),
    Bug(
        "sm80: waits for one stage too few",
        *(
            GATHER,
            "sm80/tiles.h",
            "copy_async_wait<kStages - 2>();\n  block_barrier();",
            "copy_async_wait<kStages - 1>();\n  block_barrier();",
        ),
        *(partial(conv2d, case=BORDERS), "patch_conv2d"),
    ),
    Bug(
        "sm80: the first operand is read without its permutation",
        *(
            GATHER,
            "sm80/tiles.h",
            "a + stage_offset(lane & 15, step * 2 + (lane >> 4))",
            "a + (lane & 15) * kStageBytes + (step * 2 + (lane >> 4)) * kVectorBytes",
        ),
        *(partial(conv2d, case=BORDERS), "patch_conv2d: relative error"),
    ),
    Bug(
        "sm80: channels behind the last one are not cleared",
        *(GATHER, "sm80/gather_kernel.h", "channel_exists = channel < channel_bytes", "channel_exists = true"),
        # What lies behind the weight is not the test's: it may change between any two runs.
        *(partial(conv2d, case=BORDERS), "patch_conv2d.*(relative error|different bits|differs)"),
    ),
    Bug(
        "sm80: no barrier before the offsets of the outputs are read",
        *(
            GATHER,
            "sm80/gather_kernel.h",
            "pixel.destination_offset : -1;\n  }\n  block_barrier();",
            "pixel.destination_offset : -1;\n  }",
        ),
        *(partial(conv2d, case=BORDERS), "patch_conv2d.*(relative error|different bits|differs|store_global)"),
        SEVERAL_SCHEDULES,
    ),
    Bug(
        "sm80: weight gradient reads one column behind the patch",
        *(
            WEIGHT_GRAD,
            "sm80/weight_grad_kernel.h",
            "static_cast<uint32_t>(pixel.column + tap_column) < static_cast<uint32_t>(pixel.patch_columns)",
            "static_cast<uint32_t>(pixel.column + tap_column) <= static_cast<uint32_t>(pixel.patch_columns)",
        ),
        *(partial(conv2d, case=BORDERS), "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "sm80: weight gradient drops its last share",
        *(
            WEIGHT_GRAD,
            "sm80/weight_grad.cu",
            "reduce.segments = params.segments;",
            "reduce.segments = params.segments - 1;",
        ),
        *(partial(conv2d, case=LONG), "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "sm80: weight gradient writes pixels with another permutation than it reads",
        *(
            WEIGHT_GRAD,
            "sm80/weight_grad_kernel.h",
            "stage.input + pixel_row_offset<Tile, Tile::kColumns>(p, input_vector)",
            "stage.input + pixel_row_offset<Tile, Tile::kColumns>(p, input_vector ^ 1)",
        ),
        *(partial(conv2d, case=BORDERS), "patch_conv2d_weight_grad: relative error"),
    ),
    Bug(
        "sm80: tf32 operands are not permuted as they were written",
        *(WEIGHT_GRAD, "sm80/weight_grad_kernel.h", "const int32_t pixel = lane % 4;", "const int32_t pixel = 0;"),
        *(partial(conv2d, case=BORDERS, dtype=torch.float32), "patch_conv2d_weight_grad: relative error"),
    ),
]
