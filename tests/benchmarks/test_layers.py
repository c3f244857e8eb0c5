"""The layer lists of the kernel benchmarks: they are the networks', and their formulas count what they should."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from splitkern.benchmarks.layers import (
    CONV_LAYERS,
    CORE_GRIDS,
    POOL_LAYERS,
    ConvLayer,
    PoolLayer,
    cells,
    patches,
)
from splitkern.geometry import Window


def network(name: str) -> list[ConvLayer]:
    return [layer for layer in CONV_LAYERS if layer.name.startswith(name)]


@pytest.mark.parametrize(("name", "gflop", "convolutions"), [("vgg19", 39.02, 16), ("resnet50", 8.17, 53)])
def test_known_totals(name: str, gflop: float, convolutions: int) -> None:
    """Published: 19.5 and 4.1 GMAC for one image of 224x224; the fully connected layers are not counted here."""
    layers = network(name)
    assert sum(layer.count for layer in layers) == convolutions
    assert sum(layer.count * layer.flop(1) for layer in layers) / 1e9 == pytest.approx(gflop, abs=0.01)


@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("name", "region_ends"), [("vgg19", "features.18"), ("resnet50", "layer2.3.bn3")], ids=["vgg19", "resnet50"]
)
def test_lists_are_the_networks(name: str, region_ends: str) -> None:
    from torchvision import models

    from splitkern.training import default_until

    assert region_ends.startswith(default_until(name))
    model = getattr(models, name)(weights=None).to("meta").eval()
    names = {module: module_name for module_name, module in model.named_modules()}
    seen: Counter[tuple[int, ...]] = Counter()
    inside: Counter[tuple[int, ...]] = Counter()
    pools: list[tuple[int, ...]] = []
    ended = False

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal ended
        if isinstance(module, nn.Conv2d):
            window = (module.kernel_size[0], module.stride[0], int(module.padding[0]))
            shape = (module.in_channels, module.out_channels, args[0].shape[2], *window)
            seen[shape] += 1
            if not ended:
                inside[shape] += 1
        elif isinstance(module, nn.MaxPool2d):
            pools.append((args[0].shape[1], args[0].shape[2], module.kernel_size, module.stride, module.padding))
        ended = ended or names[module] == region_ends

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(record)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert ended

    def shape_of(layer: ConvLayer) -> tuple[int, ...]:
        return layer.channels, layer.outputs, layer.size, layer.kernel, layer.stride, layer.padding

    assert Counter({shape_of(layer): layer.count for layer in network(name)}) == seen
    assert {shape_of(layer) for layer in network(name) if layer.inside} == set(inside)
    listed = [layer for layer in POOL_LAYERS if layer.kind == "max" and layer.name.startswith(name)]
    assert [(p.channels, p.size, p.kernel, p.stride, p.padding) for p in listed] == pools


def test_flop_is_what_a_counter_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer = ConvLayer("layer", 5, 7, 11, kernel=3, stride=2, padding=1, count=1, inside=True)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(torch.ones(2, 5, 11, 11), torch.ones(7, 5, 3, 3), stride=2, padding=1)
    assert layer.flop(2) == counter.get_total_flops()


def test_bytes() -> None:
    layer = ConvLayer("layer", 5, 7, 11, kernel=3, stride=2, padding=1, count=1, inside=True)
    expected = 2 * (3 * 5 * 11 * 11 + 3 * 7 * 6 * 6 + 7 * 5 * 9)
    assert [layer.byte_count(3, 2, direction) for direction in layer.passes] == [expected] * 3
    # Every second input is not read, but its gradient is written.
    sparse = ConvLayer("layer", 4, 1, 10, kernel=1, stride=2, padding=0, count=1, inside=True)
    assert sparse.byte_count(1, 4, "forward") == 4 * (4 * 25 + 25 + 4)
    assert sparse.byte_count(1, 4, "input_grad") == 4 * (4 * 100 + 25 + 4)
    assert PoolLayer("pool", "max", 3, 8, 2, 2).byte_count(1, 2, "forward") == 3 * (2 * 64 + 3 * 16)
    assert PoolLayer("pool", "avg", 3, 8, 2, 2).byte_count(1, 2, "backward") == 3 * (2 * 64 + 2 * 16)
    assert PoolLayer("norm", "batch_norm", 3, 8).byte_count(1, 2, "backward") == 5 * 2 * 3 * 64


def test_names_are_unique() -> None:
    for layers in (CONV_LAYERS, POOL_LAYERS):
        assert len({layer.name for layer in layers}) == len(layers)


def test_core_set() -> None:
    core = cells(CONV_LAYERS)
    assert {cell.grid for cell in core} == set(CORE_GRIDS)
    assert {cell.batch for cell in core} == {32}
    assert {cell.layer for cell in core} == {layer for layer in CONV_LAYERS if layer.inside}
    # Three passes of each layer on each grid; the images of the two first layers need no gradient.
    assert len(core) == 2 * (3 * 17 - 2)
    full = cells(CONV_LAYERS, full=True)
    assert full[: len(core)] == core
    assert {cell.grid for cell in full} == {(1, 1), (2, 2), (4, 4), (3, 2)}
    assert {(cell.layer.name, cell.batch) for cell in full} == {(x.name, b) for x in CONV_LAYERS for b in (32, 128)}


def test_choices() -> None:
    chosen = cells(CONV_LAYERS, pattern="vgg19.conv4_*", passes=["forward"], grids=[(3, 2)], batches=[8])
    assert [cell.key for cell in chosen] == [
        "vgg19.conv4_1 forward 3x2 batch 8",
        "vgg19.conv4_2 forward 3x2 batch 8",
    ]
    with pytest.raises(ValueError, match=r"no layer matches 'vgg20\.\*'; there are vgg19\.conv1_1"):
        cells(CONV_LAYERS, pattern="vgg20.*")
    with pytest.raises(ValueError, match="none of these layers has a pass in input_grad"):
        cells(CONV_LAYERS, pattern="vgg19.conv1_1", passes=["input_grad"])


def test_patches_of_an_uneven_grid() -> None:
    found = patches(Window(7, 2, 3), 224, (3, 2))
    assert found.out_rows == (0, 37, 75, 112)
    assert found.in_rows == (0, 74, 150, 224)
    assert found.out_cols == (0, 56, 112)
    assert found.in_cols == (0, 112, 224)
    assert found.lists()[0] == [0, 74, 150, 224]
