"""What goes wrong in the middle of a compiled model's step: the error says what to do, nothing hangs or leaks, and the
next step is right.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import splitkern as sk
from splitkern import _core
from splitkern.memory import arenas
from splitkern.memory.compile import compile, compiled_forward_of, uncompile_
from splitkern.memory.executor import StepExecutor
from tests.memory.compiled_models import (
    IMAGES,
    LABELS,
    SHAKEN,
    require_equal,
    smallest_budget,
    split_small,
    train,
)


def compiled() -> tuple[nn.Module, StepExecutor]:
    """With copies and recomputation, and its executor."""
    model = split_small()
    compile(model, IMAGES, budget=smallest_budget(model), costs="paper", link_gbps=1, execution=SHAKEN)
    assert model.plan.plan.copies and any(one.is_recomputation for one in model.plan.plan.instances)
    forward = compiled_forward_of(model)
    assert forward is not None
    (executor,) = forward.planned((IMAGES,)).executors
    return model, executor


def require_usable(model: nn.Module) -> None:
    """It trains as a fresh one does."""
    fresh = split_small()
    model.load_state_dict(fresh.state_dict())
    model.zero_grad()
    require_equal(train(model), train(fresh))


class At:
    """Does something when an instance is about to run."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.number, self.act = number, act

    @contextmanager
    def instance(self, number: int) -> Iterator[None]:
        if number == self.number:
            self.act()
        yield


def _no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nand more")


def _no_host_memory() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory")


def _interrupt() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that share out tests ignore it
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (_interrupt, KeyboardInterrupt, None),
        (_no_memory, torch.OutOfMemoryError, r"found no memory beside the arena of .*Tried.*smaller budget"),
        (_no_host_memory, RuntimeError, r"found no memory beside the arena of .*smaller budget"),
    ],
)
def test_a_step_that_is_cut_off(place: float, act: Callable[[], None], error: type[BaseException], text: str) -> None:
    model, executor = compiled()
    number = int(place * len(executor.plan.instances))
    executor.observer = At(number, act)
    with pytest.raises(error, match=text):
        F.cross_entropy(model(IMAGES), LABELS).backward()
    assert executor.next_part is None
    executor.observer = None
    require_usable(model)


def test_the_loss_raises() -> None:
    model, executor = compiled()
    with pytest.raises(ValueError, match="batch"):
        F.cross_entropy(model(IMAGES), LABELS[:2])
    gc.collect()
    assert executor.next_part is None
    require_usable(model)


def test_a_hook_of_a_gradient_raises() -> None:
    """In the backward pass, between two of its parts."""
    model, _ = compiled()

    def refuse(_: Tensor) -> None:
        raise ArithmeticError

    handle = model[11].weight.register_post_accumulate_grad_hook(refuse)
    with pytest.raises(ArithmeticError):
        F.cross_entropy(model(IMAGES), LABELS).backward()
    handle.remove()
    require_usable(model)


def test_a_copy_that_brings_back_something_else() -> None:
    model, executor = compiled()
    loss = F.cross_entropy(model(IMAGES), LABELS)
    assert executor._pipeline is not None
    executor._pipeline.synchronize()
    executor.arenas.host.add_(1)
    with pytest.raises(_core.CopyFailed, match="prefetch"):
        loss.backward()
    require_usable(model)


@pytest.mark.parametrize("place", [0.3, 0.8])
def test_a_copy_that_fails(place: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, executor = compiled()
    real = executor._pipeline
    assert real is not None
    number = int(place * len(executor.plan.instances))

    class Failing:
        def at_boundary(self, boundary: int) -> None:
            if boundary == number:
                real.abort()
                raise _core.CopyFailed("offload of storage 3 failed: the link is down")
            real.at_boundary(boundary)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "_pipeline", Failing())
        with pytest.raises(_core.CopyFailed, match="the link is down"):
            F.cross_entropy(model(IMAGES), LABELS).backward()
    require_usable(model)


def test_host_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    model = split_small()
    budget = smallest_budget(model)
    real = arenas._reserve
    with monkeypatch.context() as patch:

        def fail(size_bytes: int, device: torch.device, *, pinned: bool | None = None) -> Any:
            if pinned is None:
                return real(size_bytes, device)
            raise RuntimeError("CUDA error: out of memory\nmore")

        patch.setattr(arenas, "_reserve", fail)
        with pytest.raises(RuntimeError, match=r"host memory for what is offloaded .*out of memory; .*host_budget"):
            compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1)
    assert compiled_forward_of(model) is None and not hasattr(model, "plan")
    compile(model, IMAGES, budget=budget, costs="paper", link_gbps=1)
    require_usable(model)


def test_arenas_that_cannot_be_had() -> None:
    """The pool passes on what PyTorch's allocator says, of the type that it has there."""
    cpu = torch.device("cpu")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as refusal:
        arenas.Arenas(1 << 50, 0, cpu)
    assert not isinstance(refusal.value, _core.OutOfMemory)
    with pytest.raises(RuntimeError, match=r"host memory .* cannot be had: .*DefaultCPUAllocator.*host_budget"):
        arenas.Arenas(0, 1 << 50, cpu)


def test_arenas_are_returned() -> None:
    model, executor = compiled()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    gone = [weakref.ref(arena) for arena in (executor.arenas.device, executor.arenas.host)]
    del executor
    uncompile_(model)
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_model_goes_in_the_middle_of_a_step() -> None:
    model, executor = compiled()
    gone = weakref.ref(executor)
    loss = F.cross_entropy(model(IMAGES), LABELS)
    del model, executor
    loss.backward()
    del loss
    gc.collect()
    assert gone() is None


def test_uncompiled_in_the_middle_of_a_step() -> None:
    model, _ = compiled()
    expected = split_small()
    loss, wanted = (F.cross_entropy(one(IMAGES), LABELS) for one in (model, expected))
    sk.uncompile_(model)
    for one in (loss, wanted):
        one.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_forked_process_has_no_threads_that_copy() -> None:
    """It hung for ever when it let go of the model, or just ended."""
    model, _ = compiled()
    with torch.no_grad():
        expected = [buffer.clone() for buffer in model.buffers()]
    gc.collect()  # what a forked process must not: models of other tests
    gc.disable()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            torch.set_num_threads(1)  # OpenMP's threads are the parent's
            assert torch.isfinite(model(IMAGES)).all()
            uncompile_(model)
            os._exit(0)
        finally:
            os._exit(4)
    gc.enable()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), expected, strict=True))
    require_usable(model)


def test_one_thread_at_a_time() -> None:
    model, executor = compiled()
    refused: list[BaseException] = []

    def train_beside() -> None:
        def run() -> None:
            try:
                model(IMAGES)
            except RuntimeError as error:
                refused.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    executor.observer = At(7, train_beside)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    (error,) = refused
    assert "one thread at a time" in str(error)
    executor.observer = None
    require_usable(model)
