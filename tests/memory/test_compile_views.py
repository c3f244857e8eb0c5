"""Compiled models whose inputs, parameters or constants are views of larger tensors, or share memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from splitkern.memory.capture import CaptureError
from splitkern.memory.compile import compile

from .compiled_models import IMAGES

PAIR = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(4))


class Two(nn.Module):
    """Two inputs, and constants that are slices of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        whole = torch.rand(20)
        self.scale, self.shift = whole[3:11].view(8, 1, 1), whole[6:14].view(8, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) * self.scale - self.conv(y).relu() + self.shift


def require_as_eager(example: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> nn.Module:
    eager = Two()
    compiled = compile(Two(), example, budget=None, costs="paper")
    for model in (eager, compiled):
        model(*given).square().sum().backward()
    assert torch.equal(compiled(*given), eager(*given))
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    return compiled


@pytest.mark.parametrize(
    ("example", "given"),
    [
        ((PAIR[:4], PAIR[4:]), (PAIR[:4], PAIR[4:])),
        ((PAIR[:4], PAIR[4:]), (PAIR[:4].clone(), PAIR[4:].clone())),
        ((PAIR[:4].clone(), PAIR[4:].clone()), (PAIR[4:], PAIR[:4])),
        ((IMAGES, IMAGES.detach()), (IMAGES, PAIR[4:])),
        ((PAIR[4:, :, ::2, 1::2], PAIR[:4, :, ::2, 1::2]), (PAIR[4:, :, ::2, 1::2], PAIR[1:5, :, 1::2, ::2])),
    ],
    ids=["slices", "slices-then-own", "own-then-slices", "one-memory-then-two", "strided"],
)
def test_inputs_may_lie_anywhere(example: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> None:
    compiled = require_as_eager(example, given)
    assert compiled.forward.replans == 0


def test_an_input_counts_as_what_it_is_not_as_what_it_is_cut_from() -> None:
    cut, own = (compile(nn.Conv2d(3, 8, 3), images, budget=None, costs="paper") for images in (PAIR[6:], PAIR[6:] * 1))
    assert cut.plan.peak_bytes == own.plan.peak_bytes


def test_parameters_may_be_views_of_one_tensor() -> None:
    eager = nn.Conv2d(3, 8, 3)
    model = copy.deepcopy(eager)
    flat = torch.cat([torch.zeros(5), *(parameter.detach().flatten() for parameter in model.parameters())])
    model.weight.data, model.bias.data = flat[5:221].view(8, 3, 3, 3), flat[221:]
    compile(model, IMAGES, budget=None, costs="paper")
    assert torch.equal(model(IMAGES), eager(IMAGES))
    model.bias.data = model.bias.data + 1
    assert torch.equal(model(IMAGES), model.forward.original(IMAGES))


class Shared(nn.Module):
    """A buffer that it updates, and another one that lies so many elements behind it."""

    def __init__(self, distance: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        whole = torch.zeros(16)
        self.register_buffer("mean", whole[:8])
        self.register_buffer("other", whole[distance : distance + 8])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * (1 + self.get_buffer("other").view(-1, 1, 1))
        self.get_buffer("mean").add_(y.detach().mean((0, 2, 3)))
        return y + self.get_buffer("other").clone().view(-1, 1, 1)


def _constant() -> nn.Module:
    model = Shared(8)
    del model.other
    model.other = model.mean.view(8)
    model.get_buffer = lambda name: getattr(model, name)  # type: ignore[assignment, method-assign]
    return model


@pytest.mark.parametrize("make", [lambda: Shared(0), lambda: Shared(4), _constant], ids=["same", "overlap", "constant"])
def test_memory_that_is_shared_and_changed_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"mean and .* share memory"):
        compile(make(), IMAGES, budget=None, costs="paper")


def test_buffers_side_by_side_are_not_shared() -> None:
    eager, compiled = Shared(8), compile(Shared(8), IMAGES, budget=None, costs="paper")
    for _ in range(2):
        assert torch.equal(compiled(IMAGES), eager(IMAGES))
    assert torch.equal(compiled.mean, eager.mean)
