"""Cost models: the arithmetic, and that the H200's predicts what was measured on one."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitkern.memory.cost_model import COST_MODELS, H200_BF16, PAPER, CostModel, Counted, cost_model, with_durations

MEASURED = Path(__file__).resolve().parents[2] / "bench" / "results" / "nvidia-h200-2026-11-26.json"


@dataclass(frozen=True)
class Op:
    target: str
    flop: int = 0
    bytes: int = 0
    call: Any = None


def rows() -> list[tuple[str, Counted, float]]:
    """(kind, one call, its measured µs): every row as one call on joined tensors, and as one call per patch."""
    steps = json.loads(MEASURED.read_text())["steps"]
    found: list[tuple[str, Counted, float]] = []
    for step in ("conv", "pool"):
        for row in steps[step]["record"]["rows"].values():
            normalises = "batch norm" in row["shape"]
            if step == "conv":
                target = {"forward": "conv2d"}.get(row["pass"], f"conv2d_{row['pass']}")
            else:
                name = "batch_norm" if normalises else re.split(r"\W", row["shape"])[0] + "_pool2d"
                target = name + ("" if row["pass"] == "forward" else "_backward")
            # The rows count every pass over the data, the captured operation every tensor once.
            passes, tensors = (1, 1) if not normalises else (3, 2) if row["pass"] == "forward" else (5, 3)
            moved = row["bytes"] * tensors // passes
            for candidate, calls in (("layer", 1), ("patch", row["grid"][0] * row["grid"][1])):
                measured_us = row["candidates"][candidate]["ms"]["median"] * 1e3 / calls
                found.append((target, Op(target, row.get("flop", 0) // calls, moved // calls), measured_us))
    return found


def test_h200_predicts_the_measured_rows() -> None:
    ratios: dict[str, list[float]] = {}
    for target, operation, measured_us in rows():
        ratios.setdefault(target, []).append(H200_BF16.duration_us(operation) / measured_us)
    assert set(ratios) == {name for name in H200_BF16.rates if "." not in name} - {"mm", "addmm"}
    pooled = {
        "max_pool2d": ratios["max_pool2d"] + ratios.pop("avg_pool2d"),
        "max_pool2d_backward": ratios["max_pool2d_backward"] + ratios.pop("avg_pool2d_backward"),
    }
    for target, found in (ratios | pooled).items():
        assert statistics.geometric_mean(found) == pytest.approx(1, abs=0.02), target
        assert math.sqrt(statistics.fmean(math.log(one) ** 2 for one in found)) < 0.32, target
        assert max(max(found), 1 / min(found)) < 3, target


def test_h200_has_the_measured_ceilings() -> None:
    ceilings = json.loads(MEASURED.read_text())["steps"]["copy"]["record"]["ceilings"]
    assert pytest.approx(ceilings["matmul_tflops"], rel=0.005) == H200_BF16.matmul_tflops
    assert pytest.approx(ceilings["copy_gbps"], rel=0.005) == H200_BF16.memory_gbps
    assert pytest.approx(ceilings["from_device_gbps"], rel=0.005) == H200_BF16.offload_gbps
    assert pytest.approx(ceilings["to_device_gbps"], rel=0.005) == H200_BF16.prefetch_gbps


def test_roofline() -> None:
    overhead_us = 5.0
    assert PAPER.duration_us(Op("conv2d", flop=12 * 10**9)) == pytest.approx(1e3 + overhead_us)
    assert PAPER.duration_us(Op("relu", bytes=549 * 10**6)) == pytest.approx(1e3 + overhead_us)
    # The slower of the two counts, not their sum.
    assert PAPER.duration_us(Op("conv2d", flop=12 * 10**9, bytes=549 * 10**5)) == pytest.approx(1e3 + overhead_us)
    assert PAPER.duration_us(Op("batch_norm", bytes=549 * 10**6)) == pytest.approx(1.5e3 + overhead_us)
    assert PAPER.duration_us(Op("aten.view.default")) == overhead_us
    assert PAPER.durations_us([Op("relu"), Op("add", bytes=549 * 10**3)]) == pytest.approx([5.0, 6.0])


@pytest.mark.parametrize("model", [PAPER, H200_BF16], ids=lambda model: model.name)
def test_backward_of_batch_norm_takes_as_long_in_two_calls(model: CostModel) -> None:
    name, size_bytes = "batch_norm_backward", 10**9
    parts = [
        Op(name, bytes=tensors * size_bytes, call=SimpleNamespace(overload=f"splitkern.patch_{name}_{part}.default"))
        for part, tensors in (("reduce", 2), ("apply", 3))
    ]
    whole = Op(name, bytes=3 * size_bytes, call=SimpleNamespace(overload="aten.native_batch_norm_backward.default"))
    assert sum(model.durations_us(parts)) == pytest.approx(model.duration_us(whole), rel=1e-2)


@pytest.mark.parametrize("model", COST_MODELS.values(), ids=list(COST_MODELS))
def test_models_are_complete(model: CostModel) -> None:
    assert cost_model(model.name) is model
    assert model.label == f"estimate: {model.name}"
    assert model.sources and model.description
    for rates in (model.other, *model.rates.values()):
        assert 0 < rates.matmul_share <= 1 and 0 < rates.memory_share <= 1 and rates.traffic >= 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"cost model must be one of paper, h200-bf16, got 'a100'"):
        cost_model("a100")
    with pytest.raises(ValueError, match=r"flop and bytes of conv2d must not be negative, got -1 and 0"):
        PAPER.duration_us(Op("conv2d", flop=-1))
    with pytest.raises(ValueError, match="the graph has 1 operations, got 2 durations"):
        with_durations({"operations": [{"name": "a"}]}, [1.0, 2.0], "estimate: paper")


def test_with_durations_leaves_the_graph_alone() -> None:
    graph = {"name": "g", "operations": [{"name": "a"}, {"name": "b", "duration_us": 7.0}], "durations_from": ""}
    timed = with_durations(graph, [1, 2.5], PAPER.label)
    assert timed["operations"] == [{"name": "a", "duration_us": 1.0}, {"name": "b", "duration_us": 2.5}]
    assert timed["durations_from"] == "estimate: paper"
    assert graph["durations_from"] == "" and graph["operations"][1]["duration_us"] == 7.0
