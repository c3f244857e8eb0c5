"""The explanation names the path that the operator takes: the same choice, from numbers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from splitkern._library import forced_path
from splitkern.cli import explain
from splitkern.cli.common import UserError
from tests.kernel_checks.comparisons import Operators

TORCH_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [
    "conv2d 1x16x6x6 8x16x3x3 padding 1 bf16 grid 2x2",
    "conv2d 1x16x6x6 8x16x3x3 padding 1 fp16 contiguous grid 1x2",
    "conv2d 1x3x9x9 8x3x3x3 stride 2 padding 1 bf16 grid 2x1",
    "conv2d 2x16x6x6 16x1x3x3 padding 1 groups 16 fp16 grid 2x2",
    "conv2d 1x8x6x6 8x4x3x3 padding 1 groups 2 bf16",
    "conv2d 1x8x6x6 8x8x3x3 dilation 2 padding 2 fp32 grid 3x2",
    "conv2d 1x8x6x6 8x8x1x1 fp64",
]
DEVICE = explain.ARCHITECTURES["sm_90"]  # what the host execution stands for


def run(operators: Operators, shape: explain.ConvShape) -> None:
    """Calls the operator of the only pass of the shape on tensors such as the explanation assumes."""
    format = torch.channels_last if shape.layout == "channels_last" else torch.contiguous_format
    dtype = TORCH_DTYPES[shape.dtype]
    image = torch.ones(shape.input_size, dtype=dtype).contiguous(memory_format=format)
    weight = torch.ones(shape.weight_size, dtype=dtype).contiguous(memory_format=format)
    (in_rows, out_rows), (in_cols, out_cols) = (
        explain._bounds(shape, shape.weight_size[2 + axis], axis) for axis in (0, 1)
    )
    bounds = [in_rows, in_cols, out_rows, out_cols]
    grad_size = (shape.input_size[0], shape.weight_size[0], out_rows[-1], out_cols[-1])
    grad_output = torch.ones(grad_size, dtype=dtype).contiguous(memory_format=format)
    window = [shape.stride, shape.padding, shape.dilation, shape.groups, *bounds]
    ops = operators.namespace
    if shape.passes == ("forward",):
        ops.patch_conv2d(image, weight, None, *window, "none")
    elif shape.passes == ("input_grad",):
        ops.patch_conv2d_input_grad(grad_output, weight, shape.input_size, *window)
    else:
        ops.patch_conv2d_weight_grad(grad_output, image, shape.weight_size, *window)


@pytest.mark.parametrize("operation", explain.PASSES)
@pytest.mark.parametrize("text", SHAPES)
def test_the_operator_takes_the_explained_path_and_no_preferred_one(
    operators: Operators, host_library: Path, text: str, operation: str
) -> None:
    shape = explain.parse(f"{text} pass {operation}")
    (found,) = explain.explain(shape, DEVICE, host_library)
    assert found.operation == operation
    names = explain.conv_paths(host_library)
    preferred = names[: names.index(found.path)]
    assert found.reason.startswith(f"{found.path}: ")
    for name in preferred:
        assert f"; not {name}: " in found.reason
        with pytest.raises(RuntimeError, match=f"the path {name} was forced"), forced_path(name, host_library):
            run(operators, shape)
    with forced_path(found.path, host_library):
        run(operators, shape)


def test_an_older_device_has_the_plain_path_alone(host_library: Path) -> None:
    old = explain.Device("Turing", 75, 68, 64 * 1024)
    for found in explain.explain(explain.parse(SHAPES[0]), old, host_library):
        assert found.path == "plain"
        others = [name for name in explain.conv_paths(host_library) if name != "plain"]
        assert found.reason.count("the device has compute capability 7.5") == len(others)


@pytest.mark.parametrize(
    "text",
    [
        "max_pool2d 2x16x12x12 kernel 3 stride 2 padding 1 bf16 grid 2x2",
        "avg_pool2d 2x16x12x12 kernel 2 fp32 grid 2x2",
        "batch_norm 2x16x12x12 fp16 grid 2x2",
    ],
)
def test_pooling_and_batch_norm(host_library: Path, text: str) -> None:
    for found in explain.explain(explain.parse(text), DEVICE, host_library):
        assert (found.path, found.reason) == ("nhwc", "nhwc: several channels in one access")
    for found in explain.explain(explain.parse(f"{text} contiguous"), DEVICE, host_library):
        assert found.path == "plain"
        assert found.reason.startswith("plain: any shape, type and strides; not nhwc: ")
    with forced_path("plain", host_library):
        for found in explain.explain(explain.parse(text), DEVICE, host_library):
            assert found.reason.endswith("; not nhwc: the plain path was forced")


def test_copies(host_library: Path) -> None:
    whole = explain.explain(explain.parse("copy 2x16x12x12"), DEVICE, host_library)
    assert [found.operation for found in whole] == ["offload", "prefetch"]
    assert all(found.path == "engine" and found.reason.startswith("engine: ") for found in whole)


def test_a_weight_gradient_over_several_launches_is_plain(host_library: Path) -> None:
    (found,) = explain.explain(
        explain.parse("conv2d 1x16x80x4 8x16x1x1 bf16 grid 65x1 pass weight_grad"), DEVICE, host_library
    )
    assert found.path == "plain"
    others = [name for name in explain.conv_paths(host_library) if name != "plain"]
    assert found.reason.count("more than 64 patches on an axis") == len(others)


def test_what_the_kernels_cannot_hold_is_an_error(host_library: Path) -> None:
    shape = dataclasses.replace(explain.parse(SHAPES[0]), input_size=(2**40, 16, 6, 6))
    with pytest.raises(UserError, match="splitkern::patch_conv2d: the batch must lie within 32 bits"):
        explain.explain(shape, DEVICE, host_library)


def test_a_long_reason_is_cut_and_terminated(host_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_TEXT_BYTES", 24)
    (found,) = explain.explain(explain.parse("conv2d 1x8x6x6 8x8x1x1 fp64 pass forward"), DEVICE, host_library)
    assert found.reason == "plain: any shap"
