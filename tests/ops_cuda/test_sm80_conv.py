"""The mma.sync convolution path on a GPU: forced, against the definition in fp64, on small and on real sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import splitkern.ops  # noqa: F401  (registers the operators)
from splitkern._library import forced_path
from tests.kernel_checks import comparisons, first_principles
from tests.kernel_checks.cases import Case
from tests.kernel_checks.comparisons import Operators, assert_accurate
from tests.kernel_checks.sm80 import BORDERS, GENERATED_WIDE, LARGE, SMALL, TILES, wide

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["channels_last", "aligned channels_last view"]
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def forced(true_fp32: None) -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = True
    with forced_path("sm80"):
        yield


@pytest.fixture(scope="module")
def operators() -> Operators:
    return Operators(torch.ops.splitkern, "cuda")


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [(case, DTYPES[i % 3], LAYOUTS[i // 3 % 2]) for i, case in enumerate([*SMALL, *GENERATED_WIDE])],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_small(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    comparisons.conv2d(operators, case, dtype, layout, tf32=dtype == torch.float32)


@each_type
@pytest.mark.parametrize("case", [*TILES, wide(BORDERS, 16, 32, groups=2)], ids=str)
def test_tiles_and_groups(operators: Operators, case: Case, dtype: torch.dtype) -> None:
    for activation in ("none", "relu"):
        comparisons.conv2d(
            operators, case, dtype, "aligned channels_last view", activation, tf32=dtype == torch.float32
        )


def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, device="cuda") * scale
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@each_type
@pytest.mark.parametrize("contiguous_weight", [False, True], ids=["channels_last weight", "contiguous weight"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, dtype: torch.dtype, contiguous_weight: bool) -> None:
    """The three passes against fp64 on the GPU, with PyTorch's error in the same type as the yardstick."""
    torch.manual_seed(0)
    g = case.geometry
    taps = g.kernel[0] * g.kernel[1]
    image = random((case.batch, case.in_channels, *g.in_size), dtype)
    weight = random((case.out_channels, case.in_channels, *g.kernel), dtype, (case.in_channels * taps) ** -0.5)
    if contiguous_weight:
        weight = weight.contiguous()
    bias = torch.randn(case.out_channels, device="cuda").to(dtype)
    grad_output = random((case.batch, case.out_channels, *g.out_size), dtype)
    window = [list(g.stride), list(g.padding), list(g.dilation), 1, *g.bounds]

    def reference(kind: torch.dtype) -> tuple[Tensor, ...]:
        x, w = (t.to(kind).detach().requires_grad_() for t in (image, weight))
        output = first_principles.conv2d(x, w, bias.to(kind), g, 1)
        return output.detach(), *torch.autograd.grad(output, (x, w), grad_output.to(kind))

    truth, same = reference(torch.float64), reference(dtype)
    ops = torch.ops.splitkern
    calls = [
        ("patch_conv2d", (image, weight, bias, *window, "none"), case.in_channels * taps + 1),
        ("patch_conv2d_input_grad", (grad_output, weight, list(image.shape), *window), case.out_channels * taps),
        (
            "patch_conv2d_weight_grad",
            (grad_output, image, list(weight.shape), *window),
            case.batch * g.out_size[0] * g.out_size[1],
        ),
    ]
    for (name, arguments, terms), exact, yardstick in zip(calls, truth, same, strict=True):
        result = getattr(ops, name)(*arguments)
        assert_accurate(name, result, exact, yardstick, terms, tf32=dtype == torch.float32)
        assert torch.equal(result, getattr(ops, name)(*arguments)), f"{name} gave different bits when run again"
