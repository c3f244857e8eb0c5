"""The planned step as chained functions of autograd: what arrives when, what is kept, and what is let go."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitkern.memory import step_layout
from splitkern.memory.capture import capture
from splitkern.memory.compile import compile, compiled_forward_of, uncompile_
from splitkern.memory.executor import StepExecutor
from splitkern.memory.outside_tensors import OutsideTensors
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


def executors_of(model: nn.Module) -> list[StepExecutor]:
    forward = compiled_forward_of(model)
    assert forward is not None
    return forward.planned((IMAGES,)).executors


class Log:
    """Instances as they run, and gradients as they reach their parameters."""

    def __init__(self, model: nn.Module, executor: StepExecutor) -> None:
        self.events: list[str | int] = []
        executor.observer = self
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.events.append(name))

    @contextmanager
    def instance(self, number: int) -> Iterator[None]:
        self.events.append(number)
        yield


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("part_bytes", [25 << 20, 300])
def test_gradients_of_the_tail_arrive_before_the_region_runs(
    share: float, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_layout, "_PART_BYTES", part_bytes)
    model = split_small()
    expected = train(copy.deepcopy(model))
    compile(model, IMAGES, budget=budget_of(model, share), costs="paper", link_gbps=1, execution=SHAKEN)
    require_equal(train(model), expected)
    (executor,) = executors_of(model)
    assert len(executor.parts) == 2 if part_bytes > 300 else len(executor.parts) > 3
    assert sorted(name for part in executor.parts for name in part.gradients) == sorted(
        name for name, _ in model.named_parameters()
    )
    log = Log(model, executor)
    train(model, steps=1)
    operations = [executor.step.operations[one.operation] for one in executor.plan.instances]
    first = next(n for n, one in enumerate(operations) if one.is_backward and one.patch >= 0)
    before = log.events[: log.events.index(first)]
    assert {"6.conv.weight", "7.norm.bias", "11.weight"} <= set(before)
    assert "0.weight" not in before


def test_several_steps_in_flight() -> None:
    images = [IMAGES, IMAGES.flip(0), IMAGES * 0.5]
    expected = small()
    for one in images:
        F.cross_entropy(expected(one), LABELS).backward()
    model = compile(small(), IMAGES, budget=None, costs="paper", in_flight=3)
    assert model.plan.accounting.in_flight == len(executors_of(model)) == 3
    losses = [F.cross_entropy(model(one), LABELS) for one in images]
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    # The fourth takes the place of the oldest.
    losses = [F.cross_entropy(model(one), LABELS) for one in (*images, IMAGES)]
    with pytest.raises(RuntimeError, match=r"last 3 forward passes"):
        losses[0].backward()
    for loss in reversed(losses[1:]):
        loss.backward()


def test_every_step_in_flight_counts() -> None:
    one, three = (compile(small(), IMAGES, budget=None, costs="paper", in_flight=n).plan for n in (1, 3))
    returned_bytes = 4 * 5 * 4
    assert three.peak_bytes - one.peak_bytes == 2 * (one.arena_bytes + IMAGES.nbytes + returned_bytes)
    smallest = smallest_budget(small(), in_flight=3)
    model = compile(small(), IMAGES, budget=smallest, costs="paper", link_gbps=1, in_flight=3)
    assert model.plan.peak_bytes <= smallest < 3 * smallest_budget(small())
    with pytest.raises(ValueError, match="too small"):
        compile(small(), IMAGES, budget=smallest - 3, costs="paper", link_gbps=1, in_flight=3)
    with pytest.raises(ValueError, match="in_flight must be a whole number of at least 1, got 0"):
        compile(small(), IMAGES, budget=None, costs="paper", in_flight=0)


def test_a_step_ends_when_its_graph_goes() -> None:
    model = small()
    compile(model, IMAGES, budget=smallest_budget(model), costs="paper", link_gbps=1, execution=SHAKEN)
    (executor,) = executors_of(model)
    output = model(IMAGES)
    assert executor.next_part == 0
    loss = output.sum()
    del output
    gc.collect()
    assert executor.next_part == 0
    del loss
    gc.collect()
    assert executor.next_part is None
    model(IMAGES).sum().backward()


def test_a_step_that_is_collected_while_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector runs wherever something is allocated: also where the next forward pass ends the last."""
    model = small()
    compile(model, IMAGES, budget=smallest_budget(model), costs="paper", link_gbps=1, execution=SHAKEN)
    (executor,) = executors_of(model)
    release = executor._release

    def collects_first() -> None:
        gc.collect()
        release()

    gc.collect()
    gc.disable()
    try:
        loop: dict[str, Any] = {"output": model(IMAGES)}
        loop["self"] = loop
        del loop
        assert executor.next_part == 0
        monkeypatch.setattr(executor, "_release", collects_first)
        outputs: list[Any] = []
        thread = threading.Thread(target=lambda: outputs.append(model(IMAGES)), daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert len(outputs) == 1, "the forward pass waits for itself"
    finally:
        gc.enable()
    outputs.pop().sum().backward()
    assert executor.next_part is None


def test_gradients_of_some_parameters_alone() -> None:
    model = split_small()
    expected = copy.deepcopy(model)
    compile(model, IMAGES, budget=smallest_budget(model), costs="paper", link_gbps=1, execution=SHAKEN)
    for place in (11, 0):
        found = torch.autograd.grad(F.cross_entropy(model(IMAGES), LABELS), model[place].weight)
        wanted = torch.autograd.grad(F.cross_entropy(expected(IMAGES), LABELS), expected[place].weight)
        assert torch.equal(*found, *wanted)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_under_two_names() -> None:
    def tied() -> nn.Module:
        model = small()
        model[4].conv.weight = model[3].conv.weight
        return model

    model = tied()
    compile(model, IMAGES, budget=smallest_budget(model), costs="paper", link_gbps=1, execution=SHAKEN)
    require_equal(train(model), train(tied()))


def test_parameters_in_other_memory_are_bound_anew() -> None:
    model, expected = small(), small()
    compile(model, IMAGES, budget=None, costs="paper")
    for one in (model, expected):
        one(IMAGES)
        one[0].weight.data = one[0].weight.data + 1
        one[3].conv.weight = nn.Parameter(one[3].conv.weight.detach() * 2)
    require_equal(train(model), train(expected))


def _train_on_two(rank: int, folder: str, how: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=2)
    model: Any = split_small()
    if how == "compiled":
        compile(model, IMAGES[:2], budget=smallest_budget(model, IMAGES[:2]), costs="paper", link_gbps=1)
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        half = slice(2 * rank, 2 * rank + 2)
        F.cross_entropy(parallel(IMAGES[half]), LABELS[half]).backward()
        optimizer.step()
    if how == "compiled":
        uncompile_(model)
    torch.save(model.state_dict(), f"{folder}/{how}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    for how in ("eager", "compiled"):
        torch.multiprocessing.spawn(_train_on_two, (str(tmp_path), how), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        found, wanted = (torch.load(tmp_path / f"{how}-{rank}.pt") for how in ("compiled", "eager"))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_clipping_schedulers_and_checkpoints(tmp_path: Path) -> None:
    """A loop that clips, schedules, and goes on from a checkpoint in another model."""

    def run(model: nn.Module, begin: int, state: dict[str, Any] | None) -> tuple[list[float], dict[str, Any]]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        for name, part in parts.items() if state is not None else ():
            part.load_state_dict(state[name])
        norms = []
        for step in range(begin, begin + 2):
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES + 0.1 * step), LABELS).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)))
            optimizer.step()
            scheduler.step()
        return norms, {name: part.state_dict() for name, part in parts.items()}

    def compiled_small() -> nn.Module:
        return compile(small(), IMAGES, budget=smallest_budget(small()), costs="paper", link_gbps=1, execution=SHAKEN)

    wanted, wanted_state = run(small(), 0, None)
    found, state = run(compiled_small(), 0, None)
    torch.save(state, tmp_path / "checkpoint.pt")
    wanted_later, _ = run(small(), 2, copy.deepcopy(wanted_state))
    found_later, _ = run(compiled_small(), 2, torch.load(tmp_path / "checkpoint.pt"))
    assert (found, found_later) == (wanted, wanted_later)


def test_weight_gradients_are_handed_out_as_operations_return_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where a call that writes them would copy; patches add theirs up in one memory."""
    model, expected = split_small(), split_small()
    compile(model, IMAGES, budget=None, costs="paper")
    (executor,) = executors_of(model)
    gradients = executor.step.gradients
    named = {place: name for name, place in gradients.items()}
    assert {named[place] for place in executor.taken.values()} == {"6.conv.weight", "7.conv.weight"}
    returned: list[tuple[str, int]] = []
    real = OutsideTensors.take

    def take(self: OutsideTensors, place: int, value: Tensor) -> None:
        returned.append((named[place], value.data_ptr()))
        real(self, place, value)

    monkeypatch.setattr(OutsideTensors, "take", take)
    for one in (model, expected):
        F.cross_entropy(one(IMAGES), LABELS).backward()
    parameters = dict(model.named_parameters())
    assert len(returned) == 2
    for name, address in returned:
        assert parameters[name].grad.data_ptr() == address
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad), name


@pytest.mark.parametrize("images", [IMAGES.contiguous(memory_format=torch.channels_last), IMAGES])
def test_gradients_of_other_layouts_are_written(images: Tensor) -> None:
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    model = small().to(memory_format=torch.channels_last) if is_last else small()  # type: ignore[call-overload]
    compile(model, images, budget=None, costs="paper")
    forward = compiled_forward_of(model)
    assert forward is not None
    operations = forward.planned((images,)).step.operations
    assert sum(one.is_taken for one in operations) == (0 if is_last else 5)
    on_a_gpu = capture(small(), images, given_gradients=True, device_type="cuda")
    assert not any(one.is_taken for one in on_a_gpu.operations)
