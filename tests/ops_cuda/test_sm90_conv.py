"""The Hopper convolution path on a GPU: forced, against the definition in fp64, on small and on real sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import splitkern as sk
from splitkern._library import forced_path
from tests.kernel_checks import comparisons, first_principles
from tests.kernel_checks.cases import Case
from tests.kernel_checks.comparisons import Operators, assert_accurate
from tests.kernel_checks.sm90 import GEMM_TILES, LARGE, SMALL, WEIGHT_GRAD_TILES, tuned

pytestmark = pytest.mark.gpu

LIBRARY = Path(sk.build_info().library)
each_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper path needs compute capability 9.0")
    with forced_path("sm90"):
        yield


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(torch.ops.splitkern, "cuda")


@each_type
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    layout = "aligned channels_last view" if SMALL.index(case) % 2 else "channels_last"
    comparisons.conv2d(operators, case, dtype, layout)
    comparisons.conv2d(operators, case, dtype, layout, activation="relu")


def channels_last(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, device="cuda", dtype=torch.float32) * scale
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def compare(case: Case, dtype: torch.dtype, passes: tuple[str, ...], weight_format: torch.memory_format) -> None:
    """The named passes on the GPU against fp64, with PyTorch's error in the same type as the yardstick."""
    torch.manual_seed(0)
    g = case.geometry
    taps = g.kernel[0] * g.kernel[1]
    image = channels_last((case.batch, case.in_channels, *g.in_size), dtype)
    weight = channels_last((case.out_channels, case.in_channels, *g.kernel), dtype, (case.in_channels * taps) ** -0.5)
    weight = weight.contiguous(memory_format=weight_format)
    bias = torch.randn(case.out_channels, device="cuda").to(dtype)
    grad_output = channels_last((case.batch, case.out_channels, *g.out_size), dtype)
    window = [list(g.stride), list(g.padding), list(g.dilation), 1, *g.bounds]
    ops = torch.ops.splitkern

    def reference(kind: torch.dtype) -> tuple[Tensor, ...]:
        x, w = (t.to(kind).detach().requires_grad_() for t in (image, weight))
        output = first_principles.conv2d(x, w, bias.to(kind), g, 1)
        return output.detach(), *torch.autograd.grad(output, (x, w), grad_output.to(kind))

    truth, same = reference(torch.float64), reference(dtype)
    if "forward" in passes:
        output = ops.patch_conv2d(image, weight, bias, *window, "none")
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert_accurate("patch_conv2d", output, truth[0], same[0], case.in_channels * taps + 1)
        assert torch.equal(output, ops.patch_conv2d(image, weight, bias, *window, "none"))
    if "input_grad" in passes:
        grad = ops.patch_conv2d_input_grad(grad_output, weight, list(image.shape), *window)
        assert_accurate("patch_conv2d_input_grad", grad, truth[1], same[1], case.out_channels * taps)
        assert torch.equal(grad, ops.patch_conv2d_input_grad(grad_output, weight, list(image.shape), *window))
    if "weight_grad" in passes:
        grad = ops.patch_conv2d_weight_grad(grad_output, image, list(weight.shape), *window)
        terms = case.batch * g.out_size[0] * g.out_size[1]
        assert_accurate("patch_conv2d_weight_grad", grad, truth[2], same[2], terms)
        assert torch.equal(grad, ops.patch_conv2d_weight_grad(grad_output, image, list(weight.shape), *window))


@each_type
@pytest.mark.parametrize("name", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, name: str, dtype: torch.dtype) -> None:
    compare(case, dtype, (name,), torch.channels_last)


def test_weights_in_pytorchs_own_order() -> None:
    """OIHW weights are packed first."""
    for case in (LARGE[2], LARGE[9]):
        compare(case, torch.bfloat16, ("forward", "input_grad"), torch.contiguous_format)


@pytest.mark.parametrize("tile", GEMM_TILES)
@pytest.mark.parametrize("case", [LARGE[0], LARGE[2], LARGE[9]], ids=str)
def test_every_tile_of_forward_and_input_gradient(case: Case, tile: int) -> None:
    with tuned(LIBRARY, gemm_tile=tile):
        compare(case, torch.bfloat16, ("forward", "input_grad"), torch.channels_last)


@pytest.mark.parametrize("tile", WEIGHT_GRAD_TILES)
@pytest.mark.parametrize("case", [LARGE[0], LARGE[2], LARGE[9]], ids=str)
def test_every_tile_of_the_weight_gradient(case: Case, tile: int) -> None:
    for segments in (-1, 1, 7):
        with tuned(LIBRARY, weight_grad_tile=tile, weight_grad_segments=segments):
            compare(case, torch.bfloat16, ("weight_grad",), torch.channels_last)


def test_a_captured_graph_repeats_the_call() -> None:
    image, weight = channels_last((2, 64, 16, 16), torch.bfloat16), channels_last((64, 64, 3, 3), torch.bfloat16)
    weight = weight.contiguous()
    window = [[1, 1], [1, 1], [1, 1], 1, [0, 9, 16], [0, 16], [0, 9, 16], [0, 16]]
    ops = torch.ops.splitkern
    output = torch.empty_like(image)
    ops.patch_conv2d.out(image, weight, None, *window, "none", output=output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.patch_conv2d.out(image, weight, None, *window, "none", output=output)
        weight_grad = ops.patch_conv2d_weight_grad(output, image, list(weight.shape), *window)
    image.copy_(torch.randn_like(image))
    graph.replay()
    expected = ops.patch_conv2d(image, weight, None, *window, "none")
    assert torch.equal(output, expected)
    assert torch.equal(weight_grad, ops.patch_conv2d_weight_grad(expected, image, list(weight.shape), *window))
