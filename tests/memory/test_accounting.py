"""Bytes of a training step as the plan predicts them, beside what the allocator's own events say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import splitkern as sk
from splitkern.memory.allocated_bytes import AllocatedBytes
from splitkern.memory.compile import compile
from splitkern.memory.executor import ExecutorOptions
from splitkern.memory.step_report import Pair, step_report
from tests.memory import models
from tests.memory.compiled_models import (
    IMAGES,
    LABELS,
    budget_of,
    require_equal,
    small,
    smallest_budget,
    split_small,
    train,
)

CPU = torch.device("cpu")
MIB = 1 << 20


def require_close(pair: Pair, allowed_bytes: int = 8 * MIB) -> None:
    """Within 2 % or so many bytes of the prediction."""
    assert abs(pair.measured - pair.predicted) <= max(0.02 * pair.predicted, allowed_bytes), pair


# --- the meter ----------------------------------------------------------------------------------------------------


def test_allocated_bytes_counts_what_operators_use_inside() -> None:
    a, images, weight = torch.ones(256, 1024), torch.ones(1, 64, 8, 8), torch.ones(64, 64, 3, 3)
    with AllocatedBytes(CPU) as allocated, torch.no_grad():
        with allocated.label("scratch"), torch.backends.mkldnn.flags(enabled=False):
            F.conv2d(images, weight, padding=1)
        with allocated.label("kept"):
            kept = a + a
        with allocated.label("nothing"):
            a.add_(a)
        del kept
    unfolded_bytes = 64 * 9 * 64 * 4
    (name, scratch_bytes), *others = allocated.peak_in
    assert name == "scratch" and scratch_bytes >= images.nbytes + unfolded_bytes
    assert others == [("kept", MIB), ("nothing", 0)]
    assert (allocated.peak_bytes, allocated.current_bytes) == (MIB, 0)


def test_allocated_bytes_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), AllocatedBytes(CPU):
        raise ZeroDivisionError
    with AllocatedBytes(CPU) as allocated:
        torch.empty(MIB, dtype=torch.uint8)
    assert allocated.peak_bytes == MIB


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, split_small])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_a_step_takes_what_its_plan_says(make: Callable[[], nn.Module], share: float) -> None:
    model = make()
    budget = budget_of(model, share)
    compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    report = step_report(model, IMAGES, repeats=1)
    assert report.total_bytes.predicted == model.plan.peak_bytes <= budget
    for pair in (report.arena_bytes, report.reserve_bytes, report.total_bytes):
        require_close(pair, allowed_bytes=4096)
    assert report.offloaded_bytes.measured == report.offloaded_bytes.predicted
    assert report.prefetched_bytes.measured == report.prefetched_bytes.predicted
    assert len(report.operations) == len(model.plan.plan.instances)
    assert all(row.duration_us.measured > 0 for row in report.operations)
    # The model is as it was.
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_are_accumulated_are_there_twice() -> None:
    def peak_of(model: nn.Module) -> int:
        """Of a step that adds to gradients, by the allocator."""
        for _ in range(2):
            F.cross_entropy(model(IMAGES), LABELS).backward()
        there = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), IMAGES))
        there += sum(p.grad.nbytes for p in model.parameters())
        with AllocatedBytes(CPU) as allocated:
            F.cross_entropy(model(IMAGES), LABELS).backward()
        return there + allocated.peak_bytes + model.plan.arena_bytes

    once, twice = (compile(small(), IMAGES, budget=None, costs="paper", accumulate=a) for a in (False, True))
    gradient_bytes = sum(p.nbytes for p in once.parameters())
    assert twice.plan.peak_bytes == once.plan.peak_bytes + gradient_bytes
    loss_bytes = 4096
    assert peak_of(twice) <= twice.plan.peak_bytes + loss_bytes
    assert peak_of(once) > once.plan.peak_bytes + loss_bytes


def test_autograd_takes_gradients_over() -> None:
    """A gradient that were copied would be there twice."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 1024), nn.Linear(1024, 1))
    compile(model, IMAGES, budget=None, costs="paper")
    with AllocatedBytes(CPU) as allocated:
        model(IMAGES).sum().backward()
    gradient_bytes = sum(p.nbytes for p in model.parameters())
    assert gradient_bytes <= allocated.current_bytes <= allocated.peak_bytes < gradient_bytes + (64 << 10)


def test_a_report_says_both(tmp_path: Path) -> None:
    model = small()
    compile(model, IMAGES, budget=smallest_budget(model), costs="paper", link_gbps=1)
    report = step_report(model, IMAGES, repeats=1)
    text = str(report)
    assert "predicted" in text and "conv2d again" in text and "estimate: paper" in text
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["total_bytes"] == {
        "predicted": report.total_bytes.predicted,
        "measured": report.total_bytes.measured,
    }
    assert saved["operations"][0]["name"] == report.operations[0].name
    assert str(model.plan).startswith(f"{len(model.plan.plan.copies)} copies")


def test_reports_of_what_has_none() -> None:
    with pytest.raises(ValueError, match="not compiled"):
        step_report(small(), IMAGES)
    model = compile(small(), IMAGES, budget=None, costs="paper")
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        step_report(model, IMAGES, repeats=0)
    with pytest.raises(ValueError, match="evaluation mode"):
        step_report(model.eval(), IMAGES)


# --- whole networks -----------------------------------------------------------------------------------------------

NETWORKS = {"resnet18": "layer2", "resnet50": "layer2", "vgg11": "features.10"}


@pytest.mark.parametrize(
    "network", ["resnet18", *(pytest.param(name, marks=pytest.mark.large) for name in ("resnet50", "vgg11"))]
)
def test_twenty_steps(network: str) -> None:
    """Budgets of half and three tenths of the plain step's activations, and the smallest that can be planned: losses,
    gradients and buffers are those without a budget, and every byte is where the plan has it.
    """
    torch.manual_seed(0)
    model, images = models.build(network), torch.randn(2, 3, 32, 32)
    sk.split_(model, images, grid=(2, 2), until=NETWORKS[network], norm="patch")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compile(model, images, budget=None, costs="paper")
    assert model.plan.is_left_alone
    plain = model.plan
    expected = train(model, images, steps=20, lr=0.005)
    for share in (0.5, 0.3, 0.0):
        sk.uncompile_(model)
        model.load_state_dict(state)
        budget = smallest_budget(model, images)
        if share > 0:
            budget = plain.accounting.budget_for(int(share * plain.arena_bytes))
        execution = ExecutorOptions(copies_in_flight=1 + int(10 * share), debug=share == 0, max_delay_us=20)
        compile(model, images, budget=budget, costs="paper", link_gbps=2, execution=execution)
        assert model.plan.peak_bytes <= budget
        assert model.plan.arena_bytes <= share * plain.arena_bytes or share == 0
        require_equal(train(model, images, steps=20, lr=0.005), expected)
        report = step_report(model, images, repeats=1)
        for pair in (report.arena_bytes, report.reserve_bytes, report.total_bytes):
            require_close(pair)
