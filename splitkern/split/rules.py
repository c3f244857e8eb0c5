"""Which nodes of a traced model a split region may hold, and as which operation.

One table per kind of node; a node that no rule takes is an obstacle, named with its module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from splitkern.geometry import Window
from splitkern.split.operations import AvgPool, BatchNorm, Convolution, Dropout, MaxPool, Operation, Pointwise


class Obstacle(ValueError):
    """A node that cannot be inside a split region, with the reason."""


#: Modules that compute every output position from the same input position alone.
POINTWISE_MODULES: set[type[nn.Module]] = {
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
}

RELU_FUNCTIONS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_}
ADD_FUNCTIONS: set[Any] = {operator.add, operator.iadd, torch.add}
POINTWISE_FUNCTIONS: set[Any] = {
    *RELU_FUNCTIONS,
    *ADD_FUNCTIONS,
    F.elu,
    F.gelu,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.leaky_relu,
    F.mish,
    F.relu6,
    F.selu,
    F.sigmoid,
    F.silu,
    F.softplus,
    F.tanh,
    operator.imul,
    operator.isub,
    operator.itruediv,
    operator.mul,
    operator.neg,
    operator.sub,
    operator.truediv,
    torch.clamp,
    torch.mul,
    torch.sigmoid,
    torch.sub,
    torch.tanh,
}
RELU_METHODS = {"relu", "relu_"}
ADD_METHODS = {"add", "add_"}
POINTWISE_METHODS = {
    *RELU_METHODS,
    *ADD_METHODS,
    "clamp",
    "clamp_",
    "mul",
    "mul_",
    "sigmoid",
    "sigmoid_",
    "sub",
    "sub_",
    "tanh",
    "tanh_",
}
#: Modules of other packages that are leaves of the trace, by qualified name.
LEAF_NAMES = {"torchvision.ops.stochastic_depth.StochasticDepth"}


def register_pointwise(module_type: type[nn.Module]) -> type[nn.Module]:
    """Declare that a module type computes every output position from the same input position
    alone, so that a split region may hold it. Usable as a class decorator.

    Example:
        >>> @register_pointwise
        ... class Scale(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
    """
    POINTWISE_MODULES.add(module_type)
    return module_type


def qualified_name(module: nn.Module) -> str:
    """``package.module.Class`` of a module's type."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_leaf(module: nn.Module) -> bool:
    """Whether the trace must not look inside a module, beyond PyTorch's own."""
    return type(module) in POINTWISE_MODULES or qualified_name(module) in LEAF_NAMES


def is_window(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node is a convolution or a pooling window, as ``depth`` counts them."""
    if module is not None:
        return isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    return node.target in FUNCTIONS and FUNCTIONS[node.target] in (_max_pool_call, _avg_pool_call)


def operation_of(node: fx.Node, module: nn.Module | None, label: str) -> Operation:
    """The region's operation for a node.

    Args:
        node: a node of the trace that depends on the region's input.
        module: the module that it calls, None for functions and methods.
        label: module path for messages.

    Raises:
        Obstacle: if patches cannot compute the node independently.
    """
    if module is not None:
        return _module_operation(node, module, label)
    if node.op == "call_function":
        if node.target in FUNCTIONS:
            return FUNCTIONS[node.target](node, label)
        if node.target in POINTWISE_FUNCTIONS:
            return _pointwise(node, label)
    elif node.op == "call_method" and node.target in POINTWISE_METHODS:
        return _pointwise(node, label)
    name = getattr(node.target, "__name__", str(node.target))
    raise Obstacle(
        f"{label}: {name}() is not a convolution, pooling window, batch norm, element-wise "
        f"operation or channel concatenation, so patches cannot compute it independently"
    )


def _module_operation(node: fx.Node, module: nn.Module, label: str) -> Operation:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        raise Obstacle(f"{label}: only modules called with one tensor can be split")
    for kind in MODULES:
        # A subclass with a forward of its own computes something else.
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return MODULES[kind](node, module, label)
    if qualified_name(module) in LEAF_NAMES:
        return _stochastic_depth(node, module, label)
    if type(module) in POINTWISE_MODULES:
        return _pointwise(node, label, module)
    kind_name = type(module).__name__
    hint = ""
    if isinstance(module, nn.SyncBatchNorm):
        hint = "; convert it to BatchNorm2d"
    elif isinstance(module, nn.Linear | nn.Flatten) or "Adaptive" in kind_name:
        hint = " because it reads the whole image"
    raise Obstacle(f"{label} ({kind_name}) cannot be inside a split region{hint}")


def _inputs(node: fx.Node) -> tuple[str, ...]:
    return tuple(source.name for source in node.all_input_nodes)


def _convolution(node: fx.Node, module: nn.Conv2d, label: str) -> Operation:
    if module.padding_mode != "zeros":
        raise Obstacle(
            f"{label} (Conv2d): padding_mode must be 'zeros' inside a split region, got {module.padding_mode!r}"
        )
    return Convolution(node.name, label, _inputs(node), module=module)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _windows(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> tuple[Window, Window]:
    sizes = _pair(kernel)
    strides = _pair(stride) if stride not in (None, []) else sizes
    paddings, dilations = _pair(padding), _pair(dilation)
    rows, cols = (Window(sizes[axis], strides[axis], paddings[axis], dilations[axis], ceil_mode) for axis in (0, 1))
    return rows, cols


def _max_pool(node: fx.Node, module: nn.MaxPool2d, label: str) -> Operation:
    if module.return_indices:
        raise Obstacle(f"{label} (MaxPool2d): return_indices must be False in a split region")
    rows, cols = _windows(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    return _checked_max_pool(MaxPool(node.name, label, _inputs(node), rows=rows, cols=cols))


def _checked_max_pool(pool: MaxPool) -> MaxPool:
    positions = pool.rows.kernel * pool.cols.kernel
    if positions > 255:
        raise Obstacle(f"{pool.label}: a max pooling window must have at most 255 positions, got {positions}")
    return pool


def _avg_pool(node: fx.Node, module: nn.AvgPool2d, label: str) -> Operation:
    rows, cols = _windows(module.kernel_size, module.stride, module.padding, 1, module.ceil_mode)
    return AvgPool(
        node.name,
        label,
        _inputs(node),
        rows=rows,
        cols=cols,
        count_include_pad=module.count_include_pad,
        divisor_override=module.divisor_override,
    )


def _arguments(node: fx.Node, names: Sequence[str], defaults: Sequence[Any]) -> dict[str, Any]:
    values = dict(zip(names, defaults, strict=True))
    values.update(zip(names, node.args[1:], strict=False))
    values.update(node.kwargs)
    return values


def _max_pool_call(node: fx.Node, label: str) -> Operation:
    values = _arguments(
        node,
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        (None, None, 0, 1, False, False),
    )
    if values.pop("return_indices"):
        raise Obstacle(f"{label}: return_indices must be False in a split region")
    rows, cols = _windows(
        values["kernel_size"],
        values["stride"],
        values["padding"],
        values["dilation"],
        values["ceil_mode"],
    )
    return _checked_max_pool(MaxPool(node.name, label, _inputs(node), rows=rows, cols=cols))


def _avg_pool_call(node: fx.Node, label: str) -> Operation:
    values = _arguments(
        node,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        (None, None, 0, False, True, None),
    )
    rows, cols = _windows(values["kernel_size"], values["stride"], values["padding"], 1, values["ceil_mode"])
    return AvgPool(
        node.name,
        label,
        _inputs(node),
        rows=rows,
        cols=cols,
        count_include_pad=values["count_include_pad"],
        divisor_override=values["divisor_override"],
    )


def _batch_norm(node: fx.Node, module: nn.BatchNorm2d, label: str) -> Operation:
    return BatchNorm(node.name, label, _inputs(node), module=module)


def _dropout(node: fx.Node, module: nn.Dropout, label: str) -> Operation:
    return Dropout(node.name, label, _inputs(node), module=module, probability=module.p, noise="element")


def _dropout2d(node: fx.Node, module: nn.Dropout2d, label: str) -> Operation:
    return Dropout(node.name, label, _inputs(node), module=module, probability=module.p, noise="channel")


def _stochastic_depth(node: fx.Node, module: Any, label: str) -> Operation:
    return Dropout(node.name, label, _inputs(node), module=module, probability=module.p, noise=module.mode)


def _concatenation(node: fx.Node, label: str) -> Operation:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if dim not in (1, -3):
        raise Obstacle(f"{label}: only a concatenation of channels (dim=1) can be split, got {dim}")
    return Pointwise(node.name, label, _inputs(node), node=node)


def _functional_dropout(node: fx.Node, label: str) -> Operation:
    raise Obstacle(
        f"{label}: {getattr(node.target, '__name__', node.target)}() bakes the training flag into "
        f"the trace; use the module of the same name"
    )


def _pointwise(node: fx.Node, label: str, module: nn.Module | None = None) -> Operation:
    target = type(module) if module is not None else node.target
    operands = [value for value in node.args if isinstance(value, fx.Node)]
    if module is not None and getattr(module, "inplace", False):
        # Several patches or a saved value may share the input: write a new tensor.
        module = _out_of_place(module)
    inputs = _inputs(node)
    if target is nn.ReLU or target in RELU_FUNCTIONS or target in RELU_METHODS:
        return Pointwise(node.name, label, inputs, node=node, module=None, kind="relu")
    adds = target in ADD_FUNCTIONS or target in ADD_METHODS
    if adds and len(operands) == len(inputs) == 2 and not node.kwargs:
        return Pointwise(node.name, label, inputs, node=node, kind="add")
    return Pointwise(node.name, label, inputs, node=node, module=module)


def _out_of_place(module: nn.Module) -> nn.Module:
    copied = type(module).__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["inplace"] = False
    return copied


MODULES: dict[type[nn.Module], Callable[[fx.Node, Any, str], Operation]] = {
    nn.Conv2d: _convolution,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.BatchNorm2d: _batch_norm,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout2d,
}
FUNCTIONS: dict[Any, Callable[[fx.Node, str], Operation]] = {
    F.max_pool2d: _max_pool_call,
    torch.max_pool2d: _max_pool_call,
    F.avg_pool2d: _avg_pool_call,
    torch._C._nn.avg_pool2d: _avg_pool_call,
    torch.cat: _concatenation,
    torch.concat: _concatenation,
    F.dropout: _functional_dropout,
    F.dropout2d: _functional_dropout,
}
