"""ThreadSanitizer over the kernels: every CUDA thread is a thread to it, and only barriers order them.

The checks are the C++ files in ``races`` (every kernel, on a small shape) and in ``kernels`` (the primitives).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_execution.conftest import ROOT
from tests.host_execution.planting import Race, build_race_check_with
from tests.host_execution.test_primitives import names

FOLDER = ROOT / "tests" / "host_execution"
EVERY_KERNEL = names(FOLDER / "races")
# Checks of the primitives whose kernels have a race on purpose, which ThreadSanitizer must see as well.
RACY = {
    "a missing second barrier is noticed",
    "reading another thread's copy without a barrier is noticed",
    "a stage released before it is read is noticed",
    "a stage filled before it is released is noticed",
    "reading a tile before its barrier is noticed",
}


RACES = [
    Race(
        "sm80 without the barrier before a stage is read",
        *("sm80/gather.cu", "sm80/tiles.h"),
        *("kStages - 2>();\n  block_barrier();", "kStages - 2>();"),
        "sm80 forward",
        "sm80::gather_kernel",
    ),
    Race(
        "depthwise weight gradient without the barrier after a tap",
        *("depthwise/weight_grad.cu", "depthwise/weight_grad.cu"),
        *("in_channel] = sum;\n      }\n    }\n    block_barrier();", "in_channel] = sum;\n      }\n    }"),
        "grouped weight gradient",
    ),
    Race(
        "sm90 stores its outputs before every thread has staged them",
        *("sm90/conv_gemm_forward_bf16.cu", "sm90/conv_gemm.h"),
        *(
            "    fence_async_shared();\n    named_barrier(1 + warpgroup, kWarpgroupThreads);\n",
            "    fence_async_shared();\n",
        ),
        "sm90 forward",
    ),
]


def races(program: Path, name: str) -> str:
    """What ThreadSanitizer reports of a check; the check itself must pass."""
    done = subprocess.run([program, name], stderr=subprocess.PIPE, text=True, env={"TSAN_OPTIONS": "exitcode=66"})
    assert done.returncode in (0, 66), done.stderr
    assert (done.returncode == 66) == ("data race" in done.stderr), done.stderr
    return done.stderr if done.returncode == 66 else ""


@pytest.fixture(scope="session")
def race_check(build_target: Callable[[str], Path]) -> Path:
    return build_target("race_check")


@pytest.fixture(scope="session")
def primitive_race_check(build_target: Callable[[str], Path]) -> Path:
    return build_target("primitive_race_check")


def test_the_program_has_every_check(race_check: Path) -> None:
    done = subprocess.run([race_check], stdout=subprocess.PIPE, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(EVERY_KERNEL)


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_kernel_has_no_race(race_check: Path, name: str) -> None:
    assert races(race_check, name) == ""


@pytest.mark.parametrize("name", names(FOLDER / "kernels"))
def test_primitive(primitive_race_check: Path, name: str) -> None:
    report = races(primitive_race_check, name)
    if name in RACY:
        assert report != ""
    elif name != "a wait for too few groups is noticed":  # whose thread races with its own copy engine, or not
        assert report == ""


@pytest.mark.parametrize("race", RACES, ids=str)
def test_planted_race_is_named(race: Race, race_check: Path, host_build: Path, tmp_path: Path) -> None:
    report = races(build_race_check_with(race, host_build, tmp_path), race.check)
    assert re.search(race.named_in or rf"{re.escape(Path(race.file).name)}:\d+", report), report
