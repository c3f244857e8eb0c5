"""Bugs in csrc/kernels/nhwc that the comparisons must notice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.host_execution.planting import SEVERAL_SCHEDULES, Bug, Build
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import NAMED, Case, square

UNEVEN = Case("uneven", next(case for case in NAMED if case.name == "uneven 2x2").geometry, 2, 8, 8)
STRIDED = Case("strided", next(case for case in NAMED if case.name == "stride 2, 3x3").geometry, 2, 8, 8)
TILES = Case("several tiles", square(3, 1, 1, 1, (0, 7), (0, 4, 15), (0, 7), (0, 4, 15)), 2, 40, 40)
SEGMENTS = Case("many segments", square(1, 1, 0, 1, (0, 41, 64), (0, 63), (0, 41, 64), (0, 63)), 3, 16, 16)


# Parts of larger tensors, so that a bug that reads past a patch stays inside the allocation.
def check(comparison: Callable[..., None], case: Case) -> Callable[[Build], None]:
    def run(build: Build) -> None:
        comparison(build.operators, case, torch.float16, "channels_last part")

    return run


def batch_norm(case: Case) -> Callable[[Build], None]:
    return check(partial(comparisons.batch_norm, relu=True, affine=torch.float32), case)


MAX, AVG, NORM, POOLING = (f"nhwc/{name}" for name in ("max_pool.cu", "avg_pool.cu", "batch_norm.cu", "pooling.h"))
BUGS = [
    Bug(
        "nhwc: a window's last position is of the next patch",
        *(MAX, MAX, "origin + tap : inputs.last - 1", "origin + tap : inputs.last"),
        *(check(comparisons.max_pool2d, UNEVEN), "patch_max_pool2d values"),
    ),
    Bug(
        "nhwc: last maximum wins",
        *(MAX, MAX, "exceeds_mask<T>(candidate.words[i], values.words[i])"),
        "~exceeds_mask<T>(values.words[i], candidate.words[i])",
        *(check(comparisons.max_pool2d, UNEVEN), "patch_max_pool2d offsets"),
    ),
    Bug(
        "nhwc: gradient of the wrong position of a cell",
        *(MAX, MAX, "const uint32_t tap = kStride * q + j;", "const uint32_t tap = kStride * q + (j ^ 1);"),
        *(check(comparisons.max_pool2d, STRIDED), "patch_max_pool2d_backward: relative error"),
    ),
    Bug(
        "nhwc: last column of a row of tiles left out",
        *(
            (MAX, AVG),
            POOLING,
            "item.exists = lane < tiles.lanes",
            "item.exists = lane + tiles.vectors.divisor < tiles.lanes",
        ),
        *(check(comparisons.max_pool2d, TILES), "patch_max_pool2d"),
    ),
    Bug(
        "nhwc: gradient from an output of the next patch",
        *(AVG, POOLING, "output >= first && output < last &&", "output >= first && output <= last &&"),
        *(check(comparisons.avg_pool2d, STRIDED), "patch_avg_pool2d_backward: relative error"),
    ),
    Bug(
        "nhwc: divisor leaves out the end padding",
        *(AVG, AVG, "(extent) + window.padding - taps.origin", "(extent) - taps.origin"),
        *(check(comparisons.avg_pool2d, STRIDED), "patch_avg_pool2d: relative error"),
    ),
    Bug(
        "nhwc: shares forget the pixels that are left over",
        *(NORM, NORM, "least + (index < extra ? 1 : 0)}", "least}"),
        *(batch_norm(SEGMENTS), "patch_batch_norm"),
    ),
    Bug(
        "nhwc: walk runs past the last row of a patch",
        *(NORM, NORM, "if (row >= box.rows) {", "if (row > box.rows) {"),
        *(batch_norm(SEGMENTS), "patch_batch_norm"),
    ),
    Bug(
        "nhwc: merged variance forgets that means differ",
        *(NORM, NORM, "multiply_add(static_cast<float>(count_of(i)) * delta,", "multiply_add(0 * delta,"),
        *(batch_norm(UNEVEN), "patch_batch_norm_stats m2: relative error"),
    ),
    Bug(
        "nhwc: last segment dropped",
        *(NORM, NORM, "work.exists && segment < params.segments)", "work.exists && segment < params.segments - 1)"),
        *(batch_norm(SEGMENTS), "patch_batch_norm"),
    ),
    Bug(
        "nhwc: lanes are merged before all have written",
        *(NORM, NORM, "= m2[i];\n  }\n  block_barrier();", "= m2[i];\n  }"),
        *(batch_norm(UNEVEN), "patch_batch_norm", SEVERAL_SCHEDULES),
    ),
    Bug(
        "nhwc: parameters are read before all are staged",
        *(NORM, NORM, "      }\n    }\n    block_barrier();\n  }", "      }\n    }\n  }"),
        *(batch_norm(UNEVEN), "patch_batch_norm", SEVERAL_SCHEDULES),
    ),
]
