"""What a compiled model has to notice: attributes that change, outputs left out of the loss, gradients of gradients."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import splitkern as sk
from splitkern.memory.capture import CaptureError
from splitkern.memory.compile import compile

from .compiled_models import IMAGES, LABELS, Entropy, small, smallest_budget


class Scaled(nn.Module):
    """A convolution and attributes of all kinds that it computes with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("offset", torch.ones(1))
        self.mask = torch.ones(8, 1, 1)
        self.activation: Callable[[Tensor], Tensor] = F.relu
        self.factors = [1.0, 2.0]
        self.options: dict[str, Any] = {"scale": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.conv(x) * self.mask)
        return y * self.factors[0] * self.options["scale"] + self.get_buffer("offset")


def _mask(model: Any) -> None:
    model.mask = torch.arange(8.0).view(8, 1, 1)


def _activation(model: Any) -> None:
    model.activation = torch.tanh


def _list(model: Any) -> None:
    model.factors[0] = 5.0


def _dictionary(model: Any) -> None:
    model.options["scale"] = 5.0


def _buffer(model: Any) -> None:
    model.offset = torch.full((8, 1, 1), 2.0)


@pytest.mark.parametrize("change", [_mask, _activation, _list, _dictionary, _buffer])
def test_attributes_that_change_are_planned_anew(change: Callable[[Any], None]) -> None:
    eager, compiled = Scaled(), compile(Scaled(), IMAGES, budget=None, costs="paper")
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    for model in (eager, compiled):
        change(model)
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    assert compiled.forward.replans == 1


class Configured(nn.Module):
    """Computes with settings that are no plain attributes of modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.namespace = SimpleNamespace(scale=2.0)
        self.arguments = Namespace(nested=Settings())
        self.names = {"relu"}
        self.ordered = OrderedDict(scale=2.0)
        self.unregistered = [nn.LeakyReLU(0.1)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * self.namespace.scale * self.arguments.nested.scale * self.ordered["scale"]
        return self.unregistered[0](y) if "relu" in self.names else y


@dataclass
class Settings:
    scale: float = 3.0


def _namespace(model: Any) -> None:
    model.namespace.scale = 5.0


def _nested(model: Any) -> None:
    model.arguments.nested.scale = 5.0


def _set(model: Any) -> None:
    model.names.clear()


def _ordered(model: Any) -> None:
    model.ordered["scale"] = 5.0


def _unregistered(model: Any) -> None:
    model.unregistered[0].negative_slope = 0.5


@pytest.mark.parametrize("change", [_namespace, _nested, _set, _ordered, _unregistered])
def test_settings_that_change_are_planned_anew(change: Callable[[Any], None]) -> None:
    """The plan was that of the settings before."""
    eager, compiled = Configured(), compile(Configured(), IMAGES, budget=None, costs="paper")
    assert torch.equal(compiled(IMAGES), eager(IMAGES))
    for model in (eager, compiled):
        change(model)
    for _ in range(2):
        assert torch.equal(compiled(IMAGES), eager(IMAGES))
    assert compiled.forward.replans == 1


def test_settings_that_hold_themselves() -> None:
    model: Any = Configured()
    model.namespace.itself = model.namespace
    compile(model, IMAGES, budget=None, costs="paper")(IMAGES)
    assert model.forward.replans == 0


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)
        sk.split_(self.body, IMAGES, grid=(2, 2), until="2")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)))
        return y


def test_what_happens_to_modules_inside() -> None:
    """A split that is disabled or lifted inside a compiled model went on, and so did a forward that was replaced."""
    eager, compiled = Body(), compile(Body(), IMAGES, budget=None, costs="paper")
    split = eager(IMAGES)
    assert torch.equal(compiled(IMAGES), split)
    with sk.disabled(eager.body), sk.disabled(compiled.body):
        whole = eager(IMAGES)
        assert not torch.equal(whole, split) and torch.equal(compiled(IMAGES), whole)
    assert torch.equal(compiled(IMAGES), split)
    sk.unsplit_(compiled.body)
    assert torch.equal(compiled(IMAGES), whole)
    for model in (eager, compiled):
        model.head.forward = torch.tanh
    sk.unsplit_(eager.body)
    assert torch.equal(compiled(IMAGES), eager(IMAGES))


def test_a_model_without_anything_to_train_runs_as_before() -> None:
    model = compile(small(), IMAGES, budget=None, costs="paper").requires_grad_(False)
    expected = small().requires_grad_(False)
    assert torch.equal(model(IMAGES), expected(IMAGES))
    assert model.forward.replans == 0


def test_a_module_of_a_compiled_model_is_not_compiled_too() -> None:
    model = compile(Body(), IMAGES, budget=None, costs="paper")
    with pytest.raises(ValueError, match="this Sequential is part of a compiled Body"):
        compile(model.body, IMAGES, budget=None, costs="paper")
    sk.uncompile_(model)
    compile(model.body, IMAGES, budget=None, costs="paper")


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.conv(x.mul_(2)) + self.conv(y)
        return z


def test_inputs_that_come_to_share_memory_are_refused() -> None:
    """The plan was made for inputs apart: the one that is changed in place changed the other one."""
    both = torch.stack([IMAGES, IMAGES])
    model = compile(Shifted(), (both[0], both[1]), budget=None, costs="paper")
    model(*both.clone())
    before = both.clone()
    with pytest.raises(ValueError, match=r"input\.0, which the step changes in place, shares memory with input\.1"):
        model(both[0], both[0][:])
    assert torch.equal(both, before)
    model(*both).sum().backward()


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, flag: Any) -> Tensor:
        y: Tensor = self.conv(x)
        return y * (2 if flag is True else 3)


def test_equal_arguments_of_other_types_are_others() -> None:
    eager, compiled = Flagged(), compile(Flagged(), (IMAGES, True), budget=None, costs="paper")
    for flag in (True, 1, 1.0):
        assert torch.equal(compiled(IMAGES, flag), eager(IMAGES, flag))


def test_an_argument_that_hides_tensors_is_refused() -> None:
    """Its tensors became constants: another one in the same object was not looked at."""
    with pytest.raises(CaptureError, match="an argument is a SimpleNamespace that holds tensors"):
        compile(Flagged(), (IMAGES, SimpleNamespace(weights=torch.ones(8))), budget=None, costs="paper")


class Counting(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


def test_a_forward_pass_that_counts_is_refused() -> None:
    model = Counting()
    model.calls = 0
    with pytest.raises(CaptureError, match=r"the model \(Counting\) changes its 'calls' in the forward pass"):
        compile(model, IMAGES, budget=None, costs="paper")
    assert model.calls == 0


def test_a_gradient_of_what_is_no_parameter_is_refused() -> None:
    model = Scaled()
    model.mask.requires_grad_(True)
    with pytest.raises(CaptureError, match="requires a gradient and is neither a parameter"):
        compile(model, IMAGES, budget=None, costs="paper")
    with torch.no_grad():
        model.options["scale"] = (2 * model.mask).detach()
    model.mask = torch.ones(8, 1, 1)
    compile(model, IMAGES, budget=None, costs="paper")


@pytest.mark.parametrize("budget", [None, "smallest"])
def test_a_result_that_the_loss_leaves_out_has_no_part_in_gradients(budget: str | None) -> None:
    """Its gradient was taken for zeros, and zero times infinity is no number."""
    options: dict[str, Any] = {"budget": budget, "costs": "paper", "link_gbps": 1}
    if budget is not None:
        options["budget"] = smallest_budget(Entropy())
    eager, compiled = Entropy(), compile(Entropy(), IMAGES, **options)
    for used in ((0,), (0, 1), (0,)):
        for model in (eager, compiled):
            model.zero_grad()
            outputs = model(IMAGES)
            torch.cat([outputs[i].flatten() for i in used]).square().sum().backward()
        for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            assert torch.equal(one.grad.isnan(), other.grad.isnan())
            assert bool(other.grad.isnan().any()) == (used == (0, 1))
            if used == (0,):
                assert torch.equal(one.grad, other.grad)


class Overlapping(nn.Module):
    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.view = nn.Conv2d(3, 4, 3), view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.conv(x))


@pytest.mark.parametrize(
    "view",
    [lambda x: x.unfold(2, 3, 1), lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 2)],
    ids=["windows", "expanded"],
)
def test_results_whose_elements_share_memory(view: Callable[[Tensor], Tensor]) -> None:
    """Gradients were summed where the elements lie on each other, once instead of for each."""
    eager, compiled = Overlapping(view), compile(Overlapping(view), IMAGES, budget=None, costs="paper")
    for model in (eager, compiled):
        result = model(IMAGES)
        (result * torch.arange(result.numel()).view(result.shape)).sum().backward()
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_a_constant_that_backward_needs_must_stay() -> None:
    model: Any = compile(Scaled(), IMAGES, budget=None, costs="paper")
    loss = model(IMAGES).sum()
    model.mask.zero_()
    with pytest.raises(RuntimeError, match=r"constant\.0.* was changed in place"):
        loss.backward()
    model(IMAGES).sum().backward()


def test_an_optimizer_in_the_backward_pass() -> None:
    """A step on a parameter whose gradient is final was taken for a change of what backward needs."""

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            assert parameter.grad is not None
            parameter.sub_(0.05 * parameter.grad)
        parameter.grad = None

    eager, compiled = Body(), compile(Body(), IMAGES, budget=None, costs="paper")
    for model in (eager, compiled):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(2):
            F.cross_entropy(model(IMAGES), LABELS).backward()
    assert all(torch.equal(p, q) for p, q in zip(compiled.parameters(), eager.parameters(), strict=True))


def test_forward_mode_derivatives_are_refused() -> None:
    model = compile(small(), IMAGES, budget=None, costs="paper")
    with forward_ad.dual_level():
        images = forward_ad.make_dual(IMAGES, torch.ones_like(IMAGES))
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            model(images)
        model(IMAGES).sum().backward()


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm([22, 22])], ids=["group", "layer"])
def test_norms_under_autocast(norm: nn.Module) -> None:
    """Their statistics were taken to be of the images' type, and compile failed."""
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.LazyLinear(5))
    eager(IMAGES)
    model = copy.deepcopy(eager)
    with torch.autocast("cpu", torch.bfloat16):
        compile(model, IMAGES, budget=None, costs="paper")
        losses = [F.cross_entropy(one(IMAGES), LABELS) for one in (eager, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(eager.parameters(), model.parameters(), strict=True))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.one, self.other = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x).relu().mean((2, 3))
        return self.one(features), self.other(features)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_no_gradient_where_the_loss_does_not_depend(used: tuple[int, ...]) -> None:
    """A gradient of zeros would let weight decay and momentum move a head that is not trained."""
    eager, compiled = Heads(), compile(Heads(), IMAGES, budget=None, costs="paper")
    for model in (eager, compiled):
        outputs = model(IMAGES)
        torch.stack([outputs[i].square().sum() for i in used]).sum().backward()
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            assert one.grad is not None and torch.equal(one.grad, other.grad)


def test_gradients_of_gradients_are_refused() -> None:
    model = compile(small(), IMAGES.clone().requires_grad_(), budget=None, costs="paper")
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(model(images).sum(), images, create_graph=True)
    model(images).sum().backward()


def test_hooks_of_gradients_stay_when_planned_anew() -> None:
    eager, compiled = Heads(), compile(Heads(), IMAGES, budget=None, costs="paper")
    for model in (eager, compiled):
        model.conv.weight.register_hook(lambda gradient: gradient * 3)
        for images in (IMAGES, IMAGES[:2]):
            torch.cat(model(images), 1).square().sum().backward()
    assert compiled.forward.replans == 1
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_hooks_of_all_modules_are_refused() -> None:
    compiled = compile(small(), IMAGES, budget=None, costs="paper")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(CaptureError, match="hooks are registered for all modules"):
            compiled(IMAGES)
    finally:
        handle.remove()
    compiled(IMAGES).sum().backward()
