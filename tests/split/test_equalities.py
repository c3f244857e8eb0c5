"""What a split network computes: equal to the unsplit network, to the reference, to itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import splitkern as sk

from .models import Measured, ResNet, assert_close, differ, reference_resnet, reference_vgg, vgg

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, str]:
    torch.manual_seed(1)
    if kind == "resnet":
        return ResNet().to(dtype), "layer2"
    return vgg(kind == "vgg_bn").to(dtype), "0.11" if kind == "vgg" else "0.15"


def images(height: int = 61, width: int = 47, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, height, width, dtype=dtype)


def norm_of(kind: str, norm: str | None = "patch") -> str | None:
    return None if kind == "vgg" else norm


def split_copy(model: nn.Module, x: torch.Tensor, **options: object) -> nn.Module:
    return sk.split_(copy.deepcopy(model), x, **options)


def freeze_region(model: nn.Module, until: str) -> nn.Module:
    """The model that a frozen norm equals: the region's batch norms in evaluation mode."""
    model = copy.deepcopy(model)
    inside = ("conv1", "bn1", "layer1", "layer2") if until == "layer2" else ("0.",)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name.startswith(inside):
            module.eval()
    return model


@pytest.mark.parametrize("kind", ["vgg", "vgg_bn", "resnet"])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"order": "layer"}, {"boundary": "halo"}])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_patch_equals_unsplit_bit_for_bit(kind: str, options: dict, memory_format: str, dtype: torch.dtype) -> None:
    model, until = make(kind, dtype)
    model = model.to(memory_format=FORMATS[memory_format])
    x = images(dtype=dtype).to(memory_format=FORMATS[memory_format])
    if options == {"order": "layer"} or options.get("boundary") != "halo":
        norm = norm_of(kind)
    else:
        norm = norm_of(kind, "patch")
    split = split_copy(model, x, grid=(1, 1), until=until, norm=norm, **options)
    assert_close(Measured(split, x), Measured(model, x), 0)


@pytest.mark.parametrize("kind", ["vgg", "vgg_bn", "resnet"])
@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (1, 4)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_halo_with_frozen_norm_equals_unsplit_in_training(
    kind: str, grid: tuple, recompute: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model, until = make(kind, dtype)
    x = images(dtype=dtype)
    model(x)  # running statistics that are not the initial ones
    split = split_copy(
        model, x, grid=grid, until=until, boundary="halo", norm=norm_of(kind, "frozen"), recompute=recompute
    )
    assert_close(Measured(split, x), Measured(freeze_region(model, until), x), tolerance)


@pytest.mark.parametrize("norm", ["image", "frozen"])
def test_halo_per_layer_is_the_unsplit_network(norm: str) -> None:
    model, until = make("resnet")
    x = images()
    split = split_copy(model, x, grid=(2, 2), until=until, boundary="halo", order="layer", norm=norm)
    expected = model if norm == "image" else freeze_region(model, until)
    assert_close(Measured(split, x), Measured(expected, x), 0)


@pytest.mark.parametrize("kind", ["vgg", "vgg_bn", "resnet"])
@pytest.mark.parametrize("norm", ["patch", "frozen"])
def test_halo_equals_unsplit_in_evaluation(kind: str, norm: str) -> None:
    model, until = make(kind)
    x = images()
    model(x)
    split = split_copy(
        model, x, grid=(3, 2), until=until, boundary="halo", norm=norm_of(kind, norm), evaluation="split"
    )
    assert_close(Measured(split.eval(), x), Measured(model.eval(), x), 1e-10)


@pytest.mark.parametrize("kind", ["vgg", "vgg_bn", "resnet"])
@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (5, 3), (1, 2), ((0, 2, 3, 7, 8), (0, 1, 6))])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"order": "layer"}], ids=["patch", "recompute", "layer"])
def test_zero_boundaries_equal_the_reference(kind: str, grid: tuple, options: dict) -> None:
    model, until = make(kind)
    # The join of the residual network is 8×6, that of the plain one 15×11.
    x = images() if kind == "resnet" else images(32, 24)
    split = split_copy(model, x, grid=grid, until=until, norm=norm_of(kind), **options)
    size = tuple(x.shape[2:])
    if kind == "resnet":
        expected: nn.Module = reference_resnet(model, size, grid)
    else:
        expected = reference_vgg(model, int(until.split(".")[1]), size, grid)
    assert_close(Measured(split, x), Measured(expected, x), 1e-10, buffers=False)


@pytest.mark.parametrize("kind", ["vgg", "vgg_bn", "resnet"])
def test_a_split_network_is_not_the_unsplit_one(kind: str) -> None:
    model, until = make(kind)
    x = images()
    split = split_copy(model, x, grid=(2, 2), until=until, norm=norm_of(kind))
    assert differ(Measured(split, x), Measured(model, x))


@pytest.mark.parametrize("kind", ["vgg_bn", "resnet"])
@pytest.mark.parametrize("grid", [(2, 2), (5, 3)])
def test_orders_and_recomputation_agree(kind: str, grid: tuple) -> None:
    model, until = make(kind)
    x = images()
    by_patch, recomputed, by_layer = (
        Measured(split_copy(model, x, grid=grid, until=until, norm="patch", **options), x)
        for options in ({}, {"recompute": True}, {"order": "layer"})
    )
    assert_close(recomputed, by_patch, 1e-12)
    assert_close(by_layer, by_patch, 1e-10)


def test_image_norm_uses_all_patches() -> None:
    model, _until = make("resnet")
    x = images()
    split = split_copy(model, x, grid=(2, 2), until="bn1", norm="image", order="layer")
    got = Measured(split, x)
    rows = (0, 16, 31)
    cols = (0, 12, 24)
    convolved = sk.reference.patch_conv2d(
        x,
        model.conv1.weight,
        stride=2,
        padding=3,
        in_rows=(0, 32, 61),
        in_cols=(0, 24, 47),
        out_rows=rows,
        out_cols=cols,
    )
    tail = copy.deepcopy(model)
    tail.conv1 = nn.Identity()
    tail.bn1.load_state_dict(model.bn1.state_dict())
    expected = Measured(tail, convolved.detach())
    assert torch.allclose(got.output, expected.output, rtol=1e-10, atol=1e-12)
    assert torch.allclose(split.bn1.running_var, tail.bn1.running_var, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "patch"},
        {"norm": "patch", "recompute": True},
        {"norm": "patch", "order": "layer"},
        {"norm": "image", "order": "layer"},
        {"norm": "patch", "boundary": "halo"},
        {"norm": "patch", "boundary": "halo", "recompute": True},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_running_buffers_follow_the_pooling_formula(options: dict, momentum: float | None) -> None:
    """Pooled over owned outputs: what unsplit statistics of the joined tensor would be."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU())
    model = model.double()
    x = images(13, 11)
    split = split_copy(model, x, grid=(3, 2), until="2", **options)
    plain = copy.deepcopy(model[1])
    for factor in (1.0, 2.0):
        Measured(split, factor * x)
        if options.get("boundary") == "halo":
            joined = model[0](factor * x)
        else:
            rows, cols = (0, 4, 9, 13), (0, 6, 11)
            joined = sk.reference.patch_conv2d(
                factor * x,
                model[0].weight,
                model[0].bias,
                padding=1,
                in_rows=rows,
                in_cols=cols,
                out_rows=rows,
                out_cols=cols,
            )
        plain(joined)
    assert split[1].num_batches_tracked.item() == 2
    assert torch.allclose(split[1].running_mean, plain.running_mean, rtol=1e-12, atol=1e-14)
    assert torch.allclose(split[1].running_var, plain.running_var, rtol=1e-12)


def test_frozen_norm_leaves_the_buffers_alone() -> None:
    model, until = make("resnet")
    x = images()
    split = split_copy(model, x, grid=(2, 2), until=until, norm="frozen")
    Measured(split, x)
    for name, buffer in split.layer1.named_buffers():
        assert torch.equal(buffer, model.layer1.get_buffer(name))
    assert split.layer3[0].bn1.num_batches_tracked.item() == 1


def test_a_batch_norm_in_evaluation_mode_stays_frozen_in_a_training_model() -> None:
    model, until = make("resnet")
    x = images()
    split = split_copy(model, x, grid=(2, 2), until=until, norm="patch")
    for module in split.layer1.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    Measured(split, x)
    assert split.layer1[0].bn1.num_batches_tracked.item() == 0
    assert split.layer2[0].bn1.num_batches_tracked.item() == 1


def test_a_patch_with_one_value_per_channel_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    split = sk.split_(model, torch.randn(2, 3, 2, 2), grid=(2, 2), until="1", norm="patch")
    with pytest.raises(ValueError, match="1: batch norm in training needs more than 1 value"):
        split(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_join_keeps_the_callers_memory_format(recompute: bool, memory_format: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Identity())
    x = torch.randn(2, 3, 12, 12).to(memory_format=FORMATS[memory_format])
    split = sk.split_(model, x, grid=(2, 2), until="1", recompute=recompute)
    assert split(x).is_contiguous(memory_format=FORMATS[memory_format])


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_computes_as_unsplit(recompute: bool) -> None:
    """At e ≤ s a split is exact, so under autocast the split model has to equal the unsplit one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2))
    x = torch.randn(2, 3, 32, 32)
    split = split_copy(model, x, grid=(2, 2), until="3", recompute=recompute)
    results = []
    for candidate in (split, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = candidate(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        results.append((output, [p.grad for p in candidate.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for got, expected in zip(results[0][1], results[1][1], strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 2e-2 * expected.norm()


def test_stochastic_boundaries_are_drawn_afresh_each_training_step() -> None:
    model, until = make("vgg")
    x = images()
    split = split_copy(model, x, grid=(2, 2), until=until, boundary="stochastic", wiggle=0.4)
    torch.manual_seed(0)
    outputs = [Measured(split, x).output for _ in range(4)]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 1
    torch.manual_seed(0)
    assert torch.equal(Measured(split, x).output, outputs[0])


def test_stochastic_boundaries_match_the_reference_of_their_draw() -> None:
    model, until = make("vgg")
    x = images(32, 24)
    split = split_copy(model, x, grid=(2, 2), until=until, boundary="stochastic", recompute=True)
    torch.manual_seed(5)
    got = Measured(split, x)
    torch.manual_seed(5)
    grid = [sk.geometry.draw_bounds(extent, 2, 0.2) for extent in (8, 6)]
    assert_close(got, Measured(reference_vgg(model, 11, (32, 24), grid), x), 1e-10)


def test_evaluation_is_unsplit_unless_told() -> None:
    model, until = make("resnet")
    x = images()
    unsplit = split_copy(model, x, grid=(2, 2), until=until, norm="patch").eval()
    split = split_copy(model, x, grid=(2, 2), until=until, norm="patch", evaluation="split").eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(unsplit(x), model(x))
        assert not torch.allclose(split(x), model(x))


@pytest.mark.parametrize("order", ["patch", "layer"])
def test_other_sizes_and_an_empty_batch_work(order: str) -> None:
    model, until = make("vgg")
    split = split_copy(model, images(), grid=(2, 2), until=until, order=order)
    other = torch.randn(3, 3, 40, 36, dtype=torch.float64)
    expected = Measured(reference_vgg(model, 11, (40, 36), (2, 2)), other)
    assert_close(Measured(split, other), expected, 1e-10)
    assert split(images()[:0]).shape == (0, 5)


class Branches(nn.Module):
    """A region with two outputs, the inner one read inside and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, 2, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.one(x).relu()
        two = self.two(one)
        return self.head(torch.cat([one, self.up(two)], 1)).mean((2, 3))


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"order": "layer"}])
@pytest.mark.parametrize("boundary", ["zero", "halo"])
def test_each_output_of_a_region_has_its_own_join(options: dict, boundary: str) -> None:
    torch.manual_seed(0)
    model = Branches().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    split = split_copy(model, x, grid=(2, 2), until="two", boundary=boundary, **options)
    assert len(sk.check(model, x, grid=(2, 2), until="two").joins) == 2
    if boundary == "halo":
        expected = model
    else:
        expected = copy.deepcopy(model)
        half, whole = (0, 4, 8), (0, 8, 16)
        expected.one = _patched(expected.one, whole, whole)
        expected.two = _patched(expected.two, whole, half)
    assert_close(Measured(split, x), Measured(expected, x), 1e-10)


def _patched(conv: nn.Conv2d, inputs: tuple, outputs: tuple) -> nn.Module:
    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sk.reference.patch_conv2d(
                x,
                conv.weight,
                conv.bias,
                stride=conv.stride,
                padding=conv.padding,
                in_rows=inputs,
                in_cols=inputs,
                out_rows=outputs,
                out_cols=outputs,
            )

    return Patched()


@pytest.mark.parametrize(
    "last",
    [
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(inplace=True)),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(4),
        nn.Sigmoid(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_kind_of_last_operation_joins_right(last: nn.Module) -> None:
    """A join that an operation writes itself, and one that is copied into, against per-layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(last), nn.Identity()).double()
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    by_layer = Measured(split_copy(model, x, grid=(2, 3), until="1", norm="patch", order="layer"), x)
    for options in ({}, {"recompute": True}):
        got = Measured(split_copy(model, x, grid=(2, 3), until="1", norm="patch", **options), x)
        assert_close(got, by_layer, 1e-11)


def test_double_backward_through_a_split_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 3, padding=1)).double()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    split = sk.split_(model, x, grid=(2, 2), until="2")
    assert torch.autograd.gradgradcheck(split, (x,))


def test_double_backward_through_recomputation_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus())
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    split = sk.split_(model, x, grid=(2, 2), until="1", recompute=True)
    (grad,) = torch.autograd.grad(split(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"order": "layer"}])
def test_average_pooling_counts_the_whole_images_padding(
    ceil_mode: bool, count_include_pad: bool, options: dict
) -> None:
    """At e ≤ s the split is exact, whatever counts as padding."""
    pool = nn.AvgPool2d(3, 3, 1, ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    model = nn.Sequential(nn.Identity(), pool)
    x = torch.randn(2, 3, 19, 17, dtype=torch.float64, requires_grad=True)
    split = split_copy(model, x, grid=(2, 3), until="1", **options)
    assert torch.allclose(split(x), model(x), rtol=1e-13)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, (4, 3), padding=padding, dilation=(1, 2))).double()
    x = images(20, 21)
    split = split_copy(model, x, grid=(2, 2), until="0", boundary="halo")
    assert_close(Measured(split, x), Measured(model, x), 1e-12)
