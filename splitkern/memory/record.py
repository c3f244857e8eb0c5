"""Records one training step operator by operator, as PyTorch dispatches it, on fake tensors.

`capture` runs the step once under a :class:`Recorder`: below autograd and autocast, above the fake tensors, so what is
recorded is what eager execution dispatches, in its order, with the strides and the aliasing that it has. In-place
writes are undone on the way: a write to a whole storage opens a new version of it, which is a storage of its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from splitkern.split import labels

aten = torch.ops.aten


class CaptureError(ValueError):
    """A training step that cannot be captured; the text names the operation and the module."""


class Label(NamedTuple):
    """Where an operation comes from.

    Attributes:
        module: qualified name of the module; a function's name inside a split region; "" for the model itself.
        patch: number of the patch in execution order, -1 outside the split region.
        in_region: whether it belongs to a split region.
    """

    module: str = ""
    patch: int = -1
    in_region: bool = False


@dataclass(frozen=True)
class Read:
    """In a call's arguments: the position of a tensor among the operation's reads."""

    position: int


@dataclass(frozen=True)
class Write:
    """In a call's arguments: the position of a tensor among the operation's writes, to be written by the call."""

    position: int


class Box(NamedTuple):
    """A strided box of a recorded storage; offset and strides in bytes."""

    storage: int
    offset_bytes: int
    sizes: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class RecordedStorage:
    """One allocation, or one version of it. ``kind`` and ``name`` are "" where nothing is known yet."""

    size_bytes: int
    kind: str = ""
    name: str = ""
    constant: Tensor | None = None
    is_written: bool = False


@dataclass
class RecordedOperation:
    """One call that computes something.

    Attributes:
        overload, args, kwargs: the call; tensors are replaced by :class:`Read` and :class:`Write`.
        results: for everything that the call returns, in order, the position among ``writes`` that it is copied to, or
            None.
        preload: pairs of positions (read, write): the read is copied to the write before the call, which updates it.
        mutates: positions in ``writes`` that update what is there.
    """

    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[Box]
    writes: list[Box]
    results: tuple[int | None, ...]
    preload: tuple[tuple[int, int], ...]
    mutates: tuple[int, ...]
    label: Label
    is_backward: bool


#: Allocate, compute nothing.
_ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.empty_permuted.default,
    }
)

#: In-place operators that do not read what they overwrite.
_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_"})

#: Running statistics that native batch norms update, though their schema does not say so, and the argument that
#: tells whether they do.
_BATCH_NORMS: Mapping[Any, tuple[tuple[int, ...], int]] = {
    aten.native_batch_norm.default: ((3, 4), 5),
    aten.cudnn_batch_norm.default: ((3, 4), 5),
    aten.miopen_batch_norm.default: ((3, 4), 5),
}

#: Change a storage behind its tensors' backs.
_REFUSED = frozenset({"set_", "resize_", "resize_as_", "_resize_output_"})


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each place once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def functional_form(overload: Any) -> Any | None:
    """The overload that returns what an in-place one (``add_.Tensor``) leaves in its first argument, None without."""
    schema = overload._schema
    name = schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, overload.namespace), name[:-1], None)
    functional = getattr(packet, overload._overloadname, None) if packet is not None else None
    if functional is None:
        return None
    mine, other = schema.arguments, functional._schema.arguments
    if [(a.name, str(a.type)) for a in mine] != [(a.name, str(a.type)) for a in other]:
        return None
    return None if any(a.is_write for a in other) or len(functional._schema.returns) != 1 else functional


class Recorder(TorchDispatchMode):
    """Collects storages and operations of everything that runs inside its block, above a fake tensor mode.

    Args:
        fake_mode: the mode below, to make fakes of constants that the model holds.
        device: where the step lies.
    """

    def __init__(self, fake_mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode, self.device = fake_mode, device
        self.storages: list[RecordedStorage] = []
        self.operations: list[RecordedOperation] = []
        self.label = Label()
        self.is_backward = False
        #: Operator that failed, with its label: set once, by the first.
        self.failed: tuple[str, Label] | None = None
        self._current: dict[int, int] = {}  # address of a storage to the index of its latest version
        self._alive: list[Any] = []  # keeps addresses from being used again
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}
        self._places: dict[Any, tuple[tuple[int, str], ...]] = {}

    # --- what the caller declares -------------------------------------------------------------------------------------

    def declare(self, tensor: Tensor, kind: str, name: str, constant: Tensor | None = None) -> None:
        """Make a storage known that exists before the step; a second tensor of it changes nothing."""
        key = tensor.untyped_storage()._cdata
        if key not in self._current:
            index = self._storage(tensor)
            storage = self.storages[index]
            storage.kind, storage.name, storage.constant, storage.is_written = kind, name, constant, True

    @property
    def constants(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that the model holds as neither parameter nor buffer, each with its fake."""
        return list(self._constants.values())

    def box(self, tensor: Tensor) -> Box:
        """Where a tensor lies now."""
        size = tensor.element_size()
        key = tensor.untyped_storage()._cdata
        index = self._current.get(key)
        if index is None:
            raise CaptureError(f"a tensor of shape {list(tensor.shape)} comes from outside the step")
        strides = tuple(stride * size for stride in tensor.stride())
        return Box(index, int(tensor.storage_offset()) * size, tuple(tensor.shape), strides, tensor.dtype)

    def copy(self, source: Tensor, kind: str, name: str, like: Tensor) -> Box:
        """Record a copy of a tensor into a storage of its own with the strides of another one."""
        with torch.no_grad():
            fresh = torch.empty_strided(like.shape, like.stride(), dtype=source.dtype, device=source.device)
            fresh.copy_(source)
        box = self.box(fresh)
        self.storages[box.storage].kind, self.storages[box.storage].name = kind, name
        return box

    # --- recording ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default) and not isinstance(args[0], FakeTensor):
                result = func(*args, **kwargs)
                self.declare(result, "parameter", f"constant.{len(self._constants)}", args[0])
                self._constants[id(result)] = (args[0], result)
                return result
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
            result = _corrected(func, args, func(*args, **kwargs))
            self._record(func, args, kwargs, result)
        except Exception:
            if self.failed is None:
                self.failed = (str(func), self.label)
            raise
        return result

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            raise CaptureError(
                f"a tensor of shape {list(tensor.shape)} requires a gradient and is neither a parameter of the model "
                "nor an input, so that it would get none; make it an nn.Parameter, or detach it"
            )
        if id(tensor) not in self._constants:
            fake = self.fake_mode.from_tensor(tensor)
            self._constants[id(tensor)] = (tensor, fake)
            self.declare(fake, "parameter", f"constant.{len(self._constants) - 1}", tensor)
        return self._constants[id(tensor)][1]

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self.storages.append(RecordedStorage(int(storage.nbytes())))
        self._current[storage._cdata] = len(self.storages) - 1
        return len(self.storages) - 1

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        returned = tree_leaves(result)
        outputs = [leaf for leaf in returned if isinstance(leaf, Tensor)]
        for tensor in outputs:
            _require_plain(tensor)
            if tensor.ndim and tensor.device != self.device:
                raise CaptureError(
                    f"{func} makes a tensor on {tensor.device}; a step lies on one device, here {self.device}: move "
                    "tensors outside the model"
                )
        if func in _ALLOCATIONS:
            for tensor in outputs:
                self._storage(tensor)
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        mutated = self._mutated(func, args, kwargs)
        fresh = [isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known for leaf in returned]
        if not mutated and not any(fresh):
            return  # a view, or no tensor at all
        if self.is_backward and torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(
                "the backward pass draws random numbers (recomputation by torch.utils.checkpoint does, to restore the "
                "state that it drew from in the forward pass); capture the model without it"
            )
        _Call(self, func, args, kwargs, mutated, returned, fresh).record()

    def _mutated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Tensors among the arguments that the operator writes."""
        written = self._places.get(func)
        if written is None:
            schema = func._schema
            name = schema.name.split("::")[1]
            if name in _REFUSED:
                raise CaptureError(f"{func} changes the memory of a tensor, which a plan cannot follow")
            written = tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.is_write)
            self._places[func] = written
        found: list[Tensor] = []
        for place, name in written:
            value = args[place] if place < len(args) else kwargs.get(name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if func in _BATCH_NORMS and args[_BATCH_NORMS[func][1]]:
            found += [args[place] for place in _BATCH_NORMS[func][0] if args[place] is not None]
        return found


def _corrected(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """What the operator really returns, where the fake one's types are wrong.

    The CPU's norms keep the statistics of bfloat16 images in the type of their fp32 weight, not in the images'.
    """
    if func is aten.native_batch_norm.default and args[5] and args[1] is not None and args[1].dtype != args[0].dtype:
        return (result[0], *(statistics.to(args[1].dtype) for statistics in result[1:]))
    place = {aten.native_group_norm.default: 1, aten.native_layer_norm.default: 2}.get(func)
    if place is not None and args[0].device.type == "cpu" and args[place] is not None:
        return (result[0], *(statistics.to(args[place].dtype) for statistics in result[1:]))
    if func is aten.cudnn_batch_norm.default and args[5]:
        # What cuDNN keeps for the backward pass; the fake operator says nothing.
        reserve_bytes = torch._C._get_cudnn_batch_norm_reserve_space_size(args[0], True)  # type: ignore[attr-defined]
        return (*result[:3], result[3].new_empty(reserve_bytes))
    return result


class _Call:
    """One call on its way into the record."""

    def __init__(
        self,
        recorder: Recorder,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mutated: list[Tensor],
        returned: list[Any],
        fresh: list[bool],
    ) -> None:
        self.recorder, self.func, self.args, self.kwargs = recorder, func, args, kwargs
        self.mutated, self.returned, self.fresh = mutated, returned, fresh
        self.reads: list[Box] = []
        self.writes: list[Box] = []
        self.mutates: list[int] = []
        self.preload: list[tuple[int, int]] = []
        self.targets: dict[int, Write] = {}

    def record(self) -> None:
        recorder, func = self.recorder, self.func
        name = func._schema.name.split("::")[1]
        in_place = len(self.mutated) == 1 and bool(self.args) and self.mutated[0] is self.args[0]
        overwrites = name in _OVERWRITES or func._overloadname.startswith(("out", "grad_input"))
        functional = functional_form(func) if in_place and not overwrites else None
        # What is read is read before anything is written: versions are opened after this.
        reads: dict[int, Read] = {}
        for tensor in _tensors(self.args, self.kwargs):
            if id(tensor) in reads or (overwrites and any(tensor is m for m in self.mutated)):
                continue
            box = recorder.box(tensor)
            if not recorder.storages[box.storage].is_written and any(tensor is m for m in self.mutated):
                continue  # uninitialised: nothing there to read
            if box not in self.reads:
                self.reads.append(box)
            reads[id(tensor)] = Read(self.reads.index(box))
        updated: list[tuple[Tensor, Write]] = []
        for tensor in self.mutated:
            updated.append((tensor, self._destination(tensor, reads.get(id(tensor)), functional is None)))
        results: list[int | None] = []
        for value, is_fresh in zip(self.returned, self.fresh, strict=True):
            results.append(self._result(value) if is_fresh else None)
        if functional is not None:
            func, results = functional, [updated[0][1].position]
            updated = []
        writes = {id(tensor): write for tensor, write in updated}

        def placed(tensor: Tensor) -> Read | Write:
            return writes.get(id(tensor)) or reads[id(tensor)]

        args, kwargs = tree_map_only(Tensor, placed, (self.args, self.kwargs))
        recorder.operations.append(
            RecordedOperation(
                func,
                args,
                kwargs,
                self.reads,
                self.writes,
                tuple(results),
                tuple(self.preload),
                tuple(self.mutates),
                recorder.label,
                recorder.is_backward,
            )
        )

    def _destination(self, tensor: Tensor, read: Read | None, updates: bool) -> Write:
        """Where an argument's new value goes: its place, or a new version of its whole storage.

        Args:
            tensor: the argument.
            read: its old value among the reads, None where the call does not read it.
            updates: whether the call itself changes the old value in the place that it is given.
        """
        recorder = self.recorder
        box = recorder.box(tensor)
        storage = recorder.storages[box.storage]
        if storage.constant is not None:
            raise CaptureError(
                f"{self.func} updates a tensor that is neither parameter nor buffer; register it as a buffer"
            )
        whole = tensor.numel() * tensor.element_size() == storage.size_bytes and _is_dense(tensor)
        if storage.is_written and whole and storage.kind == "":
            key = tensor.untyped_storage()._cdata
            recorder.storages.append(RecordedStorage(storage.size_bytes, is_written=True))
            recorder._current[key] = len(recorder.storages) - 1
            self.writes.append(recorder.box(tensor))
            if read is not None and updates:
                self.preload.append((read.position, len(self.writes) - 1))
        else:
            self.writes.append(box)
            if storage.kind != "" and read is None:
                self.reads.append(box)  # an update of what outlives the step reads it, by the graph's rules
                read = Read(len(self.reads) - 1)
            if storage.is_written and read is not None:
                self.mutates.append(len(self.writes) - 1)
        storage.is_written = True
        return Write(len(self.writes) - 1)

    def _result(self, tensor: Tensor) -> int:
        recorder = self.recorder
        key = tensor.untyped_storage()._cdata
        if key not in recorder._current:
            recorder.storages[recorder._storage(tensor)].is_written = True
        box = recorder.box(tensor)
        if box in self.writes:
            raise CaptureError(f"{self.func} returns one tensor twice, which a plan cannot follow")
        self.writes.append(box)
        return len(self.writes) - 1


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def _require_plain(tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise CaptureError(f"a tensor has the layout {tensor.layout}; only strided ones can be planned")
    if not isinstance(tensor, FakeTensor):
        raise CaptureError(f"a tensor is a {type(tensor).__name__}; subclasses of Tensor cannot be planned")
    if tensor.is_complex() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise CaptureError(f"a tensor is of type {tensor.dtype}; complex, conjugate and quantised ones are not planned")


@dataclass
class Labels:
    """Keeps a recorder's label right: in forward from the modules that run, in backward from autograd's sequence
    numbers, which tell between which two changes of the label a gradient function was made.
    """

    recorder: Recorder
    names: Mapping[int, str]  # identity of a module to its qualified name
    _stack: list[str] = field(default_factory=list)
    _starts: list[int] = field(default_factory=lambda: [-1])
    _labels: list[Label] = field(default_factory=lambda: [Label()])
    _region: Label | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Follow the modules that this thread runs inside the block."""
        handles = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave),
        ]
        try:
            with labels.listening(self._listen):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def backward(self, roots: Iterable[Any]) -> Iterator[None]:
        """Label what the gradient functions reachable from ``roots`` dispatch inside the block."""
        handles = []
        pending = list(dict.fromkeys(roots))
        seen = set(pending)
        while pending:
            node = pending.pop()
            handles.append(node.register_prehook(self._labeller(node._sequence_nr())))
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    pending.append(following)
        self.recorder.is_backward = True
        try:
            with labels.listening(self._listen):
                yield
        finally:
            self.recorder.is_backward = False
            for handle in handles:
                handle.remove()

    def _labeller(self, number: int) -> Callable[[Any], None]:
        label = self._labels[bisect.bisect_right(self._starts, number) - 1]

        def apply(_: Any) -> None:
            self.recorder.label = label

        return apply

    def enter(self, name: str) -> None:
        """Label what follows in this forward pass with a name that is no module's."""
        self._stack.append(name)
        self._change()

    def _enter(self, module: nn.Module, _: Any) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self._stack.append(name)
            self._change()

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        if self.names.get(id(module)) is not None:
            self._stack.pop()
            self._change()

    def _listen(self, label: str | None, patch: int | None) -> None:
        self._region = None if label is None else Label(label, -1 if patch is None else patch, True)
        if self.recorder.is_backward:
            self.recorder.label = self._region or self.recorder.label
        else:
            self._change()

    def _change(self) -> None:
        label = self._region or Label(self._stack[-1] if self._stack else "")
        self.recorder.label = label
        self._starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._labels.append(label)
