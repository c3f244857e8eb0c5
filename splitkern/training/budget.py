"""A byte budget for `splitkern train`: the plan of its steps, and what evaluation can do beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitkern.memory.compile import CompiledPlan, compile
from splitkern.memory.live_bytes import LiveBytes
from splitkern.memory.step_bytes import resident_bytes


@dataclass(frozen=True)
class BudgetOptions:
    """Memory in which a training step has to run.

    Attributes:
        device_bytes: all device memory of a step.
        host_bytes: for what is offloaded; None: no limit.
        strategy: one of `splitkern._core.strategy_names()`.
    """

    device_bytes: int
    host_bytes: int | None = None
    strategy: str = "default"


def plan_training(model: nn.Module, images: Tensor, budget: BudgetOptions) -> dict[str, Any]:
    """Compiles a model for training by SGD with momentum, in place.

    Args:
        model: split or not; it is put into training mode.
        images: a batch as training will have it.
        budget: what to plan for.

    Returns:
        Figures of the plan (`CompiledPlan.summary`), and "text", which says what it does.

    Raises:
        ValueError, TypeError: as `splitkern.compile` does; a budget that is too small names the smallest that would do.
    """
    momentum_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    compile(
        model.train(),
        images,
        budget=budget.device_bytes,
        host_budget=budget.host_bytes,
        strategy=budget.strategy,
        optimizer_bytes=momentum_bytes,
    )
    plan = model.plan
    assert isinstance(plan, CompiledPlan)
    return {**plan.summary(), "text": str(plan)}


def evaluation_batch(
    model: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, budget: BudgetOptions, most: int
) -> int:
    """Images at a time for which evaluation fits beside what training holds.

    Evaluation runs as without a plan, beside the arena: in the room of the gradients, which are none between steps, and
    of the reserve.

    Args:
        model: in evaluation mode.
        optimizer: its.
        image: a batch of one.
        budget: of training.
        most: at most so many.

    Returns:
        At least 1.
    """
    with torch.inference_mode(), LiveBytes() as live:
        model(image)
    image_bytes = live.peak_bytes + image.untyped_storage().nbytes()
    room_bytes = budget.device_bytes - resident_bytes(model, optimizer, [])
    return min(most, max(1, room_bytes // image_bytes))
