"""Peak live bytes of forward and backward in the split region, split against unsplit.

The region runs alone, with a given gradient on its output, so the figure is the region's: its activations, their
gradients, and the join with its gradient. The region's input, the parameters and their gradients are listed beside it.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from splitkern.benchmarks.common import prefix
from splitkern.memory.live_bytes import LiveBytes
from splitkern.training.loop import MEMORY_FORMATS, PARAMETER_GRADIENTS, build_model


@dataclass(frozen=True)
class LiveCase:
    """One region and its split."""

    model: str
    until: str
    grid: tuple[int, int] = (4, 4)
    image_size: int = 224
    batch: int = 8
    boundary: str = "zero"
    norm: str = "patch"
    order: str = "patch"
    recompute: bool = True
    memory_format: str = "contiguous"


CASES = (LiveCase("vgg16", "features.16"), LiveCase("resnet50", "layer2"))


@dataclass(frozen=True)
class LiveFigures:
    """Bytes of one run; `peak_operator` is the operator whose result made the peak."""

    peak_bytes: int
    peak_operator: str
    join_bytes: int
    input_bytes: int
    parameter_bytes: int
    parameter_gradient_bytes: int


def measure_live(case: LiveCase, *, device: torch.device) -> dict[str, Any]:
    """Measures one case.

    Returns:
        "case", "unsplit" and "split" (figures) and "ratio", of the two peaks.
    """
    from splitkern import split_

    torch.manual_seed(0)
    memory_format = MEMORY_FORMATS[case.memory_format]
    region = prefix(build_model(case.model, class_count=1000), case.until)
    region.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(case.batch, 3, case.image_size, case.image_size, device=device)
    images = images.contiguous(memory_format=memory_format)
    split = copy.deepcopy(region)
    split_(
        split, images, grid=case.grid, until=case.until, boundary=case.boundary, norm=case.norm, order=case.order,
        recompute=case.recompute,
    )  # fmt: skip
    unsplit_figures = _measure(region, images)
    split_figures = _measure(split, images)
    return {
        "case": asdict(case),
        "unsplit": asdict(unsplit_figures),
        "split": asdict(split_figures),
        "ratio": split_figures.peak_bytes / unsplit_figures.peak_bytes,
    }


def _measure(region: nn.Module, images: torch.Tensor) -> LiveFigures:
    region.train()
    parameters = list(region.parameters())
    with LiveBytes() as live:
        joined = region(images)
        # The tail would hold the join until its backward has made the join's gradient: both stay to the end.
        joined_gradient = torch.randn_like(joined)
        joined.backward(joined_gradient)
        live.assign(PARAMETER_GRADIENTS, [parameter.grad for parameter in parameters])
    peak = live.peak_sample("activations")
    return LiveFigures(
        peak_bytes=live.peak_bytes,
        peak_operator=peak.operator if peak is not None else "",
        join_bytes=joined.untyped_storage().nbytes(),
        input_bytes=images.untyped_storage().nbytes(),
        parameter_bytes=sum(parameter.untyped_storage().nbytes() for parameter in parameters),
        parameter_gradient_bytes=live.peak_of(PARAMETER_GRADIENTS),
    )
