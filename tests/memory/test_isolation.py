"""A capture in the middle of a training program: what is set up there for real steps takes no part in it, and it leaves
no trace. A forward pass that does what a captured step would not do is refused.
"""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from splitkern.memory.capture import CaptureError, capture
from splitkern.memory.compile import compile
from tests.memory.compiled_models import IMAGES, LABELS, small


def _gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_step_planned_inside_a_checkpoint(requires_grad: bool) -> None:
    """The checkpoint's hooks ran the model on its real batch in the middle of the capture: it became a constant."""
    eager = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = compile(copy.deepcopy(eager), IMAGES, budget=None, costs="paper")
    batch = IMAGES[:2].clone().requires_grad_(requires_grad)
    for one in (eager, model):
        checkpoint(one, batch, use_reentrant=False).square().sum().backward()
    for other in (batch.detach(), 2 * batch.detach()):
        _gradients(eager), _gradients(model)
        for one in (eager, model):
            one(other).square().sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), eager.parameters(), strict=True))


def test_hooks_on_saved_tensors_see_nothing_of_a_capture() -> None:
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        capture(small(), IMAGES, loss=F.cross_entropy, targets=LABELS)
    assert not seen


def test_anomaly_detection_looks_at_real_values_alone() -> None:
    with torch.autograd.set_detect_anomaly(True):
        capture(small(), IMAGES, loss=F.cross_entropy, targets=LABELS)
        assert torch.is_anomaly_enabled()


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrizations_that_are_cached() -> None:
    """Fakes of the capture stayed in the cache."""
    eager, model = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3))
    model.load_state_dict(eager.state_dict())
    for one in (eager, model):
        parametrize.register_parametrization(one[0], "weight", _Doubled())
    compile(model, IMAGES, budget=None, costs="paper")
    for images in (IMAGES, IMAGES[:2]):
        with parametrize.cached():
            assert torch.equal(model(images), eager(images))
            with torch.no_grad():
                assert torch.equal(model(images), eager(images))


class Changing(nn.Module):
    """Does something to itself in the forward pass."""

    def __init__(self, act: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.entries: list[Any] = [1]
        self.state = {"calls": 0}
        self.names = {"a"}
        self.size: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.act(self, y)
        return y + self.get_buffer("mean")[:, None, None]


def _replace_buffer(model: Any, y: Tensor) -> None:
    model.mean = 0.9 * model.mean + 0.1 * y.detach().mean((0, 2, 3))


def _replace_parameter(model: Any, y: Tensor) -> None:
    model.conv.bias = nn.Parameter(model.conv.bias.detach() * 2)


def _move_parameter(model: Any, y: Tensor) -> None:
    model.conv.bias.data = model.conv.bias.data * 2


def _append(model: Any, y: Tensor) -> None:
    model.entries.append(y.detach().mean())


def _count(model: Any, y: Tensor) -> None:
    model.state["calls"] += 1


def _add(model: Any, y: Tensor) -> None:
    model.names.add("b")


def _note_size(model: Any, y: Tensor) -> None:
    model.size = y.shape[-2:]


def _make_attribute(model: Any, y: Tensor) -> None:
    model.seen = True


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (_replace_buffer, r"the model \(Changing\) puts something else in the place of its 'mean'"),
        (_replace_parameter, r"module 'conv' \(Conv2d\) puts something else in the place of its 'bias'"),
        (_move_parameter, r"conv\.bias gets other memory in the forward pass"),
        (_append, r"the model \(Changing\) changes its 'entries' in the forward pass"),
        (_count, r"the model \(Changing\) changes its 'state' in the forward pass"),
        (_add, r"the model \(Changing\) changes its 'names' in the forward pass"),
        (_note_size, r"the model \(Changing\) changes its 'size' in the forward pass"),
        (_make_attribute, r"the model \(Changing\) changes its 'seen' in the forward pass"),
    ],
)
def test_what_a_captured_step_would_not_do_is_refused(act: Callable[[Any, Tensor], object], text: str) -> None:
    """All of it was dropped silently, or left tensors of the capture in the model's lists."""
    model: Any = Changing(act)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    memory = {name: tensor.data_ptr() for name, tensor in held.items()}
    with pytest.raises(CaptureError, match=text):
        compile(model, IMAGES, budget=None, costs="paper")
    assert dict(model.named_parameters()) | dict(model.named_buffers()) == held
    assert {name: tensor.data_ptr() for name, tensor in held.items()} == memory
    assert model.entries == [1] and model.state == {"calls": 0} and model.names == {"a"} and model.size is None
    assert "seen" not in model.__dict__


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: numpy.random.rand()], ids=["Python", "NumPy"])
def test_random_decisions_of_python_are_not_silent(draw: Callable[[], float]) -> None:
    """Layers that are dropped at random were dropped for ever, or never."""

    def act(model: Any, y: Tensor) -> None:
        draw()

    before = random.getstate(), numpy.random.get_state()[2]
    with pytest.warns(UserWarning, match="decided once, for every step"):
        compile(Changing(act), IMAGES, budget=None, costs="paper")
    assert (random.getstate(), numpy.random.get_state()[2]) == before


def test_an_interrupt_waits_for_the_end_of_a_capture() -> None:
    """In the middle it could end the process: PyTorch's tracing throws where nothing may be thrown."""
    reached: list[str] = []

    def act(model: Any, y: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("behind the signal")

    before = signal.getsignal(signal.SIGINT)
    model = Changing(act)
    with pytest.raises(KeyboardInterrupt):
        compile(model, IMAGES, budget=None, costs="paper")
    assert reached and signal.getsignal(signal.SIGINT) is before
    model.act = lambda model, y: None
    compile(model, IMAGES, budget=None, costs="paper")(IMAGES).sum().backward()
