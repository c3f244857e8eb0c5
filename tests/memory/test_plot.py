"""Pictures: written as PNG, also for a step without events."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from splitkern.plot import Curve, plot_live_bytes


def test_peak_is_the_first_largest_sample() -> None:
    assert Curve("a", [(0.5, 3), (1.0, 9), (2.0, 9), (3.0, 0)], backward_ms=1.5).peak == (1.0, 9)
    assert Curve("a", [], backward_ms=0.0).peak == (0.0, 0)


@pytest.mark.parametrize("samples", [[(1.0, 2**20), (2.0, 2**22), (3.0, 0)], []])
def test_writes_a_png(tmp_path: Path, samples: list[tuple[float, int]]) -> None:
    path = tmp_path / "live.png"
    curves = [Curve("unsplit", samples, backward_ms=1.5), Curve("split", samples, backward_ms=1.5)]
    plot_live_bytes(path, curves, title="a model")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
