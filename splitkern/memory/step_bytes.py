"""Measures all device memory that training steps take: what `splitkern train --budget` and `splitkern bench training`
compare a budget with.

Parameters, buffers, gradients, the optimizer's state, the batch, arenas of a compiled model, activations, and scratch
inside operators. What a plan keeps in host memory is not device memory, on the CPU too, where both are the same.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from splitkern.memory.allocated_bytes import AllocatedBytes
from splitkern.memory.compile import CompiledPlan, compiled_forward_of


class StepBytes:
    """Measures the peak of the training steps run inside a `with` block, the first of which begins without gradients:
    those of earlier steps are dropped when the block begins.

    On CUDA by the allocator's `max_memory_allocated`, beyond what else was allocated on the device when the block
    began. On the CPU by the allocator's events, which the profiler records: blocks do not nest, and take one thread.

    Attributes:
        peak_bytes: most bytes at a time.

    Args:
        model: that is trained, compiled or not.
        optimizer: its.
        batch: the tensors of a batch that stay allocated.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(256, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> images = torch.ones(2, 256)
        >>> with StepBytes(model, optimizer, [images]) as measured:
        ...     model(images).sum().backward()
        >>> measured.peak_bytes > 2 * 1024 + 2048  # weights and their gradients, and the batch
        True
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]) -> None:
        self.peak_bytes = 0
        self._device = batch[0].device
        self._model, self._optimizer, self._batch = model, optimizer, batch
        self._resident_bytes = self._other_bytes = 0
        self._allocated: AllocatedBytes | None = None

    def __enter__(self) -> StepBytes:
        # A step that is gone, but for its cycles, would be freed inside the block, and count negative.
        gc.collect()
        # The CPU's allocator does not report the end of what it gave out before its events were recorded.
        self._optimizer.zero_grad(set_to_none=True)
        self._resident_bytes = resident_bytes(self._model, self._optimizer, self._batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._other_bytes = torch.cuda.memory_allocated(self._device) - self._resident_bytes
        else:
            self._allocated = AllocatedBytes(self._device)
            self._allocated.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._allocated is None:
            torch.cuda.synchronize(self._device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._other_bytes
        else:
            self._allocated.__exit__(kind, error, trace)
            self.peak_bytes = self._resident_bytes + self._allocated.peak_bytes


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Iterable[Tensor]) -> int:
    """Device bytes that a model holds between steps.

    Args:
        model: compiled or not.
        optimizer: its.
        batch: tensors that stay allocated beside it.

    Returns:
        Bytes of distinct storages, and of the arenas.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*_tensors_of(model, optimizer), *batch)
    }
    plan = model.plan if compiled_forward_of(model) is not None else None
    arenas_bytes = plan.arena_bytes * plan.accounting.in_flight if isinstance(plan, CompiledPlan) else 0
    return sum(storages.values()) + arenas_bytes


def _tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
