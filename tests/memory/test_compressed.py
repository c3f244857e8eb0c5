"""Compressed offload: measured, planned, and trained with, bit for bit; never without a measurement."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitkern import _core, ops
from splitkern.memory.capture import capture
from splitkern.memory.compile import BudgetError, CompiledPlan, compile, compiled_forward_of
from splitkern.memory.compression import (
    CompressionReport,
    compression_report,
    link_bytes,
    measure_compression,
    with_compression,
)
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from splitkern.memory.planned_step import PlannedStep
from splitkern.ops.copy import bytes_on_link, compressed_bytes

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
# vDNN's rule offloads every feature map: compressed copies of all of them, whatever the budget.
OFFLOADS: dict[str, Any] = {"budget": "1GiB", "strategy": "layerwise", "costs": "paper"}
SHAKEN = ExecutorOptions(chunk_bytes=1 << 14, debug=True, max_delay_us=20, count_every=1)


def vgg_like(bias: float = 0.0) -> nn.Module:
    """Convolutions, batch norms, ReLUs, poolings, dropout; `bias` moves what reaches the ReLUs."""
    torch.manual_seed(0)

    def block(before: int, channels: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(channels)
        nn.init.constant_(norm.bias, bias)
        return [nn.Conv2d(before, channels, 3, padding=1), norm, nn.ReLU(inplace=True), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 32),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor = IMAGES, steps: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images + 0.1 * step), LABELS)
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


def plan_of(model: nn.Module) -> CompiledPlan:
    plan = model.plan
    assert isinstance(plan, CompiledPlan)
    return plan


def planned(model: nn.Module, images: Tensor = IMAGES) -> PlannedStep:
    forward = compiled_forward_of(model)
    assert forward is not None
    return forward.planned((images,))


def compressed(plan: _core.Plan) -> list[_core.Copy]:
    return [one for one in plan.copies if one.compressed]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_training_is_eager_training_to_the_bit(in_flight: int) -> None:
    eager, model = vgg_like(), vgg_like()
    execution = dataclasses.replace(SHAKEN, copies_in_flight=in_flight)
    model = compile(model, IMAGES, **OFFLOADS, compress=True, execution=execution)
    copies = compressed(plan_of(model).plan)
    assert len(copies) >= 6
    require_equal(train(model), train(eager))
    report = planned(model).compression
    assert report.predicted is not None and report.measured is not None
    assert report.predicted > 1.2
    # The values moved in five steps, but not far.
    assert report.measured == pytest.approx(report.predicted, rel=0.3)


def test_the_default_strategy_within_a_budget() -> None:
    eager, model = vgg_like(), vgg_like()
    with pytest.raises(BudgetError) as caught:
        compile(copy.deepcopy(model), IMAGES, budget=1, costs="paper", compress=True)
    budget = caught.value.smallest_bytes
    model = compile(model, IMAGES, budget=budget, costs="paper", compress=True, execution=SHAKEN)
    _core.validate(plan_of(model).graph, plan_of(model).plan)
    require_equal(train(model), train(eager))


def test_measuring_leaves_the_model_and_the_random_state_alone() -> None:
    model = vgg_like()
    before = copy.deepcopy(model.state_dict())
    step = capture(model, (IMAGES,), given_gradients=True)
    graph = _core.Graph.from_json(step.graph_json())
    executor = StepExecutor(step, graph, _core.plan(graph, _core.Limits(), strategy="none"))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    assert measure_compression(executor, tensors, [IMAGES])
    assert executor.next_part is None and executor.observer is None
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_values_that_compress_less_than_measured_come_back_all_the_same() -> None:
    """Measured with ReLU inputs far below zero, trained with inputs far above: the slots have room for it."""
    model, eager = vgg_like(bias=-1.0), vgg_like(bias=-1.0)
    model = compile(model, IMAGES, **OFFLOADS, compress=True, execution=SHAKEN)
    for one in (model, eager):
        with torch.no_grad():
            for module in one.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.bias.fill_(4.0)
    require_equal(train(model), train(eager))
    report = planned(model).compression
    assert report.predicted is not None and report.measured is not None
    assert report.predicted > 2 and report.measured < 1.3


def test_nothing_is_compressed_without_a_measurement_that_pays() -> None:
    model = compile(vgg_like(), IMAGES, **OFFLOADS)
    assert plan_of(model).plan.copies and not compressed(plan_of(model).plan)
    assert all(one.compression is None for one in plan_of(model).graph.storages)
    # Nor where the measurement says that it does not pay: ReLUs that let all pass, and no dropout.
    model = vgg_like(bias=9.0)
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    dropout.p = 0.0
    plan = plan_of(compile(model, IMAGES, **OFFLOADS, compress=True))
    measured = [one.compression.ratio for one in plan.graph.storages if one.compression is not None]
    assert min(measured) < 1
    for one in compressed(plan.plan):
        compression = plan.plan.storages[one.storage].compression
        assert compression is not None and compression.ratio >= 1.125
    ratios = {member: one for one in plan.plan.copies for member in plan.plan.storages[one.storage].members}
    poor = [
        number
        for number, one in enumerate(plan.graph.storages)
        if one.compression is not None and one.compression.ratio < 1.125 and number in ratios
    ]
    assert poor and not any(ratios[number].compressed for number in poor)


@pytest.mark.parametrize("spoil", ["mask", "header"])
def test_a_compressed_storage_that_comes_back_changed_is_named(spoil: str) -> None:
    model = compile(vgg_like(), IMAGES, **OFFLOADS, compress=True, execution=ExecutorOptions(debug=True))
    executor = planned(model).executors[0]
    loss = F.cross_entropy(model(IMAGES), LABELS)
    assert executor._pipeline is not None
    executor._pipeline.synchronize()
    offload = next(
        one
        for one in compressed(executor.plan)
        if one.kind == _core.CopyKind.OFFLOAD and one.issue <= executor.parts[0].begin
    )
    offset = executor.plan.residencies[offload.destination].offset_bytes
    # One bit of the first slot's mask: every value behind it moves.
    executor.arenas.host[offset + (128 if spoil == "mask" else 16)] ^= 1
    with pytest.raises(_core.CopyFailed, match="not those" if spoil == "mask" else "header") as caught:
        loss.backward()
    assert caught.value.storage == offload.storage
    # The next step is right.
    model.zero_grad()
    F.cross_entropy(model(IMAGES), LABELS).backward()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 511, 5000, 40000])
def test_bytes_on_the_link_are_those_of_the_coder(dtype: torch.dtype, count: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("splitkern.memory.compression._PIECE_BYTES", 8192)
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).relu().to(dtype)
    buffer = ops.offload_compressed(values, torch.empty(compressed_bytes(values), dtype=torch.uint8))
    assert link_bytes(values) == bytes_on_link(buffer)


def test_measured_ratios_are_those_of_the_values() -> None:
    """ReLU outputs of a chain of pointwise operations, against what eager execution computes."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 2048), nn.Linear(2048, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(F.relu(self.first(x)))
            return out

    torch.manual_seed(4)
    model, images = Chain(), torch.randn(16, 64)
    step = capture(model, (images,), given_gradients=True)
    graph = _core.Graph.from_json(step.graph_json())
    plan = _core.plan(graph, _core.Limits(), strategy="none")
    found = measure_compression(StepExecutor(step, graph, plan), dict(model.named_parameters()), [images])
    values = F.relu(model.first(images)).detach()
    expected = values.numel() * 4 / link_bytes(values)
    assert [one.ratio for one in found.values()] == [expected]
    measured = with_compression(graph, found)
    assert [one.compression for one in measured.storages if one.compression is not None] == list(found.values())
    assert compression_report(plan, [None]) == CompressionReport(None, None)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="compress=True needs a budget"):
        compile(vgg_like(), IMAGES, budget=None, costs="paper", compress=True)
    with pytest.raises(ValueError, match=r"elements of 1, 2, 4 or 8 bytes, got torch\.complex128"):
        link_bytes(torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(ValueError, match="contiguous"):
        link_bytes(torch.zeros(3, 4).t())
    graph = _core.Graph(storages=[_core.Storage(name="a", size_bytes=6)], tensors=[], operations=[])
    with pytest.raises(ValueError, match="storages below 1, got 1"):
        with_compression(graph, {1: _core.Compression(ratio=2, element_bytes=2)})
    with pytest.raises(ValueError, match=r'"a": compression.element_bytes must be 1, 2, 4 or 8 and divide the 6 bytes'):
        with_compression(graph, {0: _core.Compression(ratio=2, element_bytes=4)})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_gpu_is_that_without_compression_to_the_bit(dtype: torch.dtype) -> None:
    images, device = IMAGES.cuda(), torch.device("cuda")
    plain, model = vgg_like().to(device), vgg_like().to(device)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        compile(plain, images, budget=None, costs="paper")
        compile(model, images, **OFFLOADS, compress=True, execution=SHAKEN)
    assert compressed(plan_of(model).plan)

    def run(one: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        found: list[Tensor] = []
        for _ in range(3):
            one.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(one(images), LABELS.cuda())
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in one.parameters() if p.grad is not None)]
        return found

    assert all(map(torch.equal, run(plain), run(model)))
    report = planned(model, images).compression
    assert report.predicted is not None and report.measured is not None
    assert report.measured == pytest.approx(report.predicted, rel=0.3)
