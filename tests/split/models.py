"""Small networks of the VGG and ResNet kinds, and what the split tests measure of a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitkern import geometry, reference
from splitkern.geometry import AxisNode, Window


def vgg(batch_norm: bool = False) -> nn.Module:
    """Seven windows, in-place ReLUs, a classifier: the shape of torchvision's VGG."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (6, 6, 0, 8, 8, 0, 10):
        if width == 0:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 5))


class Bottleneck(nn.Module):
    """A residual block of ResNet-50's kind, with a projection where it changes the shape."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False, groups=2)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.down = (
            nn.Sequential(nn.Conv2d(channels, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width))
            if stride > 1 or channels != 2 * width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, four bottlenecks and a classifier: the shape of torchvision's ResNets."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(6, 4, 1), Bottleneck(8, 4, 1))
        self.layer2 = nn.Sequential(Bottleneck(8, 6, 2), Bottleneck(12, 6, 1))
        self.layer3 = nn.Sequential(Bottleneck(12, 8, 2))
        self.fc = nn.Linear(16, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


#: Graph of ResNet's region until layer2, written by hand: what propagation has to find.
RESNET_UNTIL_LAYER2 = [
    AxisNode("conv1", ("x",), Window(7, 2, 3)),
    AxisNode("maxpool", ("conv1",), Window(3, 2, 1)),
    AxisNode("layer1.0.conv1", ("maxpool",)),
    AxisNode("layer1.0.conv2", ("layer1.0.conv1",), Window(3, 1, 1)),
    AxisNode("layer1.0", ("layer1.0.conv2", "maxpool")),
    AxisNode("layer1.1.conv1", ("layer1.0",)),
    AxisNode("layer1.1.conv2", ("layer1.1.conv1",), Window(3, 1, 1)),
    AxisNode("layer1.1", ("layer1.1.conv2", "layer1.0")),
    AxisNode("layer2.0.conv1", ("layer1.1",)),
    AxisNode("layer2.0.conv2", ("layer2.0.conv1",), Window(3, 2, 1)),
    AxisNode("layer2.0.down.0", ("layer1.1",), Window(1, 2, 0)),
    AxisNode("layer2.0", ("layer2.0.conv2", "layer2.0.down.0")),
    AxisNode("layer2.1.conv1", ("layer2.0",)),
    AxisNode("layer2.1.conv2", ("layer2.1.conv1",), Window(3, 1, 1)),
    AxisNode("layer2.1", ("layer2.1.conv2", "layer2.0")),
]


class _Reference(nn.Module):
    """Stands in for a window operation or batch norm: slice, pad, compute, concatenate."""

    def __init__(self, module: nn.Module, bounds: dict[str, Sequence[int]]) -> None:
        super().__init__()
        self.module, self.bounds = module, bounds

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        if isinstance(module, nn.Conv2d):
            return reference.patch_conv2d(
                x,
                module.weight,
                module.bias,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
                **self.bounds,
            )
        if isinstance(module, nn.MaxPool2d):
            return reference.patch_max_pool2d(
                x, module.kernel_size, stride=module.stride, padding=module.padding, **self.bounds
            )[0]
        assert isinstance(module, nn.BatchNorm2d)
        rows, cols = self.bounds["out_rows"], self.bounds["out_cols"]
        return reference.patch_batch_norm(x, module.weight, module.bias, rows=rows, cols=cols, eps=module.eps).output


def _replace(model: nn.Module, path: str, bounds: dict[str, Sequence[int]]) -> None:
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent) if parent else model
    setattr(holder, name, _Reference(model.get_submodule(path), bounds))


def _cut(nodes: Sequence[AxisNode], size: Sequence[int], grid: Sequence[Any]) -> list[dict[str, Sequence[int]]]:
    axes = []
    for extent, parts in zip(size, grid, strict=True):
        extents = geometry.forward_extents(nodes, {"x": extent})
        join = nodes[-1].name
        bounds = geometry.even_bounds(extents[join], parts) if isinstance(parts, int) else parts
        axes.append(dict(geometry.propagate(nodes, extents, {join: bounds})))
    return axes


def reference_resnet(model: ResNet, size: Sequence[int], grid: Sequence[Any]) -> ResNet:
    """A copy whose layers until layer2 are computed by the reference, patch by patch."""
    model = copy.deepcopy(model)
    rows, cols = _cut(RESNET_UNTIL_LAYER2, size, grid)
    source = {node.name: node.inputs[0] for node in RESNET_UNTIL_LAYER2}
    # Every module's input and output value among the nodes above.
    places: dict[str, tuple[str, str]] = {"conv1": ("x", "conv1"), "bn1": ("conv1", "conv1")}
    places["maxpool"] = ("conv1", "maxpool")
    for block in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        start, middle, inner = source[f"{block}.conv1"], f"{block}.conv2", f"{block}.conv1"
        places |= {
            f"{block}.conv1": (start, inner),
            f"{block}.bn1": (inner, inner),
            f"{block}.conv2": (inner, middle),
            f"{block}.bn2": (middle, middle),
            f"{block}.conv3": (middle, block),
            f"{block}.bn3": (block, block),
        }
        if isinstance(model.get_submodule(f"{block}.down"), nn.Sequential):
            places |= {f"{block}.down.0": (start, block), f"{block}.down.1": (block, block)}
    for path, (read, written) in places.items():
        bounds = {
            "in_rows": rows[read],
            "in_cols": cols[read],
            "out_rows": rows[written],
            "out_cols": cols[written],
        }
        _replace(model, path, bounds)
    return model


def reference_vgg(model: nn.Module, until: int, size: Sequence[int], grid: Sequence[Any]) -> nn.Module:
    """A copy whose first layers are computed by the reference, patch by patch."""
    model = copy.deepcopy(model)
    layers = list(model[0][: until + 1])
    nodes, value = [], "x"
    for index, layer in enumerate(layers):
        window = None
        if isinstance(layer, nn.Conv2d):
            window = Window(layer.kernel_size[0], layer.stride[0], layer.padding[0])
        elif isinstance(layer, nn.MaxPool2d):
            window = Window(layer.kernel_size, layer.stride, layer.padding)
        nodes.append(AxisNode(str(index), (value,), window))
        value = str(index)
    rows, cols = _cut(nodes, size, grid)
    for index, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        if isinstance(layer, nn.ReLU):
            continue
        read = node.inputs[0]
        bounds = {
            "in_rows": rows[read],
            "in_cols": cols[read],
            "out_rows": rows[node.name],
            "out_cols": cols[node.name],
        }
        _replace(model, f"0.{index}", bounds)
    return model


class Measured:
    """Output, gradients (of the parameters and the image) and buffers after one step."""

    def __init__(self, model: nn.Module, images: Tensor, image_gradient: bool = True) -> None:
        model.zero_grad()
        images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_(image_gradient)
        output = model(images)
        # A loss that weighs every output differently.
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * weights + output.square() / 2).sum().backward()
        self.output = output.detach()
        self.gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        self.names = [name for name, p in model.named_parameters() if p.grad is not None]
        self.image_gradient = images.grad
        self.buffers = [buffer.clone() for buffer in model.buffers()]

    def tensors(self, buffers: bool) -> list[Tensor]:
        values = [self.output, *self.gradients]
        if self.image_gradient is not None:
            values.append(self.image_gradient)
        return values + (self.buffers if buffers else [])


def assert_close(one: Measured, other: Measured, tolerance: float, *, buffers: bool = True) -> None:
    """Relative L2 error of every tensor at most ``tolerance``; 0 asks for equality.

    A gradient that is all but zero beside the others (of a bias before batch norm) is rounding, so
    errors count against at least a thousandth of the largest gradient's norm.
    """
    assert len(one.gradients) == len(other.gradients) > 0
    floor = 1e-3 * max(gradient.double().norm().item() for gradient in other.gradients)
    for got, expected in zip(one.tensors(buffers), other.tensors(buffers), strict=True):
        if tolerance == 0:
            assert torch.equal(got, expected)
        else:
            scale = max(expected.double().norm().item(), floor)
            error = (got.double() - expected.double()).norm().item() / scale
            assert error <= tolerance, f"relative error {error}"


def differ(one: Measured, other: Measured) -> bool:
    """Whether two steps differ by far more than rounding."""
    return bool((one.output - other.output).norm() > 1e-3 * other.output.norm())
