"""The torchvision families that the transformation promises to take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import splitkern as sk

from .models import Measured, assert_close

pytestmark = pytest.mark.torchvision

UNTIL = {
    "vgg11": "features.10",
    "vgg13": "features.14",
    "vgg16": "features.16",
    "vgg19": "features.18",
    "vgg11_bn": "features.14",
    "vgg13_bn": "features.20",
    "vgg16_bn": "features.23",
    "vgg19_bn": "features.26",
    "resnet18": "layer2",
    "resnet34": "layer2",
    "resnet50": "layer2",
    "resnet101": "layer2",
    "resnet152": "layer2",
    "resnext50_32x4d": "layer2",
    "wide_resnet50_2": "layer2",
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=7).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def norm_of(name: str, norm: str) -> str | None:
    return norm if "bn" in name or "res" in name else None


@pytest.mark.parametrize("name", UNTIL)
def test_every_family_member_can_be_split(name: str) -> None:
    with torch.device("meta"):
        model = make(name)
    x = torch.empty(2, 3, 224, 224, device="meta")
    report = sk.check(model, x, grid=(4, 4), until=UNTIL[name], norm=norm_of(name, "patch"), recompute=True)
    assert report.ok, report
    assert report.joins[0].shape[2:] == (28, 28)
    assert report.split_bytes < 0.15 * report.unsplit_bytes
    assert sk.check(model, x, grid=(2, 2), depth=0.5, norm=norm_of(name, "patch")).ok


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "resnet18", "resnet50"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_patch_equals_unsplit_bit_for_bit(name: str, recompute: bool) -> None:
    model, x = make(name), torch.randn(2, 3, 64, 64)
    split = sk.split_(
        copy.deepcopy(model), x, grid=(1, 1), until=UNTIL[name], norm=norm_of(name, "patch"), recompute=recompute
    )
    assert_close(Measured(split, x), Measured(model, x), 0)


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "resnet18", "resnet50"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_halo_with_frozen_norm_equals_unsplit(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = make(name, dtype), torch.randn(2, 3, 64, 64, dtype=dtype)
    split = sk.split_(
        copy.deepcopy(model),
        x,
        grid=(2, 2),
        until=UNTIL[name],
        norm=norm_of(name, "frozen"),
        boundary="halo",
        recompute=True,
    )
    plain = copy.deepcopy(model)
    report = sk.check(plain, x, grid=(2, 2), until=UNTIL[name], norm=norm_of(name, "frozen"))
    for path in report.operations:
        module = plain.get_submodule(path) if path in dict(plain.named_modules()) else None
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    # Evaluation mode in the unsplit part as well: batch statistics of few values amplify rounding.
    for candidate in (split, plain):
        for path, module in candidate.named_modules():
            if isinstance(module, nn.BatchNorm2d) and path not in report.operations:
                module.eval()
    assert_close(Measured(split, x), Measured(plain, x), tolerance)


def test_stochastic_depth_draws_as_unsplit() -> None:
    from torchvision.ops import StochasticDepth

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), StochasticDepth(0.5, "row"), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    for options in ({}, {"recompute": True}, {"order": "layer"}):
        split = sk.split_(copy.deepcopy(model), x, grid=(2, 2), until="2", **options)
        results = []
        for candidate in (split, model):
            torch.manual_seed(7)
            results.append(Measured(candidate, x))
        assert_close(*results, 1e-12)
