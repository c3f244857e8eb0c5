"""Bugs in csrc/kernels/copy that the comparisons must notice."""

from __future__ import annotations

import torch

from tests.host_execution.planting import SEVERAL_SCHEDULES, Bug, Build
from tests.kernel_checks import copies as checks
from tests.kernel_checks.copies import Copies


def plain(build: Build) -> None:
    copies = Copies(build.operators.namespace)
    for method in ("kernel", "engine"):
        checks.plain(copies, "patch of channels_last, odd channels", torch.bfloat16, method)
        checks.plain(copies, "contiguous NCHW", torch.bfloat16, method)


def compressed(build: Build) -> None:
    copies = Copies(build.operators.namespace)
    for dtype in (torch.bfloat16, torch.float64):
        checks.compressed(copies, "three chunks and a bit", dtype)
        checks.compressed(copies, "patch of channels_last, odd channels", dtype)


def negative_zero(build: Build) -> None:
    checks.special_floats(Copies(build.operators.namespace))


def few_warps(build: Build) -> None:
    checks.more_chunks_than_warps(Copies(build.operators.namespace), build.library)


def damaged(build: Build) -> None:
    copies = Copies(build.operators.namespace)
    result = checks.foreign_buffer(copies, checks.damage_header(36))
    assert bool(result.isnan().all()), "a foreign header was believed"


WALK, STRIDED, COMPRESS = "copy/walk.h", "copy/strided.cu", "copy/compress.cu"
BOTH = (STRIDED, COMPRESS)

BUGS = [
    Bug(
        "copy: quotient rounded down",
        *(STRIDED, WALK, "static_cast<uint64_t>(divisor) - 1) / divisor", "0) / divisor"),
        *(plain, "offload by kernel.*other bytes"),
    ),
    Bug(
        "copy: tail of the packed run dropped",
        *(
            STRIDED,
            STRIDED,
            "const uint32_t tail_unit = vectors * 16 / kUnit + lane;",
            "const uint32_t tail_unit = kUnits + lane;",
        ),
        *(plain, "offload by kernel.*other bytes"),
    ),
    Bug(
        "copy: the last vector always whole",
        *(
            STRIDED,
            STRIDED,
            "const uint32_t vectors = units * kUnit / 16;",
            "const uint32_t vectors = (units * kUnit + 15) / 16;",
        ),
        *(plain, "offload by kernel.*wrote outside"),
    ),
    Bug(
        "copy: slices of the engine one row short",
        *(
            STRIDED,
            STRIDED,
            "plan.box.from_slice_pitches = device_slice / device_pitch;",
            "plan.box.from_slice_pitches = plan.box.height;",
        ),
        *(plain, "offload by engine.*other bytes"),
    ),
    Bug(
        "copy: pitches of an engine prefetch not swapped",
        *(STRIDED, STRIDED, "std::swap(box.from_pitch, box.to_pitch);", ""),
        *(plain, "prefetch by engine.*(other bytes|wrote outside)|overlapping rows"),
    ),
    Bug(
        "copy: no barrier between gather and store",
        STRIDED,
        STRIDED,
        "gather<kUnit>(walk, device, first, staged);\n      warp_barrier();",
        "gather<kUnit>(walk, device, first, staged);",
        plain,
        "offload by kernel.*other bytes",
        SEVERAL_SCHEDULES,
    ),
    Bug(
        "compression: mask off by one bit",
        *(
            COMPRESS,
            COMPRESS,
            "? 1u : 0u) << decltype(i)::value;",
            "? 1u : 0u) << (decltype(i)::value + 1) % Sizes::kPerLane;",
        ),
        *(compressed, "offload_compressed of .*other bytes"),
    ),
    Bug(
        "compression: own lane counted as before",
        *(COMPRESS, COMPRESS, "(1u << lane_index()) - 1;", "(2u << lane_index()) - 1;"),
        *(compressed, "offload_compressed of .*other bytes"),
    ),
    Bug(
        "compression: values not padded",
        *(COMPRESS, COMPRESS, "if (used_bytes + lane < stored_bytes) slot.bytes[used_bytes + lane] = 0;", ""),
        *(compressed, "offload_compressed of .*other bytes"),
    ),
    Bug(
        "compression: negative zero dropped",
        COMPRESS,
        COMPRESS,
        "(element_of<T>(vector, decltype(i)::value) != 0",
        "(static_cast<T>(element_of<T>(vector, decltype(i)::value) << 1) != 0",
        negative_zero,
        "other bytes",
    ),
    Bug(
        "compression: no barrier before the slot is stored",
        COMPRESS,
        COMPRESS,
        "slot.bytes[used_bytes + lane] = 0;\n    warp_barrier();",
        "slot.bytes[used_bytes + lane] = 0;",
        compressed,
        "offload_compressed of .*other bytes",
        SEVERAL_SCHEDULES,
    ),
    Bug(
        "decompression: mask of the next chunk",
        *(
            COMPRESS,
            COMPRESS,
            "Vector16 next_mask = load_mask_of(params.first_slot + warp);",
            "Vector16 next_mask = load_mask_of(params.first_slot + warp + 1);",
        ),
        *(compressed, "prefetch_compressed of .*other bytes"),
    ),
    Bug(
        "decompression: mask fetched ahead of the wrong chunk",
        *(COMPRESS, COMPRESS, "next_mask = load_mask_of(chunk + warps);", "next_mask = load_mask_of(chunk + 1);"),
        *(few_warps, "compressed: other bytes"),
    ),
    Bug(
        "decompression: slot taken before every lane has read it",
        COMPRESS,
        COMPRESS,
        "warp_barrier();  // all lanes have read mask and values",
        "",
        compressed,
        "prefetch_compressed of .*other bytes",
        SEVERAL_SCHEDULES,
    ),
    Bug(
        "copy: stage taken while others still store from it",
        STRIDED,
        STRIDED,
        "warp_barrier();  // before the next chunk takes the stage",
        "",
        few_warps,
        "by one block: other bytes",
        SEVERAL_SCHEDULES,
    ),
    Bug(
        "decompression: values start anew in every step",
        *(COMPRESS, COMPRESS, "taken += sums.all;", "taken = sums.all;"),
        *(compressed, "prefetch_compressed of .*other bytes"),
    ),
    Bug(
        "decompression: another order taken for the expected one",
        *(COMPRESS, COMPRESS, "? Found::kOtherOrder\n", "? Found::kExpected\n"),
        *(compressed, "prefetch_compressed of .*other bytes"),
    ),
    Bug(
        "decompression: header not looked at",
        *(COMPRESS, COMPRESS, ": Found::kForeign;", ": Found::kExpected;"),
        *(damaged, "a foreign header was believed"),
    ),
]
