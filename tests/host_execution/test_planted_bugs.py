"""The comparisons notice bugs: each of these, planted in a copy of the kernels, must fail one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.host_execution.bugs_plain import CONTROL
from tests.host_execution.planting import Bug, build_with

BUGS: list[Bug] = [
    bug
    for path in sorted(Path(__file__).parent.glob("bugs_*.py"))
    for bug in importlib.import_module(f"{__package__}.{path.stem}").BUGS
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bug_is_noticed(bug: Bug, host_build: Path, tmp_path: Path) -> None:
    build = build_with(bug, host_build, tmp_path)
    with pytest.raises((AssertionError, RuntimeError), match=bug.noticed_in):
        for seed in bug.schedules:
            build.set_schedule(seed)
            bug.check(build)


def test_unchanged_copy_passes(host_build: Path, tmp_path: Path) -> None:
    build = build_with(CONTROL, host_build, tmp_path)
    for seed in range(1, 4):
        build.set_schedule(seed)
        CONTROL.check(build)
