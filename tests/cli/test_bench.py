"""`splitkern bench`: what it reports, not how good the figures are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from splitkern.benchmarks.common import prefix, quartiles
from splitkern.cli import main
from splitkern.training.loop import build_model

pytestmark = pytest.mark.torchvision

LIVE = ["bench", "live", "--model", "resnet18", "--until", "layer1", "--image-size", "64", "--batch", "2"]
STEP = ["bench", "step", "--until", "layer1", "--image-size", "32", "--batch", "2", "--pairs", "2", "--warmup", "1"]


def test_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "live.json"
    assert main([*LIVE, "--grid", "2x2", "--json", "--save", str(path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(path.read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert "--grid 2x2" in record["command"]
    assert record["commit"] is None or len(record["commit"]) >= 7
    (result,) = record["results"]
    unsplit, split = result["unsplit"], result["split"]
    join_bytes = 2 * 64 * 16 * 16 * 4
    assert unsplit["join_bytes"] == split["join_bytes"] == join_bytes
    assert unsplit["input_bytes"] == split["input_bytes"] == 2 * 3 * 64 * 64 * 4
    assert unsplit["parameter_gradient_bytes"] == unsplit["parameter_bytes"] == split["parameter_bytes"]
    assert result["ratio"] == split["peak_bytes"] / unsplit["peak_bytes"]
    # conv1's output and BatchNorm's, and the join with its gradient, are the least that unsplit holds at its peak.
    assert unsplit["peak_bytes"] > 2 * (2 * 64 * 32 * 32 * 4) + 2 * join_bytes
    assert 2 * join_bytes < split["peak_bytes"] < unsplit["peak_bytes"]


def test_live_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LIVE, "--grid", "2x2"]) == 0
    text = capsys.readouterr().out
    for part in ("resnet18 until layer1", "grid 2x2", "peak live bytes", "the join and its gradient", "parameters"):
        assert part in text


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STEP, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["case"]["memory_format"] for result in results] == ["contiguous", "channels_last"]
    for result in results:
        names = ["unsplit", "unsplit again", "split, order=patch", "split, order=layer"]
        assert list(result["variants"]) == names
        assert result["pairs"] == 2
        assert result["variants"]["unsplit"]["ratio"]["median"] == 1.0
        for variant in result["variants"].values():
            step = variant["step_ms"]
            assert 0 < step["lower"] <= step["median"] <= step["upper"]


def test_step_of_a_compiled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STEP, "--compiled", "--memory-format", "contiguous", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert list(result["variants"]) == ["split, order=patch", "split, order=patch again", "compiled, budget=None"]
    assert result["base"] == "split, order=patch" and result["variants"][result["base"]]["ratio"]["median"] == 1.0
    assert result["case"]["compiled"]


def test_step_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STEP, "--memory-format", "contiguous", "--order", "patch"]) == 0
    text = capsys.readouterr().out
    assert "unsplit again" in text
    assert "2 interleaved rounds" in text
    assert "order=layer" not in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "live", "--until", "layer2"], "--until needs --model"),
        ([*LIVE, "--until", "layer9"], "conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, got 'layer9'"),
        (["bench", "live", "--model", "vgg11", "--until", "features.99"], "features.0 to features.20"),
        ([*LIVE, "--order", "layer"], "recompute=True with order='layer'"),
        ([*LIVE, "--device", "abacus"], "abacus"),
    ],
)
def test_errors_are_one_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("name", "until"), [("vgg11_bn", "features.10"), ("resnet18", "layer2")])
def test_prefix_is_the_models_own_beginning(name: str, until: str) -> None:
    model = build_model(name, class_count=2).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(until).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    images = torch.randn(1, 3, 64, 64)
    model(images)
    part = prefix(model, until)
    assert torch.equal(part(images), seen[0])
    assert isinstance(part.get_submodule(until), nn.Module)


def test_quartiles() -> None:
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert quartiles([7]) == (7, 7, 7)
