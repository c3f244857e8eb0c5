"""CUDA graphs of a step: on the CPU with recorded calls in their place, on a GPU for real."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from splitkern.memory import graphs, planned_step
from splitkern.memory.bound_calls import BoundCall, tensor_of
from splitkern.memory.compile import compile, compiled_forward_of
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from tests.memory.compiled_models import (
    IMAGES,
    Entropy,
    budget_of,
    require_equal,
    small,
    smallest_budget,
    split_small,
    train,
)

GRAPHED = ExecutorOptions(cuda_graphs=True)


class Recorded:
    """Stands for a graph's capture: notes calls and their tensors instead of running them, and can run them again."""

    def __init__(self) -> None:
        self.captures: list[int] = []
        self.replays = 0
        self.pools: list[object] = []

    def __call__(self, run: Callable[[], None], pool: object, stream: object) -> Callable[[], None]:
        self.pools.append(pool)
        calls: list[Callable[[], None]] = []

        def note(call: Any) -> None:
            args, kwargs, overload = _copied(call._args), _copied(call._kwargs), call._overload
            preload = [(tensor_of(read), tensor_of(write)) for read, write in call._preload]
            copies = [(position, tensor_of(write)) for position, write in call._copies]

            def again() -> None:
                for read, write in preload:
                    write.copy_(read)
                returned = overload(*args, **kwargs)
                values = returned if isinstance(returned, tuple | list) else (returned,)
                for position, write in copies:
                    if values[position] is not None:
                        write.copy_(values[position])

            calls.append(again)

        def note_zeros(executor: StepExecutor, number: int) -> None:
            calls.append(lambda: real_zeros(executor, number))

        real, real_zeros = BoundCall.run, StepExecutor._run_to_zero
        BoundCall.run, StepExecutor._run_to_zero = note, note_zeros  # type: ignore[method-assign,assignment]
        try:
            run()
        finally:
            BoundCall.run, StepExecutor._run_to_zero = real, real_zeros  # type: ignore[method-assign]
        self.captures.append(len(calls))

        def replay() -> None:
            self.replays += 1
            for call in calls:
                call()

        return replay


def _copied(container: Any) -> Any:
    if isinstance(container, dict):
        return {key: _copied(value) for key, value in container.items()}
    return [_copied(value) for value in container] if isinstance(container, list) else container


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    stand_in = Recorded()
    monkeypatch.setattr(graphs, "capture", stand_in)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(graphs, "stream_of", lambda device: object())
    monkeypatch.setattr(planned_step, "require_graphs", lambda device, debug: None)
    return stand_in


@pytest.mark.parametrize("make", [small, split_small])
@pytest.mark.parametrize("share", [None, 0.5, 0.0])
def test_replayed_steps_are_eager_steps(make: Callable[[], nn.Module], share: float | None, recorded: Recorded) -> None:
    model = make()
    expected = train(copy.deepcopy(model), steps=5)
    budget = None if share is None else budget_of(model, share) + (1 << 20)
    strategy = "default" if share is None else "layerwise"
    compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1, strategy=strategy, execution=GRAPHED)
    require_equal(train(model, steps=5), expected)
    forward = compiled_forward_of(model)
    assert forward is not None
    (executor,) = forward.planned((IMAGES,)).executors
    if share is None:  # forward, and every part of backward
        assert len(recorded.captures) == 1 + len(executor.parts)
    else:
        assert len(recorded.captures) > 1 + len(executor.parts)
    assert sum(recorded.captures) == len(executor.plan.instances)
    assert recorded.replays == 4 * len(recorded.captures)


def test_parameters_that_move_are_captured_anew(recorded: Recorded) -> None:
    model, expected = small(), small()
    compile(model, IMAGES, budget=None, costs="paper", execution=GRAPHED)
    require_equal(train(model), train(expected))
    captures = len(recorded.captures)
    for one in (model, expected):
        one[0].weight.data = one[0].weight.data + 1
    require_equal(train(model), train(expected))
    assert len(recorded.captures) == 2 * captures
    # One pool for the pieces, and another one for those that take their place.
    assert len(set(recorded.pools[:captures])) == len(set(recorded.pools[captures:])) == 1
    assert len(set(recorded.pools)) == 2


def test_a_capture_leaves_other_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that feed copies go on while a piece is captured; it is captured on a stream of the step's device."""
    given: list[dict[str, Any]] = []
    current: list[torch.device] = []

    class Graph:
        def replay(self) -> None:
            pass

    @contextmanager
    def begin(graph: Graph, **options: Any) -> Iterator[None]:
        given.append(options)
        yield

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield

    class Stream:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", begin)
    monkeypatch.setattr(torch.cuda, "device", on)
    ran: list[int] = []
    stream = Stream()
    graphs.capture(lambda: ran.append(1), "pool", stream)()
    assert ran == [1] and current == [Stream.device]
    assert given == [{"pool": "pool", "stream": stream, "capture_error_mode": "thread_local"}]


def test_gradients_of_a_replayed_step_are_the_callers(recorded: Recorded) -> None:
    """The memory that graphs write to is not what is handed out."""
    model, expected = small(), small()
    compile(model, IMAGES, budget=None, costs="paper", execution=GRAPHED, accumulate=True)
    for one in (model, expected):
        for scale in (1.0, 0.5, 2.0, 1.5):
            one(IMAGES * scale).square().sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_an_input_that_the_model_changes_is_the_callers(recorded: Recorded) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))
    expected = copy.deepcopy(model)
    compile(model, IMAGES, budget=None, costs="paper", execution=GRAPHED)
    for _ in range(3):
        given = torch.randn_like(IMAGES)
        changed = [given.clone(), given.clone()]
        for one, images in zip((model, expected), changed, strict=True):
            one(images).square().sum().backward()
        assert torch.equal(*changed) and not torch.equal(changed[0], given)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_what_graphs_copy_is_counted(recorded: Recorded) -> None:
    plain = compile(small(), IMAGES, budget=None, costs="paper").plan
    graphed = compile(small(), IMAGES, budget=None, costs="paper", execution=GRAPHED).plan
    gradient_bytes = sum(p.nbytes for p in small().parameters())
    assert graphed.peak_bytes - plain.peak_bytes == IMAGES.nbytes + 4 * 5 * 4 + gradient_bytes


def test_graphs_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a model on a GPU, got one on cpu"):
        compile(small(), IMAGES, budget=None, costs="paper", execution=GRAPHED)
    with pytest.raises(ValueError, match="exclude each other"):
        graphs.require_graphs(torch.device("cuda"), debug=True)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_graphs_on_a_gpu(share: float) -> None:
    images, model = IMAGES.cuda(), split_small().cuda()
    budget = smallest_budget(model, images) + (4 << 20)
    reference = copy.deepcopy(model)
    execution = ExecutorOptions()
    for one, how in ((reference, execution), (model, GRAPHED)):
        compile(one, images, budget=None if share == 1 else budget, costs="paper", link_gbps=1, execution=how)
    require_equal(train(model, images, steps=6), train(reference, images, steps=6))


def test_a_result_that_the_loss_leaves_out_is_another_graph(recorded: Recorded) -> None:
    eager, model = Entropy(), compile(Entropy(), IMAGES, budget=None, costs="paper", execution=GRAPHED)
    for used in ((0,), (0,), (0, 1), (0,), (0, 1), (0, 1), (0,)):
        for one in (eager, model):
            one.zero_grad()
            outputs = one(IMAGES)
            torch.cat([outputs[i].flatten() for i in used]).square().sum().backward()
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    assert recorded.replays
