"""Time of a training step, split against unsplit, or compiled without a budget against eager, as interleaved pairs with
an A/A control.

Every round runs each variant once, in an order that rotates, so that a slow moment of the machine hits all alike.
Ratios are taken within a round, to the first variant. A copy of it, "... again", is the control, whose ratio shows what
the machine's noise alone makes of 1.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from splitkern.benchmarks.common import quartiles
from splitkern.training.loop import MEMORY_FORMATS, build_model


@dataclass(frozen=True)
class StepCase:
    """What is timed; every variant trains the whole network."""

    model: str = "resnet18"
    until: str = "layer2"
    grid: tuple[int, int] = (2, 2)
    image_size: int = 224
    batch: int = 8
    boundary: str = "zero"
    norm: str = "patch"
    memory_format: str = "contiguous"
    orders: tuple[str, ...] = ("patch", "layer")
    recompute: bool = False
    compiled: bool = False


def measure_step(
    case: StepCase,
    *,
    pairs: int,
    warmup: int = 2,
    device: torch.device,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Times `pairs` rounds after `warmup` rounds.

    Returns:
        "case", "pairs", "base": name of the first variant; and "variants": per name the step's quartiles in ms and the
        quartiles of its ratio to the base.
    """
    steps = _variants(case, device)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + pairs):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            duration_ms = _timed(steps[name], device)
            if index >= warmup:
                times[name].append(duration_ms)
        on_round()
    return {
        "case": asdict(case),
        "pairs": pairs,
        "base": names[0],
        "variants": {
            name: {
                "step_ms": quartiles(times[name])._asdict(),
                "ratio": quartiles([a / b for a, b in zip(times[name], times[names[0]], strict=True)])._asdict(),
            }
            for name in names
        },
    }


def _variants(case: StepCase, device: torch.device) -> dict[str, Callable[[], None]]:
    from splitkern import compile, split_

    torch.manual_seed(0)
    memory_format = MEMORY_FORMATS[case.memory_format]
    model = build_model(case.model, class_count=1000)
    model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    model.train()
    images = torch.randn(case.batch, 3, case.image_size, case.image_size, device=device)
    images = images.contiguous(memory_format=memory_format)
    classes = torch.randint(1000, (case.batch,), device=device)

    def split(order: str) -> nn.Module:
        return split_(
            copy.deepcopy(model), images, grid=case.grid, until=case.until, boundary=case.boundary, norm=case.norm,
            order=order, recompute=case.recompute and order == "patch",
        )  # fmt: skip

    if case.compiled:
        (order,) = case.orders
        eager = f"split, order={order}"
        models = {eager: split(order), f"{eager} again": split(order)}
        # No plan is made without a budget, so that it does not matter where durations come from.
        models["compiled, budget=None"] = compile(split(order), images, budget=None, costs="paper")
    else:
        models = {"unsplit": copy.deepcopy(model), "unsplit again": copy.deepcopy(model)}
        models |= {f"split, order={order}": split(order) for order in case.orders}
    return {name: _step(variant, images, classes) for name, variant in models.items()}


def _step(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), classes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3
