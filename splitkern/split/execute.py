"""Runs a split region: whole, all patches per layer, or patch after patch, with or without
recomputation. Called by :mod:`splitkern.split.surgery` once per forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from splitkern.ops._common import is_channels_last
from splitkern.split import labels
from splitkern.split.autograd import (
    JoinPart,
    Recomputation,
    cut_patches,
    join_patches,
    recompute_patches,
    view_of,
)
from splitkern.split.layout import Layout
from splitkern.split.operations import Dropout, Operation
from splitkern.split.step import Norm, Step, parameters_of


@dataclass(frozen=True)
class Region:
    """The part of a model that is split.

    Args:
        operations: in execution order.
        inputs: names of the values that come from outside.
        outputs: names of the values that are joined for the rest of the model.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def dead_after(self) -> list[tuple[str, ...]]:
        """For every operation the values that nothing reads after it."""
        last: dict[str, int] = {}
        for index, operation in enumerate(self.operations):
            for name in (*operation.inputs, operation.name):
                last[name] = index
        for name in self.outputs:
            last.pop(name, None)
        return [
            tuple(name for name, index in last.items() if index == position) for position in range(len(self.operations))
        ]

    @cached_property
    def joined_by_operation(self) -> dict[str, Operation]:
        """Outputs that their operation writes into the joined tensor itself."""
        read = {name for operation in self.operations for name in operation.inputs}
        return {
            operation.name: operation
            for operation in self.operations
            if operation.name in self.outputs and operation.name not in read and operation.writes_joined
        }

    @property
    def draws_per_patch(self) -> bool:
        """Whether a patch draws random numbers of its own now."""
        return any(op.draws_per_patch for op in self.operations if isinstance(op, Dropout))


@dataclass
class _Joined:
    """Joined tensors, allocated when the first patch tells channels and dtype."""

    region: Region
    layout: Layout
    memory_format: torch.memory_format
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def view(self, name: str, patch: tuple[int, int], like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = torch.empty(
                (
                    like.shape[0],
                    channels,
                    self.layout.rows.extents[name],
                    self.layout.cols.extents[name],
                ),
                dtype=dtype,
                device=like.device,
                memory_format=self.memory_format,
            )
        return view_of(self.tensors[name], self.layout.owned_box(name, patch))

    def copy_in(self, name: str, patch: tuple[int, int], value: Tensor) -> None:
        value = self.owned(name, patch, value)
        self.view(name, patch, value, value.shape[1], value.dtype).copy_(value)

    def copy_in_all(self, patch: tuple[int, int], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.copy_in(name, patch, value)

    def owned(self, name: str, patch: tuple[int, int], value: Tensor) -> Tensor:
        """The part of a patch's value that the patch owns: less than all of it with a halo."""
        return _crop(value, self.layout.box(name, patch), self.layout.owned_box(name, patch))

    def all(self) -> list[Tensor]:
        return [self.tensors[name] for name in self.region.outputs]


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """The memory format that operators give their outputs."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def _crop(
    value: Tensor,
    has: tuple[tuple[int, int], tuple[int, int]],
    wants: tuple[tuple[int, int], tuple[int, int]],
) -> Tensor:
    if has == wants:
        return value
    (top, _), (left, _) = has
    (first, last), (begin, end) = wants
    return view_of(value, ((first - top, last - top), (begin - left, end - left)))


def run_whole(region: Region, norm: Norm | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The region as the model itself runs it."""
    step = Step(parameters_of(region.operations), norm, inputs[0].device.type)
    values = dict(zip(region.inputs, inputs, strict=True))
    for operation, dead in zip(region.operations, region.dead_after, strict=True):
        labels.tell(operation.label, None)
        values[operation.name] = operation.whole(step, [values[n] for n in operation.inputs])
        for name in dead:
            del values[name]
    labels.tell(None, None)
    return [values[name] for name in region.outputs]


def run_layers(region: Region, layout: Layout, norm: Norm | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All patches per layer: every operation once, on joined tensors."""
    step = Step(parameters_of(region.operations), norm, inputs[0].device.type)
    caller_format = memory_format_of(inputs[0])
    values = dict(zip(region.inputs, _device_format(inputs), strict=True))
    for operation, geometry, dead in zip(region.operations, layout.layer_calls, region.dead_after, strict=True):
        read = [values[name] for name in operation.inputs]
        labels.tell(operation.label, None)
        values[operation.name] = operation.run(step, read, geometry)
        del read
        for name in dead:
            del values[name]
    step.update_running_buffers()
    return [
        values[name].contiguous(memory_format=caller_format) if values[name].is_cuda else values[name]
        for name in region.outputs
    ]


def _device_format(inputs: Sequence[Tensor]) -> list[Tensor]:
    """CUDA kernels read channels_last: convert once, here. The CPU keeps the caller's format."""
    return [tensor.contiguous(memory_format=torch.channels_last) if tensor.is_cuda else tensor for tensor in inputs]


def run_patches(region: Region, layout: Layout, norm: Norm | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Patch after patch through all layers; autograd, where it records, keeps every patch's activations."""
    step = Step(parameters_of(region.operations), norm, inputs[0].device.type)
    if not torch.is_grad_enabled():
        return _write_patches(region, layout, step, _device_format(inputs), memory_format_of(inputs[0]))
    joined = _Joined(region, layout, memory_format_of(inputs[0]))
    cuts = _cut(region, layout, _device_format(inputs))
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    parts: list[JoinPart] = []

    def position(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in places:
            places[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return places[id(tensor)]

    def write(index: int, patch: tuple[int, int], operation: Operation, read: Sequence[Tensor]) -> None:
        geometry = layout.patch_calls[patch][index]
        differentiable = operation.differentiable(step, read)
        channels, dtype = operation.output_like(step, read)
        with torch.no_grad():
            view = joined.view(operation.name, patch, read[0], channels, dtype)
            extra = operation.write(differentiable, geometry, view)
        parts.append(
            JoinPart(
                output=region.outputs.index(operation.name),
                box=layout.owned_box(operation.name, patch),
                positions=tuple(position(tensor) for tensor in differentiable),
                operation=operation,
                geometry=geometry,
                patch=layout.patches.index(patch),
                shapes=tuple(None if t is None else t.shape for t in differentiable),
                extra=extra,
            )
        )

    for number, patch in enumerate(layout.patches):
        values = _run_patch(region, layout, patch, step, [cut[number] for cut in cuts], write)
        for name, value in values.items():
            with torch.no_grad():
                joined.copy_in(name, patch, value)
            parts.append(
                JoinPart(
                    output=region.outputs.index(name),
                    box=layout.owned_box(name, patch),
                    positions=(position(joined.owned(name, patch, value)),),
                )
            )
    step.update_running_buffers()
    if not any(tensor.requires_grad for tensor in tensors):
        return joined.all()
    return join_patches(parts, joined.all(), tensors)


def _cut(region: Region, layout: Layout, inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    cuts: list[Sequence[Tensor]] = []
    for name, tensor in zip(region.inputs, inputs, strict=True):
        boxes = [layout.box(name, patch) for patch in layout.patches]
        if tensor.requires_grad:
            cuts.append(cut_patches(tensor, boxes, layout.halo))
        else:
            cuts.append([view_of(tensor, box) for box in boxes])
    return cuts


WriteJoined = Callable[[int, tuple[int, int], Operation, Sequence[Tensor]], None]


def _run_patch(
    region: Region,
    layout: Layout,
    patch: tuple[int, int],
    step: Step,
    inputs: Sequence[Tensor],
    write: WriteJoined | None,
) -> dict[str, Tensor]:
    """One patch through all layers.

    Returns the values of the region's outputs, except those that ``write`` took over.
    """
    values = dict(zip(region.inputs, inputs, strict=True))
    single = len(layout.patches) == 1
    number = layout.patches.index(patch)
    written = {} if write is None or single else region.joined_by_operation
    for index, (operation, geometry, dead) in enumerate(
        zip(region.operations, layout.patch_calls[patch], region.dead_after, strict=True)
    ):
        read = [values[name] for name in operation.inputs]
        if layout.halo and operation.windows is None:
            box = layout.box(operation.name, patch)
            read = [
                _crop(value, layout.box(name, patch), box) for name, value in zip(operation.inputs, read, strict=True)
            ]
        labels.tell(operation.label, number)
        if write is not None and operation.name in written:
            write(index, patch, operation, read)
        elif single:
            values[operation.name] = operation.whole(step, read)
        else:
            values[operation.name] = operation.run(step, read, geometry)
        del read
        for name in dead:
            values.pop(name, None)
    return {name: values[name] for name in region.outputs if name in values}


def _write_patches(
    region: Region,
    layout: Layout,
    step: Step,
    images: Sequence[Tensor],
    memory_format: torch.memory_format,
    before_patch: Callable[[int], None] = lambda _: None,
) -> list[Tensor]:
    """All patches into fresh joined tensors, where autograd records nothing: nothing of a patch outlives it."""
    joined = _Joined(region, layout, memory_format)

    def write(index: int, patch: tuple[int, int], operation: Operation, read: Sequence[Tensor]) -> None:
        channels, dtype = operation.output_like(step, read)
        view = joined.view(operation.name, patch, read[0], channels, dtype)
        operation.write(operation.differentiable(step, read), layout.patch_calls[patch][index], view)

    for number, patch in enumerate(layout.patches):
        before_patch(number)
        views = [view_of(image, layout.box(name, patch)) for name, image in zip(region.inputs, images, strict=True)]
        joined.copy_in_all(patch, _run_patch(region, layout, patch, step, views, write))
    step.update_running_buffers()
    return joined.all()


def run_patches_recomputed(region: Region, layout: Layout, norm: Norm | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Patch after patch without keeping activations; backward recomputes one patch at a time."""
    device_type = inputs[0].device.type
    own = parameters_of(region.operations)
    noise: dict[str, Tensor] = {}
    memory_format = memory_format_of(inputs[0])

    def start(parameters: Sequence[Tensor], *, first_execution: bool) -> Step:
        return Step(
            dict(zip(own, parameters, strict=True)),
            norm,
            device_type,
            first_execution=first_execution,
            noise=noise,
        )

    def write(
        images: Sequence[Tensor], parameters: Sequence[Tensor], before_patch: Callable[[int], None]
    ) -> list[Tensor]:
        step = start(parameters, first_execution=True)
        return _write_patches(region, layout, step, images, memory_format, before_patch)

    def run_patch(number: int, images: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        patch = layout.patches[number]
        step = start(parameters, first_execution=False)
        values = _run_patch(region, layout, patch, step, images, None)
        return [_crop(values[name], layout.box(name, patch), layout.owned_box(name, patch)) for name in region.outputs]

    plan = Recomputation(
        input_boxes=[[layout.box(n, patch) for n in region.inputs] for patch in layout.patches],
        output_boxes=[[layout.owned_box(n, patch) for n in region.outputs] for patch in layout.patches],
        write=write,
        run_patch=run_patch,
        random=region.draws_per_patch,
    )
    images = _device_format(inputs)
    return recompute_patches(plan, images, list(own.values()))
