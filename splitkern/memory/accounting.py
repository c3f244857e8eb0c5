"""What a training step holds on the device beside its arena, and so how large the arena may be under a budget.

Outside the arena lie what the caller gives and gets (parameters, buffers, inputs, gradients, what the model returns)
and what operations allocate while they run. Gradients come one by one, and large scratch at few operations, so the most
that is there at a time is less than the sum of both peaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitkern import _core
from splitkern.memory.capture import CapturedStep

__all__ = ["Accounting", "accounting_of"]


@dataclass(frozen=True)
class Accounting:
    """Device bytes of a step beside its arena.

    Attributes:
        in_flight: how many steps can be under way, each with an arena of its own.
        given_bytes: parameters, buffers, inputs, and gradients that the step is given.
        input_bytes: of these, what every further step in flight holds again.
        gradient_bytes: gradients that the step makes.
        reserve_bytes: most that one operation allocates, and what the model returns.
        outside_bytes: most that is there at a time of all of these.
        beside_bytes: what else the budget has to hold: the optimizer's state, gradients that are accumulated, and what
            CUDA graphs copy.
    """

    in_flight: int
    given_bytes: int
    input_bytes: int
    gradient_bytes: int
    reserve_bytes: int
    outside_bytes: int
    beside_bytes: int

    def budget_for(self, arena_bytes: int) -> int:
        """The smallest budget that holds arenas of a size."""
        return self._without_arenas + self.in_flight * arena_bytes

    def arena_under(self, budget: int) -> int:
        """The largest size of an arena under a budget; negative where even none would fit."""
        return (budget - self._without_arenas) // self.in_flight

    @property
    def _without_arenas(self) -> int:
        return self.outside_bytes + (self.in_flight - 1) * self.input_bytes + self.beside_bytes


def accounting_of(
    step: CapturedStep,
    plan: _core.Plan,
    workspace_bytes: Sequence[int],
    *,
    in_flight: int = 1,
    optimizer_bytes: int = 0,
    accumulate: bool = False,
    cuda_graphs: bool = False,
) -> Accounting:
    """Adds up a plan.

    Args:
        step: as captured.
        plan: for it; its instances decide when a gradient is made.
        workspace_bytes: what each operation of the step allocates while it runs.
        in_flight: steps that can be under way.
        optimizer_bytes: of the optimizer's state.
        accumulate: whether gradients of earlier steps are there all the time.
        cuda_graphs: whether inputs and gradients are there a second time, in memory that stays.
    """
    storage_of = {member: number for number, storage in enumerate(plan.storages) for member in storage.members}
    sizes = [storage.size_bytes for storage in plan.storages]

    def storages(places: Sequence[int]) -> set[int]:
        return {storage_of[step.tensors[place].storage] for place in places}

    given = storages([*step.parameters.values(), *step.inputs.values(), *step.constants])
    made = storages(list(step.gradients.values())) - given
    inputs = storages([place for name, place in step.inputs.items() if name.startswith("input.")])
    copied = storages([*step.inputs.values(), *step.constants])
    returned = sum(_dense_bytes(step, place) for place in step.outputs)
    alive = most = 0
    missing = set(made)
    for instance in plan.instances:
        operation = step.operations[instance.operation]
        new = storages(operation.writes) & missing
        missing -= new
        alive += sum(sizes[storage] for storage in new)
        most = max(most, alive + workspace_bytes[instance.operation])
    given_bytes = sum(sizes[storage] for storage in given)
    gradient_bytes = sum(sizes[storage] for storage in made)
    return Accounting(
        in_flight=in_flight,
        given_bytes=given_bytes,
        input_bytes=sum(sizes[storage] for storage in inputs),
        gradient_bytes=gradient_bytes,
        reserve_bytes=max(workspace_bytes, default=0) + in_flight * returned,
        outside_bytes=given_bytes + in_flight * returned + most,
        beside_bytes=optimizer_bytes
        + (gradient_bytes if accumulate else 0)
        + (in_flight * (gradient_bytes + sum(sizes[one] for one in copied)) if cuda_graphs else 0),
    )


def _dense_bytes(step: CapturedStep, place: int) -> int:
    tensor = step.tensors[place]
    return math.prod(tensor.sizes) * tensor.element_bytes
