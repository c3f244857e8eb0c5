"""On a GPU: what goes wrong raises with the operator's name and leaves the process usable; sizes at the limits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import splitkern.ops  # noqa: F401  (registers the operators)
from splitkern._library import forced_path
from splitkern.cli.explain import conv_paths
from tests.kernel_checks import comparisons
from tests.kernel_checks.cases import EMPTY, NAMED
from tests.kernel_checks.comparisons import LAYOUTS, Operators

pytestmark = pytest.mark.gpu

MANY = next(case for case in NAMED if case.name == "150 row patches")
UNEVEN = next(case for case in NAMED if case.name == "uneven 2x2")
STREAM_CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(torch.ops.splitkern, "cuda")


def window(extent: int, kernel: int = 3) -> list[object]:
    """Stride 1, padded to the same extent, one patch."""
    return [[1, 1], [kernel // 2] * 2, [1, 1], 1, [0, extent], [0, extent], [0, extent], [0, extent]]


def assert_usable() -> None:
    """A convolution of every path that this GPU has still computes what PyTorch does."""
    ops = torch.ops.splitkern
    image = torch.randn(2, 16, 12, 12, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    output = ops.patch_conv2d(image, weight, None, *window(12), "none")
    expected = F.conv2d(image.float(), weight.float(), padding=1)
    assert ((output.float() - expected).norm() / expected.norm()).item() < 1e-2
    torch.cuda.synchronize()


@pytest.fixture
def capturing_stream() -> Iterator[None]:
    """A stream that captures and that the legacy default stream would have to wait for: CUDA refuses every launch
    there meanwhile."""
    cudart = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")  # PyTorch's own, already in the process
    stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.synchronize()
    assert cudart.cudaStreamCreate(ctypes.byref(stream)) == 0
    assert cudart.cudaStreamBeginCapture(stream, STREAM_CAPTURE_RELAXED) == 0
    yield
    cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))  # the refused launch has spoilt the capture
    cudart.cudaGetLastError()
    assert cudart.cudaStreamDestroy(stream) == 0


@pytest.mark.parametrize("operation", ["patch_conv2d", "patch_max_pool2d", "patch_batch_norm_apply"])
def test_a_refused_launch_names_the_operator(request: pytest.FixtureRequest, operation: str) -> None:
    ops = torch.ops.splitkern
    image = torch.randn(1, 4, 8, 8, device="cuda")
    weight = torch.randn(4, 4, 3, 3, device="cuda")
    pool = [[2, 2], [2, 2], [0, 0], [1, 1], [0, 8], [0, 8], [0, 4], [0, 4]]
    values, offsets = ops.patch_max_pool2d(image, *pool)
    output = torch.empty_like(image)  # nothing below allocates
    one = torch.ones(1, 4, device="cuda")
    request.getfixturevalue("capturing_stream")
    with pytest.raises(RuntimeError, match=f"splitkern::{operation}: CUDA error cudaErrorStreamCapture"):
        if operation == "patch_conv2d":
            ops.patch_conv2d.out(image, weight, None, *window(8), "none", output=output)
        elif operation == "patch_max_pool2d":
            ops.patch_max_pool2d.out(image, *pool, values=values, offsets=offsets)
        else:
            ops.patch_batch_norm_apply.out(image, one, one, None, None, [0, 8], [0, 8], "none", output=output)


def test_the_process_is_usable_after_a_refused_launch() -> None:
    """Runs after the tests above: the refused launches left no error behind."""
    assert_usable()


@pytest.mark.parametrize("operation", ["patch_conv2d", "patch_conv2d_input_grad", "patch_conv2d_weight_grad"])
def test_out_of_memory_names_the_operator(operation: str) -> None:
    """Results of 2^44 bytes from inputs that hold one number, expanded."""
    ops = torch.ops.splitkern
    side = 2**16
    one = torch.ones(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16)
    many = one.expand(2**11, 2**11, 1, 1)
    with pytest.raises(RuntimeError, match=rf"splitkern::{operation}: .*out of memory"):
        if operation == "patch_conv2d":
            ops.patch_conv2d(one.expand(1, 2**11, side, side), many, None, *window(side, 1), "none")
        elif operation == "patch_conv2d_input_grad":
            ops.patch_conv2d_input_grad(
                one.expand(1, 2**11, side, side), many, [1, 2**11, side, side], *window(side, 1)
            )
        else:
            channels = 2**21
            vector = one.expand(1, channels, 1, 1)
            ops.patch_conv2d_weight_grad(vector, vector, [channels, channels, 1, 1], *window(1, 1))
    assert_usable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("in_channels", "out_channels"), [(16, 8), (12, 10), (3, 16), (9, 7)])
def test_every_layout_and_alignment(
    operators: Operators, in_channels: int, out_channels: int, layout: str, dtype: torch.dtype
) -> None:
    comparisons.conv2d(operators, replace(UNEVEN, in_channels=in_channels, out_channels=out_channels), dtype, layout)


def test_more_patches_than_one_launch_holds(operators: Operators) -> None:
    comparisons.conv2d(operators, replace(MANY, in_channels=16, out_channels=16), torch.bfloat16, "channels_last")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_empty_batch(operators: Operators, layout: str) -> None:
    comparisons.conv2d(operators, replace(EMPTY, in_channels=16, out_channels=16), torch.bfloat16, layout)


@pytest.mark.large
@pytest.mark.parametrize("path", [name for name in conv_paths() if name != "plain"])
def test_more_than_2_31_elements(path: str) -> None:
    """The last corner of tensors past 2^31 elements comes out as in a small call, in each pass."""
    if path == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is not sm_90")
    ops = torch.ops.splitkern
    channels, outputs, groups = {"first_layer": (3, 64, 1), "depthwise": (64, 64, 64)}.get(path, (64, 64, 1))
    side, tail = 5800, 8
    assert outputs * side * side > 2**31
    generator = torch.Generator().manual_seed(11)
    format = torch.channels_last
    small = torch.randn(1, channels, tail, tail, generator=generator).bfloat16().cuda().contiguous(memory_format=format)
    weight = torch.randn(outputs, channels // groups, 3, 3, generator=generator).bfloat16().cuda()
    weight = weight.contiguous(memory_format=format)
    bounds = [0, side - tail, side]
    far = [[1, 1], [1, 1], [1, 1], groups, bounds, bounds, bounds, bounds]
    near = [[1, 1], [1, 1], [1, 1], groups, [0, tail], [0, tail], [0, tail], [0, tail]]

    def grown(corner: torch.Tensor) -> torch.Tensor:
        size = (1, corner.shape[1], side, side)
        parent = torch.empty(size, dtype=corner.dtype, device="cuda", memory_format=format).zero_()
        parent[..., -tail:, -tail:] = corner
        return parent

    with forced_path(path):
        image = grown(small)
        output = ops.patch_conv2d(image, weight, None, *far, "none")
        expected = ops.patch_conv2d(small, weight, None, *near, "none")
        torch.testing.assert_close(output[..., -tail:, -tail:], expected, rtol=2e-2, atol=2e-2)
        # Everything but the corner is zero, so the weight's gradient is the corner's.
        del output
        grad_output = grown(expected)
        found = ops.patch_conv2d_weight_grad(grad_output, image, list(weight.shape), *far)
        wanted = ops.patch_conv2d_weight_grad(expected, small, list(weight.shape), *near)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-1)
        del image
        found = ops.patch_conv2d_input_grad(grad_output, weight, [1, channels, side, side], *far)
        wanted = ops.patch_conv2d_input_grad(expected, weight, [1, channels, tail, tail], *near)
        torch.testing.assert_close(found[..., -tail:, -tail:], wanted, rtol=2e-2, atol=5e-1)
