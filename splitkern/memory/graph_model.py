"""A graph of Dynamo's as a module with the names of the model that it comes from.

Placeholders are told apart by where Dynamo found them: parameters and buffers get their qualified names back, and every
node runs inside a stand-in for its module, by which `capture` labels what it records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from splitkern.memory.capture import without_recomputation
from splitkern.memory.record import CaptureError
from splitkern.split import operator

_HELD = re.compile(r"\._(modules|parameters|buffers)\['([^']*)'\]")


@dataclass(frozen=True)
class Place:
    """What a placeholder is: a "parameter" or "buffer" with a qualified name, an "input", or a "number" in a tensor."""

    kind: str
    name: str


def places_of(graph: fx.GraphModule, examples: Sequence[Any]) -> list[Place]:
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    taken: set[str] = set()
    found = []
    for node, example in zip(nodes, examples, strict=True):
        if isinstance(example, Tensor) and node.users and all(map(_is_item, node.users)):
            # So Dynamo passes floats that it does not specialise: settings of modules, with dynamic=True.
            found.append(Place("number", node.name))
            continue
        held = _HELD.findall(_source(node))
        kind = held[-1][0] if held else ""
        if not isinstance(example, Tensor) or (kind != "buffers" and not isinstance(example, nn.Parameter)):
            found.append(Place("input", node.name))
            continue
        name = ".".join(part for _, part in held) if held else node.name
        if name in taken:  # of another model in the same function
            name = node.name
        taken.add(name)
        found.append(Place("buffer" if kind == "buffers" else "parameter", name))
    return found


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def _source(node: fx.Node) -> str:
    """The expression by which Dynamo found a placeholder's value."""
    argument = node.meta.get("grapharg")
    name = "" if argument is None else argument.source.name
    return str(name() if callable(name) else name)


def _path(node: fx.Node) -> str:
    """Qualified name of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", next(reversed(stack.values()))[0])
    return re.sub(r"^[A-Za-z]+\['[^']*'\]\.?", "", path)


class _Scope(nn.Module):
    """Stands for a module of the model: holds its tensors, and is called around what it computes."""

    def forward(self, function: Callable[[fx.Node], Any], node: fx.Node) -> Any:
        return function(node)


class _Interpreter(fx.Interpreter):
    """Runs a graph inside the scopes that its nodes come from."""

    def __init__(self, graph: fx.GraphModule, scopes: Mapping[str, _Scope]) -> None:
        super().__init__(graph)
        self.scopes = scopes

    def run_node(self, n: fx.Node) -> Any:
        if _is_item(n) and not isinstance(value := self.env[n.args[0]], Tensor):  # type: ignore[index]
            return value
        path = "" if n.op in ("placeholder", "output") else _path(n)
        scope = self.scopes.get(path) if path else None
        return super().run_node(n) if scope is None else scope(super().run_node, n)


class GraphModel(nn.Module):
    """A graph as a module that has parameters and buffers of its own."""

    def __init__(self, graph: fx.GraphModule, places: Sequence[Place]) -> None:
        super().__init__()
        # Not as submodules and attributes: the names are the model's.
        scopes: dict[str, _Scope] = {}
        held: dict[str, tuple[dict[str, Any], str]] = {}
        for place in places:
            if place.kind in ("parameter", "buffer"):
                path, _, key = place.name.rpartition(".")
                owner = self._scope(path, scopes)
                held[place.name] = (owner._parameters if place.kind == "parameter" else owner._buffers, key)
        for node in graph.graph.nodes:
            self._scope(_path(node), scopes)
        self.__dict__["_step"] = GraphStep(graph, places, scopes, held)

    def _scope(self, path: str, scopes: dict[str, _Scope]) -> nn.Module:
        if not path:
            return self
        if path not in scopes:
            parent, _, key = path.rpartition(".")
            self._scope(parent, scopes)._modules[key] = scopes[path] = _Scope()
        return scopes[path]

    def forward(self, *inputs: Any) -> list[Tensor]:
        step: GraphStep = self.__dict__["_step"]
        return step.interpret(inputs)

    def capture_names(self) -> dict[int, str]:
        """Qualified names of the modules of split models in the graph, by identity; `capture` labels by them."""
        step: GraphStep = self.__dict__["_step"]
        return {id(module): path for model in step.split_models for path, module in model.named_modules()}


class GraphStep:
    """The graph of a :class:`GraphModel`, with what belongs where."""

    def __init__(
        self,
        graph: fx.GraphModule,
        places: Sequence[Place],
        scopes: Mapping[str, _Scope],
        held: Mapping[str, tuple[dict[str, Any], str]],
    ) -> None:
        self.places, self.held = places, held
        self.interpreter = _Interpreter(graph, scopes)
        self.split_models = [
            operator.model_of(str(node.args[0])) for node in calls_of(graph, torch.ops.splitkern.split_forward)
        ]
        arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
        returned = returned_by(graph)
        #: For everything that the graph returns: the argument that it is, or -1.
        self.returned = [arguments.index(node) if node in arguments else -1 for node in returned]
        for node in returned:
            example = node.meta.get("example_value") if isinstance(node, fx.Node) else node
            if not isinstance(example, Tensor):
                raise CaptureError(
                    f"the graph returns {node} ({type(example).__name__}), which is no tensor: sizes that Dynamo keeps "
                    "symbolic cross a graph break; use torch.compile(..., dynamic=False)"
                )

    @contextmanager
    def holding(self, arguments: Sequence[Any]) -> Iterator[None]:
        """Parameters and buffers of a call in their places, for as long as it takes: they are somebody else's."""
        self._put(arguments)
        try:
            yield
        finally:
            self._put([None] * len(self.places))

    def _put(self, arguments: Sequence[Any]) -> None:
        for place, value in zip(self.places, arguments, strict=True):
            if place.name in self.held:
                tensors, key = self.held[place.name]
                tensors[key] = value

    def inputs(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """What the module is called with. Numbers are constants of a plan, so that other ones are planned anew."""
        return tuple(
            value.item() if place.kind == "number" else value
            for place, value in zip(self.places, arguments, strict=True)
            if place.name not in self.held
        )

    def interpret(self, inputs: Sequence[Any]) -> list[Tensor]:
        remaining = iter(inputs)
        arguments = [
            self.held[place.name][0][self.held[place.name][1]] if place.name in self.held else next(remaining)
            for place in self.places
        ]
        with ExitStack() as stack:
            for model in self.split_models:
                stack.enter_context(without_recomputation(model))
            results = self.interpreter.run(*arguments, enable_io_processing=False)
        return [value for value, argument in zip(results, self.returned, strict=True) if argument < 0]

    def outputs(self, computed: Sequence[Tensor], arguments: Sequence[Any]) -> tuple[Any, ...]:
        """What the graph returns, of what was computed and of its arguments."""
        remaining = iter(computed)
        return tuple(arguments[argument] if argument >= 0 else next(remaining) for argument in self.returned)


def returned_by(graph: fx.GraphModule) -> Sequence[Any]:
    (returned,) = next(node for node in graph.graph.nodes if node.op == "output").args
    assert isinstance(returned, (tuple, list))
    return returned


def calls_of(graph: fx.GraphModule, packet: Any) -> list[fx.Node]:
    return [
        node for node in graph.graph.nodes if node.op == "call_function" and node.target in (packet, packet.default)
    ]
