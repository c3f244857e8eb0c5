"""What splitting leaves alone: parameters, checkpoints, classes, copies, wrappers, the rest."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import splitkern as sk
from splitkern.memory.live_bytes import LiveBytes

from .models import Measured, ResNet, assert_close, vgg

OPTIONS = {"grid": (2, 2), "until": "layer2", "norm": "patch"}


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 48, 48)


@pytest.fixture
def model() -> ResNet:
    torch.manual_seed(0)
    return ResNet()


def test_class_parameters_and_keys_stay(model: ResNet, x: torch.Tensor) -> None:
    parameters, keys = list(model.parameters()), list(model.state_dict())
    children = dict(model.named_modules())
    model.note = "mine"
    assert sk.split_(model, x, **OPTIONS) is model
    assert type(model) is ResNet and model.note == "mine"
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == children


def test_unsplit_gives_back_the_original_bit_for_bit(model: ResNet, x: torch.Tensor) -> None:
    original = copy.deepcopy(model)
    attributes = set(model.__dict__)
    sk.split_(model, x, **OPTIONS, recompute=True)
    assert sk.unsplit_(model) is model
    assert set(model.__dict__) == attributes
    assert model.forward.__func__ is ResNet.forward
    assert_close(Measured(model, x), Measured(original, x), 0)


def test_splitting_changes_neither_buffers_nor_modes_nor_random_state(model: ResNet, x: torch.Tensor) -> None:
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sk.check(model, x, **OPTIONS)
    sk.split_(model, x, **OPTIONS)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_deepcopy_is_an_independent_split_model(model: ResNet, x: torch.Tensor) -> None:
    sk.split_(model, x, **OPTIONS)
    copied = copy.deepcopy(model)
    assert_close(Measured(copied, x), Measured(model, x), 0)
    with torch.no_grad():
        copied.conv1.weight.zero_()
    assert not torch.equal(copied(x), model(x))
    sk.unsplit_(copied)
    assert sk.config_of(model)["until"] == "layer2"


def test_pickling_keeps_the_split(model: ResNet, x: torch.Tensor) -> None:
    sk.split_(model, x, **OPTIONS)
    restored = pickle.loads(pickle.dumps(model))
    assert sk.config_of(restored) == sk.config_of(model)
    assert_close(Measured(restored, x), Measured(model, x), 0)


def test_a_state_dict_travels_between_split_and_unsplit(model: ResNet, x: torch.Tensor) -> None:
    plain = ResNet()
    sk.split_(model, x, **OPTIONS)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    with sk.disabled(model):
        assert_close(Measured(model, x), Measured(plain, x), 0)


def test_config_is_json_and_splits_the_same_way_again(model: ResNet, x: torch.Tensor) -> None:
    other = copy.deepcopy(model)
    sk.split_(model, x, grid=((0, 2, 6), 2), until="layer2", norm="patch", recompute=True)
    config = json.loads(json.dumps(sk.config_of(model)))
    sk.split_(other, x, **config)
    assert sk.config_of(other) == sk.config_of(model)
    assert_close(Measured(other, x), Measured(model, x), 0)


def test_disabled_is_unsplit_in_training_and_ends_with_its_block(model: ResNet, x: torch.Tensor) -> None:
    plain = copy.deepcopy(model)
    sk.split_(model, x, **OPTIONS)
    with pytest.raises(KeyError), sk.disabled(model):
        assert_close(Measured(model, x), Measured(plain, x), 0)
        raise KeyError
    assert not torch.allclose(model(x), plain(x))


def test_train_and_eval_switch_the_split(model: ResNet, x: torch.Tensor) -> None:
    plain = copy.deepcopy(model)
    sk.split_(model, x, **OPTIONS)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.allclose(model.train()(x), plain.train()(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_an_optimizer_trains_it(model: ResNet, x: torch.Tensor, recompute: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sk.split_(model, x, **OPTIONS, recompute=recompute)
    target = torch.tensor([1, 3])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_accumulate_over_backward_passes(model: ResNet, x: torch.Tensor) -> None:
    model.eval()  # no batch statistics, so that the second pass equals the first
    sk.split_(model, x, **OPTIONS, recompute=True, evaluation="split")
    model(x).sum().backward()
    once = [p.grad.clone() for p in model.parameters()]
    model(x).sum().backward()
    for p, grad in zip(model.parameters(), once, strict=True):
        assert torch.allclose(p.grad, 2 * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_parameters_get_no_gradient(model: ResNet, x: torch.Tensor, recompute: bool) -> None:
    model.conv1.requires_grad_(False)
    model.layer1.requires_grad_(False)
    sk.split_(model, x, **OPTIONS, recompute=recompute)
    model(x).sum().backward()
    assert model.conv1.weight.grad is None and model.layer1[0].bn1.weight.grad is None
    assert model.layer2[0].conv1.weight.grad is not None


def test_a_fully_frozen_region_costs_no_graph(model: ResNet, x: torch.Tensor) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer3", "fc")))
    for recompute in (False, True):
        split = sk.split_(copy.deepcopy(model), x, **OPTIONS, recompute=recompute)
        joined: list[torch.Tensor] = []
        split.layer3.register_forward_pre_hook(lambda _, args, seen=joined: seen.append(args[0]))
        split(x).sum().backward()
        assert not joined[0].requires_grad
        assert split.fc.weight.grad is not None


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("recompute", [False, True])
def test_ddp_wraps_a_split_model(model: ResNet, x: torch.Tensor, recompute: bool) -> None:
    alone = copy.deepcopy(model)
    for candidate in (model, alone):
        sk.split_(candidate, x, **OPTIONS, recompute=recompute)
    wrapped = nn.parallel.DistributedDataParallel(model)
    got = Measured(wrapped, x, image_gradient=False)
    assert_close(got, Measured(alone, x, image_gradient=False), 1e-6)
    assert sk.config_of(wrapped) == sk.config_of(alone)
    with sk.disabled(wrapped):
        wrapped(x)


def test_a_replaced_head_is_used(model: ResNet, x: torch.Tensor) -> None:
    sk.split_(model, x, **OPTIONS)
    assert model(x).shape == (2, 5)
    model.fc = nn.Linear(16, 7)
    assert model(x).shape == (2, 7)


def test_a_module_replaced_inside_the_region_is_used(model: ResNet, x: torch.Tensor) -> None:
    sk.split_(model, x, **OPTIONS)
    model(x)
    model.conv1 = nn.Conv2d(3, 6, 5, 2, 2, bias=False)
    Measured(model, x)
    assert model.conv1.weight.grad is not None


def test_containers_of_the_tail_keep_their_hooks(model: ResNet, x: torch.Tensor) -> None:
    sk.split_(model, x, **OPTIONS)
    seen: list[tuple[int, ...]] = []
    model.layer3.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model(x)
    assert seen == [(2, 16, 3, 3)]


def test_a_parametrized_weight_is_computed_from_its_parts(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = vgg()
    nn.utils.parametrizations.weight_norm(model[0][2])
    model = model.double()
    plain = copy.deepcopy(model)
    sk.split_(model, x.double(), grid=(2, 2), until="0.3", boundary="halo", recompute=True)
    assert_close(Measured(model, x.double()), Measured(plain, x.double()), 1e-10)


def test_optional_arguments_stay_at_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor, double: bool = False, scale: float | None = None) -> torch.Tensor:
            x = self.conv(x)
            if double:
                x = 2 * x
            return self.head(x if scale is None else scale * x)

    model, x = Optional(), torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    sk.split_(model, x, grid=(2, 2), until="conv", boundary="halo")
    assert_close(Measured(model, x), Measured(plain, x), 1e-5)
    assert torch.allclose(model(x=x, double=False), plain(x), atol=1e-6)
    with pytest.raises(ValueError, match="double must stay at False, with which the model was split, got True"):
        model(x, double=True)


@pytest.mark.parametrize("last", [nn.MaxPool2d(2), nn.Sigmoid()], ids=["written", "copied"])
def test_without_gradients_nothing_of_a_patch_outlives_it(last: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), last)
    x = torch.randn(2, 3, 32, 32)
    sk.split_(model, x, grid=(4, 4), until="1", evaluation="split").eval()
    with torch.no_grad(), LiveBytes(exclude=[x, *model.parameters()]) as live:
        output = model(x)
    convolved = 2 * 16 * 32 * 32 * 4
    # The join, and one patch of what lies before it with its result, not all of them.
    assert live.peak_bytes <= output.nbytes + 2.5 * convolved / 16


@pytest.mark.parametrize("depth", [0.2, 0.5, 0.75, 1.0])
def test_depth_takes_its_share_of_the_windows(depth: float) -> None:
    model = vgg()
    windows = [i for i, m in enumerate(model[0]) if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    report = sk.check(model, torch.randn(2, 3, 32, 32), grid=(2, 2), depth=depth)
    assert report.ok, report
    inside = [m for m in report.operations if isinstance(model.get_submodule(m), nn.Conv2d | nn.MaxPool2d)]
    assert inside == [f"0.{i}" for i in windows[: int(depth * len(windows))]]


def test_depth_may_end_inside_a_residual_block(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = ResNet().double()
    plain = copy.deepcopy(model)
    sk.split_(model, x.double(), grid=(2, 2), depth=0.3, norm="frozen", boundary="halo", evaluation="split")
    assert_close(Measured(model.eval(), x.double()), Measured(plain.eval(), x.double()), 1e-10)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"order": "layer"}])
@pytest.mark.parametrize("kind", ["element", "channel"])
def test_dropout_keeps_the_expectation(kind: str, options: dict) -> None:
    layer = nn.Dropout(0.25) if kind == "element" else nn.Dropout2d(0.25)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), layer, nn.Identity())
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    split = sk.split_(model, torch.randn(4, 3, 16, 16), grid=(2, 2), until="1", **options)
    torch.manual_seed(0)
    output = split(torch.randn(16, 3, 16, 16))
    assert sorted(output.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert output.mean().item() == pytest.approx(1.0, abs=0.05)
    per_channel = output.flatten(2)
    constant = (per_channel == per_channel[..., :1]).all()
    assert bool(constant) == (kind == "channel")


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"order": "layer"}])
def test_channel_dropout_draws_as_unsplit(options: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout2d(0.5), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    split = sk.split_(copy.deepcopy(model), x, grid=(2, 2), until="2", **options)
    results = []
    for candidate in (split, model):
        torch.manual_seed(7)
        results.append(Measured(candidate, x))
    assert_close(*results, 1e-12)


def test_recomputation_repeats_the_dropout_of_the_first_execution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for recompute in (False, True):
        split = sk.split_(copy.deepcopy(model), x, grid=(2, 2), until="2", recompute=recompute)
        torch.manual_seed(7)
        results.append(Measured(split, x))
        after = torch.get_rng_state()
        torch.manual_seed(7)
        split(x)
        assert torch.equal(after, torch.get_rng_state()), "backward moved the random state"
    assert_close(*results, 1e-12)


def test_registered_element_wise_modules_are_taken() -> None:
    @sk.split.register_pointwise
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor if x.sum() > -1e9 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Scale(), nn.PReLU(4))
    x = torch.randn(2, 3, 8, 8)
    for recompute in (False, True):
        split = sk.split_(copy.deepcopy(model), x, grid=(2, 2), until="2", recompute=recompute)
        assert_close(Measured(split, x), Measured(model, x), 1e-5)


def test_the_report_says_what_would_be_split(model: ResNet, x: torch.Tensor) -> None:
    report = sk.check(model, x, grid=(2, 3), until="layer2", norm="patch")
    assert report.ok and "forward" not in model.__dict__
    assert report.operations[0] == "conv1" and report.operations[-1] == "layer2.1.relu"
    assert [join.shape for join in report.joins] == [(2, 12, 6, 6)]
    assert report.joins[0].rows == (0, 3, 6) and report.joins[0].cols == (0, 2, 4, 6)
    assert report.input_rows == (0, 24, 48) and report.input_cols == (0, 16, 32, 48)
    assert "does not lower the peak" in str(report)
    recomputed = sk.check(model, x, grid=(2, 3), until="layer2", norm="patch", recompute=True)
    assert recomputed.split_bytes < 0.5 * report.split_bytes <= 0.5 * report.unsplit_bytes


def test_the_report_names_the_obstacle(model: ResNet, x: torch.Tensor) -> None:
    report = sk.check(model, x, grid=(2, 2), until="fc", norm="patch")
    assert not report.ok
    assert "mean() is not a convolution" in str(report) and "until='layer3'" in str(report)
