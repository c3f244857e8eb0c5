"""The reference against PyTorch where both are defined, and the examples of the documentation."""

from __future__ import annotations

import doctest
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from splitkern import reference
from splitkern.ops import avg_pool, batch_norm, conv, max_pool

from .cases import CASES, Case, by_name, make


@pytest.mark.parametrize("module", [reference, conv, max_pool, avg_pool, batch_norm], ids=lambda m: m.__name__)
def test_examples_of_the_documentation_run(module: ModuleType) -> None:
    outcome = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    public = [name for name in vars(module) if name.startswith("patch_")]
    assert outcome.failed == 0
    assert outcome.attempted >= len(public) > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (2, 1), "padding": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_patch_is_pytorchs_operation(options: dict[str, Any]) -> None:
    x, w, b = make((2, 4, 9, 8)), make((6, 2, 3, 3), seed=1), make((6,), seed=2)
    conv = reference.patch_conv2d(x, w, b, groups=2, **options)
    torch.testing.assert_close(conv, F.conv2d(x, w, b, groups=2, **options))
    pool = {"stride": 1} | options
    assert torch.equal(reference.patch_max_pool2d(x, 3, **pool)[0], F.max_pool2d(x, 3, **pool))
    if "dilation" not in pool:
        for count in (True, False):
            came = reference.patch_avg_pool2d(x, 3, **pool, count_include_pad=count)
            torch.testing.assert_close(came, F.avg_pool2d(x, 3, **pool, count_include_pad=count))
    came = reference.patch_batch_norm(x, w[:4, 0, 0, 0], b[:4])
    torch.testing.assert_close(came.output, F.batch_norm(x, None, None, w[:4, 0, 0, 0], b[:4], True))


@pytest.mark.parametrize("case", by_name("2x2_even", "5x3_uneven", "stride_2", "end_cropped", "dilation"), ids=str)
def test_every_patch_is_pytorchs_operation_on_the_padded_slice(case: Case) -> None:
    """Slice, pad and convolve one patch by hand; the paddings spelled out from the definition."""
    x, w = make(case.shape), make(case.weight_shape, seed=1)
    whole = reference.patch_conv2d(x, w, **case.conv)
    for i in range(len(case.in_rows) - 1):
        for j in range(len(case.in_cols) - 1):
            pads, boxes = [], []
            for axis, index, incoming, outgoing in (
                (0, i, case.in_rows, case.out_rows),
                (1, j, case.in_cols, case.out_cols),
            ):
                stride, padding = case.stride[axis], case.padding[axis]
                effective = case.dilation[axis] * (case.kernel[axis] - 1) + 1
                begin = incoming[index] - (outgoing[index] * stride - padding)
                end = (outgoing[index + 1] - 1) * stride - padding + effective - incoming[index + 1]
                pads.append((begin, end))
                boxes.append((slice(*incoming[index : index + 2]), slice(*outgoing[index : index + 2])))
            patch = F.pad(x[:, :, boxes[0][0], boxes[1][0]], (*pads[1], *pads[0]))
            wanted = F.conv2d(patch, w, None, case.stride, 0, case.dilation, case.groups)
            torch.testing.assert_close(whole[:, :, boxes[0][1], boxes[1][1]], wanted)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_a_kernel_no_wider_than_its_stride_splits_exactly(kernel: int) -> None:
    x, w = make((1, 2, 12, 12)), make((3, 2, kernel, kernel), seed=1)
    bounds = {"in_rows": (0, 3, 12), "out_rows": (0, 1, 4), "in_cols": (0, 6, 12), "out_cols": (0, 2, 4)}
    torch.testing.assert_close(reference.patch_conv2d(x, w, stride=3, **bounds), F.conv2d(x, w, stride=3))
    assert torch.equal(reference.patch_max_pool2d(x, kernel, stride=3, **bounds)[0], F.max_pool2d(x, kernel, stride=3))


def test_empty_windows_do_not_disturb_gradients() -> None:
    x = make((1, 4, 12, 12)).requires_grad_()
    (case,) = (case for case in CASES if case.name == "window_sees_nothing")
    values, offsets = reference.patch_max_pool2d(x, **case.max_pool)
    values.masked_fill(offsets == 255, 0.0).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.sum() == (offsets != 255).sum()
