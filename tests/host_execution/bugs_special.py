"""Bugs in csrc/kernels/first_layer and csrc/kernels/depthwise that the comparisons must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from tests.host_execution.planting import SEVERAL_SCHEDULES, Bug, Build
from tests.kernel_checks import first_principles
from tests.kernel_checks.cases import Case, square
from tests.kernel_checks.comparisons import assert_accurate

_WINDOW = square(3, 1, 1, 1, (0, 13, 40), (0, 21, 43), (0, 13, 40), (0, 22, 43))
IMAGES = Case("images", _WINDOW, 2, 3, 16)
DEPTHWISE = Case("depthwise", _WINDOW, 2, 8, 8, 8)
GROUPED = Case("grouped", _WINDOW, 2, 8, 8, 2)


@contextmanager
def two_multiprocessors(build: Build) -> Iterator[None]:
    """Blocks take several turns, and there is more than one share of a sum."""
    build.set_device(80, 2, 166912)
    yield
    build.set_device()


def inside_a_margin(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Aligned channels, and memory around the view, so that a bug that reads past a patch stays inside it."""
    n, c, h, w = shape
    parent = torch.randn((n, c, h + 2, w + 2), generator=generator).to(dtype)
    return parent.contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 1:-1]


def run(build: Build, path: str, case: Case, check: Callable[[Build, Case, Tensor, Tensor], None]) -> None:
    generator = torch.Generator().manual_seed(21)
    g = case.geometry
    image = inside_a_margin((case.batch, case.in_channels, *g.in_size), torch.bfloat16, generator)
    weight = torch.randn((case.out_channels, case.in_channels // case.groups, *g.kernel), generator=generator)
    with two_multiprocessors(build), build.forced_path(path):
        check(build, case, image, weight.bfloat16())


def window(case: Case) -> list[object]:
    g = case.geometry
    return [list(g.stride), list(g.padding), list(g.dilation), case.groups, *g.bounds]


def check_forward(build: Build, case: Case, image: Tensor, weight: Tensor) -> None:
    actual = build.operators("patch_conv2d", image, weight, None, *window(case), "none")
    truth = first_principles.conv2d(image.double(), weight.double(), None, case.geometry, case.groups)
    same = first_principles.conv2d(image, weight, None, case.geometry, case.groups)
    assert_accurate("patch_conv2d", actual, truth, same, weight[0].numel())


def check_weight_grad(build: Build, case: Case, image: Tensor, weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(22)
    shape = (case.batch, case.out_channels, *case.geometry.out_size)
    grad_output = inside_a_margin(shape, torch.bfloat16, generator)

    def reference(dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        output = first_principles.conv2d(image.to(dtype), leaf, None, case.geometry, case.groups)
        (grad,) = torch.autograd.grad(output, leaf, grad_output.to(dtype))
        return grad

    actual = build.operators("patch_conv2d_weight_grad", grad_output, image, list(weight.shape), *window(case))
    terms = grad_output.numel() // case.out_channels
    assert_accurate("weight_grad", actual, reference(torch.float64), reference(torch.bfloat16), terms)


first_layer_forward = partial(run, path="first_layer", case=IMAGES, check=check_forward)
first_layer_weight_grad = partial(run, path="first_layer", case=IMAGES, check=check_weight_grad)
depthwise_forward = partial(run, path="depthwise", case=DEPTHWISE, check=check_forward)
depthwise_weight_grad = partial(run, path="depthwise", case=DEPTHWISE, check=check_weight_grad)
grouped_forward = partial(run, path="depthwise", case=GROUPED, check=check_forward)

_ADD_UP = "    const int32_t index = static_cast<int32_t>(thread_index());\n    if (index < block_channels"

BUGS = [
    Bug(
        "first layer: a tile takes one input of the next patch",
        *("first_layer/forward.cu", "first_layer/tile.h"),
        *("axis.in_bounds[patch + 1] - tile.in_begin", "axis.in_bounds[patch + 1] + 1 - tile.in_begin"),
        *(first_layer_forward, "patch_conv2d: relative error"),
    ),
    Bug(
        "first layer: no barrier before the next tile",
        *("first_layer/forward.cu", "first_layer/forward.cu"),
        *("    block_barrier();\n    target = next;", "    target = next;"),
        *(first_layer_forward, "relative error|different bits|differs", SEVERAL_SCHEDULES),
    ),
    Bug(
        "first layer: the other tap of a pair",
        *("first_layer/weight_grad.cu", "first_layer/weight_grad.cu"),
        *("const int32_t odd = pixel & 1;", "const int32_t odd = ~pixel & 1;"),
        *(first_layer_weight_grad, "not a multiple of them"),
    ),
    Bug(
        "first layer: gradients used before they arrive",
        *("first_layer/weight_grad.cu", "first_layer/weight_grad.cu", "copy_async_wait<1>();", "copy_async_wait<2>();"),
        *(first_layer_weight_grad, "relative error|different bits"),
    ),
    Bug(
        "first layer: no barrier between two tiles of gradients",
        *("first_layer/weight_grad.cu", "first_layer/weight_grad.cu"),
        *("of the one before.\n    block_barrier();", "of the one before.\n"),
        *(first_layer_weight_grad, "relative error|different bits", SEVERAL_SCHEDULES),
    ),
    Bug(
        "first layer: the last share dropped",
        *("first_layer/weight_grad.cu", "first_layer/weight_grad.cu"),
        *("block < params.blocks;", "block < params.blocks - 1;"),
        *(first_layer_weight_grad, "weight_grad: relative error"),
    ),
    Bug(
        "depthwise: one input of the next patch",
        *("depthwise/gather.cu", "depthwise/gather.cu"),
        *("static_cast<uint32_t>(first + column) >= width", "static_cast<uint32_t>(first + column) > width"),
        *(depthwise_forward, "patch_conv2d: relative error"),
    ),
    Bug(
        "small groups: one input of the patch before",
        *("depthwise/gather.cu", "depthwise/gather.cu"),
        *("from[o] = column < run.source_begin ||", "from[o] = column < run.source_begin - 1 ||"),
        *(grouped_forward, "patch_conv2d: relative error"),
    ),
    Bug(
        "depthwise: sums exchanged without a barrier",
        *("depthwise/weight_grad.cu", "depthwise/weight_grad.cu"),
        *(f"    block_barrier();\n{_ADD_UP}", _ADD_UP),
        *(depthwise_weight_grad, "relative error|different bits", SEVERAL_SCHEDULES),
    ),
    Bug(
        "depthwise: the last share dropped",
        *("depthwise/weight_grad.cu", "depthwise/weight_grad.cu"),
        *("block < params.blocks;", "block < params.blocks - 1;"),
        *(depthwise_weight_grad, "weight_grad: relative error"),
    ),
]
