"""The sm_80 convolution path, executed by the CPU, against the definition of each operator in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitkern import _library
from splitkern._library import forced_path
from tests.kernel_checks import comparisons, first_principles
from tests.kernel_checks.cases import NAMED, Case, square
from tests.kernel_checks.comparisons import Operators, assert_accurate, random_tensor
from tests.kernel_checks.sm80 import BORDERS, GENERATED_WIDE, SMALL, TILES, wide

STRIDED = next(case for case in NAMED if case.name == "stride 2, 3x3")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["channels_last", "aligned channels_last view"]
SetDevice = Callable[..., None]

each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def device(host_library: Path) -> Iterator[SetDevice]:
    """Every convolution takes the path, and fp32 may be tf32. Sets capability, multiprocessors and shared memory.

    One multiprocessor makes the launch choose the largest tile that a shape fills, and one share of a reduction.
    """
    library = ctypes.CDLL(str(host_library))
    allow = _library._Tf32Query(lambda: 1)
    library.splitkern_set_tf32_query(allow)

    def set_device(multiprocessors: int = 1, capability: int = 80, shared_bytes: int = 163 * 1024) -> None:
        library.splitkern_host_set_device(
            ctypes.c_int32(capability), ctypes.c_int32(multiprocessors), ctypes.c_int64(shared_bytes)
        )

    set_device()
    with forced_path("sm80", host_library):
        yield set_device
    library.splitkern_set_tf32_query(None)
    set_device(132, 90, 232448)


def check(operators: Operators, case: Case, dtype: torch.dtype, layout: str, activation: str = "none") -> None:
    comparisons.conv2d(operators, case, dtype, layout, activation, tf32=dtype == torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [(case, DTYPES[i % 3], LAYOUTS[i // 3 % 2]) for i, case in enumerate([*SMALL, *GENERATED_WIDE])],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_geometries(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    check(operators, case, dtype, layout)


@each_type
@pytest.mark.parametrize("case", TILES, ids=str)
def test_tiles(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    check(operators, case, dtype, "aligned channels_last view")


@each_type
def test_relu(operators: Operators, dtype: torch.dtype) -> None:
    check(operators, wide(BORDERS, 16, 24), dtype, "channels_last", activation="relu")


@each_type
@pytest.mark.parametrize("groups", [2, 3])
def test_groups(operators: Operators, dtype: torch.dtype, groups: int) -> None:
    check(operators, wide(STRIDED, 8 * groups, 16 * groups, groups=groups), dtype, "channels_last")


@each_type
@pytest.mark.parametrize("multiprocessors", [2, 7, 132])
def test_reduction_in_many_shares(
    operators: Operators, device: SetDevice, dtype: torch.dtype, multiprocessors: int
) -> None:
    device(multiprocessors)
    bounds = (0, 20, 33), (0, 17, 30)
    check(operators, Case("long", square(1, 1, 0, 1, *bounds, *bounds), 3, 8, 8), dtype, "channels_last")


def geometry_of(case: Case) -> list[Any]:
    g = case.geometry
    return [list(g.stride), list(g.padding), list(g.dilation), case.groups, *g.bounds]


@each_type
@pytest.mark.parametrize("channels", [1, 5, 12, 70])
@pytest.mark.parametrize("groups", [1, 2])
def test_any_number_of_results(operators: Operators, dtype: torch.dtype, channels: int, groups: int) -> None:
    """Only the channels of the reduction must fill vectors, and weights may have any strides."""
    case = wide(BORDERS, 8 * groups, channels * groups, groups=groups)
    g = case.geometry
    generator = torch.Generator().manual_seed(21)
    tf32 = dtype == torch.float32

    def linear(input: Tensor, weight: Tensor) -> Tensor:
        return first_principles.conv2d(input, weight, None, g, groups)

    image = random_tensor((2, 8 * groups, *g.in_size), dtype, "channels_last", generator)
    weight = random_tensor((channels * groups, 8, 3, 3), dtype, "stepped", generator)
    output = operators("patch_conv2d", image, weight, None, *geometry_of(case), "none")
    truth, same = linear(image.double(), weight.double()), linear(image, weight)
    assert_accurate("patch_conv2d", output, truth, same, 72, tf32=tf32)

    case = wide(case, channels * groups, 8 * groups, groups=groups)
    grad_output = random_tensor((2, 8 * groups, *g.out_size), dtype, "channels_last", generator)
    weight = random_tensor((8 * groups, channels, 3, 3), dtype, "stepped", generator)
    size = [2, channels * groups, *g.in_size]
    result = operators("patch_conv2d_input_grad", grad_output, weight, size, *geometry_of(case))
    grads = []
    for type in (torch.float64, dtype):
        leaf = torch.zeros(size, dtype=type, requires_grad=True)
        grads += torch.autograd.grad(linear(leaf, weight.to(type)), leaf, grad_output.to(type))
    assert_accurate("patch_conv2d_input_grad", result, grads[0], grads[1], 72, tf32=tf32)


@pytest.mark.parametrize("stride", [4, 9, 17])
def test_strides_with_many_classes_of_inputs(operators: Operators, stride: int) -> None:
    """The input gradient takes residues of the stride by eight per launch and axis."""
    extent, outputs = (0, 2 * stride, 3 * stride + 1), (0, 2, 4)
    g = square(3, stride, 1, 2, extent, extent, outputs, outputs)
    check(operators, Case("long stride", g, 1, 8, 8), torch.bfloat16, "channels_last")


WINDOW = [[1, 1], [1, 1], [1, 1], 1, [0, 2, 4], [0, 4], [0, 2, 4], [0, 4]]


def forward(operators: Operators, image: Tensor, out_channels: int = 8, kernel: int = 3) -> Tensor:
    weight = torch.ones(out_channels, image.shape[1], kernel, kernel, dtype=image.dtype)
    result: Tensor = operators.namespace.patch_conv2d(image, weight, None, *WINDOW, "none")
    return result


def nhwc(channels: int = 8, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(1, channels, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_refused_types_and_layouts(operators: Operators) -> None:
    for image, reason in [
        (nhwc(dtype=torch.float64), "the type is float64"),
        (nhwc(12), "input channels per group number 12, no multiple of 8"),
        (nhwc(8).contiguous(), "the channel stride of the input is 16, not 1"),
        (nhwc(20)[:, 4:12], "the pixels of the input do not all begin at multiples of 16 bytes"),
        (nhwc(32)[:, 4:12], "the pixels of the input do not all begin at multiples of 16 bytes"),
    ]:
        with pytest.raises(RuntimeError, match=reason):
            forward(operators, image)
    with pytest.raises(RuntimeError, match="the kernel has 17 positions along an axis, over 16"):
        forward(operators, nhwc(), kernel=17)
    ops = operators.namespace
    with pytest.raises(RuntimeError, match="output channels per group number 6, no multiple of 8"):
        ops.patch_conv2d_input_grad(nhwc(6), torch.ones(6, 8, 3, 3, dtype=torch.bfloat16), [1, 8, 4, 4], *WINDOW)
    with pytest.raises(RuntimeError, match="output channels per group number 6, no multiple of 8"):
        ops.patch_conv2d_weight_grad(nhwc(6), nhwc(8), [6, 8, 3, 3], *WINDOW)
    with pytest.raises(RuntimeError, match="the channel stride of the input is 16, not 1"):
        ops.patch_conv2d_weight_grad(nhwc(8), nhwc(8).contiguous(), [8, 8, 3, 3], *WINDOW)


def test_refused_tf32(operators: Operators, host_library: Path) -> None:
    ctypes.CDLL(str(host_library)).splitkern_set_tf32_query(None)
    with pytest.raises(RuntimeError, match="float32 may not be rounded to tf32"):
        forward(operators, nhwc(dtype=torch.float32))


def test_refused_devices(operators: Operators, device: SetDevice) -> None:
    device(capability=75)
    with pytest.raises(RuntimeError, match=r"the device has compute capability 7\.5"):
        forward(operators, nhwc())
    device(shared_bytes=32 * 1024)
    with pytest.raises(RuntimeError, match="a block may have 32768 bytes of shared memory, under 49152"):
        forward(operators, nhwc())
    with pytest.raises(RuntimeError, match="a block may have 32768 bytes of shared memory, under 57344"):
        operators.namespace.patch_conv2d_weight_grad(nhwc(8), nhwc(8), [8, 8, 3, 3], *WINDOW)


def test_refused_positions(operators: Operators) -> None:
    far = [[1, 1], [2**29, 1], [1, 1], 1, [0, 2, 4], [0, 4], [0, 2, 4], [0, 4]]
    weight = torch.ones(8, 8, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"a window reaches beyond position 2\^30"):
        operators.namespace.patch_conv2d(nhwc(), weight, None, *far, "none")


@pytest.mark.large
def test_offsets_beyond_32_bits(operators: Operators) -> None:
    """Pixels up to 2^32 elements apart; only the touched pages are ever allocated. Further ones are refused."""
    step = 2**30
    parents = [torch.empty(4 * step, dtype=torch.float16) for _ in range(2)]
    far_input, far_output = (parent.as_strided((1, 8, 4, 4), (0, 1, 8, step)) for parent in parents)
    near = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(7)).half()
    near = near.contiguous(memory_format=torch.channels_last)
    far_input.copy_(near)
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(8)).half()
    window = [[1, 1], [1, 1], [1, 1], 1, [0, 2, 4], [0, 3, 4], [0, 2, 4], [0, 3, 4]]
    ops = operators.namespace
    ops.patch_conv2d.out(far_input, weight, None, *window, "none", output=far_output)
    assert torch.equal(far_output, ops.patch_conv2d(near, weight, None, *window, "none"))
    grad_output = far_output.clone(memory_format=torch.channels_last)
    far_grad = ops.patch_conv2d_weight_grad(far_output, far_input, [8, 8, 3, 3], *window)
    assert torch.equal(far_grad, ops.patch_conv2d_weight_grad(grad_output, near, [8, 8, 3, 3], *window))
    near_grad = ops.patch_conv2d_input_grad(grad_output, weight, [1, 8, 4, 4], *window)
    ops.patch_conv2d_input_grad.out(far_output, weight, [1, 8, 4, 4], *window, output=far_input)
    assert torch.equal(far_input, near_grad)
    window[1] = [1, 20]
    with pytest.raises(RuntimeError, match="the input, with its padding, spans 32 GiB or more"):
        ops.patch_conv2d(far_input, weight, None, *window, "none")
