"""Stochastic boundaries under a plan: one set of decisions for all draws, bit for bit the split model that is not
compiled.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import splitkern as sk
from splitkern import _core
from splitkern.memory import arenas, planned_step
from splitkern.memory import draws as drawn
from splitkern.memory import executor as executors
from splitkern.memory.arenas import Arenas
from splitkern.memory.capture import CapturedStep, CaptureError, capture
from splitkern.memory.compile import BudgetError, CompiledForward, compile, compiled_forward_of, uncompile_
from splitkern.memory.draws import Drawing, DrawnSteps, capture_family
from splitkern.memory.executor import ExecutorOptions
from splitkern.memory.family import Draw, DrawError, Family, fit, numbers_of
from splitkern.memory.step_layout import StepLayout
from splitkern.split.surgery import SplitForward, split_forward_of

SHAKEN = ExecutorOptions(chunk_bytes=1 << 12, debug=True, max_delay_us=30)
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1])


class Block(nn.Module):
    """A residual block whose branches join after a stride of two."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(channels, width, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet(order: str = "patch") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return sk.split_(model, IMAGES, grid=(2, 2), until="3", boundary="stochastic", norm="patch", order=order)


def vgg() -> nn.Module:
    """Pooling inside the region; dropout, which draws from the same generator, behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    return sk.split_(model, IMAGES, grid=(3, 2), until="4", boundary="stochastic", wiggle=0.3)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "vgg": vgg}


def split_of(model: nn.Module) -> SplitForward:
    forward = compiled_forward_of(model)
    split = split_forward_of(model) if forward is None else forward.inner
    assert isinstance(split, SplitForward)
    return split


@functools.cache
def family_of(name: str) -> Family:
    """Captured once for all tests of this file: a family holds nothing of its model."""
    model = NETWORKS[name]()
    return capture_family(split_of(model), lambda: capture(model, IMAGES, given_gradients=True))[0]


@pytest.fixture
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A split model which `compile` need not capture."""

    def ready(split: SplitForward, _: Callable[[], CapturedStep]) -> tuple[Family, Drawing]:
        return family_of(request.param), Drawing.of(split, split.program(True), (24, 24))

    monkeypatch.setattr(planned_step, "capture_family", ready)
    yield NETWORKS[request.param]()


both = pytest.mark.parametrize("network", list(NETWORKS), indirect=True)
either = pytest.mark.parametrize("network", ["resnet"], indirect=True)


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


def differences(one: Any, other: Any) -> list[str]:
    assert one[1].keys() == other[1].keys()
    losses = [f"loss {i}" for i, pair in enumerate(zip(one[0], other[0], strict=True)) if not torch.equal(*pair)]
    return losses + [name for name, value in one[1].items() if not torch.equal(value, other[1][name])]


_SMALLEST: dict[tuple[str, ...], int] = {}


def smallest_budget(model: nn.Module) -> int:
    name = tuple(model.state_dict())
    if name not in _SMALLEST:
        with pytest.raises(BudgetError) as caught:
            compile(copy.deepcopy(model), IMAGES, budget=1, costs="paper", link_gbps=1)
        _SMALLEST[name] = caught.value.smallest_bytes
    return _SMALLEST[name]


def compiled(model: nn.Module, share: float | None = None, **options: Any) -> CompiledForward:
    """Under parameters and the like and a share of the activations' peak; 0: under the smallest budget."""
    if share is None:
        compile(model, IMAGES, budget=None, costs="paper", **options)
    else:
        budget = smallest_budget(model)
        if share > 0:
            free = compile(copy.deepcopy(model), IMAGES, budget=None, costs="paper").plan
            activations = free.plan.predicted.device_peak_bytes
            budget = max(budget, free.peak_bytes - free.arena_bytes + int(share * activations))
        compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1, execution=SHAKEN, **options)
        assert model.plan.peak_bytes <= budget
        plan = model.plan.plan
        assert plan.copies or any(instance.is_recomputation for instance in plan.instances)
    forward = compiled_forward_of(model)
    assert forward is not None
    return forward


def steps_of(forward: CompiledForward) -> DrawnSteps:
    (planned,) = forward._steps.values()
    assert planned.draws is not None
    return planned.draws


# --- the family of steps ------------------------------------------------------------------------------------------


def require_fresh_capture(model: nn.Module, family: Family, drawing: Drawing, draw: Draw) -> None:
    layout = drawing.layout(draw)
    with drawing.split.choosing(lambda program, extents: layout):
        fresh = capture(model, IMAGES, given_gradients=True)
    numbers = family.numbers(draw)
    found, wanted = numbers_of(family.step(numbers)), numbers_of(fresh)
    assert found == wanted
    # The graph as the planner sees it; durations and names apart, which are the base's.
    base = _core.Graph.from_json(family.base.graph_json())
    made = _core.with_sizes(base, family.graph_numbers(numbers))
    other = _core.Graph.from_json(fresh.graph_json())
    assert made.storages == other.storages
    for mine, theirs in zip(made.tensors, other.tensors, strict=True):
        assert (mine.storage, mine.offset_bytes, mine.sizes, mine.strides_bytes, mine.element_bytes) == (
            theirs.storage, theirs.offset_bytes, theirs.sizes, theirs.strides_bytes, theirs.element_bytes,
        )  # fmt: skip


@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_evaluated_draw_is_a_fresh_capture(name: str) -> None:
    model, family = NETWORKS[name](), family_of(name)
    drawing = Drawing.of(split_of(model), split_of(model).program(True), (24, 24))
    draw = next(draw for draw in drawing.samples(20, seed=9) if draw[0] != family.origin[0])
    require_fresh_capture(model, family, drawing, draw)
    require_fresh_capture(model, family, drawing, drawing.extreme(True, False))
    # Only there: the numbers of another draw are others.
    assert numbers_of(family.step(family.numbers(draw)))[0] != numbers_of(family.base)[0]
    assert numbers_of(family.step(family.numbers(family.origin)))[0] == numbers_of(family.base)[0]


def test_all_patches_of_a_layer_in_one_call() -> None:
    model = resnet(order="layer")
    family, drawing = capture_family(split_of(model), lambda: capture(model, IMAGES, given_gradients=True))
    require_fresh_capture(model, family, drawing, drawing.extreme(False, True))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_no_number_of_any_draw_is_larger(name: str) -> None:
    family, split = family_of(name), split_of(NETWORKS[name]())
    drawing = Drawing.of(split, split.program(True), (24, 24))
    bounds = family.largest(drawing.ranges)
    draws = [drawing.extreme(*odd) for odd in ((False, False), (False, True), (True, False), (True, True))]
    numbers = [family.numbers(draw) for draw in (*draws, *drawing.samples(20))]
    assert all((one <= bounds).all() for one in numbers)
    assert (max(one.sum() for one in numbers) < bounds.sum()) and (bounds > family.numbers(family.origin)).any()


class OnGpu(Tensor):
    """A tensor of the CPU that says that it lies on a GPU, until it is copied from there."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        device = torch.device("cuda", 0)
        made: OnGpu = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return result if func is torch.ops.aten._to_copy.default else tree_map_only(Tensor, OnGpu, result)

    def tolist(self) -> list[Any]:
        return self.held.tolist()


def test_pixel_counts_on_a_gpu_are_numbers_of_the_step() -> None:
    """They were taken for values that all draws share, so that every draw was another step and none was planned."""
    base = family_of("resnet").base
    assert base.constants
    away = {place: OnGpu(value) for place, value in base.constants.items()}
    assert not any(value.is_cpu for value in away.values())
    assert numbers_of(replace(base, constants=away)) == numbers_of(base)


def test_a_step_that_is_no_such_function_is_refused() -> None:
    family, split = family_of("vgg"), split_of(vgg())
    drawing = Drawing.of(split, split.program(True), (24, 24))

    def fitted(change: Callable[[CapturedStep, Draw], CapturedStep]) -> Family:
        return fit(
            lambda draw: change(family.step(family.numbers(draw)), draw),
            family.base,
            family.origin,
            drawing.rows,
            single=drawing.one_step(),
            joint=[drawing.extreme(odd, odd) for odd in (False, True)],
            held_out=drawing.samples(3, seed=5),
        )

    def bent(step: CapturedStep, draw: Draw) -> CapturedStep:
        first = step.storages[-1]
        more = (draw[0] - family.origin[0]) ** 2
        return replace(step, storages=(*step.storages[:-1], replace(first, size_bytes=first.size_bytes + more)))

    def shortened(step: CapturedStep, draw: Draw) -> CapturedStep:
        return step if draw[0] >= family.origin[0] else replace(step, operations=step.operations[:-1])

    same = fitted(lambda step, draw: step)
    draw = drawing.extreme(True, False)
    assert (same.numbers(draw)[same._template.graph] == family.graph_numbers(family.numbers(draw))).all()
    with pytest.raises(DrawError, match=r"1 of \d+ numbers of the step are no product"):
        fitted(bent)
    with pytest.raises(DrawError, match="operations of the step depend on the draw"):
        fitted(shortened)


# --- training -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("share", [None, 0.5, 0.0])
def test_training_is_that_of_the_split_model_to_the_bit(network: nn.Module, share: float | None) -> None:
    expected = train(copy.deepcopy(network))
    forward = compiled(network, share)
    found = train(network)
    assert (forward.replans, forward.redraws) == (0, 0)
    assert not differences(found, expected)
    # Nothing of evaluation is planned.
    network.eval()
    before = torch.get_rng_state()
    assert torch.equal(network(IMAGES), type(network).forward(network, IMAGES))
    assert torch.equal(torch.get_rng_state(), before)


@either
def test_stale_addresses_are_seen(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug that a planned draw invites: places of the draw before, at the sizes of this one."""
    expected = train(copy.deepcopy(network))
    steps = steps_of(compiled(network))
    # Room for what is larger at an old address.
    steps.arenas = Arenas(2 * steps.arenas.device.numel(), 0, torch.device("cpu"))
    original, before = _core.place_again, [network.plan.plan.residencies]

    def stale(graph: _core.Graph, plan: _core.Plan, limits: _core.Limits, **options: Any) -> _core.Plan:
        made = original(graph, plan, limits, **options)
        names = ("graph_fingerprint", "strategy", "limits", "storages", "fused", "instances", "boundaries", "copies")
        residencies = [
            _core.Residency(
                storage=one.storage, pool=one.pool, offset_bytes=other.offset_bytes, size_bytes=one.size_bytes,
                begin=one.begin, end=one.end,
            )
            for one, other in zip(made.residencies, before[-1], strict=True)
        ]  # fmt: skip
        before.append(made.residencies)
        fields = {name: getattr(made, name) for name in names}
        return _core.Plan(**fields, residencies=residencies, predicted=made.predicted)

    monkeypatch.setattr(_core, "place_again", stale)
    steps._ready.clear()
    with pytest.raises(_core.InvalidPlan):
        train(network)
    monkeypatch.setattr(_core, "validate", lambda graph, plan: None)
    fresh = NETWORKS["resnet"]()
    network.load_state_dict(fresh.state_dict())
    try:
        is_seen = bool(differences(train(network), expected))
    except RuntimeError as error:  # PyTorch looks at what its own operators get
        is_seen = "refer to a single memory location" in str(error)
    assert is_seen


@either
def test_draws_that_do_not_fit_are_drawn_again_and_counted(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = compiled(network, 0.5)
    steps = steps_of(forward)
    # Places for the even boundaries and smaller ones alone.
    steps._limits = drawn._with_budgets(steps._limits, model_peak(network), None)
    steps._ready.clear()
    losses, _ = train(network, steps=20)
    assert forward.redraws > 0 and all(map(torch.isfinite, losses))
    for executor in steps._ready.values():
        assert executor is None or executor.plan.predicted.device_peak_bytes <= steps.arenas.device.numel()
    steps._limits = drawn._with_budgets(steps._limits, 0, None)
    steps._ready.clear()
    with pytest.raises(DrawError, match="none of 32 draws"):
        train(network)


def model_peak(model: nn.Module) -> int:
    predicted = model.plan.plan.predicted
    return int(predicted.device_peak_bytes + predicted.parameters_peak_bytes)


@either
def test_no_draw_is_placed_beyond_the_budget(network: nn.Module) -> None:
    forward = compiled(network, 0.0)
    steps, budget = steps_of(forward), forward.options.budget
    assert budget is not None and network.plan.peak_bytes <= budget
    assert steps.arenas.device.numel() == network.plan.arena_bytes
    fitting = 0
    drawing = steps._drawing
    for draw in drawing.samples(30, seed=4):
        executor = steps.executor(draw)
        if executor is None:
            continue
        fitting += 1
        predicted = executor.plan.predicted
        assert predicted.device_peak_bytes <= steps.arenas.device.numel()
        assert network.plan.accounting.budget_for(predicted.device_peak_bytes) <= budget
        assert [one.operation for one in executor.plan.instances] == [
            one.operation for one in network.plan.plan.instances
        ]
        assert executor.plan.boundaries == network.plan.plan.boundaries
        own, shared = vars(StepLayout(executor.step, executor.plan)), vars(steps.even.layout)
        assert all(shared[name] == value for name, value in own.items() if name not in ("_step", "_ran"))
    assert fitting == len(drawing.samples(30, seed=4))


# --- the thread ---------------------------------------------------------------------------------------------------


@either
def test_the_next_step_is_ready_before_it_is_drawn(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(compiled(network))
    steps._ready.clear()
    train(network, steps=1)
    assert steps._pending is not None
    steps._pending.result()
    made: list[Draw] = []
    make = steps._make

    def counted(draw: Draw) -> Any:
        made.append(draw)
        return make(draw)

    monkeypatch.setattr(steps, "_make", counted)
    executor = steps.take()
    assert not made and executor in steps._ready.values()
    # Somebody else draws in between: the forward pass prepares its own.
    steps._ready.clear()
    steps.look_ahead()
    assert steps._pending is not None
    steps._pending.result()
    guessed = list(steps._ready)
    made.clear()
    while list(steps._ready) == guessed:
        torch.rand(1)
        steps.take()
    assert made


@either
def test_what_fails_in_the_thread_is_raised_by_the_next_forward_pass(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(compiled(network))
    make = steps._make

    def fails(draw: Draw) -> Any:
        raise MemoryError("planted")

    train(network, steps=1)
    assert steps._pending is not None
    steps._pending.result()
    steps._pending = None
    steps._ready.clear()
    monkeypatch.setattr(steps, "_make", fails)
    steps.look_ahead()
    with pytest.raises(MemoryError, match="planted"):
        network(IMAGES)
    monkeypatch.setattr(steps, "_make", make)
    expected = train(copy.deepcopy(uncompiled(network)))
    assert not differences(train(network), expected)


class Stream:
    """Stands for a CUDA stream: what it waits for comes before what is launched on it afterwards."""

    def __init__(self) -> None:
        self.behind: set[Stream] = set()

    def wait_stream(self, other: Stream) -> None:
        self.behind |= {other, *other.behind}


class OnStreams:
    """An arena that can be told which streams use it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.recorded = memory, set[Stream]()

    def record_stream(self, stream: Stream) -> None:
        self.recorded.add(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.memory[index]


@either
def test_a_draw_runs_behind_the_one_before_on_whatever_stream(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An executor may be new on its stream, or have run there before others did on another."""
    first, second = Stream(), Stream()
    now = [first]
    for module in (executors, arenas):
        monkeypatch.setattr(module, "current_stream", lambda device: now[0])
    steps = steps_of(compiled(network))
    steps.arenas.device = arena = OnStreams(steps.arenas.device)  # type: ignore[assignment]
    parameters = dict(network.named_parameters()) | dict(network.named_buffers())
    drawing = steps._drawing
    draws = [draw for draw in drawing.samples(4) if draw != drawing.of_layout(drawing.even)]

    def run(draw: Draw | None) -> None:
        executor = steps.even if draw is None else steps.executor(draw)
        assert executor is not None
        executor.forward(parameters, [IMAGES])
        executor.give_up(executor.number)

    run(None)
    now[0] = second
    run(draws[0])  # made on this stream
    assert first in second.behind and second in arena.recorded
    third = now[0] = Stream()
    run(draws[1])
    now[0] = first
    run(None)  # as long ago
    assert {second, third} <= first.behind and third in arena.recorded
    first.behind.clear()
    run(draws[1])
    assert not first.behind


def uncompiled(model: nn.Module) -> nn.Module:
    return uncompile_(copy.deepcopy(model))


@either
def test_a_backward_pass_after_another_forward_pass_is_refused(network: nn.Module) -> None:
    compiled(network)
    torch.manual_seed(0)
    first = network(IMAGES).sum()
    second = network(IMAGES).sum()
    with pytest.raises(RuntimeError, match="activations of this forward pass are gone"):
        first.backward()
    second.backward()


@either
def test_copies_and_dropped_models_leave_nothing_behind(network: nn.Module) -> None:
    expected = train(copy.deepcopy(network), steps=2)
    forward = compiled(network)
    other, third = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    assert not differences(train(network, steps=2), expected)
    assert not differences(train(other, steps=2), expected)
    assert not differences(train(third, steps=2), expected)
    pool = steps_of(forward)._pool
    thread = next(iter(pool._threads))
    gone = weakref.ref(steps_of(forward).arenas.device)
    uncompile_(network)
    del forward, pool
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive() and gone() is None


@either
def test_a_forked_process_makes_its_own_thread(network: nn.Module) -> None:
    steps = steps_of(compiled(network))
    torch.manual_seed(2)
    network(IMAGES)
    parent = steps._pool
    gc.collect()  # what a forked process must not: models of other tests whose threads it does not have
    gc.disable()
    child = os.fork()
    if child == 0:
        try:  # forward passes alone: PyTorch refuses backward passes in a fork
            signal.alarm(300)
            torch.set_num_threads(1)  # OpenMP's threads are the parent's
            outputs = [network(IMAGES) for _ in range(3)]
            assert all(map(torch.isfinite, (out.sum() for out in outputs)))
            assert steps._pool is not parent and steps._pending is not None
            steps._pending.result(timeout=60)
            os._exit(0)
        finally:
            os._exit(4)
    gc.enable()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    network(IMAGES)
    assert steps._pool is parent


# --- refusals -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_for_is_refused() -> None:
    def part() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        return sk.split_(model, IMAGES, grid=(2, 1), until="1", boundary="stochastic")

    with pytest.raises(CaptureError, match=r'one split with boundary="stochastic", got 2'):
        compile(nn.Sequential(part(), part()), IMAGES, budget=None, costs="paper")
    twice = part()
    with pytest.raises(CaptureError, match=r"run a split .* once, got 2 times"):
        compile(nn.Sequential(twice, twice), IMAGES, budget=None, costs="paper")
    with pytest.raises(CaptureError, match=r"draws random numbers before the boundaries are drawn"):
        compile(nn.Sequential(nn.Dropout(0.5), part()), IMAGES, budget=None, costs="paper")
