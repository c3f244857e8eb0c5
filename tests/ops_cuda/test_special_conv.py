"""The kernels of the first layer and of few channels per group on a GPU: forced, against the definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import splitkern.ops  # noqa: F401  (registers the operators)
from splitkern._library import forced_path
from tests.kernel_checks import comparisons, first_principles
from tests.kernel_checks.cases import Case
from tests.kernel_checks.comparisons import LAYOUTS, Operators, assert_accurate
from tests.kernel_checks.special import (
    DEPTHWISE,
    FIRST_LAYER,
    FIRST_LAYER_BY_NAME,
    GROUPED,
    LARGE_DEPTHWISE,
    LARGE_FIRST_LAYER,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def tf32(true_fp32: None) -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = True
    yield


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(torch.ops.splitkern, "cuda")


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i % 3]) for i, case in enumerate(FIRST_LAYER)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_first_layer(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    with forced_path("first_layer"):
        comparisons.conv2d(operators, case, dtype, "channels_last", tf32=dtype == torch.float32)


@pytest.mark.usefixtures("tf32")
@each_type
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_layer_forward_takes_every_layout(operators: Operators, dtype: torch.dtype, layout: str) -> None:
    with forced_path("first_layer"):
        case = FIRST_LAYER_BY_NAME["3x3, tiled"]
        comparisons.conv2d(operators, case, dtype, layout, activation="relu", tf32=dtype == torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[(i + i // 6) % 3]) for i, case in enumerate([*DEPTHWISE, *GROUPED])],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_groups(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    with forced_path("depthwise"):
        comparisons.conv2d(operators, case, dtype, "channels_last")
        comparisons.conv2d(operators, case, dtype, "channels_last", activation="relu")


def compare_large(case: Case, dtype: torch.dtype, tf32: bool) -> None:
    """All passes of the forced path on sizes of real networks, twice, against fp64 on the same GPU."""
    torch.manual_seed(0)
    g = case.geometry
    per_group = case.in_channels // case.groups
    terms = per_group * g.kernel[0] * g.kernel[1]

    def channels_last(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, device="cuda") * scale
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    image = channels_last((case.batch, case.in_channels, *g.in_size))
    weight = channels_last((case.out_channels, per_group, *g.kernel), terms**-0.5)
    bias = torch.randn(case.out_channels, device="cuda").to(dtype)
    grad_output = channels_last((case.batch, case.out_channels, *g.out_size))
    window = [list(g.stride), list(g.padding), list(g.dilation), case.groups, *g.bounds]

    def reference(kind: torch.dtype) -> tuple[Tensor, ...]:
        x, w = (t.to(kind).detach().requires_grad_() for t in (image, weight))
        output = first_principles.conv2d(x, w, bias.to(kind), g, case.groups)
        return output.detach(), *torch.autograd.grad(output, (x, w), grad_output.to(kind))

    truth, same = reference(torch.float64), reference(dtype)
    ops = torch.ops.splitkern
    calls = [
        ("patch_conv2d", lambda: ops.patch_conv2d(image, weight, bias, *window, "none"), terms + 1),
        (
            "patch_conv2d_input_grad",
            lambda: ops.patch_conv2d_input_grad(grad_output, weight, list(image.shape), *window),
            terms * case.out_channels // case.in_channels,
        ),
        (
            "patch_conv2d_weight_grad",
            lambda: ops.patch_conv2d_weight_grad(grad_output, image, list(weight.shape), *window),
            case.batch * g.out_size[0] * g.out_size[1],
        ),
    ]
    for (name, call, reduction), exact, similar in zip(calls, truth, same, strict=True):
        result = call()
        assert_accurate(name, result, exact, similar, reduction, tf32=tf32)
        assert torch.equal(result, call()), f"{name} gave different bits when run again"


@pytest.mark.usefixtures("tf32")
@each_type
@pytest.mark.parametrize("case", LARGE_FIRST_LAYER, ids=str)
def test_large_first_layer(case: Case, dtype: torch.dtype) -> None:
    with forced_path("first_layer"):
        compare_large(case, dtype, tf32=dtype == torch.float32)


@each_type
@pytest.mark.parametrize("case", LARGE_DEPTHWISE, ids=str)
def test_large_groups(case: Case, dtype: torch.dtype) -> None:
    with forced_path("depthwise"):
        compare_large(case, dtype, tf32=False)
