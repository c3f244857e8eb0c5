"""Runs a captured step operation by operation from its graph alone: proof that the graph is the step.

Every storage is one buffer of bytes, every tensor a strided view of its storage. Storages are filled with NaN when they
are made and again after their last use, so that a wrong alias, a missing dependency or a lifetime that is too short
shows in the result. For tests and debugging; the executor is another thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitkern.memory.capture import CapturedOperation, CapturedStep, CapturedTensor
from splitkern.memory.rewrite import is_pointwise, run_call

_POISON = 0xFF  # every floating-point type reads this pattern as NaN


@dataclass(frozen=True)
class StepResult:
    """What a step returns and changes.

    Attributes:
        loss: scalar; None where the step begins its backward pass from gradients that it is given.
        outputs: what the model returned, where the step was captured with them.
        gradients: by qualified name of the parameter.
        parameters: every parameter and buffer after the step, by qualified name.
    """

    loss: Tensor | None
    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def interpret(
    step: CapturedStep,
    parameters: nn.Module | Mapping[str, Tensor],
    inputs: Tensor | Sequence[Any],
    targets: Tensor | Sequence[Any] = (),
    *,
    grad_outputs: Tensor | Sequence[Tensor] = (),
    out_calls: bool = False,
    check_strides: bool = True,
) -> StepResult:
    """Run a captured step on real tensors.

    Args:
        step: from :func:`splitkern.memory.capture.capture`.
        parameters: the model, or its parameters and buffers by qualified name; not changed.
        inputs, targets: as for the capture, with the same shapes and strides.
        grad_outputs: what a step with given gradients begins its backward pass from.
        out_calls: run the call that writes into its destinations where an operation has one, and in place where it
            may, as the executor does, instead of the one that eager execution ran.
        check_strides: whether a result with other strides than captured is an error.

    Returns:
        Copies of loss, gradients, and parameters and buffers after the step.

    Raises:
        ValueError: where parameters or inputs do not fit the step.
        RuntimeError: where an operation returns something else than was captured.
    """
    memory = _Memory(step)
    if isinstance(parameters, nn.Module):
        parameters = parameters.state_dict(keep_vars=True) | dict(parameters.named_buffers())
    for name, place in step.parameters.items():
        if name not in parameters:
            raise ValueError(f"parameters must have {name!r}")
        memory.fill(name, place, parameters[name].detach())
    sources = {"input": inputs, "target": targets, "grad_output": grad_outputs}
    given = {f"{prefix}.{i}": v for prefix, vs in sources.items() for i, v in _numbered(vs)}
    for name, place in step.inputs.items():
        if name not in given:
            raise ValueError(f"inputs must have {name}")
        memory.fill(name, place, given[name].detach())
    for place, value in step.constants.items():
        memory.fill("constant", place, value.detach())
    with torch.no_grad():
        for index in range(len(step.operations)):
            _run(step, memory, index, out_calls, check_strides)
    return StepResult(
        loss=memory.view(step.loss).clone() if step.loss >= 0 else None,
        outputs=tuple(memory.view(place).clone() for place in step.outputs),
        gradients={name: memory.view(place).clone() for name, place in step.gradients.items()},
        parameters={name: memory.view(place).clone() for name, place in step.parameters.items()},
    )


def _numbered(values: Tensor | Sequence[Any]) -> list[tuple[int, Tensor]]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return list(enumerate(leaf for leaf in leaves if isinstance(leaf, Tensor)))


def _run(step: CapturedStep, memory: _Memory, index: int, out_calls: bool, check_strides: bool) -> None:
    operation = step.operations[index]
    call = operation.out_call if out_calls and operation.out_call is not None else operation.call
    reads = [memory.view(place) for place in operation.reads]
    if out_calls and call is operation.out_call:
        memory.take_over(index)
    writes = [memory.view(place) for place in operation.writes]
    returned = run_call(call, reads, writes)
    if call.results and len(returned) != len(call.results):
        raise RuntimeError(f"{operation.name}: captured with {len(call.results)} results, got {len(returned)}")
    for value, place in zip(returned, call.results, strict=False):
        if place is None:
            continue
        captured = step.tensors[operation.writes[place]]
        if tuple(value.shape) != captured.sizes:
            raise RuntimeError(f"{operation.name}: captured with sizes {captured.sizes}, got {tuple(value.shape)}")
        if value.dtype != captured.dtype and not _casts(operation):
            raise RuntimeError(f"{operation.name}: captured as {captured.dtype}, got {value.dtype}")
        if check_strides and not operation.mutates and not _same_layout(value, captured, memory):
            raise RuntimeError(
                f"{operation.name}: captured with strides {captured.strides}, got {value.stride()} "
                f"at sizes {captured.sizes}"
            )
        writes[place].copy_(value)
    memory.release(index)


def _casts(operation: CapturedOperation) -> bool:
    """Whether the result is cast on its way: an in-place operator keeps the type of what it updates."""
    return bool(operation.mutates) or is_pointwise(operation.call.overload)


def _same_layout(value: Tensor, captured: CapturedTensor, memory: _Memory) -> bool:
    """Whether strides agree; a box of a larger storage was written by a copy, whose source had strides of its own."""
    if memory.is_box(captured):
        return True
    return all(
        size <= 1 or one == other
        for size, one, other in zip(captured.sizes, captured.strides, value.stride(), strict=True)
    )


class _Memory:
    """A buffer of bytes for every storage, from its first use to its last."""

    def __init__(self, step: CapturedStep) -> None:
        self.step = step
        self.buffers: dict[int, Tensor] = {}
        last: dict[int, int] = {}
        for index, operation in enumerate(step.operations):
            for place in (*operation.reads, *operation.writes):
                last[step.tensors[place].storage] = index
        self.dead_after: dict[int, list[int]] = {}
        for storage, index in last.items():
            if step.storages[storage].kind == "activation" and not step.storages[storage].is_output:
                self.dead_after.setdefault(index, []).append(storage)

    def view(self, place: int) -> Tensor:
        tensor = self.step.tensors[place]
        buffer = self.buffers.get(tensor.storage)
        if buffer is None:
            size_bytes = self.step.storages[tensor.storage].size_bytes
            buffer = torch.full((size_bytes,), _POISON, dtype=torch.uint8, device=self.step.device)
            self.buffers[tensor.storage] = buffer
        size = tensor.element_bytes
        usable = buffer[: buffer.numel() // size * size].view(tensor.dtype)
        return usable.as_strided(tensor.sizes, tensor.strides, tensor.offset_bytes // size)

    def take_over(self, index: int) -> None:
        """Let a write take the place of a read that dies in the operation, where the graph allows it."""
        operation = self.step.operations[index]
        for read, write in operation.inplace:
            source = self.step.tensors[operation.reads[read]].storage
            if source in self.dead_after.get(index, ()):
                self.buffers[self.step.tensors[operation.writes[write]].storage] = self.buffers.pop(source)
                return

    def is_box(self, tensor: CapturedTensor) -> bool:
        count = tensor.element_bytes
        for size in tensor.sizes:
            count *= size
        return count != self.step.storages[tensor.storage].size_bytes

    def fill(self, name: str, place: int, value: Tensor) -> None:
        tensor = self.step.tensors[place]
        if tuple(value.shape) != tensor.sizes or value.dtype != tensor.dtype:
            raise ValueError(
                f"{name} must be of shape {tensor.sizes} and type {tensor.dtype}, "
                f"got {tuple(value.shape)} and {value.dtype}"
            )
        self.view(place).copy_(value)

    def release(self, index: int) -> None:
        for storage in self.dead_after.get(index, ()):
            buffer = self.buffers.pop(storage, None)
            if buffer is not None:
                buffer.fill_(_POISON)
