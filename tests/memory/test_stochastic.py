"""Stochastic boundaries under a plan: one capture and one set of decisions for all draws, bit for bit the split model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import splitkern as sk
from splitkern.memory.compile import BudgetError, compile, compiled_forward_of, uncompile_
from splitkern.memory.executor import ExecutorOptions

SHAKEN = ExecutorOptions(chunk_bytes=1 << 12, debug=True, max_delay_us=30)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])


class Block(nn.Module):
    """A residual block whose branches join after a stride of two."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8, 8, 1),
        Block(8, 12, 2), Block(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return sk.split_(model, IMAGES, grid=(2, 2), until="4", boundary="stochastic", norm="patch")


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    return sk.split_(model, IMAGES, grid=(3, 2), until="6", boundary="stochastic", wiggle=0.3)


def train(model: nn.Module, steps: int = 10) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, and the state after the last step with the last gradients."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES + 0.1 * step), LABELS)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses, {**{name: value.clone() for name, value in model.state_dict().items()}, **gradients}


def require_equal(one: Any, other: Any) -> None:
    assert all(map(torch.equal, one[0], other[0]))
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


def smallest_budget(model: nn.Module) -> int:
    with pytest.raises(BudgetError) as caught:
        compile(copy.deepcopy(model), IMAGES, budget=1, costs="paper", link_gbps=1)
    return caught.value.smallest_bytes


@pytest.mark.parametrize("make", [cnn, resnet])
@pytest.mark.parametrize("share", [None, 0.5, 0.0])
def test_training_is_that_of_the_split_model_to_the_bit(make: Callable[[], nn.Module], share: float | None) -> None:
    model = make()
    expected = train(copy.deepcopy(model))
    if share is None:
        compile(model, IMAGES, budget=None, costs="paper")
    else:
        budget = smallest_budget(model)
        if share:
            unlimited = compile(copy.deepcopy(model), IMAGES, budget=None, costs="paper").plan
            wanted = unlimited.peak_bytes - int((1 - share) * unlimited.plan.predicted.device_peak_bytes)
            budget = max(budget, wanted)
        compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1, execution=SHAKEN)
        plan = model.plan.plan
        assert plan.copies or any(instance.is_recomputation for instance in plan.instances)
        assert model.plan.peak_bytes <= budget
    forward = compiled_forward_of(model)
    assert forward is not None
    found = train(model)
    assert forward.replans == 0 and forward.redraws == 0
    require_equal(found, expected)
    uncompile_(model)
