"""The kernels for images of few channels, executed by the CPU, against the definition in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitkern import _library
from splitkern._library import forced_path
from tests.kernel_checks import comparisons, first_principles
from tests.kernel_checks.cases import Case, even
from tests.kernel_checks.comparisons import LAYOUTS, Operators
from tests.kernel_checks.first_principles import Geometry
from tests.kernel_checks.special import FIRST_LAYER
from tests.kernel_checks.special import FIRST_LAYER_BY_NAME as BY_NAME

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def small_device(host_library: Path) -> Iterator[None]:
    """So few multiprocessors that blocks take several tiles, and fp32 that may be rounded to tf32."""
    library = ctypes.CDLL(str(host_library))
    library.splitkern_host_set_device(ctypes.c_int32(80), ctypes.c_int32(1), ctypes.c_int64(166912))
    allowed = _library._Tf32Query(lambda: 1)
    library.splitkern_set_tf32_query(allowed)
    with forced_path("first_layer", host_library):
        yield
    library.splitkern_set_tf32_query(None)
    library.splitkern_host_set_device(ctypes.c_int32(90), ctypes.c_int32(132), ctypes.c_int64(232448))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i % 3]) for i, case in enumerate(FIRST_LAYER)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_conv2d(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, case, dtype, "channels_last", tf32=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [BY_NAME["7x7, stride 2"], BY_NAME["uneven 2x2"]], ids=str)
def test_types(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    comparisons.conv2d(operators, case, dtype, "channels_last", tf32=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_takes_every_layout(operators: Operators, dtype: torch.dtype, layout: str) -> None:
    """Also output channels that do not fill 16 bytes, and the ReLU."""
    case = replace(BY_NAME["stride 2, 3x3"], in_channels=3, out_channels=11)
    comparisons.conv2d(operators, case, dtype, layout, activation="relu", tf32=True)


@pytest.mark.parametrize("shared_bytes", [232448, 101376, 69632])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weight_gradient_fits_its_stages_to_the_shared_memory(
    operators: Operators, host_library: Path, dtype: torch.dtype, shared_bytes: int
) -> None:
    device = ctypes.CDLL(str(host_library)).splitkern_host_set_device
    device(ctypes.c_int32(80), ctypes.c_int32(2), ctypes.c_int64(shared_bytes))
    case = BY_NAME["3x3, tiled"]
    g = case.geometry
    generator = torch.Generator().manual_seed(11)
    image = comparisons.random_tensor((2, 3, *g.in_size), dtype, "channels_last", generator)
    grad_output = comparisons.random_tensor((2, 64, *g.out_size), dtype, "channels_last", generator)
    window = [list(g.stride), list(g.padding), list(g.dilation), 1, *g.bounds]
    weight_grad = operators("patch_conv2d_weight_grad", grad_output, image, [64, 3, 3, 3], *window)
    wanted = weight_gradient(image, grad_output, case, torch.float64)
    same = weight_gradient(image, grad_output, case, dtype)
    comparisons.assert_accurate("weight gradient", weight_grad, wanted, same, grad_output.numel() // 64, tf32=True)


def weight_gradient(image: torch.Tensor, grad_output: torch.Tensor, case: Case, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.zeros(case.out_channels, case.in_channels, *case.geometry.kernel, dtype=dtype, requires_grad=True)
    output = first_principles.conv2d(image.to(dtype), weight, None, case.geometry, 1)
    (grad,) = torch.autograd.grad(output, weight, grad_output.to(dtype))
    return grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_infinities_outside_a_window_stay_outside(operators: Operators, dtype: torch.dtype) -> None:
    """Positions that fill up tiles and windows are zeros times real inputs at most where those are finite."""
    bounds = [[0, 6, 9], [0, 9], [0, 4, 7], [0, 7]]  # the windows of the first patch see five of its rows
    window: list[Any] = [[1, 1], [-1, 0], [1, 1], 1, *bounds]
    image = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(12)).to(dtype)
    image[:, :, 0, :] = torch.inf
    image = image.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(13)).to(dtype)
    output = operators("patch_conv2d", image, weight, None, *window, "none")
    assert bool(output.isfinite().all())
    grad = operators("patch_conv2d_weight_grad", torch.ones_like(output), image, [8, 3, 3, 3], *window)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "kernel", "reason"),
    [
        (torch.float64, 3, 1, 3, "the type is float64"),
        (torch.bfloat16, 5, 1, 3, "the input has 5 channels, more than 4"),
        (torch.bfloat16, 4, 2, 3, "the channels are in groups"),
        (torch.bfloat16, 3, 1, 12, "the window has 144 positions, more than 128"),
    ],
)
def test_what_is_refused(
    operators: Operators, dtype: torch.dtype, channels: int, groups: int, kernel: int, reason: str
) -> None:
    image, weight = torch.ones(1, channels, 12, 12, dtype=dtype), torch.ones(8, channels // groups, kernel, kernel)
    out = 13 - kernel
    window = [[1, 1], [0, 0], [1, 1], groups, [0, 12], [0, 12], [0, out], [0, out]]
    with pytest.raises(RuntimeError, match=reason):
        operators("patch_conv2d", image, weight.to(dtype), None, *window, "none")


def test_windows_that_no_tile_holds_are_refused(operators: Operators) -> None:
    image, weight = torch.ones(1, 3, 201, 201).bfloat16(), torch.ones(8, 3, 3, 3).bfloat16()
    window = [[1, 1], [0, 0], [100, 100], 1, [0, 201], [0, 201], [0, 1], [0, 1]]
    with pytest.raises(RuntimeError, match="a window spans more inputs than are staged at once"):
        operators("patch_conv2d", image, weight, None, *window, "none")


def test_a_gradient_of_few_channels_is_refused(operators: Operators) -> None:
    image, grad_output = torch.ones(1, 3, 4, 4).bfloat16(), torch.ones(1, 12, 4, 4).bfloat16()
    window = [[1, 1], [1, 1], [1, 1], 1, [0, 4], [0, 4], [0, 4], [0, 4]]
    with pytest.raises(RuntimeError, match="grad_output has 12 channels, not a multiple of 8"):
        operators("patch_conv2d_weight_grad", grad_output, image, [12, 3, 3, 3], *window)


def test_more_patches_than_one_launch_takes(operators: Operators) -> None:
    bounds = even(150, 150)
    window: list[Any] = [[1, 1], [1, 1], [1, 1], 1, bounds, [0, 2, 4], bounds, [0, 2, 4]]
    image = torch.randn(1, 3, 150, 4, generator=torch.Generator().manual_seed(14)).bfloat16()
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(15)).bfloat16()
    output = operators("patch_conv2d", image, weight, None, *window, "none")
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1), bounds, (0, 2, 4), bounds, (0, 2, 4))
    wanted = first_principles.conv2d(image.double(), weight.double(), None, g, 1)
    same = first_principles.conv2d(image, weight, None, g, 1)
    comparisons.assert_accurate("patch_conv2d", output, wanted, same, 27)
