"""What of a step under a plan depends on no size and no address: its stretches, and what is made and leaves when.

Steps whose patch boundaries are drawn afresh share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitkern import _core
from splitkern.memory.bound_calls import StandIns
from splitkern.memory.capture import CapturedStep

#: A part of the backward pass ends once this many bytes of gradients are final: a bucket of DistributedDataParallel.
_PART_BYTES = 25 << 20

#: Instead of a residency: the tensor lies outside the arena.
OUTSIDE = -1


@dataclass(frozen=True)
class BackwardPart:
    """A stretch of the backward pass after which some gradients are final.

    Attributes:
        begin, end: instances.
        gradients: names of those that are final at its end.
    """

    begin: int
    end: int
    gradients: tuple[str, ...]


class StepLayout:
    """One captured step under one plan. A "storage" is one of the plan's, a "place" the position of a captured tensor.

    Attributes:
        operations: position in the step's operations, by instance.
        accumulates: by instance, whether it adds to its destination.
        stand_ins: by position of an operation of the step, where tensors are put into its arguments.
        outside: storages outside the arena: the plan's parameters pool and what the caller gives.
        views: the different tensors that instances touch: place, and position in ``plan.residencies`` or `OUTSIDE`.
        reads, writes: by instance, positions in `views`.
        made_at: by instance, the gradients outside the arena that it is the first to write: they are made then.
        made: all of these.
        taken: by instance, the gradients outside the arena, as places, that its call may return.
        begin_of_backward: the first instance that needs a gradient that the step is given, or is of the backward pass.
        late: parameters, inputs and constants, by name, storage and the last instance that reads them, whose values
            backward needs as forward left them.
        changed_inputs: numbers of the inputs that the forward part writes.
        outputs: by the instance of the forward part that writes it last, after which it may leave: what the model
            returns, as position in its results and in `views`.
        parts: of the backward pass, in order.
        gradients: by name, positions in `views`.
        causes: for every gradient, the results whose gradients it is computed from.
        causes_of: the same by instance; none for those that are computed from no gradient.

    Args:
        step: captured with ``given_gradients=True``.
        plan: valid for its graph.
    """

    def __init__(self, step: CapturedStep, plan: _core.Plan) -> None:
        self._step = step
        # Attributes of a plan are slow to read.
        instances, residencies = list(plan.instances), list(plan.residencies)
        self.operations = [instance.operation for instance in instances]
        self.accumulates = [instance.accumulate for instance in instances]
        self._ran = [step.operations[operation] for operation in self.operations]
        self.stand_ins = [StandIns.of(one.best_call) for one in step.operations]
        self._storage_of = [0] * len(step.storages)
        for number, storage in enumerate(plan.storages):
            for member in storage.members:
                self._storage_of[member] = number
        given = (*step.parameters.values(), *step.inputs.values(), *step.constants)
        self.outside = {self.storage_of(place) for place in given}
        # On the device, by storage: begin, end, position.
        self._residencies: dict[int, list[tuple[int, int, int]]] = {}
        for position, residency in enumerate(residencies):
            pool = residency.pool
            if pool == _core.PoolKind.PARAMETERS:
                self.outside.add(residency.storage)
            elif pool == _core.PoolKind.DEVICE and residency.storage >= 0:
                found = residency.begin, residency.end, position
                self._residencies.setdefault(residency.storage, []).append(found)
        numbered: dict[tuple[int, int], int] = {}

        def views(places: Iterable[int], boundary: int) -> list[int]:
            return [numbered.setdefault(self._view(place, boundary), len(numbered)) for place in places]

        self.reads = [views(one.reads, number) for number, one in enumerate(self._ran)]
        self.writes = [views(one.writes, number) for number, one in enumerate(self._ran)]
        self.gradients = {name: views((place,), len(self._ran))[0] for name, place in step.gradients.items()}
        self.made_at = self._first_writes()
        self.made = {storage for made in self.made_at.values() for storage in made}
        self.taken = {
            number: one.writes[0]
            for number, one in enumerate(self._ran)
            if one.is_taken and self.storage_of(one.writes[0]) in self.made
        }
        self.begin_of_backward = self._find_backward([instance.is_recomputation for instance in instances])
        self.late = self._read_in_backward()
        self.changed_inputs = self._written_in_forward()
        self.outputs: dict[int, list[tuple[int, int]]] = {}
        last_writes = self._last_touches(self.begin_of_backward, reads=False)
        for position, place in enumerate(step.outputs):
            last = last_writes.get(self.storage_of(place), self.begin_of_backward - 1)
            self.outputs.setdefault(last, []).append((position, views((place,), last)[0]))
        self.views = list(numbered)
        self.parts = self._divide_backward()
        self.causes, self.causes_of = self._find_causes()

    def storage_of(self, place: int) -> int:
        """The planned storage of a tensor."""
        return self._storage_of[self._step.tensors[place].storage]

    def _view(self, place: int, boundary: int) -> tuple[int, int]:
        """The tensor where the plan has it when the instance behind a boundary runs."""
        storage = self.storage_of(place)
        if storage in self.outside:
            return place, OUTSIDE
        for begin, end, position in self._residencies.get(storage, ()):
            if begin <= boundary < end:
                return place, position
        raise AssertionError(f"a valid plan has storage {storage} on the device at boundary {boundary}")

    def _first_writes(self) -> dict[int, list[int]]:
        gradients = {
            self._storage_of[number]
            for number, storage in enumerate(self._step.storages)
            if storage.kind == "gradient" and self._storage_of[number] in self.outside
        }
        found: dict[int, list[int]] = {}
        for number, operation in enumerate(self._ran):
            for place in operation.writes:
                storage = self.storage_of(place)
                if storage in gradients:
                    gradients.remove(storage)
                    found.setdefault(number, []).append(storage)
        return found

    def _find_backward(self, is_recomputation: Sequence[bool]) -> int:
        step = self._step
        given = {step.tensors[place].storage for name, place in step.inputs.items() if name.startswith("grad_output.")}
        return next(
            (
                number
                for number, operation in enumerate(self._ran)
                if is_recomputation[number]
                or operation.is_backward
                or any(step.tensors[read].storage in given for read in operation.reads)
            ),
            len(self._ran),
        )

    def _read_in_backward(self) -> list[tuple[str, int, int]]:
        step = self._step
        late = {
            step.tensors[read].storage: number
            for number, operation in enumerate(self._ran)
            if number >= self.begin_of_backward
            for read in operation.reads
        }
        constants = ((step.tensors[place].name, place) for place in step.constants)
        return [
            (name, self.storage_of(place), late[step.tensors[place].storage])
            for name, place in (*step.parameters.items(), *step.inputs.items(), *constants)
            if step.tensors[place].storage in late and not name.startswith("grad_output.")
        ]

    def _written_in_forward(self) -> list[int]:
        written = {self.storage_of(place) for one in self._ran[: self.begin_of_backward] for place in one.writes}
        return [
            int(name.removeprefix("input."))
            for name, place in self._step.inputs.items()
            if name.startswith("input.") and self.storage_of(place) in written
        ]

    def _last_touches(self, end: int, *, reads: bool) -> dict[int, int]:
        """By storage, the last instance before `end` that writes, or also reads it."""
        found: dict[int, int] = {}
        for number, operation in enumerate(self._ran[:end]):
            for place in (*operation.writes, *(operation.reads if reads else ())):
                found[self.storage_of(place)] = number
        return found

    def _divide_backward(self) -> list[BackwardPart]:
        """Cuts where enough gradients are final, and where the backward pass enters the split region."""
        step = self._step
        final: dict[int, list[str]] = {}
        parts: list[BackwardPart] = []
        begin, names, final_bytes = self.begin_of_backward, list[str](), 0
        last_touch = self._last_touches(len(self._ran), reads=True)
        seen = set[int]()
        for name, place in step.gradients.items():
            parameter = step.parameters.get(name)
            if parameter in seen:
                continue  # another name of a parameter that has its gradient already
            if parameter is not None:
                seen.add(parameter)
            last = last_touch.get(self.storage_of(place))
            if last is None or last < begin:
                names.append(name)
            else:
                final.setdefault(last, []).append(name)
        in_region = False
        for number in range(begin, len(self._ran)):
            enters = self._ran[number].patch >= 0 and not in_region
            in_region = in_region or enters
            if names and (enters or final_bytes >= _PART_BYTES):
                parts.append(BackwardPart(begin, number, tuple(names)))
                begin, names, final_bytes = number, [], 0
            for name in final.get(number, ()):
                names.append(name)
                final_bytes += step.storages[step.tensors[step.gradients[name]].storage].size_bytes
        if parts and not names:
            last_part = parts.pop()
            begin, names = last_part.begin, list(last_part.gradients)
        return [*parts, BackwardPart(begin, len(self._ran), tuple(names))]

    def _find_causes(self) -> tuple[dict[str, set[int]], list[frozenset[int]]]:
        step = self._step
        causes: dict[int, set[int]] = {}
        for name, place in step.inputs.items():
            if name.startswith("grad_output."):
                causes[step.tensors[place].storage] = {int(name.removeprefix("grad_output."))}
        of_operations: list[frozenset[int]] = []
        for operation in step.operations:
            found = set[int]().union(*(causes.get(step.tensors[read].storage, ()) for read in operation.reads))
            of_operations.append(frozenset(found))
            for write in operation.writes if found else ():
                causes.setdefault(step.tensors[write].storage, set()).update(found)
        of_gradients = {name: causes.get(step.tensors[place].storage, set()) for name, place in step.gradients.items()}
        return of_gradients, [of_operations[operation] for operation in self.operations]
