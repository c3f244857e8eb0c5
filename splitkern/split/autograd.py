"""The three places where a split region meets autograd: cutting the input into patches, joining
patches, and recomputing a patch in the backward pass.

The join is one function: in-place writes that autograd records one by one cost many times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from splitkern.split import labels
from splitkern.split.layout import Box
from splitkern.split.operations import CallGeometry, Operation, SavedForGradients


def view_of(tensor: Tensor, box: Box) -> Tensor:
    """The rows and columns of a patch, without a copy."""
    (top, bottom), (left, right) = box
    return tensor[:, :, top:bottom, left:right]


class CutPatches(torch.autograd.Function):
    """Views of an image for every patch; backward assembles one gradient instead of adding a
    zero-filled image per patch. Overlapping patches (halo) add up.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, boxes: Sequence[Box], overlap: bool) -> Any:
        ctx.boxes, ctx.overlap = boxes, overlap
        ctx.shape = image.shape
        ctx.set_materialize_grads(False)
        return tuple(view_of(image, box) for box in boxes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        present = [grad for grad in grads if grad is not None]
        if not present:
            return None, None, None
        complete = len(present) == len(grads) and not ctx.overlap
        total = present[0].new_empty(ctx.shape) if complete else present[0].new_zeros(ctx.shape)
        for box, grad in zip(ctx.boxes, grads, strict=True):
            if grad is None:
                continue
            if complete:
                view_of(total, box).copy_(grad)
            else:
                view_of(total, box).add_(grad)
        return total, None, None


@dataclass(frozen=True)
class JoinPart:
    """One patch of one joined tensor.

    Args:
        output: index of the joined tensor.
        box: rows and columns of the patch in it.
        positions: of the part's differentiable tensors among the function's, None where absent.
        operation: the operation that wrote the view itself; None where a value was copied in.
        geometry: the operation's call.
        patch: number of the patch in execution order, where there is an operation.
        shapes: of the differentiable tensors.
        extra: what the operation needs for its gradients besides them.
    """

    output: int
    box: Box
    positions: tuple[int | None, ...]
    operation: Operation | None = None
    geometry: CallGeometry | None = None
    patch: int | None = None
    shapes: tuple[torch.Size | None, ...] = ()
    extra: tuple[Tensor, ...] = ()


class JoinPatches(torch.autograd.Function):
    """Joined tensors that the patches have already been written into.

    Backward hands out views of the joined gradient, or, where a patch's last operation wrote its
    view itself, that operation's gradients.
    """

    @staticmethod
    def forward(ctx: Any, parts: Sequence[JoinPart], joined: Sequence[Tensor], *tensors: Tensor) -> Any:
        kept: list[Tensor] = []
        places: dict[int, int] = {}
        for part in parts:
            if part.operation is None:
                continue
            for position, save in zip(part.positions, part.operation.saved_for_gradients, strict=True):
                if save and position is not None and position not in places:
                    places[position] = len(kept)
                    kept.append(tensors[position])
        ctx.extra_places = []
        for part in parts:
            ctx.extra_places.append((len(kept), len(kept) + len(part.extra)))
            kept.extend(part.extra)
        ctx.parts = [replace(part, extra=()) for part in parts]
        ctx.places, ctx.count = places, len(tensors)
        reading = {p.output for p in parts if p.operation is not None and p.operation.reads_output}
        ctx.output_places = {output: len(kept) + i for i, output in enumerate(sorted(reading))}
        ctx.save_for_backward(*kept, *(joined[output] for output in sorted(reading)))
        ctx.set_materialize_grads(False)
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        totals: list[Tensor | None] = [None] * ctx.count
        needs = ctx.needs_input_grad[2:]
        for part, (first, last) in zip(reversed(ctx.parts), reversed(ctx.extra_places), strict=True):
            grad = grads[part.output]
            if grad is None:
                continue
            grad = view_of(grad, part.box)
            if part.operation is None:
                results: Sequence[Tensor | None] = (grad,)
            else:
                place = ctx.output_places.get(part.output)
                kept = SavedForGradients(
                    shapes=part.shapes,
                    tensors=tuple(
                        saved[ctx.places[position]] if position in ctx.places else None for position in part.positions
                    ),
                    extra=tuple(saved[first:last]),
                    output=None
                    if place is None or not part.operation.reads_output
                    else view_of(saved[place], part.box),
                )
                assert part.geometry is not None
                labels.tell(part.operation.label, part.patch)
                results = part.operation.gradients(
                    grad,
                    kept,
                    part.geometry,
                    [position is not None and needs[position] for position in part.positions],
                )
            for position, result in zip(part.positions, results, strict=True):
                if position is None or result is None:
                    continue
                total = totals[position]
                totals[position] = result if total is None else total + result
        labels.tell(None, None)
        return None, None, *totals


@dataclass(frozen=True)
class Recomputation:
    """What :class:`RecomputePatches` runs.

    Args:
        input_boxes: for every patch the box of each region input.
        output_boxes: for every patch its box of each joined tensor.
        write: computes all patches into freshly joined tensors, from inputs and parameters.
        run_patch: computes the outputs of one patch with autograd, from the patch's views of the
            inputs and the parameters.
        random: whether patches draw random numbers of their own.
    """

    input_boxes: Sequence[Sequence[Box]]
    output_boxes: Sequence[Sequence[Box]]
    write: Callable[[Sequence[Tensor], Sequence[Tensor], Callable[[int], None]], list[Tensor]]
    run_patch: Callable[[int, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    random: bool


class RecomputePatches(torch.autograd.Function):
    """All patches without saved activations; backward visits the patches in reverse order and
    recomputes one at a time (Chen et al., 2016, with a patch as the segment).

    Random draws and the autocast state of the first execution are restored. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, plan: Recomputation, count: int, *tensors: Tensor) -> Any:
        ctx.plan, ctx.count = plan, count
        device = tensors[0].device
        ctx.device = device
        ctx.autocast = (
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
            torch.is_autocast_cache_enabled(),
        )
        ctx.random_states = {}

        def before_patch(index: int) -> None:
            if plan.random:
                ctx.random_states[index] = _random_state(device)

        joined = plan.write(tensors[:count], tensors[count:], before_patch)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: Recomputation = ctx.plan
        tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        inputs, parameters = tensors[: ctx.count], tensors[ctx.count :]
        totals: list[Tensor | None] = [None] * len(tensors)
        if all(grad is None for grad in grads):
            return None, None, *totals
        enabled, dtype, cache = ctx.autocast
        for index in reversed(range(len(plan.input_boxes))):
            with ExitStack() as stack:
                stack.enter_context(_restored_random_state(ctx, index))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled, cache_enabled=cache))
                leaves = [
                    view_of(tensor, box).detach().requires_grad_(need)
                    for tensor, box, need in zip(inputs, plan.input_boxes[index], needs[: ctx.count], strict=True)
                ]
                leaves += [
                    tensor.detach().requires_grad_(need)
                    for tensor, need in zip(parameters, needs[ctx.count :], strict=True)
                ]
                outputs = plan.run_patch(index, leaves[: ctx.count], leaves[ctx.count :])
            pairs = [
                (output, view_of(grad, box))
                for output, grad, box in zip(outputs, grads, plan.output_boxes[index], strict=True)
                if grad is not None and output.requires_grad
            ]
            del outputs
            wanted = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.requires_grad]
            if not pairs or not wanted:
                continue
            results = torch.autograd.grad(
                [output for output, _ in pairs],
                [leaf for _, leaf in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
            del pairs
            for (i, _), result in zip(wanted, results, strict=True):
                if result is None:
                    continue
                if i >= ctx.count:
                    total = totals[i]
                    totals[i] = result if total is None else total.add_(result)
                else:
                    total = totals[i]
                    if total is None:
                        total = totals[i] = torch.zeros_like(inputs[i])
                    view_of(total, plan.input_boxes[index][i]).add_(result)
        return None, None, *totals


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own


def _restored_random_state(ctx: FunctionCtx, index: int) -> ExitStack:
    states: dict[int, tuple[Tensor, Tensor | None]] = ctx.random_states  # type: ignore[attr-defined]
    device: torch.device = ctx.device  # type: ignore[attr-defined]
    stack = ExitStack()
    if index in states:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        cpu, own = states[index]
        torch.set_rng_state(cpu)
        if own is not None:
            torch.cuda.set_rng_state(own, device)
    return stack


def cut_patches(image: Tensor, boxes: Sequence[Box], overlap: bool) -> Sequence[Tensor]:
    """:class:`CutPatches`, typed."""
    return CutPatches.apply(image, boxes, overlap)  # type: ignore[no-untyped-call, no-any-return]


def join_patches(parts: Sequence[JoinPart], joined: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """:class:`JoinPatches`, typed."""
    return list(JoinPatches.apply(parts, joined, *tensors))  # type: ignore[no-untyped-call]


def recompute_patches(plan: Recomputation, images: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """:class:`RecomputePatches`, typed."""
    return list(RecomputePatches.apply(plan, len(images), *images, *parameters))  # type: ignore[no-untyped-call]
