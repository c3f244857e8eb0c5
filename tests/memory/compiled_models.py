"""What the tests of compiled models share: small models, a training loop, and budgets for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import splitkern as sk
from splitkern.memory.compile import BudgetError, compile
from splitkern.memory.executor import ExecutorOptions

SHAKEN = ExecutorOptions(chunk_bytes=1 << 12, debug=True, max_delay_us=30)

IMAGES = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Entropy(nn.Module):
    """Also returns what is infinite in its derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.conv(x).mean((2, 3)))
        shares = F.softmax(1000 * logits, 1)
        return logits, -(shares * shares.log()).sum(1)


def small(dropout: float = 0.0) -> nn.Module:
    """Convolutions, batch norms, residual sums, a pooling."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8), Block(8),
        nn.MaxPool2d(2), Block(8), Block(8), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def split_small() -> nn.Module:
    return sk.split_(small(), IMAGES, grid=(2, 2), until="4", norm="patch")


def train(
    model: nn.Module, images: Tensor = IMAGES, steps: int = 3, lr: float = 0.05
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, and the state after the last step with the last gradients."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    labels = LABELS[: len(images)].to(images.device)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images + 0.1 * step), labels)
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


def budget_of(model: nn.Module, share: float, images: Tensor = IMAGES) -> int:
    """What lies beside the arena, and a share of the arena without a budget, where that is possible."""
    compiled = compile(copy.deepcopy(model), images, budget=None, costs="paper")
    wanted = compiled.plan.accounting.budget_for(int(share * compiled.plan.arena_bytes))
    return max(wanted, smallest_budget(model, images))


def smallest_budget(model: nn.Module, images: Tensor = IMAGES, **options: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        compile(copy.deepcopy(model), images, budget=1, costs="paper", link_gbps=1, **options)
    return caught.value.smallest_bytes
