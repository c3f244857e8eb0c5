"""Noise that all patches of an image share, drawn as the unsplit modules draw it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

NoiseKind = Literal["element", "channel", "row", "batch"]


def draw_noise(like: Tensor, probability: float, kind: NoiseKind) -> Tensor:
    """Bernoulli keep-mask divided by the keep probability.

    Same draw and rounding as ``torch.nn.functional.dropout2d`` ("channel", shape [N, C, 1, 1]) and
    ``torchvision.ops.stochastic_depth`` ("row", [N, 1, 1, 1]; "batch", [1, 1, 1, 1]).

    Raises:
        ValueError: for "element", which cannot be shared between patches of different sizes.
    """
    keep = 1.0 - probability
    shapes = {
        "channel": [like.shape[0], like.shape[1], 1, 1],
        "row": [like.shape[0], 1, 1, 1],
        "batch": [1, 1, 1, 1],
    }
    if kind not in shapes:
        raise ValueError(f"noise must be one of {sorted(shapes)}, got {kind!r}")
    noise = torch.empty(shapes[kind], dtype=like.dtype, device=like.device).bernoulli_(keep)
    return noise.div_(keep) if keep > 0 else noise
