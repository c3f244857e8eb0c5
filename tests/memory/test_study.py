"""The study of budgets: steps scaled in their batch, the searches for batches, tables and the plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitkern.benchmarks.budget import (
    Curve,
    Plain,
    Point,
    ScalableStep,
    ScaleError,
    best,
    curve_of_row,
    largest_batches,
    largest_plain,
    plot,
)
from splitkern.memory.cost_model import PAPER


def scalable(low: dict[str, Any], high: dict[str, Any]) -> ScalableStep:
    return ScalableStep((2, 4), (low, high), ["aten.mm.default"])


def step_at(batch: int) -> dict[str, Any]:
    """As a capture at that batch would be."""
    return {
        "format": "splitkern.graph",
        "version": 1,
        "storages": [{"name": "a", "size_bytes": 96 * batch + 512}, {"name": "weight", "size_bytes": 40}],
        "tensors": [{"sizes": [batch, 3], "strides_bytes": [12, 4]}],
        "operations": [{"name": "mm", "target": "mm", "is_backward": False, "reads": [0], "inplace": [[0, 0]]}],
        "costs": [[3 * 10**9 * batch, 100 * batch]],
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 1024])
def test_every_number_lies_on_its_line(batch: int) -> None:
    assert scalable(step_at(2), step_at(4)).at(batch) == step_at(batch)


def test_what_is_not_on_a_line_is_named() -> None:
    odd = step_at(4)
    odd["storages"][0]["size_bytes"] += 1
    with pytest.raises(ScaleError, match=r"step.storages\[0\].size_bytes is 704 at batch 2 and 897 at batch 4"):
        scalable(step_at(2), odd).at(3)
    assert scalable(step_at(2), odd).at(6)["storages"][0]["size_bytes"] == 1090
    for change, where in (
        ({"format": "other"}, "step.format"),
        ({"tensors": []}, "step.tensors"),
        ({"version": 1.5}, "step.version"),
    ):
        with pytest.raises(ScaleError, match=where):
            scalable(step_at(2), {**step_at(4), **change}).at(3)
    renamed = step_at(4)
    renamed["operations"][0]["is_backward"] = True
    with pytest.raises(ScaleError, match=r"step.operations\[0\].is_backward"):
        scalable(step_at(2), renamed).at(3)


def test_graph_has_the_cost_models_durations() -> None:
    graph = json.loads(scalable(step_at(2), step_at(4)).graph_json(8, PAPER, "net, batch 8"))
    assert (graph["name"], graph["durations_from"]) == ("net, batch 8", "estimate: paper")
    assert "costs" not in graph
    assert graph["operations"][0]["duration_us"] == pytest.approx(2000 + 5)


@pytest.mark.torchvision
def test_capture_proves_the_third_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitkern.benchmarks import budget
    from splitkern.benchmarks.networks import NetworkOptions, capture_network

    options = NetworkOptions("resnet18", image_size=32, grid=(2, 2), until="layer1")
    step = ScalableStep.capture(options, batches=(2, 3, 4))
    captured = capture_network(NetworkOptions("resnet18", 5, 32, (2, 2), "layer1"))
    at = step.at(5)
    assert [one["size_bytes"] for one in at["storages"]] == [one.size_bytes for one in captured.storages]
    assert at["costs"] == [[one.flop, one.bytes] for one in captured.operations]

    def unlike(options: NetworkOptions) -> Any:
        return capture_network(NetworkOptions("resnet18", options.batch, 32 if options.batch < 4 else 40))

    monkeypatch.setattr(budget, "capture_network", unlike)
    with pytest.raises(ScaleError, match=r"is not affine in its batch: at batch 4 step\."):
        ScalableStep.capture(options, batches=(2, 3, 4))


@pytest.mark.parametrize("largest", [1, 2, 3, 63, 64, 65, 1000])
def test_largest_plain(largest: int) -> None:
    asked: list[int] = []

    def evaluate(batch: int) -> float | None:
        asked.append(batch)
        return 100 + 1 / batch if batch <= largest else None

    assert largest_plain(evaluate) == Plain(largest, 100 + 1 / largest)
    assert len(asked) < 25


def test_largest_plain_needs_one_image() -> None:
    with pytest.raises(ValueError, match="not even a batch of 1 fits"):
        largest_plain(lambda batch: None)


def linear(batch: int) -> float | None:
    """1 % slower for every 10 images above 100, nothing above 350."""
    return None if batch > 350 else 100.0 * (1 + max(0, batch - 100) / 1000)


@pytest.mark.parametrize("resolution", [0.0, 0.02])
def test_largest_batches(resolution: float) -> None:
    answers, points = largest_batches(linear, Plain(100, 100.0), slowdowns=(0.05, 0.1, 0.3), resolution=resolution)
    for limit, exact in ((0.05, 150), (0.1, 200), (0.3, 350)):
        assert exact * (1 - resolution) - 1 <= answers[limit] <= exact, limit
        assert resolution > 0 or answers[limit] == exact
    batches = [point.batch for point in points]
    assert batches == sorted(set(batches)) and len(batches) < 30
    assert all(point.image_us == linear(point.batch) for point in points)


def slow(batch: int) -> float:
    """Splitting alone costs 20 % at any batch."""
    return 120.0


def nothing_fits(batch: int) -> None:
    return None


def needs_small(batch: int) -> float | None:
    """Fits only below the plain batch."""
    return 100.0 if batch <= 40 else None


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        (slow, {0.1: 0, 0.3: 1 << 16}),
        (nothing_fits, {0.1: 0, 0.3: 0}),
        (needs_small, {0.1: 40, 0.3: 40}),
    ],
)
def test_largest_batches_at_the_ends(evaluate: Callable[[int], float | None], expected: dict[float, int]) -> None:
    answers, _ = largest_batches(evaluate, Plain(100, 100.0), slowdowns=(0.1, 0.3), resolution=0.0)
    assert answers.keys() == expected.keys()
    for limit, batch in expected.items():
        assert answers[limit] >= batch if batch == 1 << 16 else answers[limit] == batch


def curve(strategy: str, grid: tuple[int, int], batches: dict[float, int], network: str = "vgg19") -> Curve:
    host_bytes = {limit: batch << 20 for limit, batch in batches.items()}
    points = [Point(50, 2000.0), Point(900, None)]
    return Curve("paper", network, grid, strategy, 50, 2000.0, batches, host_bytes, points)


CURVES = (
    curve("none", (1, 1), {0.05: 50, 0.1: 50}),
    curve("default", (1, 1), {0.05: 100, 0.1: 110}),
    curve("default", (2, 2), {0.05: 90, 0.1: 300}),
    curve("default", (2, 2), {0.05: 0, 0.1: 75}, network="resnet50"),
)


def test_best_takes_each_slowdowns_own_grid() -> None:
    assert best(CURVES)["paper", "vgg19", "default"] == {0.05: (2.0, (1, 1)), 0.1: (6.0, (2, 2))}


def test_curves_survive_json() -> None:
    for one in CURVES:
        assert curve_of_row(json.loads(json.dumps(one.as_row()))) == one


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(tmp_path / "budget.png", CURVES)
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_tables() -> None:
    from splitkern.cli.bench_budget import _tables

    text = _tables(CURVES, markdown=True)
    assert "**vgg19, estimate: paper: plain batch 50, 2.000 ms per image**" in text
    assert "| default | 2x2 | 1.80x (90) | 6.00x (300) | 300.0 MiB |" in text
    assert "| default | 2x2 | - | 1.50x (75) | 75.0 MiB |" in text
    assert _tables(CURVES, markdown=False).count("default") == 3
