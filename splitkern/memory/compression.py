"""Compressed offload: what the lossless coder makes of a step's values, as measured on a real forward pass.

The planner compresses the copies of a storage only where its graph carries such a measurement. ReLU outputs compress,
since about half of them are zero; what a storage holds next may compress less: then the copy takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from splitkern import _core
from splitkern.memory.executor import StepExecutor
from splitkern.ops.copy import CHUNK_BYTES, HEADER_BYTES

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE_BYTES = 16 << 20  # what is looked at in one go: temporaries are of its size


@dataclass(frozen=True)
class CompressionReport:
    """Plain bytes over bytes on the link, over all compressed offloads of a step; None where there are none.

    Attributes:
        predicted: by the measurements that the plan was made with.
        measured: in the steps that were counted since.
    """

    predicted: float | None
    measured: float | None


def link_bytes(values: Tensor) -> int:
    """Bytes that one compressed copy of a tensor puts on the link: header, masks, and values that are not zero.

    A value is left out where all its bits are 0. The same number as `splitkern.ops.copy.bytes_on_link` of the
    compressed buffer, without making one.

    Args:
        values: contiguous, with elements of 1, 2, 4 or 8 bytes, on any device.

    Raises:
        ValueError: for other elements or strides.

    Example:
        >>> link_bytes(torch.zeros(2048, dtype=torch.bfloat16))
        384
    """
    size = values.element_size()
    if size not in _INTEGERS:
        raise ValueError(f"values must have elements of 1, 2, 4 or 8 bytes, got {values.dtype}")
    if not values.is_contiguous():
        raise ValueError(f"values must be contiguous, got strides {values.stride()} for shape {tuple(values.shape)}")
    bits = values.detach().reshape(-1).view(_INTEGERS[size])
    per_slot = CHUNK_BYTES // size
    total = HEADER_BYTES + math.ceil(bits.numel() / per_slot) * (per_slot // 8)
    for piece in torch.split(bits, _PIECE_BYTES // CHUNK_BYTES * per_slot):
        whole = piece.numel() // per_slot * per_slot
        kept = [(piece[:whole].view(-1, per_slot) != 0).sum(dim=1), (piece[whole:] != 0).sum().reshape(1)]
        total += int(((torch.cat(kept) * size + 15) // 16 * 16).sum())
    return total


def measure_compression(
    executor: StepExecutor, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> dict[int, _core.Compression]:
    """Runs the forward part of a step once and measures what is saved for the backward part.

    Whatever the plan does with a storage, it is looked at when its last value of the forward part has been written, so
    a plan within the budget will do. Buffers and the random state are left as they were.

    Args:
        executor: of the step, between steps.
        parameters: parameters and buffers by qualified name.
        inputs: as captured.

    Returns:
        By storage of the graph. Elements are those of the tensor that is written there.
    """
    device = executor.step.device
    values = {name: _copied(value) for name, value in parameters.items()}
    executor.observer = ratios = _Ratios(executor)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            executor.forward(values, inputs)
    finally:
        executor.observer = None
        executor.give_up(executor.number)
    return ratios.found


class _Ratios:
    """Looks at what the backward part needs of the arena, right after the instance that writes it last."""

    def __init__(self, executor: StepExecutor) -> None:
        self.found: dict[int, _core.Compression] = {}
        self._step = step = executor.step
        operations = [step.operations[one.operation] for one in executor.plan.instances]
        begin_of_backward = executor.parts[0].begin
        storage_of = {member: number for number, one in enumerate(executor.plan.storages) for member in one.members}
        needed = {
            storage_of[step.tensors[read].storage]
            for operation in operations[begin_of_backward:]
            for read in operation.reads
        }
        last = {
            storage_of[step.tensors[place].storage]: (number, place)
            for number, operation in enumerate(operations[:begin_of_backward])
            for place in operation.writes
        }
        # By instance: the tensor that is written, and the bytes of its whole storage.
        self._saved: dict[int, list[tuple[int, Tensor]]] = {}
        for residency in executor.plan.residencies:
            number, place = last.get(residency.storage, (-1, -1))
            is_there = residency.begin <= number < residency.end and residency.pool == _core.PoolKind.DEVICE
            if is_there and residency.storage in needed:
                size_bytes = step.storages[step.tensors[place].storage].size_bytes
                whole = executor.arenas.device[residency.offset_bytes : residency.offset_bytes + size_bytes]
                self._saved.setdefault(number, []).append((place, whole))

    @contextmanager
    def instance(self, number: int) -> Iterator[None]:
        """As `Observer` says."""
        yield
        for place, whole in self._saved.get(number, ()):
            tensor = self._step.tensors[place]
            size = tensor.element_bytes
            if size in _INTEGERS and whole.numel() > 0 and whole.numel() % size == 0:
                ratio = whole.numel() / link_bytes(whole.view(_INTEGERS[size]))
                self.found[tensor.storage] = _core.Compression(ratio=ratio, element_bytes=size)


def _copied(value: Tensor) -> Tensor:
    """Buffers, which a step updates in place; parameters stay what they are."""
    return value if isinstance(value, torch.nn.Parameter) else value.detach().clone()


def with_compression(graph: _core.Graph, measured: Mapping[int, _core.Compression]) -> _core.Graph:
    """The same graph with measurements.

    Args:
        graph: of a step.
        measured: by position of the storage; others have none.

    Raises:
        splitkern._core.InvalidArgument: a ValueError; a ratio that is not positive, elements that do not make up the
            storage.
    """
    for position in measured:
        if not 0 <= position < len(graph.storages):
            raise ValueError(f"measured must name storages below {len(graph.storages)}, got {position}")
    storages = [
        _core.Storage(
            name=one.name,
            size_bytes=one.size_bytes,
            kind=one.kind,
            is_output=one.is_output,
            compression=measured.get(position),
        )
        for position, one in enumerate(graph.storages)
    ]
    return _core.Graph(
        name=graph.name,
        storages=storages,
        tensors=graph.tensors,
        operations=graph.operations,
        durations_from=graph.durations_from,
    )


def compression_report(plan: _core.Plan, copied: Sequence[_core.CopyStatistics | None]) -> CompressionReport:
    """Predicted and measured ratio of a plan's compressed offloads.

    Args:
        plan: that is run.
        copied: what the copies of its executors have done; None where one has no copies.
    """
    plain, link = 0, 0.0
    for copy in plan.copies:
        storage = plan.storages[copy.storage]
        if copy.compressed and copy.kind == _core.CopyKind.OFFLOAD and storage.compression is not None:
            plain += storage.size_bytes
            link += storage.size_bytes / storage.compression.ratio
    counted = sum(one.counted_bytes for one in copied if one is not None)
    counted_link = sum(one.counted_link_bytes for one in copied if one is not None)
    return CompressionReport(
        predicted=plain / link if link > 0 else None, measured=counted / counted_link if counted_link > 0 else None
    )
