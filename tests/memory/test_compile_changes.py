"""What a compiled model has to notice: attributes that change, outputs left out of the loss, gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitkern.memory.capture import CaptureError
from splitkern.memory.compile import compile

from .compiled_models import IMAGES, small


class Scaled(nn.Module):
    """A convolution and attributes of all kinds that it computes with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("offset", torch.ones(1))
        self.mask = torch.ones(8, 1, 1)
        self.activation: Callable[[Tensor], Tensor] = F.relu
        self.factors = [1.0, 2.0]
        self.options: dict[str, Any] = {"scale": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.conv(x) * self.mask)
        return y * self.factors[0] * self.options["scale"] + self.get_buffer("offset")


def _mask(model: Any) -> None:
    model.mask = torch.arange(8.0).view(8, 1, 1)


def _activation(model: Any) -> None:
    model.activation = torch.tanh


def _list(model: Any) -> None:
    model.factors[0] = 5.0


def _dictionary(model: Any) -> None:
    model.options["scale"] = 5.0


def _buffer(model: Any) -> None:
    model.offset = torch.full((8, 1, 1), 2.0)


@pytest.mark.parametrize("change", [_mask, _activation, _list, _dictionary, _buffer])
def test_attributes_that_change_are_planned_anew(change: Callable[[Any], None]) -> None:
    eager, compiled = Scaled(), compile(Scaled(), IMAGES, budget=None, costs="paper")
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    for model in (eager, compiled):
        change(model)
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    assert compiled.forward.replans == 1


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, flag: Any) -> Tensor:
        y: Tensor = self.conv(x)
        return y * (2 if flag is True else 3)


def test_equal_arguments_of_other_types_are_others() -> None:
    eager, compiled = Flagged(), compile(Flagged(), (IMAGES, True), budget=None, costs="paper")
    for flag in (True, 1, 1.0):
        assert torch.equal(compiled(IMAGES, flag), eager(IMAGES, flag))


class Counting(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


def test_a_forward_pass_that_counts_is_refused() -> None:
    model = Counting()
    model.calls = 0
    with pytest.raises(CaptureError, match=r"the model \(Counting\) changes its 'calls' in the forward pass"):
        compile(model, IMAGES, budget=None, costs="paper")
    assert model.calls == 0


def test_a_gradient_of_what_is_no_parameter_is_refused() -> None:
    model = Scaled()
    model.mask.requires_grad_(True)
    with pytest.raises(CaptureError, match="requires a gradient and is neither a parameter"):
        compile(model, IMAGES, budget=None, costs="paper")
    with torch.no_grad():
        model.options["scale"] = (2 * model.mask).detach()
    model.mask = torch.ones(8, 1, 1)
    compile(model, IMAGES, budget=None, costs="paper")


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.one, self.other = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x).relu().mean((2, 3))
        return self.one(features), self.other(features)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_no_gradient_where_the_loss_does_not_depend(used: tuple[int, ...]) -> None:
    """A gradient of zeros would let weight decay and momentum move a head that is not trained."""
    eager, compiled = Heads(), compile(Heads(), IMAGES, budget=None, costs="paper")
    for model in (eager, compiled):
        outputs = model(IMAGES)
        torch.stack([outputs[i].square().sum() for i in used]).sum().backward()
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            assert one.grad is not None and torch.equal(one.grad, other.grad)


def test_gradients_of_gradients_are_refused() -> None:
    model = compile(small(), IMAGES.clone().requires_grad_(), budget=None, costs="paper")
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(model(images).sum(), images, create_graph=True)
    model(images).sum().backward()


def test_hooks_of_gradients_stay_when_planned_anew() -> None:
    eager, compiled = Heads(), compile(Heads(), IMAGES, budget=None, costs="paper")
    for model in (eager, compiled):
        model.conv.weight.register_hook(lambda gradient: gradient * 3)
        for images in (IMAGES, IMAGES[:2]):
            torch.cat(model(images), 1).square().sum().backward()
    assert compiled.forward.replans == 1
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_hooks_of_all_modules_are_refused() -> None:
    compiled = compile(small(), IMAGES, budget=None, costs="paper")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(CaptureError, match="hooks are registered for all modules"):
            compiled(IMAGES)
    finally:
        handle.remove()
    compiled(IMAGES).sum().backward()
