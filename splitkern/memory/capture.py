"""Captures a training step, loss and parameter gradients included, as the graph that the memory planner reads.

The step runs once on fake tensors under :class:`splitkern.memory.record.Recorder`, which sees what eager execution
dispatches: nothing is computed, and model, buffers and random state stay as they are. `splitkern plan`, the profiler
and the executor call it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.grad_mode import set_multithreading_enabled
from torch.nn.parameter import is_lazy
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only

from splitkern.memory import rewrite
from splitkern.memory.isolation import Holdings, isolated, where
from splitkern.memory.record import (
    Box,
    CaptureError,
    Label,
    Labels,
    RecordedOperation,
    RecordedStorage,
    Recorder,
)
from splitkern.memory.rewrite import Call
from splitkern.split.surgery import SplitForward, split_forward_of

__all__ = [
    "CaptureError",
    "CapturedOperation",
    "CapturedStep",
    "CapturedStorage",
    "CapturedTensor",
    "capture",
]

FORMAT = "splitkern.graph"
VERSION = 1


@dataclass(frozen=True)
class CapturedStorage:
    """One allocation of the step.

    Attributes:
        name: unique; of a parameter, buffer or gradient ("grad.conv1.weight") from its qualified name.
        size_bytes: as PyTorch allocates it.
        kind: "parameter" (also buffers and constants), "gradient", "input" or "activation".
        is_output: whether the step returns it.
    """

    name: str
    size_bytes: int
    kind: str
    is_output: bool = False


@dataclass(frozen=True)
class CapturedTensor:
    """A strided box of a storage. Offset and strides in bytes."""

    name: str
    storage: int
    offset_bytes: int
    sizes: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements, as PyTorch counts them."""
        return tuple(stride // self.dtype.itemsize for stride in self.strides_bytes)


@dataclass(frozen=True)
class CapturedOperation:
    """One operation; the fields that the planner reads are those of ``Operation`` in csrc/memory/graph.h.

    Attributes:
        flop: floating-point operations: 2·N·K·P·Q·(C/g)·R·S for each pass of a convolution.
        bytes: bytes of all that it reads and writes.
        call: what eager execution ran.
        out_call: a call that writes into the destinations without allocating them; None where there is none.
        is_taken: whether what it makes can be handed out as it is returned: all of a parameter's gradient, on the CPU,
            where `out_call` would copy it.
    """

    name: str
    target: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    inplace: tuple[tuple[int, int], ...]
    accumulates: tuple[int, ...]
    mutates: tuple[int, ...]
    is_sum: bool
    is_random: bool
    is_backward: bool
    patch: int
    segment: str
    module: str
    flop: int
    bytes: int
    call: Call = field(repr=False)
    out_call: Call | None = field(repr=False)
    duration_us: float = 0.0
    workspace_bytes: int = 0
    is_taken: bool = False

    @property
    def best_call(self) -> Call:
        """What is run: a call that returns what is taken, or one that writes into the destinations, if there is one."""
        if self.out_call is None:
            return self.call
        return rewrite.returning(self.out_call) if self.is_taken else self.out_call


@dataclass(frozen=True)
class CapturedStep:
    """A training step as captured.

    Attributes:
        name: of the graph.
        storages, tensors, operations: indices are positions in these tuples; operations are in execution order.
        loss: tensor of the loss; -1 where the step begins its backward pass from gradients that it is given.
        outputs: tensors of what the model returned, where they were asked for.
        gradients: tensor of the gradient of every parameter that gets one, by qualified name; of an input that requires
            a gradient under the input's name ("input.0").
        parameters: tensor of every parameter and buffer, by qualified name; a tied one under each of its names.
        inputs: tensor of every example input and target, and of every gradient that the step is given, by name
            ("input.0", "target.0", "grad_output.0").
        constants: value of every tensor that the model holds as neither parameter nor buffer, by tensor.
        device: where the step was captured for.
        differentiable: of ``outputs``, the positions of those that a gradient is given for.
        structure: how the outputs are nested in what the model returns, as of ``torch.utils._pytree``; None where they
            were not asked for.
    """

    name: str
    storages: tuple[CapturedStorage, ...]
    tensors: tuple[CapturedTensor, ...]
    operations: tuple[CapturedOperation, ...]
    loss: int
    outputs: tuple[int, ...]
    gradients: Mapping[str, int]
    parameters: Mapping[str, int]
    inputs: Mapping[str, int]
    constants: Mapping[int, Tensor] = field(repr=False)
    device: torch.device
    differentiable: tuple[int, ...] = ()
    structure: TreeSpec | None = field(default=None, repr=False)
    durations_from: str = ""

    def graph_dict(self) -> dict[str, Any]:
        """The graph as JSON-able values, in the format "splitkern.graph", version 1. Bytes and microseconds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "durations_from": self.durations_from,
            "storages": [
                {"name": s.name, "size_bytes": s.size_bytes, "kind": s.kind, "is_output": s.is_output}
                for s in self.storages
            ],
            "tensors": [
                {
                    "name": t.name,
                    "storage": t.storage,
                    "offset_bytes": t.offset_bytes,
                    "sizes": list(t.sizes),
                    "strides_bytes": list(t.strides_bytes),
                    "element_bytes": t.element_bytes,
                }
                for t in self.tensors
            ],
            "operations": [
                {
                    "name": o.name,
                    "target": o.target,
                    "duration_us": o.duration_us,
                    "workspace_bytes": o.workspace_bytes,
                    "reads": list(o.reads),
                    "writes": list(o.writes),
                    "inplace": [list(pair) for pair in o.inplace],
                    "accumulates": list(o.accumulates),
                    "mutates": list(o.mutates),
                    "is_sum": o.is_sum,
                    "is_random": o.is_random,
                    "is_backward": o.is_backward,
                    "patch": o.patch,
                    "segment": o.segment,
                    "module": o.module,
                }
                for o in self.operations
            ],
        }

    def graph_json(self) -> str:
        """:meth:`graph_dict` as JSON text."""
        return json.dumps(self.graph_dict())

    def with_durations(
        self, durations_us: Sequence[float], durations_from: str, *, workspace_bytes: Sequence[int] | None = None
    ) -> CapturedStep:
        """The same step with how long each operation takes.

        Args:
            durations_us: microseconds of every operation, in order.
            durations_from: "measured: ..." or "estimate: ...".
            workspace_bytes: device memory that each needs only while it runs; unchanged unless given.

        Raises:
            ValueError: where there are not as many as operations.
        """
        for argument, values in (("durations_us", durations_us), ("workspace_bytes", workspace_bytes)):
            if values is not None and len(values) != len(self.operations):
                raise ValueError(
                    f"{argument} must have one value for each of {len(self.operations)}, got {len(values)}"
                )
        workspaces = [o.workspace_bytes for o in self.operations] if workspace_bytes is None else workspace_bytes
        operations = tuple(
            replace(operation, duration_us=float(duration), workspace_bytes=int(workspace))
            for operation, duration, workspace in zip(self.operations, durations_us, workspaces, strict=True)
        )
        return replace(self, operations=operations, durations_from=durations_from)

    def runnable(self, index: int, device: torch.device | str | None = None) -> Callable[[], None]:
        """An operation on tensors of its real shapes and strides, to be timed.

        Floating-point tensors hold normal random numbers, drawn without touching the global random state; pooling
        positions are those of such images; others hold zeros, which are valid as class labels.

        Args:
            index: of the operation.
            device: where; the step's own unless given.

        Returns:
            Runs the operation once, asynchronously on CUDA. It holds the tensors.
        """
        device = self.device if device is None else torch.device(device)
        operation = self.operations[index]
        generator = torch.Generator(device).manual_seed(index)
        reads = [_example(self.tensors[place], device, generator) for place in operation.reads]
        writes = [_example(self.tensors[place], device, generator) for place in operation.writes]
        if operation.call.overload is torch.ops.splitkern.patch_max_pool2d_backward.default:
            _, _, sizes, *window = operation.call.args
            images = torch.randn(sizes, dtype=reads[0].dtype, device=device, generator=generator)
            reads[1].copy_(torch.ops.splitkern.patch_max_pool2d(images, *window)[1])
        call = operation.best_call

        def run() -> None:
            rewrite.run_call(call, reads, writes)

        return run


def _example(tensor: CapturedTensor, device: torch.device, generator: torch.Generator) -> Tensor:
    last = sum((size - 1) * stride for size, stride in zip(tensor.sizes, tensor.strides, strict=True))
    count = 0 if 0 in tensor.sizes else last + 1
    flat = torch.zeros(count, dtype=tensor.dtype, device=device)
    if tensor.dtype.is_floating_point:
        flat.normal_(generator=generator)
    return flat.as_strided(tensor.sizes, tensor.strides)


# --- capture ------------------------------------------------------------------------------------------------------


def capture(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    loss: Callable[..., Tensor] | None = None,
    targets: Tensor | Sequence[Any] = (),
    outputs: bool = False,
    given_gradients: bool = False,
    device_type: str | None = None,
    name: str = "",
) -> CapturedStep:
    """Capture one training step of a model, split or not: forward, loss, and the gradients of its parameters.

    Nothing is computed: only shapes matter. Model, gradients, buffers and random state stay as they are. Autocast and
    training flags are those of the moment. Of a model split with ``recompute=True`` the step without recomputation is
    captured, because what to recompute is for the planner to decide.

    Args:
        model: any module whose control flow does not depend on tensor values.
        example_inputs: its input, or the tuple of its arguments; on the device that the step is for.
        loss: takes what the model returns and then the targets, returns a scalar; without it the model returns its
            loss itself.
        targets: further arguments of the loss.
        outputs: whether the step also returns what the model returns.
        given_gradients: the loss is somebody else's: the step returns what the model returns, and its backward pass
            begins from the gradients of that, which are further inputs. Not with ``loss`` and ``targets``.
        device_type: "cpu" or "cuda": where the operations will run, which decides what is rewritten to the package's
            own; the device of the inputs unless given. A plan for a GPU can be made without one.
        name: of the graph; the model's class unless given.

    Returns:
        The step.

    Raises:
        CaptureError: a ValueError that names the operation and the module, where the step cannot be captured.
        TypeError: where an argument has the wrong type.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> images, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
        >>> step = capture(model, images, loss=torch.nn.functional.cross_entropy, targets=labels)
        >>> step.operations[0].target
        'conv2d'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    arguments = _arguments("example_inputs", example_inputs)
    extra = _arguments("targets", targets)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the model's output and the targets, got {type(loss).__name__}")
    if given_gradients and (loss is not None or extra):
        raise ValueError("given_gradients must not come with loss or targets: the loss is not part of such a step")
    if device_type not in (None, "cpu", "cuda"):
        raise ValueError(f"device_type must be 'cpu', 'cuda' or None, got {device_type!r}")
    for value in tree_leaves((arguments, extra)):
        if not isinstance(value, Tensor) and any(
            isinstance(one, Tensor) for one in getattr(value, "__dict__", {}).values()
        ):
            raise CaptureError(
                f"an argument is a {type(value).__name__} that holds tensors, which would be taken for constants; pass "
                "the tensors, or register the class with torch.utils._pytree"
            )
    modules = _modules(model, loss)
    _require_capturable(modules, runs_gradient_hooks=given_gradients)
    with ExitStack() as stack:
        stack.enter_context(without_recomputation(model))
        stack.enter_context(isolated(modules))
        capturing = _Capture(model, modules, loss, arguments, extra, outputs, given_gradients, device_type)
        return capturing.run(name or type(model).__name__)


def _arguments(argument: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return (value,)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{argument} must be a tensor or a tuple of arguments, got {type(value).__name__}")
    return tuple(value)


def _modules(model: nn.Module, loss: Any) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(loss, nn.Module):
        prefix = "loss"
        while prefix in modules:
            prefix += "_"
        modules.update({f"{prefix}.{name}" if name else prefix: module for name, module in loss.named_modules()})
    return modules


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def global_hooks() -> int:
    """How many hooks are registered for every module there is."""
    module = nn.modules.module
    return sum(len(getattr(module, f"_global{hooks}")) for hooks in _HOOKS)


def _require_capturable(modules: Mapping[str, nn.Module], *, runs_gradient_hooks: bool) -> None:
    if global_hooks():
        raise CaptureError(
            "forward or backward hooks are registered for all modules, which a captured step would not run; remove "
            "them first"
        )
    for path, module in modules.items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                full = f"{path}.{key}" if path else key
                raise CaptureError(f"{full} of {where(path, module)} has no shape yet; run the model once first")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise CaptureError(
                f"{where(path, module)} has forward or backward hooks, which a captured step would not run; "
                f"remove them first"
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{key}" if path else key
            hooked = tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
            if hooked and not runs_gradient_hooks:  # where the caller's autograd has the gradients, it calls them
                raise CaptureError(f"{full} has gradient hooks, which a captured step would not run; remove them first")
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
                raise CaptureError(f"{full} is a {type(tensor).__name__}; subclasses of Tensor cannot be planned")
        split = split_forward_of(module)
        if split is not None and split.is_drawing and split.chosen is None:
            raise CaptureError(
                f'{where(path, module)} is split with boundary="stochastic", whose boundaries change every step; '
                'capture it with boundary="zero" or "halo"'
            )


@contextmanager
def without_recomputation(model: nn.Module) -> Iterator[None]:
    """A split model as if split without ``recompute``; any other as it is."""
    forward: SplitForward | None = split_forward_of(model)
    if forward is None:
        yield
        return
    before = forward.options
    forward.options = replace(before, recompute=False)
    try:
        yield
    finally:
        forward.options = before


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether the memory between the first and the last element of two tensors overlaps."""
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata or 0 in (one.numel(), other.numel()):
        return False

    def extent(tensor: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin, item = int(tensor.storage_offset()), tensor.element_size()
        return begin * item, (begin + int(last) + 1) * item

    (begin, end), (other_begin, other_end) = extent(one), extent(other)
    return begin < other_end and other_begin < end


class _Capture:
    """One capture under way."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        loss: Callable[..., Tensor] | None,
        arguments: tuple[Any, ...],
        targets: tuple[Any, ...],
        outputs: bool,
        given_gradients: bool,
        device_type: str | None,
    ) -> None:
        self.model, self.modules, self.loss = model, modules, loss
        self.arguments, self.targets = arguments, targets
        self.wants_outputs, self.given_gradients = outputs or given_gradients, given_gradients
        self.device_type = device_type
        self.fake_mode = FakeTensorMode(static_shapes=True)
        held = (*model.parameters(), *model.buffers(), *tree_leaves((arguments, targets)))
        self.device = next((one.device for one in held if isinstance(one, Tensor)), torch.device("cpu"))
        self.recorder = Recorder(self.fake_mode, self.device)
        names: dict[int, str] = {}
        for path, module in modules.items():
            names.setdefault(id(module), path)
        others: Any = getattr(model, "capture_names", None)
        if others is not None:  # of modules that run inside the model without being its own
            names = others() | names
        self.labels = Labels(self.recorder, names)
        self.phase = "forward"
        self.parameters: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        # What the step is given, by name: as it is, and its fake.
        self.given: list[tuple[str, Tensor, Tensor]] = []
        self.given_storages: list[int] = []

    def run(self, name: str) -> CapturedStep:
        self._fake_parameters()
        arguments, targets = self._fake_inputs("input", self.arguments), self._fake_inputs("target", self.targets)
        wanted = {
            path: tensor for path, tensor in (*self.parameters.items(), *self.inputs.items()) if tensor.requires_grad
        }
        unique: dict[int, tuple[str, Tensor]] = {}
        for path, tensor in wanted.items():
            unique.setdefault(id(tensor), (path, tensor))
        leaves = [tensor for _, tensor in unique.values()]
        held = Holdings(self.modules)
        try:
            with self.fake_mode, self.recorder, torch.enable_grad(), self.labels.forward():
                result = self.model(*arguments)
                roots = [result] if self.loss is None else [self._loss(result, targets)]
            if self.given_gradients:
                roots = self._differentiable(result)
                given: tuple[Any, ...] | None = self._fake_gradients(roots)
            else:
                self._require_loss(roots[0])
                given = None
            held.require_kept()
            self._require_in_place()
            with self.fake_mode, self.recorder, torch.enable_grad():
                self.phase = "backward"
                # On this thread, which the region tells what it does; autograd has a thread of its own for a GPU.
                with self.labels.backward([root.grad_fn for root in roots]), set_multithreading_enabled(False):
                    found = torch.autograd.grad(roots, leaves, given, allow_unused=True)
                self.recorder.label = Label()
                gradients = self._gradients(dict(zip(unique.values(), found, strict=True)))
        except CaptureError as error:
            raise self._error(error) from error
        except Exception as error:
            raise self._error(error) from error
        self._require_apart()
        boxes = self.recorder.box
        everything, structure = tree_flatten(result)
        if self.given_gradients and not all(isinstance(leaf, Tensor) for leaf in everything):
            came = next(type(leaf).__name__ for leaf in everything if not isinstance(leaf, Tensor))
            raise CaptureError(f"the model must return tensors only, however nested, got a {came} among them")
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)] if self.wants_outputs else []
        return _Assembly(
            self.recorder,
            loss=None if self.given_gradients else boxes(roots[0]),
            outputs=[boxes(tensor) for tensor in returned],
            gradients={
                path: gradients[unique[id(tensor)][0]]
                for path, tensor in wanted.items()
                if unique[id(tensor)][0] in gradients
            },
            parameters={path: boxes(tensor) for path, tensor in self.parameters.items()},
            inputs={path: boxes(tensor) for path, tensor in self.inputs.items()},
            device=self.device,
            device_type=self.device_type or self.device.type,
        ).step(
            name,
            differentiable=tuple(i for i, leaf in enumerate(returned) if leaf.grad_fn is not None),
            structure=structure if self.wants_outputs else None,
        )

    def _fake_parameters(self) -> None:
        """Give the modules fake parameters and buffers; one that is in two places stays one."""
        fakes: dict[int, Tensor] = {}
        for path, module in self.modules.items():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in stores:
                for key, tensor in held.items():
                    if tensor is None:
                        continue
                    full = f"{path}.{key}" if path else key
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = self._given("parameter", full, tensor)
                    held[key] = fakes[id(tensor)]
                    self.parameters[full] = fakes[id(tensor)]
        # named_modules lists a shared module once; its other paths are names of the same tensors.
        for path, tensor in self.model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                self.parameters.setdefault(path, tensor)

    def _given(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """A fake in memory of its own: of what a view is a view, and where in it, differs from step to step."""
        with self.fake_mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fake.requires_grad_(tensor.requires_grad)
        self.recorder.declare(fake, kind, name)
        self.given.append((name, tensor, fake))
        self.given_storages.append(fake.untyped_storage()._cdata)
        return fake

    def _require_in_place(self) -> None:
        for (name, _, fake), storage in zip(self.given, self.given_storages, strict=True):
            if fake.untyped_storage()._cdata != storage:
                raise CaptureError(
                    f"{name} gets other memory in the forward pass (.data = ...), which a captured step would not give "
                    "it; update it in place (copy_)"
                )

    def _require_apart(self) -> None:
        """What the step changes in place must be nothing else that it is given: each is taken to be by itself."""
        recorder = self.recorder
        written = {box.storage for operation in recorder.operations for box in operation.writes}
        given = [*self.given, *(("a tensor that the model holds", *pair) for pair in recorder.constants)]
        changed = [one for one in given if recorder.box(one[2]).storage in written]
        for name, tensor, fake in changed:
            for other, seen, other_fake in given:
                if fake is not other_fake and share_memory(tensor, seen):
                    raise CaptureError(
                        f"{name} and {other} share memory, and the step changes the first in place, which a plan "
                        "cannot follow; give each memory of its own (clone)"
                    )

    def _fake_inputs(self, prefix: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        count = 0

        def fake(tensor: Tensor) -> Tensor:
            nonlocal count
            full = f"{prefix}.{count}"
            count += 1
            self.inputs[full] = self._given("input", full, tensor)
            return self.inputs[full]

        mapped: tuple[Any, ...] = tree_map_only(Tensor, fake, values)
        return mapped

    def _loss(self, result: Any, targets: tuple[Any, ...]) -> Tensor:
        assert self.loss is not None
        if not isinstance(self.loss, nn.Module):
            self.labels.enter("loss")
        return self.loss(result, *targets)

    def _differentiable(self, result: Any) -> list[Tensor]:
        """What the model returns and a gradient can be given for."""
        roots = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(leaf.requires_grad and leaf.grad_fn is None for leaf in leaves):
            raise CaptureError("the model must not return a parameter or an input itself; return a copy (clone)")
        elsewhere = next((leaf for leaf in leaves if leaf.device != self.device), None)
        if elsewhere is not None:
            raise CaptureError(f"the model returns a tensor on {elsewhere.device}; its step lies on {self.device}")
        other = next((type(leaf).__name__ for leaf in tree_leaves(result) if not isinstance(leaf, Tensor)), None)
        if not roots and other is not None:
            raise CaptureError(f"the model must return tensors only, however nested, got a {other} among them")
        if not roots:
            raise CaptureError("nothing that the model returns depends on anything that requires a gradient")
        return roots

    def _fake_gradients(self, roots: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for number, root in enumerate(roots):
            with self.fake_mode:
                gradient = torch.empty_strided(root.shape, root.stride(), dtype=root.dtype, device=root.device)
                if torch._debug_has_internal_overlap(gradient) != 0:  # of an expanded tensor, or of windows
                    gradient = torch.empty(root.shape, dtype=root.dtype, device=root.device)
            self.recorder.declare(gradient, "input", f"grad_output.{number}")
            self.inputs[f"grad_output.{number}"] = gradient
        return tuple(self.inputs[f"grad_output.{number}"] for number in range(len(roots)))

    def _require_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor):
            came = type(loss).__name__
            raise CaptureError(
                f"the loss must be a scalar tensor, got a {came}; give loss= where the model returns none"
            )
        if loss.numel() != 1:
            raise CaptureError(f"the loss must be a scalar, got shape {list(loss.shape)}; give loss= or reduce it")
        if loss.grad_fn is None:
            raise CaptureError("the loss does not depend on anything that requires a gradient")

    def _gradients(self, found: Mapping[tuple[str, Tensor], Tensor | None]) -> dict[str, Box]:
        """Every gradient in a storage of its own with its parameter's strides, as autograd leaves it in ``.grad``."""
        recorder = self.recorder
        taken: set[int] = set()
        boxes: dict[str, Box] = {}
        for (path, leaf), gradient in found.items():
            if gradient is None:
                continue
            box = recorder.box(gradient)
            storage = recorder.storages[box.storage]
            fits = gradient.stride() == leaf.stride() and rewrite.box_bytes(box) == storage.size_bytes
            if storage.kind != "" or box.storage in taken or not fits:
                box = recorder.copy(gradient, "gradient", f"grad.{path}", leaf)
            else:
                storage.kind, storage.name = "gradient", f"grad.{path}"
            taken.add(box.storage)
            boxes[path] = box
        return boxes

    def _error(self, error: Exception) -> CaptureError:
        operator, label = self.recorder.failed or ("", self.recorder.label)
        module = self.modules.get(label.module)
        place = where(label.module, module) if module is not None else repr(label.module)
        what = f"{operator} in {place}" if operator else place
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            reason = "what follows depends on the values of tensors, which a plan made beforehand cannot know"
        elif isinstance(error, UnsupportedOperatorException) or "no fake impl registered" in str(error):
            qualified = "::".join(operator.split(".")[:2])
            reason = (
                "the operator has no fake implementation, which tells the shapes of its results beforehand; "
                f'register one with torch.library.register_fake("{qualified}", ...)'
            )
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return CaptureError(f"cannot capture {what} ({self.phase}): {reason}")


class _Assembly:
    """From a record to a step: rewrites, names, and what each operation may do."""

    def __init__(
        self,
        recorder: Recorder,
        *,
        loss: Box | None,
        outputs: Sequence[Box],
        gradients: Mapping[str, Box],
        parameters: Mapping[str, Box],
        inputs: Mapping[str, Box],
        device: torch.device,
        device_type: str,
    ) -> None:
        self.device, self.device_type = device, device_type
        self.storages: list[RecordedStorage] = recorder.storages
        self.loss, self.outputs = loss, outputs
        self.gradients, self.parameters, self.inputs = gradients, parameters, inputs
        returned = {box.storage for box in (loss, *outputs) if box is not None}
        self.returned = returned
        for index in returned:
            if self.storages[index].kind == "":
                self.storages[index].kind = "activation"
        operations = [
            rewrite.read_only_needed(part)
            for operation in recorder.operations
            for part in rewrite.split_convolution_backward(operation)
        ]
        operations = rewrite.replace_max_pools(operations, self.storages, device_type)
        self.recorded = rewrite.write_joins(operations, self.storages)
        self.boxes: dict[Box, int] = {}
        self.kept: dict[int, int] = {}
        self.names: Counter[str] = Counter()
        self.captured_storages: list[CapturedStorage] = []
        self.tensors: list[CapturedTensor] = []

    def step(self, name: str, **returned: Any) -> CapturedStep:
        for box in (*self.parameters.values(), *self.inputs.values()):
            self._tensor(box, "")
        operations = [self._operation(operation) for operation in self.recorded]
        constants = {
            self._tensor(self._whole(index, storage.constant), ""): storage.constant
            for index, storage in enumerate(self.storages)
            if storage.constant is not None and index in self.kept
        }
        places: dict[str, Any] = {
            "loss": -1 if self.loss is None else self._tensor(self.loss, ""),
            "outputs": tuple(self._tensor(box, "") for box in self.outputs),
            "gradients": {path: self._tensor(box, "") for path, box in self.gradients.items()},
            "parameters": {path: self._tensor(box, "") for path, box in self.parameters.items()},
            "inputs": {path: self._tensor(box, "") for path, box in self.inputs.items()},
        }
        return CapturedStep(
            name=name,
            storages=tuple(self.captured_storages),
            tensors=tuple(self.tensors),
            operations=tuple(self._taken(operations)),
            constants=constants,
            device=self.device,
            **returned,
            **places,
        )

    def _taken(self, operations: Sequence[CapturedOperation]) -> Iterator[CapturedOperation]:
        """The operations, those marked that make the whole of a gradient, in its order in memory."""
        writers = Counter(self.tensors[place].storage for one in operations for place in one.writes)
        for one in operations:
            if self.device_type == "cpu" and one.target == "conv2d_weight_grad" and one.out_call is not None:
                made = self.tensors[one.writes[0]]
                storage = self.captured_storages[made.storage]
                size_bytes = math.prod(made.sizes) * made.element_bytes
                is_whole = (made.offset_bytes, size_bytes) == (0, storage.size_bytes)
                is_in_order = made.strides == tuple(math.prod(made.sizes[axis + 1 :]) for axis in range(4))
                if storage.kind == "gradient" and writers[made.storage] == 1 and is_whole and is_in_order:
                    one = replace(one, is_taken=True)
            yield one

    @staticmethod
    def _whole(index: int, value: Tensor) -> Box:
        size = value.element_size()
        strides = tuple(stride * size for stride in value.stride())
        return Box(index, int(value.storage_offset()) * size, tuple(value.shape), strides, value.dtype)

    def _unique(self, name: str) -> str:
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"

    def _tensor(self, box: Box, maker: str) -> int:
        if box in self.boxes:
            return self.boxes[box]
        storage = self.storages[box.storage]
        if box.storage not in self.kept:
            self.kept[box.storage] = len(self.captured_storages)
            self.captured_storages.append(
                CapturedStorage(
                    name=self._unique(storage.name or maker),
                    size_bytes=storage.size_bytes,
                    kind=storage.kind or "activation",
                    is_output=box.storage in self.returned,
                )
            )
        place = self.kept[box.storage]
        self.boxes[box] = len(self.tensors)
        self.tensors.append(
            CapturedTensor(
                name=self._unique(f"{self.captured_storages[place].name}:{'x'.join(map(str, box.sizes))}"),
                storage=place,
                offset_bytes=box.offset_bytes,
                sizes=box.sizes,
                strides_bytes=box.strides_bytes,
                dtype=box.dtype,
            )
        )
        return self.boxes[box]

    def _operation(self, recorded: RecordedOperation) -> CapturedOperation:
        target = rewrite.target_of(recorded)
        label = recorded.label
        patch = f"[{label.patch}]" if label.patch >= 0 else ""
        name = self._unique(f"{label.module or 'model'}{patch}/{target}")
        reads = tuple(self._tensor(box, name) for box in recorded.reads)
        writes = tuple(self._tensor(box, name) for box in recorded.writes)
        return CapturedOperation(
            name=name,
            target=target,
            reads=reads,
            writes=writes,
            inplace=tuple(rewrite.inplace_pairs(recorded, self.storages)),
            accumulates=(0,) if target == "conv2d_weight_grad" else (),
            mutates=recorded.mutates,
            is_sum=rewrite.is_sum(recorded),
            is_random=rewrite.is_random(recorded.overload),
            is_backward=recorded.is_backward,
            patch=label.patch,
            segment="region" if label.in_region else label.module.partition(".")[0],
            module=label.module,
            flop=rewrite.flop_of(recorded, target),
            bytes=sum(map(rewrite.box_bytes, (*recorded.reads, *recorded.writes))),
            call=rewrite.original_call(recorded),
            out_call=rewrite.out_call(recorded, self.device_type),
        )
