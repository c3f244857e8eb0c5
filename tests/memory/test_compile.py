"""compile: ordinary training loops whose steps run as planned, bit for bit, on arenas of plain memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import splitkern as sk
from splitkern import _core
from splitkern.memory import arenas, planned_step
from splitkern.memory.capture import CapturedStep, capture
from splitkern.memory.compile import BudgetError, _Same, compile, compiled_forward_of, uncompile_
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from tests.memory import models
from tests.memory.compiled_models import (
    IMAGES,
    SHAKEN,
    budget_of,
    require_equal,
    small,
    smallest_budget,
    split_small,
    train,
)


@pytest.mark.parametrize("make", [small, split_small])
@pytest.mark.parametrize("share", [None, 0.7, 0.5, 0.0])
def test_training_is_eager_training_to_the_bit(make: Callable[[], nn.Module], share: float | None) -> None:
    model = make()
    expected = train(copy.deepcopy(model))
    if share is None:
        compile(model, IMAGES, budget=None, costs="paper")
        assert not model.plan.plan.copies
    else:
        budget = smallest_budget(model) if share == 0 else budget_of(model, share)
        compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1, execution=SHAKEN)
        plan = model.plan.plan
        assert plan.copies or any(instance.is_recomputation for instance in plan.instances)
        assert model.plan.peak_bytes <= budget
    require_equal(train(model), expected)


@pytest.mark.parametrize("strategy", _core.strategy_names())
@pytest.mark.parametrize("copies_in_flight", [1, 4])
def test_every_strategy_and_any_number_of_copies_in_flight(strategy: str, copies_in_flight: int) -> None:
    model = small()
    expected = train(copy.deepcopy(model))
    options = ExecutorOptions(
        chunk_bytes=1 << 12, copies_in_flight=copies_in_flight, debug=True, max_delay_us=30, seed=3
    )
    compile(model, IMAGES, budget="1GiB", costs="paper", link_gbps=1, strategy=strategy, execution=options)
    require_equal(train(model), expected)


@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_resnet18(grid: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    model, images = models.build("resnet18"), torch.randn(2, 3, 64, 64)
    if grid:
        sk.split_(model, images, grid=grid, until="layer1", norm="patch")
    expected = train(copy.deepcopy(model), images, steps=2)
    budget = smallest_budget(model, images)
    compile(model, images, budget=budget, costs="paper", link_gbps=1, execution=ExecutorOptions(debug=True))
    assert model.plan.plan.copies or any(instance.is_recomputation for instance in model.plan.plan.instances)
    require_equal(train(model, images, steps=2), expected)


def test_a_wait_that_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offloads of a plan, waited for at the end only: their bytes are used again while they leave."""
    monkeypatch.setattr(_core, "validate", lambda graph, plan: None)
    real = StepExecutor.__init__

    def late(self: StepExecutor, step: Any, graph: Any, plan: _core.Plan, options: Any) -> None:
        last = len(plan.instances)
        offloads = {n for n, one in enumerate(plan.copies) if one.kind == _core.CopyKind.OFFLOAD}
        boundaries = [
            _core.Boundary(waits=[c for c in one.waits if c not in offloads], issues=one.issues)
            for one in plan.boundaries
        ]
        boundaries[last] = _core.Boundary(waits=[*boundaries[last].waits, *sorted(offloads)], issues=[])
        names = ("graph_fingerprint", "strategy", "limits", "storages", "fused", "instances", "residencies", "copies")
        parts = {name: getattr(plan, name) for name in names}
        real(self, step, graph, _core.Plan(**parts, boundaries=boundaries, predicted=plan.predicted), options)

    monkeypatch.setattr(StepExecutor, "__init__", late)
    options = ExecutorOptions(chunk_bytes=1 << 10, debug=True, max_delay_us=2000)
    model = compile(small(), IMAGES, budget="1GiB", costs="paper", link_gbps=1, strategy="layerwise", execution=options)
    with pytest.raises(_core.CopyFailed):
        train(model)


# --- an ordinary module -----------------------------------------------------------------------------


def test_a_model_that_fits_is_left_alone() -> None:
    model = compile(small(), IMAGES, budget="1GiB", costs="paper", link_gbps=1)
    plan = model.plan.plan
    assert not plan.copies and not any(instance.is_recomputation for instance in plan.instances)
    assert model.plan.predicted_step_ms > 0


def test_evaluation_and_no_grad_run_as_before() -> None:
    model = small()
    expected = copy.deepcopy(model)
    compile(model, IMAGES, budget=budget_of(model, 0.5), costs="paper", link_gbps=1)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected(IMAGES))
    model.eval(), expected.eval()
    assert torch.equal(model(IMAGES), expected(IMAGES))
    assert torch.equal(model(IMAGES[:1]), expected(IMAGES[:1]))
    model(IMAGES).sum().backward()  # in evaluation mode autograd does it
    assert model.train()(IMAGES).requires_grad


def test_everything_of_the_module_stays() -> None:
    model = small()
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert compile(model, IMAGES, budget=None, costs="paper") is model
    assert type(model) is nn.Sequential
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    other = copy.deepcopy(model)
    require_equal(train(other), train(small()))
    assert compiled_forward_of(other) is not compiled_forward_of(model)
    again = pickle.loads(pickle.dumps(compiled_forward_of(model)))
    assert again.replans == 0
    assert uncompile_(model) is model
    assert "forward" not in model.__dict__ and not hasattr(model, "plan")
    require_equal(train(model), train(small()))
    with pytest.raises(ValueError, match="not compiled"):
        uncompile_(model)


def test_a_split_stays_below() -> None:
    model = split_small()
    compile(model, IMAGES, budget=None, costs="paper")
    uncompile_(model)
    assert sk.config_of(model)["grid"] == [2, 2] or sk.config_of(model)["grid"] == (2, 2)
    require_equal(train(model), train(split_small()))


def test_dropout_draws_what_eager_training_draws() -> None:
    model = small(dropout=0.5)
    expected = train(copy.deepcopy(model))
    compile(model, IMAGES, budget=budget_of(model, 0.5), costs="paper", link_gbps=1, execution=SHAKEN)
    require_equal(train(model), expected)


@pytest.mark.parametrize("costs", ["paper", "measured"])
def test_the_random_state_stays(costs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though operations that draw are run to be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = small(dropout=0.5)
    before = torch.get_rng_state()
    compile(model, IMAGES, budget="1GiB", costs=costs, link_gbps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_accumulate_and_reach_the_input() -> None:
    model = small()
    expected = copy.deepcopy(model)
    images = IMAGES.clone().requires_grad_()
    compile(model, images, budget=None, costs="paper")
    for one in (model, expected):
        one(images).sum().backward()
        one(images).square().sum().backward()
    grad = images.grad
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    images.grad = None
    model(images).sum().backward()
    assert images.grad is not None and grad is not None and images.grad.shape == grad.shape


def test_frozen_parameters_get_no_gradient() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    expected = train(copy.deepcopy(model))
    compile(model, IMAGES, budget=budget_of(model, 0.5), costs="paper", link_gbps=1, execution=SHAKEN)
    require_equal(train(model), expected)
    assert model[0].weight.grad is None


def test_autocast() -> None:
    model = small()
    expected = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        compile(model, IMAGES, budget=None, costs="paper")
        mine, theirs = model(IMAGES), expected(IMAGES)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(mine, theirs)
    mine.float().sum().backward()
    theirs.float().sum().backward()
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2, msg=name)


def test_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = small(), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.body(x)
            return {"wide": y, "narrow": (self.head(y), y.argmax(1))}

    torch.manual_seed(0)
    model = Two()
    expected = copy.deepcopy(model)
    compile(model, IMAGES, budget=None, costs="paper")
    results = [one(IMAGES) for one in (model, expected)]
    for result in results:
        (result["wide"].sum() + result["narrow"][0].sum()).backward()
    assert torch.equal(results[0]["narrow"][1], results[1]["narrow"][1])
    assert not results[0]["narrow"][1].requires_grad
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_names_one_that_is_not() -> None:
    model = small()
    with pytest.raises(BudgetError, match="smallest that would do") as caught:
        compile(model, IMAGES, budget="20KiB", costs="paper", link_gbps=1)
    assert caught.value.budget_bytes == 20 << 10
    assert "forward" not in model.__dict__ and not hasattr(model, "plan")
    compile(model, IMAGES, budget=caught.value.smallest_bytes, costs="paper", link_gbps=1)
    with pytest.raises(BudgetError):
        compile(small(), IMAGES, budget=caught.value.smallest_bytes - 1, costs="paper", link_gbps=1)


def test_where_recomputation_needs_more_beside_the_arena_than_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution's scratch while the gradients of a large linear layer are there already."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        convolutions += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(
            *convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 512), nn.Linear(512, 5)
        )

    def measured(step: CapturedStep) -> list[int]:
        return [200 << 10 if one.target == "conv2d" else 0 for one in step.operations]

    monkeypatch.setattr(planned_step, "measure_workspaces", measured)
    smallest = {strategy: smallest_budget(model(), strategy=strategy) for strategy in ("default", "layerwise")}
    assert smallest["default"] <= smallest["layerwise"]
    compiled = compile(model(), IMAGES, budget=smallest["default"], costs="paper", link_gbps=1)
    require_equal(train(compiled), train(model()))
    monkeypatch.setattr(planned_step, "_INSTEAD_OF", {})
    assert smallest_budget(model()) > smallest["layerwise"]


def test_a_host_budget_that_is_too_small() -> None:
    with pytest.raises(BudgetError, match=r"host_budget=30\.0 KiB is too small"):
        compile(small(), IMAGES, budget="1GiB", host_budget="30KiB", strategy="layerwise", costs="paper", link_gbps=1)


def test_other_shapes_are_planned_anew_or_refused() -> None:
    model = compile(small(), IMAGES, budget=None, costs="paper")
    forward = compiled_forward_of(model)
    assert forward is not None and forward.replans == 0
    expected = train(small(), IMAGES[:2])
    require_equal(train(model, IMAGES[:2]), expected)
    assert forward.replans == 1
    strict = compile(small(), IMAGES, budget=None, costs="paper", strict=True)
    with pytest.raises(ValueError, match=r"\[4, 3, 24, 24\].*\[2, 3, 24, 24\]"):
        strict(IMAGES[:2])
    strict(IMAGES).sum().backward()


def test_plans_are_kept_and_arenas_are_not() -> None:
    """The last batch of an epoch is smaller, and the next one is a whole one again."""
    model, expected = compile(small(), IMAGES, budget=None, costs="paper"), small()
    forward = compiled_forward_of(model)
    assert forward is not None
    seen: list[weakref.ref[Tensor]] = []
    plans = []
    for images in (IMAGES, IMAGES[:2], IMAGES, IMAGES[:2], IMAGES):
        require_equal(train(model, images, steps=1), train(expected, images, steps=1))
        (executor,) = forward.planned((images,)).executors
        seen.append(weakref.ref(executor.arenas.device))
        plans.append(model.plan)
        del executor
        assert [one() is None for one in seen] == [True] * (len(seen) - 1) + [False]
    assert forward.replans == 1
    assert plans[0] is plans[2] is plans[4] and plans[1] is plans[3] is not plans[0]


def test_a_loss_that_is_kept_keeps_no_arena() -> None:
    """A loop's last loss is alive while the next batch, which may be smaller, is planned: two arenas were there."""
    model = compile(small(), IMAGES, budget=None, costs="paper")
    forward = compiled_forward_of(model)
    assert forward is not None
    loss = model(IMAGES).sum()
    loss.backward()
    (executor,) = forward.planned((IMAGES,)).executors
    gone = weakref.ref(executor.arenas.device)
    other = model(IMAGES[:2]).sum()
    assert gone() is None
    with pytest.warns(UserWarning, match=r"1 forward pass\(es\) with other shapes .* wait for their backward pass"):
        last = model(IMAGES).sum()
    for one in (last, other):
        one.backward()
    expected = small()
    for images in (IMAGES, IMAGES[:2], IMAGES):
        expected(images).sum().backward()
    for one, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None and wanted.grad is not None
        torch.testing.assert_close(one.grad, wanted.grad)  # the sum of three, in another order


@pytest.mark.parametrize("budget", [16e9, numpy.int64(16 * 10**9), "16GB"])
def test_a_budget_may_be_any_whole_number(budget: Any) -> None:
    model = compile(small(), IMAGES, budget=budget, costs="paper", link_gbps=1)
    assert model.forward.options.budget == 16 * 10**9


def test_what_takes_the_place_of_an_object_is_another_one() -> None:
    class Thing:
        pass

    class Unwatched:
        __slots__ = ()

    for kind in (Thing, Unwatched):
        first = kind()
        one, again, other = _Same(first), _Same(first), _Same(kind())
        assert one == again and hash(one) == hash(again) and one != other and one != first
        number = id(first)
        del first
        later = [kind() for _ in range(100)]
        assert all(_Same(thing) != one for thing in later)
        if kind is Unwatched:
            assert number not in map(id, later)  # it is held


def test_one_step_at_a_time() -> None:
    model = compile(small(), IMAGES, budget=None, costs="paper")
    first = model(IMAGES)
    model(IMAGES).sum().backward()  # gives the first one up
    with pytest.raises(RuntimeError, match="activations of this forward pass are gone"):
        first.sum().backward()
    twice = model(IMAGES).sum()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="activations of this forward pass are gone"):
        twice.backward()
    model(IMAGES)
    with pytest.raises(RuntimeError, match="activations of this forward pass are gone"):
        twice.backward()
    skipped = model(IMAGES)  # a loop that goes on after a bad loss
    assert skipped.isfinite().all()
    model(IMAGES).sum().backward()


def test_what_backward_needs_must_stay() -> None:
    model = compile(small(), IMAGES, budget=None, costs="paper")
    loss = model(IMAGES).square().sum()
    with torch.no_grad():
        model[3].conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"3\.conv\.weight was changed in place"):
        loss.backward()


def test_changes_to_the_model_are_planned_anew() -> None:
    model = small(dropout=0.5)
    compile(model, IMAGES, budget=None, costs="paper")
    model[8].p = 0.0
    model[2] = nn.Tanh()
    model[1].momentum = 0.9
    expected = small()
    expected[2] = nn.Tanh()
    expected[1].momentum = 0.9
    require_equal(train(model), train(expected))
    forward = compiled_forward_of(model)
    assert forward is not None and forward.replans == 1
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        model(IMAGES)


def test_gradients_that_are_copies_alone() -> None:
    """Every operation of the backward pass is one that capture adds."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * 1 + self.a + self.b

    model = compile(Sums(), torch.ones(3, 4), budget=None, costs="paper")
    model(torch.ones(3, 4)).square().sum().backward()
    assert torch.equal(model.a.grad, torch.full((3, 4), 2.0))
    assert torch.equal(model.b.grad, torch.full((3, 4), 2.0))


def test_the_same_input_twice_is_another_step() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x) * y

    torch.manual_seed(0)
    model, x, y = Product(), torch.ones(2, 4), torch.full((2, 4), 5.0)
    expected = model.linear(x) * y
    compile(model, (x, x), budget=None, costs="paper")
    assert torch.equal(model(x, y), expected)


def test_a_model_that_returns_a_parameter_is_refused() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), self.linear.weight

    with pytest.raises(ValueError, match="must not return a parameter"):
        compile(Returns(), torch.ones(2, 4), budget=None, costs="paper")


def test_texts_for_split_models_that_are_compiled() -> None:
    model = compile(split_small(), IMAGES, budget=None, costs="paper")
    with pytest.raises(ValueError, match="uncompile_ first"):
        sk.unsplit_(model)
    with pytest.raises(ValueError, match="uncompile_ first"):
        sk.split_(model, IMAGES, grid=(2, 2), until="4", norm="patch")
    named = nn.Sequential()
    named.add_module("plan", nn.Linear(4, 4))
    with pytest.raises(ValueError, match="attribute 'plan'"):
        compile(named, torch.ones(2, 4), budget=None, costs="paper")


def test_an_error_in_the_middle_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    expected = train(copy.deepcopy(model))
    compile(model, IMAGES, budget=budget_of(model, 0.5), costs="paper", link_gbps=1, execution=SHAKEN)
    output = model(IMAGES)
    with pytest.raises(ZeroDivisionError):
        output.sum() / (1 // 0)
    del output
    gc.collect()

    forward = compiled_forward_of(model)
    assert forward is not None
    (executor,) = next(iter(forward._steps.values())).executors
    with monkeypatch.context() as patch:

        def interrupt() -> None:
            raise KeyboardInterrupt

        calls = [*executor._instances[:5], SimpleNamespace(run=interrupt), *executor._instances[6:]]
        patch.setattr(executor, "_instances", calls)
        with pytest.raises(KeyboardInterrupt):
            model(IMAGES)
    fresh = small()
    model.load_state_dict(fresh.state_dict())
    model.zero_grad()
    require_equal(train(model), expected)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"budget": "much"}, ValueError, "much"),
        ({"budget": -1}, ValueError, "budget"),
        ({"budget": None, "strategy": "magic"}, ValueError, "strategy"),
        ({"budget": None, "costs": "toaster"}, ValueError, "toaster"),
        ({"budget": None, "link_gbps": 0}, ValueError, "link_gbps"),
        ({"budget": None, "optimizer_bytes": -1}, ValueError, "optimizer_bytes"),
        ({"budget": "much"}, ValueError, "budget must be bytes such as"),
        ({"budget": "1MiB", "host_budget": "-3"}, ValueError, "host_budget must be bytes such as"),
        ({"budget": 1 << 63}, ValueError, "budget must be below"),
        ({"budget": None, "costs": 5}, TypeError, "costs"),
        ({"budget": None, "link_gbps": "3"}, ValueError, "link_gbps"),
        ({"budget": None, "optimizer_bytes": "1MiB"}, TypeError, "optimizer_bytes"),
        ({"budget": None, "optimizer_bytes": 1.5}, TypeError, "optimizer_bytes"),
        ({"budget": None, "in_flight": True}, ValueError, "in_flight"),
        ({"budget": None, "execution": 5}, TypeError, "execution"),
        ({"budget": True}, ValueError, "budget must be a number of bytes"),
        ({"budget": 1.5}, ValueError, "budget must be a number of bytes"),
        ({"budget": None, "link_gbps": True}, ValueError, "link_gbps"),
        ({"budget": None, "accumulate": "no"}, TypeError, "accumulate must be True or False, got 'no'"),
        ({"budget": None, "strict": "no"}, TypeError, "strict must be True or False"),
        ({"budget": "1GiB", "compress": 1}, TypeError, "compress must be True or False"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = small()
    with pytest.raises(error, match=text):
        compile(model, IMAGES, **options)
    assert "forward" not in model.__dict__


def test_models_that_cannot_be_compiled() -> None:
    with pytest.raises(TypeError, match="Module"):
        compile(len, IMAGES, budget=None)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="Module"):
        uncompile_(5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="example_inputs"):
        compile(small(), 5, budget=None)  # type: ignore[arg-type]
    inner = nn.Sequential(compile(small(), IMAGES, budget=None, costs="paper"))
    with pytest.raises(ValueError, match=r"module '0' .* is already compiled"):
        compile(inner, IMAGES, budget=None)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        compile(small(), IMAGES, budget=None)
    with pytest.raises(ValueError, match="evaluation mode"):
        compile(small().eval(), IMAGES, budget=None)
    model = compile(small(), IMAGES, budget=None, costs="paper")
    with pytest.raises(ValueError, match="already compiled"):
        compile(model, IMAGES, budget=None)
    hooked = small()
    hooked[3].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        compile(hooked, IMAGES, budget=None, costs="paper")
    assert "forward" not in hooked.__dict__


def test_a_scalar_of_the_cpu_takes_part_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in eager execution, but the executor refused it for its device. Meta memory stands for a GPU's."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 4), torch.tensor(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) * self.scale
            return y

    def reserve(size_bytes: int, device: torch.device, *, pinned: bool = False) -> tuple[None, Tensor]:
        return None, torch.empty(size_bytes, dtype=torch.uint8, device=device)

    monkeypatch.setattr(arenas, "_reserve", reserve)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    model, x = Scaled().to("meta"), torch.empty(2, 3, device="meta")
    step = capture(model, x, given_gradients=True)
    assert [value.device.type for value in step.constants.values()] == ["cpu"]
    graph = _core.Graph.from_json(step.graph_json())
    executor = StepExecutor(step, graph, _core.plan(graph, _core.Limits(), strategy="none"))
    (output,) = executor.forward(dict(model.named_parameters()), [x])
    assert output.device == x.device and output.shape == (2, 4)
