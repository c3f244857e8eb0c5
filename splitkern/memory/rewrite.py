"""The rewrite table: what a recorded call is called in a graph, and how it runs into destinations that are given.

`capture` passes every recorded call through here. The planner reads the targets and what an operation may do with its
tensors; the executor and the tests run an operation's call. Nothing here depends on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import splitkern.ops  # noqa: F401  # registers the operators named below
from splitkern.memory.record import Box, Read, RecordedOperation, RecordedStorage, Write

aten = torch.ops.aten
splitkern_ops = torch.ops.splitkern


@dataclass(frozen=True)
class Blank:
    """In a call's arguments: a tensor of which only the shape matters."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """How to run an operation.

    Attributes:
        overload, args, kwargs: the call; tensors are replaced by ``Read``, ``Write`` and ``Blank``.
        results: for everything that it returns, in order, the position of the write that it is to be copied to, or
            None. Writes named in the arguments are written by the call itself.
        preload: pairs (read, write): the read is copied to the write before the call, which updates it there.
    """

    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...] = ()
    preload: tuple[tuple[int, int], ...] = ()


# --- names --------------------------------------------------------------------------------------------------------

#: What the gradient of a convolution's bias is.
CONVOLUTION_BIAS_GRAD = "aten.sum.dim_IntList"

_BACKWARD = aten.convolution_backward.default

_TARGETS: Mapping[Any, str] = {
    splitkern_ops.patch_conv2d.default: "conv2d",
    splitkern_ops.patch_conv2d.out: "conv2d",
    splitkern_ops.patch_conv2d_input_grad.default: "conv2d_input_grad",
    splitkern_ops.patch_conv2d_weight_grad.default: "conv2d_weight_grad",
    splitkern_ops.patch_max_pool2d.default: "max_pool2d",
    splitkern_ops.patch_max_pool2d.out: "max_pool2d",
    splitkern_ops.patch_max_pool2d_backward.default: "max_pool2d_backward",
    splitkern_ops.patch_avg_pool2d.default: "avg_pool2d",
    splitkern_ops.patch_avg_pool2d.out: "avg_pool2d",
    splitkern_ops.patch_avg_pool2d_backward.default: "avg_pool2d_backward",
    splitkern_ops.patch_batch_norm.default: "batch_norm",
    splitkern_ops.patch_batch_norm.out: "batch_norm",
    splitkern_ops.patch_batch_norm_apply.default: "batch_norm",
    splitkern_ops.patch_batch_norm_backward_reduce.default: "batch_norm_backward",
    splitkern_ops.patch_batch_norm_backward_apply.default: "batch_norm_backward",
    aten.max_pool2d_with_indices.default: "max_pool2d",
    aten.max_pool2d_with_indices_backward.default: "max_pool2d_backward",
    aten.avg_pool2d.default: "avg_pool2d",
    aten.avg_pool2d_backward.default: "avg_pool2d_backward",
    aten.native_batch_norm.default: "batch_norm",
    aten.cudnn_batch_norm.default: "batch_norm",
    aten.miopen_batch_norm.default: "batch_norm",
    aten.native_batch_norm_backward.default: "batch_norm_backward",
    aten.cudnn_batch_norm_backward.default: "batch_norm_backward",
    aten.miopen_batch_norm_backward.default: "batch_norm_backward",
    aten.relu.default: "relu",
    aten.mm.default: "mm",
    aten.addmm.default: "addmm",
}


def target_of(operation: RecordedOperation) -> str:
    """Name of what an operation computes: one of the planner's, or PyTorch's own."""
    overload, args = operation.overload, operation.args
    if overload is aten.convolution.default and _is_conv2d(operation):
        return "conv2d"
    if overload is aten.convolution_backward.default and _is_conv2d(operation):
        mask = args[10]
        if mask == [True, False, False]:
            return "conv2d_input_grad"
        if mask == [False, True, False]:
            return "conv2d_weight_grad"
        return CONVOLUTION_BIAS_GRAD
    if overload is aten.add.Tensor and operation.kwargs.get("alpha", 1) == 1:
        return "add"
    if overload is aten.threshold_backward.default and args[2] == 0:
        return "relu_backward"
    return _TARGETS.get(overload, str(overload))


def _is_conv2d(operation: RecordedOperation) -> bool:
    """Whether an ATen convolution, or its gradient, is one that the package's operators compute."""
    if operation.overload is aten.convolution.default:
        stride, transposed, output_padding = operation.args[3], operation.args[6], operation.args[7]
    else:
        stride, transposed, output_padding = operation.args[4], operation.args[7], operation.args[8]
    return len(stride) == 2 and not transposed and not any(output_padding)


# --- what an operation may do with its tensors --------------------------------------------------------------------

#: Element-wise, though PyTorch does not tag them so: every element of the first result depends on the same element of
#: the arguments of its shape.
_POINTWISE = frozenset(
    {
        aten.hardtanh_backward.default,
        aten.hardswish_backward.default,
        aten.hardsigmoid_backward.default,
        aten.leaky_relu_backward.default,
        aten.elu_backward.default,
        aten.native_dropout.default,
        aten.native_dropout_backward.default,
        aten._to_copy.default,
        aten.copy_.default,
        splitkern_ops.patch_batch_norm_apply.default,
        splitkern_ops.patch_batch_norm_backward_apply.default,
    }
)


def is_pointwise(overload: Any) -> bool:
    """Whether every element of the result depends on one element of each argument of its shape."""
    return overload in _POINTWISE or torch.Tag.pointwise in overload.tags


def is_random(overload: Any) -> bool:
    """Whether the operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in overload.tags


def inplace_pairs(operation: RecordedOperation, storages: Sequence[RecordedStorage]) -> list[tuple[int, int]]:
    """Pairs (read, write) whose boxes are equal and where the write may take the read's place."""
    if not is_pointwise(operation.overload) or not operation.writes or operation.mutates:
        return []
    write = operation.writes[0]
    whole = storages[write.storage]
    return [
        (position, 0)
        for position, read in enumerate(operation.reads)
        if read.storage != write.storage
        and storages[read.storage].kind == ""
        and storages[read.storage].size_bytes == whole.size_bytes
        and read.offset_bytes == write.offset_bytes
        and read.sizes == write.sizes
        and read.strides_bytes == write.strides_bytes
        and read.dtype.itemsize == write.dtype.itemsize
        and not any(other.storage == read.storage for other in operation.writes)
        and not any(other.storage == read.storage and other != read for other in operation.reads)
    ]


def is_sum(operation: RecordedOperation) -> bool:
    """Whether ``writes[0] = reads[0] + reads[1]``, element by element, in one type and layout."""
    if target_of(operation) != "add" or len(operation.reads) != 2 or operation.mutates:
        return False
    shapes = {(box.sizes, box.strides_bytes, box.dtype) for box in (*operation.reads, operation.writes[0])}
    return len(shapes) == 1


# --- cost ---------------------------------------------------------------------------------------------------------


def box_bytes(box: Box) -> int:
    """Bytes of the elements of a box; repeated elements (stride 0) count once."""
    once = (size if stride != 0 or size == 0 else 1 for size, stride in zip(box.sizes, box.strides_bytes, strict=True))
    return int(box.dtype.itemsize) * _product(once)


def flop_of(operation: RecordedOperation, target: str) -> int:
    """Floating-point operations: 2·N·K·P·Q·(C/g)·R·S for each pass of a convolution, 2·M·N·K for a matrix product,
    one per element written for the rest.
    """
    if target in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad"):
        arguments = operation.args
        if target == "conv2d":
            output = operation.writes[0].sizes
            weight = operation.reads[arguments[1].position].sizes
        else:
            output = operation.reads[arguments[0].position].sizes
            weight = (
                operation.writes[0].sizes
                if target == "conv2d_weight_grad"
                else operation.reads[_argument(operation, "weight").position].sizes
            )
        return 2 * _product(output) * _product(weight[1:])
    if target in ("mm", "addmm", "aten.bmm.default"):
        one = operation.args[1 if target == "addmm" else 0]
        inner: int = operation.reads[one.position].sizes[-1]
        return 2 * _product(operation.writes[0].sizes) * inner
    return sum(_product(write.sizes) for write in operation.writes)


def _argument(operation: RecordedOperation, name: str) -> Any:
    for place, argument in enumerate(operation.overload._schema.arguments):
        if argument.name == name:
            return operation.args[place] if place < len(operation.args) else operation.kwargs[name]
    raise KeyError(name)


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


# --- passes over the record ---------------------------------------------------------------------------------------


def _blank(box: Box) -> Blank:
    return Blank(box.sizes, tuple(stride // box.dtype.itemsize for stride in box.strides_bytes), box.dtype)


def split_convolution_backward(operation: RecordedOperation) -> list[RecordedOperation]:
    """The gradients of one convolution as operations of their own, each reading only what it needs.

    Each still is the original call, asked for one gradient: what it does not read is blank.
    """
    if operation.overload is not aten.convolution_backward.default or not _is_conv2d(operation):
        return [operation]
    mask = operation.args[10]
    needs = {0: (0, 2), 1: (0, 1), 2: (0,)}
    parts: list[RecordedOperation] = []
    written = iter(operation.writes)
    for gradient in range(3):
        if not mask[gradient]:
            continue
        reads: list[Box] = []
        args = list(operation.args)
        for place in range(3):
            box = operation.reads[args[place].position]
            if place not in needs[gradient]:
                args[place] = _blank(box)
                continue
            if box not in reads:
                reads.append(box)
            args[place] = Read(reads.index(box))
        args[10] = [gradient == other for other in range(3)]
        parts.append(
            replace(
                operation,
                args=tuple(args),
                reads=reads,
                writes=[next(written)],
                results=tuple(0 if gradient == other else None for other in range(3)),
            )
        )
    return parts


#: Positions of arguments of which an operator reads only the shape.
_SHAPE_ONLY: Mapping[Any, tuple[int, ...]] = {
    aten.max_pool2d_with_indices_backward.default: (1,),
    aten.avg_pool2d_backward.default: (1,),
    aten._adaptive_avg_pool2d_backward.default: (1,),
    aten.adaptive_max_pool2d_backward.default: (1,),
    aten.reflection_pad2d_backward.default: (1,),
    aten.replication_pad2d_backward.default: (1,),
    aten.nll_loss_backward.default: (1,),
    aten.nll_loss2d_backward.default: (1,),
}

#: Of these, operators that on CUDA lay their result out as the argument that they do not read (the second one): the
#: result's own memory stands for it, in size and layout.
_LAID_OUT_AS_READ = frozenset({aten.max_pool2d_with_indices_backward.default, aten.avg_pool2d_backward.default})

#: Gradients of batch norms: positions of the running statistics, which they do not read where they normalised by the
#: batch's own, and of the argument that tells (None: always its own).
_BATCH_NORM_BACKWARDS: Mapping[Any, tuple[tuple[int, int], int | None]] = {
    aten.native_batch_norm_backward.default: ((3, 4), 7),
    aten.cudnn_batch_norm_backward.default: ((3, 4), None),
    aten.miopen_batch_norm_backward.default: ((3, 4), None),
}


def read_only_needed(operation: RecordedOperation) -> RecordedOperation:
    """Without the reads whose values the operator does not look at: they would keep storages alive for nothing."""
    args = list(operation.args)
    blank: set[int] = set()
    for place in _SHAPE_ONLY.get(operation.overload, ()):
        blank.add(place)
    if operation.overload in _BATCH_NORM_BACKWARDS:
        places, flag = _BATCH_NORM_BACKWARDS[operation.overload]
        if flag is None or args[flag]:
            blank.update(place for place in places if args[place] is not None)
    if not blank:
        return operation
    for place in blank:
        args[place] = _blank(operation.reads[args[place].position])
    reads: list[Box] = []

    def moved(read: Read) -> Read:
        box = operation.reads[read.position]
        if box not in reads:
            reads.append(box)
        return Read(reads.index(box))

    args, kwargs = tree_map_only(Read, moved, (args, operation.kwargs))
    return replace(operation, args=tuple(args), kwargs=kwargs, reads=reads)


_LARGEST_POOL_WINDOW = 255


def replace_max_pools(
    operations: list[RecordedOperation], storages: list[RecordedStorage], device_type: str
) -> list[RecordedOperation]:
    """ATen's max poolings as the package's, which keep one byte per output where ATen's keep eight.

    Values and gradients are the same bit for bit: the first maximum of a window wins in both, and gradients add up in
    the order of the outputs. Only where nothing but gradients reads the positions, and, on the CPU, not where windows
    overlap in a type of less than 32 bits: there ATen rounds every sum of gradients, the package's only the last.
    """
    forwards = {
        operation.writes[1].storage: index
        for index, operation in enumerate(operations)
        if operation.overload is aten.max_pool2d_with_indices.default and _is_max_pool2d(operation, device_type)
    }
    backwards: dict[int, list[int]] = {storage: [] for storage in forwards}
    for index, operation in enumerate(operations):
        for box in operation.reads:
            if box.storage not in forwards:
                continue
            forward = operations[forwards[box.storage]]
            if operation.overload is aten.max_pool2d_with_indices_backward.default and box == forward.writes[1]:
                backwards[box.storage].append(index)
            else:
                forwards.pop(box.storage)
    for storage, index in forwards.items():
        forward = operations[index]
        positions = forward.writes[1]
        strides = tuple(stride // positions.dtype.itemsize for stride in positions.strides_bytes)
        offsets = positions._replace(strides_bytes=strides, dtype=torch.uint8)
        storages[storage].size_bytes //= positions.dtype.itemsize
        source = forward.reads[0].sizes
        window = (*_pool_window(forward), *_bounds(source, forward.writes[0].sizes))
        operations[index] = replace(
            forward,
            overload=splitkern_ops.patch_max_pool2d.default,
            args=(Read(0), *window),
            kwargs={},
            writes=[forward.writes[0], offsets],
        )
        for place in backwards[storage]:
            backward = operations[place]
            grad = backward.reads[backward.args[0].position]
            operations[place] = replace(
                backward,
                overload=splitkern_ops.patch_max_pool2d_backward.default,
                args=(Read(0), Read(1), list(source), *window),
                kwargs={},
                reads=[grad, offsets],
            )
    return operations


def _is_max_pool2d(operation: RecordedOperation, device_type: str) -> bool:
    kernel, stride, _, dilation = _pool_window(operation)
    overlap = any(d != 1 or s < k for k, s, d in zip(kernel, stride, dilation, strict=True))
    return (
        not (overlap and device_type == "cpu" and operation.writes[0].dtype.itemsize < 4)
        and len(operation.reads[0].sizes) == 4
        and kernel[0] * kernel[1] <= _LARGEST_POOL_WINDOW
        and operation.writes[0].dtype.is_floating_point
        and operation.writes[1].offset_bytes == 0
    )


def _pool_window(operation: RecordedOperation) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation of a max pooling, with PyTorch's defaults filled in."""
    _, kernel, stride, padding, dilation = (*operation.args, *(None,) * 5)[:5]
    kernel = list(kernel)
    return (
        _pair(kernel),
        _pair(list(stride) if stride else kernel),
        _pair(0 if padding is None else padding),
        _pair(1 if dilation is None else dilation),
    )


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def write_joins(operations: list[RecordedOperation], storages: Sequence[RecordedStorage]) -> list[RecordedOperation]:
    """Drop copies into boxes of a joined storage where the producer can write the box itself.

    A value that is computed, copied into a box and afterwards read only by the copy and by element-wise operations is
    written to the box at once; its other readers read the box. Element-wise, because for them the layout of an argument
    cannot change a result; a reduction or a convolution may depend on it in the last bit.
    """
    writers: dict[int, list[int]] = {}
    readers: dict[int, list[int]] = {}
    for index, operation in enumerate(operations):
        for box in operation.writes:
            writers.setdefault(box.storage, []).append(index)
        for box in operation.reads:
            readers.setdefault(box.storage, []).append(index)
    tiled = {s for s, indices in writers.items() if len(indices) > 1 and _is_tiled(s, indices, operations, storages)}
    dropped: set[int] = set()
    for index, operation in enumerate(operations):
        if operation.overload is not aten.copy_.default or len(operation.reads) != 1 or operation.mutates:
            continue
        source, target = operation.reads[0], operation.writes[0]
        made = writers.get(source.storage, [])
        if (
            target.storage not in tiled
            or len(made) != 1
            or storages[source.storage].kind != ""
            or source.sizes != target.sizes
            or source.dtype != target.dtype
            or any(box.storage == target.storage for box in operations[made[0]].reads)
        ):
            continue
        others = [reader for reader in readers[source.storage] if reader != index]
        producer = operations[made[0]]
        if producer.preload or not all(is_pointwise(operations[r].overload) for r in others):
            continue
        accesses = [box for r in others for box in operations[r].reads if box.storage == source.storage]
        accesses += [box for box in producer.writes if box.storage == source.storage]
        if any(box != source for box in accesses):
            continue
        for touched in (made[0], *others):
            one = operations[touched]
            operations[touched] = replace(
                one,
                reads=[target if box == source else box for box in one.reads],
                writes=[target if box == source else box for box in one.writes],
            )
        readers.setdefault(target.storage, []).extend(others)
        dropped.add(index)
    return [operation for index, operation in enumerate(operations) if index not in dropped]


def _is_tiled(
    storage: int, indices: Sequence[int], operations: Sequence[RecordedOperation], storages: Sequence[RecordedStorage]
) -> bool:
    """Whether every byte of a storage that is written is written once, so that time does not matter."""
    boxes = [box for i in set(indices) for box in operations[i].writes if box.storage == storage]
    if any(operations[i].writes[m].storage == storage for i in indices for m in operations[i].mutates):
        return False
    return len(set(boxes)) == len(boxes) and sum(map(box_bytes, boxes)) <= storages[storage].size_bytes


# --- calls --------------------------------------------------------------------------------------------------------

#: Operators with a real `.out`: (overload, names of its destinations). Not here: those whose `.out` PyTorch generates,
#: which allocates and copies.
_OUT: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    aten.add.Tensor: (aten.add.out, ("out",)),
    aten.sub.Tensor: (aten.sub.out, ("out",)),
    aten.mul.Tensor: (aten.mul.out, ("out",)),
    aten.div.Tensor: (aten.div.out, ("out",)),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, ("grad_input",)),
    aten.hardtanh_backward.default: (aten.hardtanh_backward.grad_input, ("grad_input",)),
    aten.leaky_relu.default: (aten.leaky_relu.out, ("out",)),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, ("grad_input",)),
    aten.silu.default: (aten.silu.out, ("out",)),
    aten.silu_backward.default: (aten.silu_backward.grad_input, ("grad_input",)),
    aten.gelu.default: (aten.gelu.out, ("out",)),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, ("grad_input",)),
    aten.hardtanh.default: (aten.hardtanh.out, ("out",)),
    aten.hardswish.default: (aten.hardswish.out, ("out",)),
    aten.sigmoid.default: (aten.sigmoid.out, ("out",)),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, ("grad_input",)),
    aten.tanh.default: (aten.tanh.out, ("out",)),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, ("grad_input",)),
    aten.gt.Scalar: (aten.gt.Scalar_out, ("out",)),
    aten.where.self: (aten.where.self_out, ("out",)),
    aten.sqrt.default: (aten.sqrt.out, ("out",)),
    aten.rsqrt.default: (aten.rsqrt.out, ("out",)),
    aten.mm.default: (aten.mm.out, ("out",)),
    aten.addmm.default: (aten.addmm.out, ("out",)),
    aten.bmm.default: (aten.bmm.out, ("out",)),
    aten.cat.default: (aten.cat.out, ("out",)),
    aten.sum.dim_IntList: (aten.sum.IntList_out, ("out",)),
    aten.mean.dim: (aten.mean.out, ("out",)),
    aten._log_softmax.default: (aten._log_softmax.out, ("out",)),
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, ("out",)),
    aten._softmax.default: (aten._softmax.out, ("out",)),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, ("grad_input",)),
    aten.nll_loss_forward.default: (aten.nll_loss_forward.output, ("output", "total_weight")),
    aten.nll_loss_backward.default: (aten.nll_loss_backward.grad_input, ("grad_input",)),
    aten.max_pool2d_with_indices.default: (aten.max_pool2d_with_indices.out, ("out", "indices")),
    aten.max_pool2d_with_indices_backward.default: (
        aten.max_pool2d_with_indices_backward.grad_input,
        ("grad_input",),
    ),
    aten.avg_pool2d.default: (aten.avg_pool2d.out, ("out",)),
    aten.avg_pool2d_backward.default: (aten.avg_pool2d_backward.grad_input, ("grad_input",)),
    splitkern_ops.patch_conv2d.default: (splitkern_ops.patch_conv2d.out, ("output",)),
    splitkern_ops.patch_conv2d_input_grad.default: (splitkern_ops.patch_conv2d_input_grad.out, ("output",)),
    splitkern_ops.patch_max_pool2d.default: (splitkern_ops.patch_max_pool2d.out, ("values", "offsets")),
    splitkern_ops.patch_max_pool2d_backward.default: (splitkern_ops.patch_max_pool2d_backward.out, ("output",)),
    splitkern_ops.patch_avg_pool2d.default: (splitkern_ops.patch_avg_pool2d.out, ("output",)),
    splitkern_ops.patch_avg_pool2d_backward.default: (splitkern_ops.patch_avg_pool2d_backward.out, ("output",)),
    splitkern_ops.patch_batch_norm.default: (
        splitkern_ops.patch_batch_norm.out,
        ("output", "mean", "invstd", "m2"),
    ),
    splitkern_ops.patch_batch_norm_stats.default: (splitkern_ops.patch_batch_norm_stats.out, ("mean", "m2")),
    splitkern_ops.patch_batch_norm_apply.default: (splitkern_ops.patch_batch_norm_apply.out, ("output",)),
    splitkern_ops.patch_batch_norm_backward_reduce.default: (
        splitkern_ops.patch_batch_norm_backward_reduce.out,
        ("sum_grad", "sum_grad_centered"),
    ),
    splitkern_ops.patch_batch_norm_backward_apply.default: (
        splitkern_ops.patch_batch_norm_backward_apply.out,
        ("output",),
    ),
}


def original_call(operation: RecordedOperation) -> Call:
    """What eager execution ran."""
    return Call(operation.overload, operation.args, operation.kwargs, operation.results, operation.preload)


def out_call(operation: RecordedOperation, device_type: str) -> Call | None:
    """A call that writes the destinations itself, without allocating them; None where there is none.

    ATen's convolutions become the package's, of one patch. Of a bias's gradient only on CUDA: on the CPU the library
    that ATen calls adds up in another order than ``sum``, and a step has to stay bit-equal to eager execution there.
    """
    if device_type == "cpu" and target_of(operation) == CONVOLUTION_BIAS_GRAD and operation.overload is _BACKWARD:
        return None
    overload, args, kwargs = operation.overload, operation.args, operation.kwargs
    if not any(result is not None for result in operation.results):
        return None if operation.preload else original_call(operation)
    if operation.mutates or [place for place in operation.results if place is not None] != list(
        range(len(operation.writes))
    ):
        return None
    builder = _BUILDERS.get(overload)
    if builder is not None:
        return builder(operation)
    if overload not in _OUT:
        return None
    out, names = _OUT[overload]
    if overload in _LAID_OUT_AS_READ:
        args = (args[0], Write(0), *args[2:])
    kwargs = {name: value for name, value in kwargs.items() if name in {a.name for a in out._schema.arguments}}
    destinations = {name: Write(place) for place, name in enumerate(names)}
    # ATen's .out forms check the dtype of the result; a conversion on the way is not theirs.
    return Call(out, args, {**kwargs, **destinations})


def _relu(operation: RecordedOperation) -> Call:
    return Call(aten.clamp_min.out, (*operation.args, 0), {"out": Write(0)})


def _copy(operation: RecordedOperation) -> Call:
    return Call(aten.copy_.default, (Write(0), operation.args[0]), {})


def _weight_grad(operation: RecordedOperation) -> Call:
    return Call(splitkern_ops.patch_conv2d_weight_grad.out, (*operation.args, False), {"output": Write(0)})


def returning(call: Call) -> Call:
    """A weight gradient that is returned, instead of written as by a call of `out_call`."""
    return Call(splitkern_ops.patch_conv2d_weight_grad.default, call.args[:-1], {})


def _bounds(read: Sequence[int], written: Sequence[int]) -> list[list[int]]:
    return [[0, read[2]], [0, read[3]], [0, written[2]], [0, written[3]]]


def _convolution(operation: RecordedOperation) -> Call | None:
    if not _is_conv2d(operation):
        return None
    source, weight, bias, stride, padding, dilation, _, _, groups = operation.args
    bounds = _bounds(operation.reads[source.position].sizes, operation.writes[0].sizes)
    arguments = (source, weight, bias, stride, padding, dilation, groups, *bounds, "none")
    return Call(splitkern_ops.patch_conv2d.out, arguments, {"output": Write(0)})


def _convolution_backward(operation: RecordedOperation) -> Call | None:
    if not _is_conv2d(operation):
        return None
    grad, source, weight, _, stride, padding, dilation, _, _, groups, mask = operation.args
    sizes = operation.reads[grad.position].sizes
    window = (stride, padding, dilation, groups)
    if mask[0]:
        wanted = operation.writes[0].sizes
        arguments = (grad, weight, list(wanted), *window, *_bounds(wanted, sizes))
        return Call(splitkern_ops.patch_conv2d_input_grad.out, arguments, {"output": Write(0)})
    if mask[1]:
        bounds = _bounds(operation.reads[source.position].sizes, sizes)
        arguments = (grad, source, list(operation.writes[0].sizes), *window, *bounds, False)
        return Call(splitkern_ops.patch_conv2d_weight_grad.out, arguments, {"output": Write(0)})
    return Call(aten.sum.IntList_out, (grad, [0, 2, 3]), {"out": Write(0)})


_BUILDERS: Mapping[Any, Callable[[RecordedOperation], Call | None]] = {
    aten.relu.default: _relu,
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    splitkern_ops.patch_conv2d_weight_grad.default: _weight_grad,
}


def run_call(call: Call, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> list[Any]:
    """Run a call on tensors; what it returns is left to the caller to copy.

    Returns:
        What the call returned, in order.
    """
    device = (reads or writes)[0].device if reads or writes else torch.device("cpu")

    def blank(value: Blank) -> torch.Tensor:
        return torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device=device).zero_()

    for read, write in call.preload:
        writes[write].copy_(reads[read])
    given = (call.args, call.kwargs)
    given = tree_map_only(Blank, blank, given)
    given = tree_map_only(Read, lambda r: reads[r.position], given)
    args, kwargs = tree_map_only(Write, lambda w: writes[w.position], given)
    result = call.overload(*args, **kwargs)
    return tree_leaves(result)
