"""torch.compile with backend="splitkern": found, planned, run, bit for bit as eager PyTorch does."""

from __future__ import annotations

import copy
import gc
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch._dynamo.exc import BackendCompilerFailed

import splitkern as sk
from splitkern.memory import plans
from splitkern.memory.capture import CaptureError
from splitkern.memory.compile import BudgetError
from tests.memory.compiled_models import (
    IMAGES,
    LABELS,
    SHAKEN,
    budget_of,
    require_equal,
    small,
    smallest_budget,
    split_small,
    train,
)

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
FREE = {"budget": None, "costs": "paper"}


@pytest.fixture(autouse=True, scope="module")
def _entry_point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The backend as pip would install it, whether or not this tree is installed."""
    groups = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    folder = tmp_path_factory.mktemp("site") / "splitkern-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: splitkern\nVersion: 0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in groups.items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        registry.list_backends()  # finds what is installed, once
        registry._BACKENDS.pop("splitkern", None)
        registry._COMPILER_FNS.pop("splitkern", None)
        registry._discover_entrypoint_backends.cache_clear()
        registry._discover_entrypoint_backends()
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def compiled(model: nn.Module, fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(model, backend="splitkern", fullgraph=fullgraph, options={**FREE, **options})


def plain_names(result: tuple[list[Tensor], dict[str, Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    return result[0], {name.replace("_orig_mod.", ""): value for name, value in result[1].items()}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def split_tiny(**options: Any) -> nn.Module:
    return sk.split_(tiny(), IMAGES, **{"grid": (2, 2), "until": "2", "norm": "patch", **options})


@pytest.mark.parametrize("make", [small, split_small])
@pytest.mark.parametrize("is_tight", [False, True])
def test_training_is_eager_training_to_the_bit(make: Any, is_tight: bool) -> None:
    model = make()
    expected = train(copy.deepcopy(model))
    options: dict[str, Any] = {}
    if is_tight:
        options = {"budget": budget_of(model, 0.5), "link_gbps": 1, "execution": SHAKEN}
    step = compiled(model, **options)
    require_equal(plain_names(train(step)), expected)
    (planned,) = plans(step)
    assert planned is plans(model)[0] and planned.replans == 0 and planned.graph_break is None
    plan = planned.plan
    assert plan is not None
    if is_tight:
        assert plan.peak_bytes <= options["budget"]
        assert plan.plan.copies or any(instance.is_recomputation for instance in plan.plan.instances)


@pytest.mark.parametrize("make", [small, split_small])
def test_the_plan_is_the_one_that_compile_makes(make: Any) -> None:
    step = compiled(make())
    step(IMAGES).sum().backward()
    other = sk.compile(make(), IMAGES, budget=None, costs="paper").plan
    (planned,) = plans(step)
    assert planned.plan is not None and planned.plan.peak_bytes == other.peak_bytes
    names = [{op.module for op in plan.graph.operations} for plan in (planned.plan, other)]
    assert names[0] == names[1] and "3.conv" in names[0]
    assert [op.patch for op in planned.plan.graph.operations] == [op.patch for op in other.graph.operations]
    parameters = {s.name for s in other.graph.storages if s.kind == "parameter"}
    assert {s.name for s in planned.plan.graph.storages if s.kind == "parameter"} == parameters


def test_without_gradients_the_graph_runs_as_it_is() -> None:
    model = tiny()
    step = compiled(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(step(IMAGES), expected(IMAGES))
        assert torch.equal(step.eval()(IMAGES), expected.eval()(IMAGES))
    assert not plans(step)
    for parameter in (*step.train().parameters(), *expected.train().parameters()):
        parameter.requires_grad_(False)
    assert torch.equal(step(IMAGES), expected(IMAGES))
    assert not plans(step)
    require_equal(([], model.state_dict()), ([], expected.state_dict()))


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_other_shapes_are_planned_anew_and_counted(dynamic: bool | None) -> None:
    model, expected = tiny(), tiny()
    step = torch.compile(model, backend="splitkern", dynamic=dynamic, options=FREE)
    counts = []
    for images in (IMAGES, IMAGES[:3], IMAGES[:3], IMAGES):
        for one in (step, expected):
            one.zero_grad()
            one(images).square().sum().backward()
        require_equal(([], {n: p.grad for n, p in model.named_parameters()}),
                      ([], {n: p.grad for n, p in expected.named_parameters()}))  # fmt: skip
        (planned,) = plans(step)
        counts.append(planned.replans)
    assert counts == [0, 1, 1, 2]


def test_strict_refuses_other_shapes() -> None:
    step = compiled(tiny(), strict=True)
    step(IMAGES).sum().backward()
    with pytest.raises(BackendCompilerFailed, match=r"strict=True.*\[\[3, 3, 24, 24\]\]"):
        step(IMAGES[:3])
    step(IMAGES).sum().backward()


def test_a_budget_that_is_too_tiny() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    smallest = smallest_budget(model)
    with pytest.raises(BackendCompilerFailed, match=f"BudgetError.*{smallest} bytes") as caught:
        compiled(model, budget=smallest - 1, link_gbps=1)(IMAGES)
    assert isinstance(caught.value.inner_exception, BudgetError)
    assert caught.value.inner_exception.smallest_bytes == smallest
    require_equal(([], model.state_dict()), ([], before))
    compiled(model, budget=smallest, link_gbps=1)(IMAGES).sum().backward()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"options": {"budget": "1GiB", "bugdet": 1}}, r"among budget, .*execution, got bugdet"),
        ({"options": {"costs": "paper"}}, r"must have 'budget'.*\{'costs': 'paper'\}"),
        ({}, r"must have 'budget'.*no options"),
        ({"mode": "reduce-overhead"}, r"takes options=.*got \['mode'\]"),
        ({"options": {"budget": "much"}}, "much"),
        ({"options": {"budget": None, "costs": "toaster"}}, "toaster"),
    ],
)
def test_bad_options(given: dict[str, Any], text: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=text):
        torch.compile(tiny(), backend="splitkern", **given)(IMAGES)


class Straight(nn.Module):
    """A graph break before, between or after two convolutions."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.place == 0:
            torch._dynamo.graph_break()
        x = self.first(x)
        if self.place == 1:
            torch._dynamo.graph_break()
        x = self.second(x)
        if self.place == 2:
            torch._dynamo.graph_break()
        return x


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(
    ("model", "reason", "count"),
    [
        (Straight(0), "it begins after a graph break in forward", 1),
        (Straight(1), r"it ends at a graph break at .*test_dynamo.py:\d+ \(Call to `torch._dynamo.graph_break", 2),
        (Straight(2), "it ends at a graph break", 1),
        (nn.Sequential(Nothing(), Straight(-1)), "runs the Sequential that it belongs to without a graph", 1),
    ],
)
def test_graph_breaks_are_told(model: nn.Module, reason: str, count: int) -> None:
    images = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)
    expected(images).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        compiled(model, fullgraph=False)(images).sum().backward()
    text = str(next(entry.message for entry in caught if entry.category is RuntimeWarning))
    assert re.search(f"not the whole model: .*{reason}.*explain.*fullgraph=True", text)
    gradients = [[p.grad for p in one.parameters()] for one in (model, expected)]
    assert all(map(torch.equal, *gradients))
    assert len(plans(model)) == count
    assert re.search(reason, str(plans(model)[0].graph_break))
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=f"not the whole model: .*{reason}") as refused:
        compiled(model, fullgraph=False, strict=True)(images)
    assert isinstance(refused.value.inner_exception, CaptureError)


def test_a_whole_training_step() -> None:
    """Dynamo breaks it at the call of backward, which leaves the model whole, and does not look into the executor."""
    results, counts = [], []
    for backend, options in (("eager", {}), ("splitkern", FREE)):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step(
            images: Tensor, labels: Tensor, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(step, backend=backend, options=options)
        results.append(([run(IMAGES, LABELS) for _ in range(3)], model.state_dict()))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    require_equal(*results)
    assert counts[0] == counts[1]
    (planned,) = plans(model)
    assert planned.graph_break is None and planned.replans == 0


def test_models_that_share_a_graph_have_steps_of_their_own() -> None:
    torch._dynamo.utils.counters.clear()
    models, expected = [tiny(), tiny()], [tiny(), tiny()]
    with torch.no_grad():
        for one in (models[1], expected[1]):
            one[0].weight.mul_(2)
    steps = [compiled(model) for model in models]
    for pair in (steps, expected):
        (pair[0](IMAGES).square().sum() + pair[1](IMAGES).sum()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for model, other in zip(models, expected, strict=True):
        require_equal(
            ([p.grad for p in model.parameters()], model.state_dict()),
            ([p.grad for p in other.parameters()], other.state_dict()),
        )
    assert [len(plans(model)) for model in models] == [1, 1]
    gc.collect()  # other tests' models too
    count = len(plans())
    del model, other, models[0], steps[0]
    gc.collect()
    assert len(plans()) == count - 1


def test_inputs_with_gradients_and_inputs_that_are_returned() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))
            self.scale = torch.full((4,), 2.0)  # neither parameter nor buffer

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            self.seen += x.detach().sum()
            y.add_(1)
            return {"out": (self.linear(x) * self.scale, x), "y": y, "number": 3}

    torch.manual_seed(0)
    model = Pair()
    expected = copy.deepcopy(model)
    found = []
    for one in (compiled(model), expected):
        x, y = torch.ones(2, 4, requires_grad=True), torch.zeros(2, 4)
        for _ in range(2):
            result = one(x, y)
            (result["out"][0] * result["y"]).sum().backward()
        assert result["out"][1] is x and result["y"] is y and result["number"] == 3
        found.append(([x.grad, y, result["out"][0].detach()], dict(one.state_dict())))
    require_equal(plain_names(found[0]), found[1])
    require_equal(([p.grad for p in model.parameters()], {}), ([p.grad for p in expected.parameters()], {}))


def test_frozen_parameters() -> None:
    models = [tiny(), tiny()]
    for model in models:
        model[0].weight.requires_grad_(False)
    compiled(models[0])(IMAGES).sum().backward()
    models[1](IMAGES).sum().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


# --- split models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_split_model_is_one_graph_for_other_backends(backend: str) -> None:
    model = split_tiny()
    expected = train(copy.deepcopy(model))
    require_equal(plain_names(train(torch.compile(model, backend=backend, fullgraph=True))), expected)


@pytest.mark.parametrize("options", [{"recompute": True}, {"boundary": "halo", "norm": "frozen"}, {"order": "layer"}])
def test_split_models_are_planned_whole(options: dict[str, Any]) -> None:
    model = split_tiny(**options)
    expected = train(copy.deepcopy(model))
    step = compiled(model)
    require_equal(plain_names(train(step)), expected)
    assert not any(op.name.startswith("model/") for op in plans(step)[0].plan.graph.operations)  # type: ignore[union-attr]


def test_a_split_model_inside_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = split_tiny(), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    model, expected = Outer(), Outer()
    expected.load_state_dict(model.state_dict())
    step = compiled(model)
    for one in (step, expected):
        one(IMAGES).sum().backward()
    require_equal(
        ([p.grad for p in model.parameters()], model.state_dict()),
        ([p.grad for p in expected.parameters()], expected.state_dict()),
    )


def test_split_models_follow_training_flags_and_disabled() -> None:
    model, plain = split_tiny(), tiny()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        split = step(IMAGES)
        assert not torch.allclose(split, plain(IMAGES))
        model.load_state_dict(plain.state_dict())
        with sk.disabled(model):
            assert torch.equal(step(IMAGES), plain(IMAGES))
        assert torch.equal(step.eval()(IMAGES), plain.eval()(IMAGES))
        assert torch.equal(step.train()(IMAGES), split)


@pytest.mark.parametrize("how", ["stochastic", "two outputs", "by name"])
def test_split_models_that_dynamo_cannot_trace_whole(how: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())

        def forward(self, x: Tensor) -> Any:
            y = self.body(x)
            return (y, y.mean()) if how == "two outputs" else y

    boundary = "stochastic" if how == "stochastic" else "zero"
    model = sk.split_(Two(), IMAGES, grid=(2, 2), until="body", boundary=boundary)
    step = compiled(model, fullgraph=False)
    with pytest.raises(BackendCompilerFailed, match=r"cannot trace this split model whole.*splitkern\.compile\("):
        step(x=IMAGES) if how == "by name" else step(IMAGES)


def test_plans_of_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="int"):
        plans(3)  # type: ignore[arg-type]
