"""compile on a GPU: the plan's kernels are those of budget=None, so results are equal to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import splitkern as sk
from splitkern import _core
from splitkern.memory.compile import compile
from splitkern.memory.executor import ExecutorOptions
from splitkern.memory.step_bytes import StepBytes
from splitkern.memory.step_report import step_report
from tests.memory import models
from tests.memory.compiled_models import IMAGES, require_equal, small, smallest_budget, split_small, train
from tests.memory.test_accounting import require_close

pytestmark = pytest.mark.gpu

DEBUG = ExecutorOptions(chunk_bytes=1 << 12, debug=True)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("make", [small, split_small])
@pytest.mark.parametrize("strategy", ["default", "layerwise"])
@pytest.mark.parametrize("debug", [True, False])
def test_a_budget_changes_no_bit(make: Callable[[], nn.Module], strategy: str, debug: bool) -> None:
    images, model = IMAGES.cuda(), make().cuda()
    reference = compile(copy.deepcopy(model), images, budget=None, costs="h200-bf16")
    budget: int | str = smallest_budget(model, images) if strategy == "default" else "1GiB"
    execution = DEBUG if debug else ExecutorOptions()
    compile(model, images, budget=budget, costs="h200-bf16", link_gbps=1, strategy=strategy, execution=execution)
    assert model.plan.plan.copies
    require_equal(train(model, images, steps=5), train(reference, images, steps=5))


def test_on_other_streams() -> None:
    images, model = IMAGES.cuda(), split_small().cuda()
    reference = compile(copy.deepcopy(model), images, budget=None, costs="h200-bf16")
    expected = train(reference, images, steps=4)
    compile(model, images, budget=smallest_budget(model, images), costs="h200-bf16", link_gbps=1, execution=DEBUG)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number in range(4):
        streams[number % 2].wait_stream(streams[1 - number % 2])
        with torch.cuda.stream(streams[number % 2]):
            optimizer.zero_grad()
            labels = torch.arange(4, device="cuda")
            loss = F.cross_entropy(model(images + 0.1 * number), labels)
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()
        assert torch.equal(loss, expected[0][number])


@pytest.mark.parametrize("network", ["resnet18", "vgg11"])
def test_bytes_are_where_the_plan_has_them(network: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    model = models.build(network).cuda().to(memory_format=torch.channels_last)
    sk.split_(model, images, grid=(2, 2), until="layer2" if network == "resnet18" else "features.10", norm="patch")
    labels = torch.zeros(8, dtype=torch.long, device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    with torch.autocast("cuda", torch.bfloat16):
        with pytest.raises(sk.BudgetError) as caught:
            compile(model, images, budget=1, costs="h200-bf16")
        compile(model, images, budget=caught.value.smallest_bytes, costs="h200-bf16")
        report = step_report(model, images, repeats=1)
    for pair in (report.arena_bytes, report.reserve_bytes, report.total_bytes):
        require_close(pair)
    step()  # cuBLAS has its workspaces, one for each thread
    with StepBytes(model, torch.optim.SGD(model.parameters(), lr=0.0), [images, labels]) as measured:
        step()
    assert measured.peak_bytes <= caught.value.smallest_bytes + (8 << 20)


def test_measured_durations_and_link() -> None:
    images, model = IMAGES.cuda(), split_small().cuda()
    compile(model, images, budget="1GiB", costs="measured")
    assert model.plan.graph.durations_from.startswith("measured")
    assert _core.find_violations(model.plan.graph, model.plan.plan) == []
    train(model, images)
