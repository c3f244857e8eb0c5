"""Captured steps of whole networks, run from their graphs, against eager execution: bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import splitkern as sk
from splitkern.memory.capture import CapturedStep, capture
from splitkern.memory.interpret import interpret
from tests.memory import models
from tests.memory.graph_rules import require_valid

#: Networks and grids; the few that run always hold every operation that the others hold.
_ALWAYS = {("resnet18", None), ("resnet18", (2, 2)), ("vgg11", (2, 2)), ("vgg11", None)}
CASES = [
    pytest.param(
        name,
        grid,
        id=f"{name}-{'unsplit' if grid is None else 'x'.join(map(str, grid))}",
        marks=() if (name, grid) in _ALWAYS else (pytest.mark.large,),
    )
    for name in ("resnet18", "resnet50", "vgg11", "vgg19")
    for grid in (None, (2, 2), (4, 4))
]


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """Sums over threads may be cut differently from run to run where other processes load the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _prepared(name: str, grid: tuple[int, int] | None, pixels: int = 32) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.build(name, hidden=32)
    images = torch.randn(2, 3, pixels, pixels)
    if grid is not None:
        norm = "patch" if name.startswith("resnet") else None
        sk.split_(model, images, grid=grid, until=models.UNTIL[name], norm=norm)
    return model, images


def _require_equal(step: CapturedStep, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    results = []
    for out_calls in (False, True):
        torch.manual_seed(7)
        results.append(interpret(step, model, images, labels, out_calls=out_calls))
    torch.manual_seed(7)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for result in results:
        assert torch.equal(result.loss, loss)
        for name, parameter in model.named_parameters():
            assert torch.equal(result.gradients[name], parameter.grad), name
        for name, buffer in model.named_buffers():
            assert torch.equal(result.parameters[name], buffer), name


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_bit_equal_to_eager(name: str, grid: tuple[int, int] | None) -> None:
    model, images = _prepared(name, grid)
    labels = torch.tensor([1, 2])
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    step = capture(model, images, loss=F.cross_entropy, targets=labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    require_valid(step.graph_dict())
    _require_equal(step, model, images, labels)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "vgg19"])
def test_networks_are_torchvisions(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, name)(num_classes=10), models.build(name)
    keys = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == keys
    image = torch.empty(2, 3, 64, 64, device="meta")
    assert theirs(image).shape == ours(image).shape
    if name == "resnet18":
        theirs, ours = theirs.to_empty(device="cpu"), ours.to_empty(device="cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            for value in theirs.state_dict().values():
                value.copy_(torch.rand(value.shape) * 0.1 + 0.01)
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(theirs(images), ours(images))
