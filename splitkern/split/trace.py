"""From a model to a program: trace it, choose the region, turn the region's nodes into operations,
and keep the rest as nodes to run as they are.

The trace looks inside a container only where the region reaches into it: other containers stay
modules, with their hooks and their control flow.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from splitkern.split import rules
from splitkern.split.execute import Region
from splitkern.split.operations import BatchNorm, Convolution, Operation, Pointwise
from splitkern.split.rules import Obstacle


@dataclass(frozen=True)
class Extent:
    """How far the region reaches: up to and including a module, or a share of the windows."""

    until: str | None
    depth: float | None

    def __str__(self) -> str:
        return f"until={self.until!r}" if self.until is not None else f"depth={self.depth}"


@dataclass(frozen=True)
class Program:
    """A traced model, cut into a region and the rest.

    Args:
        region: what is split.
        arguments: the model's tensor arguments in order, as value name and argument name.
        tail: nodes outside the region in execution order, the output node last.
        dead_after: for every tail node the values that nothing reads after it.
        modules: path and module of everything that the region reads, to notice replacements.
        graph: the traced graph.
    """

    region: Region
    arguments: tuple[tuple[str, str], ...]
    tail: tuple[fx.Node, ...]
    dead_after: tuple[tuple[str, ...], ...]
    modules: tuple[tuple[str, nn.Module], ...]
    graph: fx.Graph

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model still holds the modules that the region was built from."""
        for path, module in self.modules:
            found: Any = model
            for name in path.split(".") if path else ():
                found = found._modules.get(name) if isinstance(found, nn.Module) else None
            if found is not module:
                return False
        return True

    def run_tail(self, model: nn.Module, values: dict[str, Any]) -> Any:
        """Run the rest of the model from the region's outputs and the model's arguments."""

        def value(node: fx.Node) -> Any:
            return values[node.name]

        for node, dead in zip(self.tail, self.dead_after, strict=True):
            args = fx.node.map_arg(node.args, value)
            kwargs = fx.node.map_arg(node.kwargs, value)
            if node.op == "output":
                return args[0]
            values[node.name] = _call(model, node, args, kwargs)
            del args, kwargs
            for name in dead:
                values.pop(name, None)
        raise RuntimeError("the traced graph has no output node")


def _call(model: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        function: Any = node.target
        return function(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return _attribute(model, str(node.target))


def _attribute(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name)
    return found


class _Tracer(fx.Tracer):
    """Records which modules a node was called in and what each module returned."""

    def __init__(self, opened: set[str] | None) -> None:
        super().__init__()
        self.opened = opened
        self.stack: list[str] = []
        self.returned: dict[str, Any] = {}
        self.calls: dict[str, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if rules.is_leaf(m) or super().is_leaf_module(m, module_qualified_name):
            return True
        return self.opened is not None and module_qualified_name not in self.opened

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        self.stack.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self.stack.pop()
        self.returned[path] = result
        self.calls[path] = self.calls.get(path, 0) + 1
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["modules"] = tuple(self.stack)
        return node


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Containers answer ``self.training`` with ``training`` while the model is traced."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, flag in before:
            module.training = flag


def _trace(
    model: nn.Module, constants: dict[str, Any], training: bool, opened: set[str] | None
) -> tuple[fx.Graph, _Tracer]:
    tracer = _Tracer(opened)
    with _in_mode(model, training):
        try:
            graph = tracer.trace(model, constants)
        except (fx.proxy.TraceError, TypeError) as error:
            raise Obstacle(
                f"{type(model).__name__}.forward cannot be traced ({error}); its control flow "
                f"must not depend on tensor values"
            ) from error
    for node in list(graph.nodes):
        # A constant argument leaves a placeholder and a check of its value behind; SplitForward checks it instead.
        if node.op == "placeholder" and node.target not in inspect.signature(type(model).forward).parameters:
            _erase(graph, node)
    return graph, tracer


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def build(model: nn.Module, constants: dict[str, Any], extent: Extent, training: bool) -> Program:
    """Trace a model and cut it into region and rest.

    Args:
        model: not changed.
        constants: optional arguments of the model's forward that stay at their default.
        extent: how far the region reaches.
        training: the training flag that control flow in the model's containers sees.

    Raises:
        ValueError: if ``extent`` names nothing, with the nearest names.
        Obstacle: if the region would hold a node that cannot be split.
    """
    graph, tracer = _trace(model, constants, training, None)
    nodes, windows = _select(model, graph, tracer, extent)
    opened = {path for node in nodes for path in node.meta["modules"]}
    if extent.until is not None:
        opened |= set(_prefixes(extent.until))
    graph, tracer = _trace(model, constants, training, opened)
    chosen, _ = _select(model, graph, tracer, extent, windows)
    return _program(model, graph, chosen)


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _label(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    inside = node.meta["modules"]
    name = getattr(node.target, "__name__", str(node.target))
    return f"{inside[-1]} ({name})" if inside else str(name)


def _select(
    model: nn.Module,
    graph: fx.Graph,
    tracer: _Tracer,
    extent: Extent,
    windows: int | None = None,
) -> tuple[list[fx.Node], int | None]:
    """The region's nodes in execution order, and how many windows ``depth`` came to."""
    if extent.until is not None:
        targets = _returned_by(model, tracer, extent.until)
        chosen = _ancestors(targets)
        return [node for node in graph.nodes if node in chosen], None
    found = [
        node
        for node in graph.nodes
        if node.op in ("call_module", "call_function") and rules.is_window(node, _module_of(model, node))
    ]
    if windows is None:
        assert extent.depth is not None
        windows = int(extent.depth * len(found))
        if windows < 1:
            raise ValueError(
                f"depth must reach at least one of the {len(found)} convolutions and poolings, got {extent.depth}"
            )
    chosen = _ancestors(found[:windows])
    # Whatever follows without another window costs no boundary: take it in.
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node in chosen or not inputs or not all(source in chosen for source in inputs):
            continue
        module = _module_of(model, node)
        if node.op != "output" and not rules.is_window(node, module) and _fits(node, module):
            chosen.add(node)
    return [node for node in graph.nodes if node in chosen], windows


def _fits(node: fx.Node, module: nn.Module | None) -> bool:
    try:
        rules.operation_of(node, module, "")
    except Obstacle:
        return False
    return all(source.op != "placeholder" for source in node.all_input_nodes)


def _returned_by(model: nn.Module, tracer: _Tracer, until: str) -> list[fx.Node]:
    if until not in tracer.returned:
        known = [name for name, _ in model.named_modules() if name]
        if until in known:
            raise ValueError(
                f"until: module {until!r} is never called on its own by "
                f"{type(model).__name__}.forward; name a module that is, for example one of "
                f"{list(tracer.returned)[:8]}"
            )
        near = difflib.get_close_matches(until, known, n=5, cutoff=0.3) or known[:8]
        raise ValueError(f"until: no module is named {until!r}; the nearest names are {near}")
    if tracer.calls[until] > 1:
        raise ValueError(
            f"until: module {until!r} is called {tracer.calls[until]} times, so where to join is "
            f"not unique; name a module that is called once"
        )
    targets: list[fx.Node] = []
    fx.node.map_aggregate(
        tracer.returned[until],
        lambda value: targets.append(value.node) if isinstance(value, fx.Proxy) else None,
    )
    return targets


def _ancestors(targets: Iterable[fx.Node]) -> set[fx.Node]:
    chosen: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in chosen and node.op != "placeholder":
            chosen.add(node)
            stack.extend(node.all_input_nodes)
    return chosen


def _program(model: nn.Module, graph: fx.Graph, chosen: Sequence[fx.Node]) -> Program:
    inside = set(chosen)
    operations: list[Operation] = []
    previous: fx.Node | None = None
    for node in chosen:
        try:
            if node.op == "get_attr":
                raise Obstacle(
                    f"{node.target}: a parameter or buffer that forward reads directly cannot be inside a split region"
                )
            operations.append(rules.operation_of(node, _module_of(model, node), _label(node)))
        except Obstacle as error:
            raise Obstacle(f"{error}; {_join_before(node, previous)}") from None
        previous = node
    outputs = [node.name for node in chosen if any(user not in inside for user in node.users) or not node.users]
    inputs = [
        node.name for node in graph.nodes if node.op == "placeholder" and any(user in inside for user in node.users)
    ]
    if len(inputs) != 1:
        raise Obstacle(f"the split region must begin at one input image, got {inputs}")
    operations = _reuse_inputs(_fuse_relus(operations, outputs), outputs)
    tail = [node for node in graph.nodes if node not in inside and node.op != "placeholder"]
    return Program(
        region=Region(tuple(operations), tuple(inputs), tuple(outputs)),
        arguments=tuple((node.name, str(node.target)) for node in graph.nodes if node.op == "placeholder"),
        tail=tuple(tail),
        dead_after=_dead_after(tail),
        modules=tuple(_modules(model, chosen)),
        graph=graph,
    )


def _join_before(node: fx.Node, previous: fx.Node | None) -> str:
    if previous is None:
        return "nothing before it can be split"
    around = set(node.meta["modules"])
    for path in previous.meta["modules"]:
        if path not in around:
            return f"join before it: until={path!r}"
    return "join before it"


def _modules(model: nn.Module, chosen: Sequence[fx.Node]) -> Iterator[tuple[str, nn.Module]]:
    for path in dict.fromkeys(path for node in chosen for path in node.meta["modules"]):
        yield path, model.get_submodule(path)


def _dead_after(tail: Sequence[fx.Node]) -> tuple[tuple[str, ...], ...]:
    last: dict[str, int] = {}
    for index, node in enumerate(tail):
        for source in (*node.all_input_nodes, node):
            last[source.name] = index
    return tuple(tuple(name for name, index in last.items() if index == position) for position in range(len(tail)))


def _readers(operations: Sequence[Operation]) -> dict[str, list[Operation]]:
    readers: dict[str, list[Operation]] = {}
    for operation in operations:
        for name in operation.inputs:
            readers.setdefault(name, []).append(operation)
    return readers


def _fuse_relus(operations: Sequence[Operation], outputs: Sequence[str]) -> list[Operation]:
    """Let a convolution or batch norm apply the ReLU that alone reads it."""
    readers = _readers(operations)
    fused: list[Operation] = []
    relus: set[str] = set()
    for operation in operations:
        if operation.name in relus:
            continue
        following = readers.get(operation.name, [])
        if (
            isinstance(operation, Convolution | BatchNorm)
            and operation.name not in outputs
            and len(following) == 1
            and isinstance(following[0], Pointwise)
            and following[0].kind == "relu"
        ):
            relus.add(following[0].name)
            operation = replace(operation, name=following[0].name, activation="relu")
        fused.append(operation)
    return fused


def _reuse_inputs(operations: Sequence[Operation], outputs: Sequence[str]) -> list[Operation]:
    """Let ReLUs and sums write their first input where nothing else reads or has saved it."""
    readers = _readers(operations)
    writers = {operation.name: operation for operation in operations}
    result: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Pointwise) and operation.kind in ("relu", "add"):
            source = operation.inputs[0]
            writer = writers.get(source)
            fresh = (isinstance(writer, Convolution | BatchNorm) and writer.activation == "none") or (
                isinstance(writer, Pointwise) and writer.kind == "add"
            )
            if fresh and len(readers[source]) == 1 and source not in outputs:
                operation = replace(operation, reuse_input=True)
        result.append(operation)
    return result


def fake_shapes(
    program: Program, model: nn.Module, inputs: Sequence[Tensor]
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of the traced graph, without computing anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}

    class _Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Tensor) -> None:
            values: dict[str, Any] = {name: arg for (name, _), arg in zip(program.arguments, args, strict=True)}
            for node in program.graph.nodes:
                if node.op in ("placeholder", "output"):
                    continue
                mapped = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
                values[node.name] = _call(self.model, node, mapped[0], mapped[1])
            for name, value in values.items():
                if isinstance(value, Tensor):
                    shapes[name] = (value.shape, value.dtype)

    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.no_grad():
        runner = _Run()
        state: dict[str, Tensor] = {
            **{name: mode.from_tensor(tensor) for name, tensor in runner.named_parameters()},
            **{name: mode.from_tensor(tensor) for name, tensor in runner.named_buffers()},
        }
        fakes = tuple(mode.from_tensor(tensor) for tensor in inputs)
        torch.func.functional_call(runner, state, fakes)
    return shapes
