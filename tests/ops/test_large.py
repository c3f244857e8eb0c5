"""Tensors of over 2^31 elements: 32-bit indices would read or write elsewhere."""

from __future__ import annotations

import pytest
import torch

from splitkern import ops, reference

EXTENT = 46_352  # its square is over 2^31, and it is a multiple of 16


@pytest.mark.large
@pytest.mark.parametrize("operator", ["conv2d", "max_pool2d", "avg_pool2d"])
def test_last_patch_of_a_large_image(operator: str) -> None:
    assert EXTENT**2 > 2**31
    bounds = (0, EXTENT // 2, EXTENT)
    halves = (0, EXTENT // 4, EXTENT // 2)
    x = torch.zeros(1, 1, EXTENT, EXTENT, dtype=torch.bfloat16)
    corner = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0, -64:, -64:] = corner
    given = {"stride": 2, "in_rows": bounds, "in_cols": bounds, "out_rows": halves, "out_cols": halves}
    if operator == "conv2d":
        weight = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
        came, wanted = (
            ops.patch_conv2d(x, weight, **given),
            reference.patch_conv2d(corner[None, None], weight, stride=2),
        )
    elif operator == "max_pool2d":
        came, wanted = ops.patch_max_pool2d(x, 2, **given)[0], reference.patch_max_pool2d(corner[None, None], 2)[0]
    else:
        came, wanted = ops.patch_avg_pool2d(x, 2, **given), reference.patch_avg_pool2d(corner[None, None], 2)
    torch.testing.assert_close(came[:, :, -32:, -32:], wanted, rtol=1e-2, atol=1e-2)
    assert came[:, :, :-32].count_nonzero() == 0


@pytest.mark.large
def test_statistics_and_gradient_of_a_large_image() -> None:
    x = torch.zeros(1, 1, EXTENT, EXTENT, dtype=torch.bfloat16)
    x[0, 0, -16:, -16:] = 1
    bounds = (0, EXTENT - 16, EXTENT)
    mean, m2 = ops.patch_batch_norm_stats(x, rows=bounds, cols=bounds)
    assert mean.flatten().tolist() == [0, 0, 0, 1]
    assert m2.flatten().tolist() == [0, 0, 0, 0]
    sums = ops.patch_batch_norm_backward_reduce(x, x, mean, torch.ones_like(mean), rows=bounds, cols=bounds)
    assert sums[0].flatten().tolist() == [0, 0, 0, 256]
