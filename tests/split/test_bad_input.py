"""Every refusal names the argument, what came and what is allowed, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import splitkern as sk
from splitkern.split import surgery

from .models import ResNet, vgg

GOOD = {"grid": (2, 2), "until": "layer2", "norm": "patch"}


def refuse(model: nn.Module, x: torch.Tensor, error: type[BaseException], match: str | None, **options: object) -> None:
    """`split_` raises, and the model is what it was."""
    attributes, state = dict(model.__dict__), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=match):
        sk.split_(model, x, **options)
    assert model.__dict__ == attributes
    assert modes == [module.training for module in model.modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grid": (9, 2)}, ValueError, r"grid: rows must be at most the height 6 of the join .*, got 9"),
        ({"grid": (2, 9)}, ValueError, r"grid: columns must be at most the width 6 of the join .*, got 9"),
        ({"grid": (0, 2)}, ValueError, r"grid: rows must be at least 1, got 0"),
        ({"grid": 2}, TypeError, r"grid must be a pair \(rows, columns\), got 2"),
        ({"grid": (2, "3")}, TypeError, r"grid: columns must be a number of patches or a list of boundaries"),
        ({"grid": ((0, 4, 2, 6), 2)}, ValueError, r"boundaries of rows must begin at 0 and increase strictly"),
        ({"grid": ((0, 2, 5), 2)}, ValueError, r"grid: rows must end at the join's height 6, got \[0, 2, 5\]"),
        ({"until": "layer9"}, ValueError, r"no module is named 'layer9'; the nearest names are \['layer"),
        ({"until": None}, ValueError, r"give either until or depth, got until=None and depth=None"),
        ({"depth": 0.5}, ValueError, r"give either until or depth"),
        ({"until": None, "depth": 1.5}, ValueError, r"depth must be above 0 and at most 1, got 1.5"),
        ({"until": None, "depth": 0.01}, ValueError, r"depth must reach at least one of the 20"),
        ({"boundary": "same"}, ValueError, r"boundary must be one of \['zero', 'stochastic', 'halo'\], got 'same'"),
        ({"order": "row"}, ValueError, r"order must be one of \['patch', 'layer'\], got 'row'"),
        ({"evaluation": "no"}, ValueError, r"evaluation must be one of \['unsplit', 'split'\], got 'no'"),
        ({"norm": "batch"}, ValueError, r"norm must be one of \['patch', 'image', 'frozen'\], got 'batch'"),
        ({"norm": None}, ValueError, r"norm must be given, .* \(first: bn1\): 'patch'"),
        ({"norm": "image"}, ValueError, r"norm='image' with order='patch' .*; use order='layer', or norm='patch'"),
        ({"recompute": True, "order": "layer"}, ValueError, r"recompute=True with order='layer' .*use order='patch'"),
        ({"boundary": "halo", "order": "layer"}, ValueError, r"norm='patch' with boundary='halo' and order='layer'"),
        ({"wiggle": 0.5}, ValueError, r"wiggle must be at least 0 and below 0.5, got 0.5"),
        ({"boundary": "stochastic", "grid": ((0, 2, 6), 2)}, ValueError, r"'stochastic' draws the boundaries itself"),
        ({"until": "fc"}, ValueError, r"mean\(\) is not a convolution.*join before it: until='layer3'"),
    ],
)
def test_wrong_arguments(change: dict, error: type[Exception], match: str) -> None:
    refuse(ResNet(), torch.randn(2, 3, 48, 48), error, match, **{**GOOD, **change})


def test_a_global_operation_is_named_with_what_to_do() -> None:
    refuse(
        vgg(),
        torch.randn(2, 3, 32, 32),
        ValueError,
        r"1 \(AdaptiveAvgPool2d\) cannot be inside a split region because it reads the whole image; "
        r"join before it: until='0'",
        grid=(2, 2),
        until="3",
    )


def test_a_model_already_split() -> None:
    model = sk.split_(ResNet(), torch.randn(2, 3, 48, 48), **GOOD)
    with pytest.raises(ValueError, match=r"already split \(grid=\(2, 2\), until='layer2'\); call unsplit_ first"):
        sk.split_(model, torch.randn(2, 3, 48, 48), **GOOD)
    assert sk.config_of(model)["grid"] == [2, 2]


@pytest.mark.parametrize("function", [sk.unsplit_, sk.config_of, lambda model: sk.disabled(model).__enter__()])
def test_a_model_that_is_not_split(function: object) -> None:
    with pytest.raises(ValueError, match="this ResNet is not split"):
        function(ResNet())


def test_an_interrupted_split_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("build", "check_norm", "make_layout"):
        with monkeypatch.context() as patch:
            patch.setattr(surgery, place, interrupt)
            refuse(ResNet(), torch.randn(2, 3, 48, 48), KeyboardInterrupt, None, **GOOD)


def test_an_interruption_inside_the_trace_restores_every_mode() -> None:
    class Interrupting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.drop = nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    model = Interrupting().eval()
    refuse(model, torch.randn(2, 3, 8, 8), KeyboardInterrupt, None, grid=(1, 1), until="conv")


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), r"0 .* padding_mode must be 'zeros'.*got 'reflect'"),
        (nn.MaxPool2d(16), r"0: a max pooling window must have at most 255 positions, got 256"),
        (nn.MaxPool2d(2, return_indices=True), r"0 \(MaxPool2d\): return_indices must be False"),
        (nn.GroupNorm(1, 3), r"0 \(GroupNorm\) cannot be inside a split region; nothing before it"),
        (nn.SyncBatchNorm(3), r"0 \(SyncBatchNorm\) cannot be .*; convert it to BatchNorm2d"),
        (nn.ConvTranspose2d(3, 3, 2), r"0 \(ConvTranspose2d\) cannot be inside a split region"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_patches_cannot_compute(layer: nn.Module, match: str) -> None:
    model = nn.Sequential(layer, nn.Identity())
    refuse(model, torch.randn(2, 3, 32, 32), ValueError, match, grid=(2, 2), until="1")


def test_hooks_inside_the_region_would_be_bypassed() -> None:
    model = ResNet()
    model.layer1[0].register_forward_hook(lambda *_: None)
    refuse(model, torch.randn(2, 3, 48, 48), ValueError, r"module 'layer1.0' has forward or backward hooks", **GOOD)


def test_a_forward_on_the_instance_is_not_replaced() -> None:
    model = vgg()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="has a forward of its own on the instance"):
        sk.split_(model, torch.randn(2, 3, 32, 32), grid=(2, 2), until="0.3")


def test_control_flow_on_values_cannot_be_traced() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    refuse(
        Depends(), torch.randn(2, 3, 8, 8), ValueError, "Depends.forward cannot be traced", grid=(1, 1), until="conv"
    )


def test_a_module_called_twice_is_no_join() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    refuse(Twice(), torch.randn(2, 3, 8, 8), ValueError, "'conv' is called 2 times", grid=(2, 2), until="conv")


def test_a_fork_that_allows_no_common_boundary_names_both_consumers() -> None:
    class Fork(nn.Module):
        """Both sides halve twice, but the right one reads one position earlier."""

        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2))
            self.right = nn.Sequential(nn.Conv2d(3, 4, 2, 2, padding=1), nn.Conv2d(4, 4, 2, 2))
            self.add = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.add(self.left(x) + self.right(x))

    refuse(
        Fork(),
        torch.randn(2, 3, 16, 16),
        ValueError,
        r"the split cannot start at x: its consumers left_0 .* and right_0 .* allow no common boundary",
        grid=(2, 2),
        until="add",
    )


def test_the_wrong_example() -> None:
    refuse(ResNet(), torch.randn(3, 48, 48), ValueError, r"must be a batch of images \[N, C, H, W\]", **GOOD)
    with pytest.raises(TypeError, match="example_inputs must be a tensor or a tuple"):
        sk.split_(ResNet(), 3, **GOOD)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        sk.split_("resnet", torch.randn(2, 3, 48, 48), **GOOD)


def test_an_image_that_became_too_small() -> None:
    model = sk.split_(ResNet(), torch.randn(2, 3, 48, 48), **GOOD)
    with pytest.raises(ValueError, match="grid: rows must be at most the height 1 of the join"):
        model(torch.randn(2, 3, 8, 8))
    model(torch.randn(2, 3, 48, 48))
