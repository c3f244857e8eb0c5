"""The tensors of a step that lie outside the arena: what the caller gives, and gradients on their way to the caller."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitkern import _core
from splitkern.memory.bound_calls import Slot
from splitkern.memory.capture import CapturedStep
from splitkern.memory.step_layout import StepLayout


@dataclass(frozen=True)
class _Kept:
    """A parameter as it was bound. It may go while the executor stays."""

    tensor: weakref.ref[Tensor]
    address: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor) -> _Kept:
        return cls(weakref.ref(value), value.data_ptr(), value.stride())

    def is_still(self, value: Tensor) -> bool:
        return value is self.tensor() and value.data_ptr() == self.address and value.stride() == self.strides


class OutsideTensors:
    """Binds them to the slots that operations read and write.

    Args:
        step: with its tensors.
        plan: with sizes.
        layout: of the step under the plan.
        stay: inputs and gradients keep their addresses from step to step, as CUDA graphs need it: they are copied to
            and from memory of their own.
    """

    def __init__(self, step: CapturedStep, plan: _core.Plan, layout: StepLayout, *, stay: bool) -> None:
        self._step, self._layout, self._stay = step, layout, stay
        # By storage: the slots of its tensors, and what is bound.
        self._slots: dict[int, dict[int, Slot]] = {storage: {} for storage in layout.outside}
        self._bound: dict[int, Tensor] = {}
        self._kept: dict[int, _Kept] = {}
        self._static = set[int]()
        storages = plan.storages
        self._size_bytes = {storage: storages[storage].size_bytes for storage in layout.made}

    def slot(self, place: int) -> Slot:
        """Of a tensor of the step, by its position there."""
        return self._slots[self._layout.storage_of(place)].setdefault(place, Slot(place))

    def bound(self, storage: int) -> Tensor:
        """What is bound to a planned storage."""
        return self._bound[storage]

    def bind_parameter(self, place: int, value: Tensor) -> bool:
        """Binds a parameter or buffer, once for as long as it is the same tensor in the same memory.

        Returns:
            Whether it was bound now.
        """
        storage = self._layout.storage_of(place)
        kept = self._kept.get(storage)
        if kept is not None and kept.is_still(value):
            return False
        tensor = self._step.tensors[place]
        self._require_alike(place, value)
        if not _same_strides(value, tensor.strides):
            raise ValueError(f"{tensor.name} must have strides {list(tensor.strides)}, got {list(value.stride())}")
        # `detach` shares the version counter, by which a change in place is seen.
        self._put(storage, value.detach(), tensor.offset_bytes)
        self._kept[storage] = _Kept.of(value)
        return True

    def bind(self, place: int, value: Tensor) -> None:
        """Takes a caller's tensor for a storage; one of another layout is copied."""
        self._require_alike(place, value)
        tensor, storage = self._step.tensors[place], self._layout.storage_of(place)
        if storage in self._static:
            self._bound[storage].copy_(value)
            return
        if self._stay or not _same_strides(value, tensor.strides):
            own = torch.empty_strided(tensor.sizes, tensor.strides, dtype=value.dtype, device=value.device)
            value = own.copy_(value)
        self._put(storage, value, tensor.offset_bytes)
        if self._stay:
            self._static.add(storage)

    def return_to(self, place: int, value: Tensor) -> None:
        """Gives the caller's tensor what the step has made of its copy, where it worked on one."""
        bound = self._bound[self._layout.storage_of(place)]
        if bound.data_ptr() != value.data_ptr():
            value.copy_(bound)

    def make(self, storage: int) -> None:
        """Memory for a gradient, of its own, because it is handed out."""
        if storage in self._static:
            return
        slots = self._slots[storage]
        tensor = self._step.tensors[next(iter(slots))]
        elements = -(-self._size_bytes[storage] // tensor.element_bytes)
        self._put(storage, torch.empty(elements, dtype=tensor.dtype, device=self._step.device))
        if self._stay:
            self._static.add(storage)

    def take(self, place: int, value: Tensor) -> None:
        """Takes over a gradient that an operation has returned, all of its storage."""
        tensor = self._step.tensors[place]
        if not _same_strides(value, tensor.strides):
            raise RuntimeError(f"{tensor.name} must have strides {list(tensor.strides)}, got {list(value.stride())}")
        self._put(self._layout.storage_of(place), value)

    def is_static(self, storage: int) -> bool:
        """Whether it keeps its memory from step to step."""
        return storage in self._static

    def follow(self, stream: torch.cuda.Stream) -> None:
        """Has PyTorch's allocator keep what stays until another stream, too, has passed it."""
        for storage in self._static:
            self._bound[storage].record_stream(stream)

    def unbind(self, storages: Iterable[int]) -> None:
        """Lets go of what is bound to these, but for what stays."""
        for storage in storages:
            if storage in self._static:
                continue
            self._bound.pop(storage, None)
            for slot in self._slots.get(storage, {}).values():
                slot.bind(None)

    def release(self) -> None:
        """Lets go of what a step was given and has made; parameters stay bound, for the next step."""
        self.unbind(self._bound.keys() - self._kept.keys())

    def _require_alike(self, place: int, value: Tensor) -> None:
        tensor, device = self._step.tensors[place], self._step.device
        if tuple(value.shape) != tensor.sizes or value.dtype != tensor.dtype or value.device != device:
            raise ValueError(
                f"{tensor.name} must be of shape {list(tensor.sizes)}, type {tensor.dtype}, on {device}, "
                f"got {list(value.shape)}, {value.dtype}, on {value.device}"
            )

    def _put(self, storage: int, value: Tensor, begin_bytes: int = 0) -> None:
        """Binds a tensor, whose memory begins so many bytes behind the storage, to all slots of a storage."""
        self._bound[storage] = value
        for place, slot in self._slots[storage].items():
            tensor = self._step.tensors[place]
            if value.dtype != tensor.dtype:
                raise RuntimeError(f"{tensor.name}: storage of type {value.dtype} read as {tensor.dtype}")
            offset = value.storage_offset() + (tensor.offset_bytes - begin_bytes) // tensor.element_bytes
            slot.bind(value.as_strided(tensor.sizes, tensor.strides, offset))


def _same_strides(value: Tensor, strides: Sequence[int]) -> bool:
    return all(size <= 1 or own == other for size, own, other in zip(value.shape, value.stride(), strides, strict=True))
