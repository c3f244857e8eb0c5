"""What every operator file shares: argument checks, output formats, and dispatcher registrations.

The checks are Python's twin of the native library's: fakes call them on every trace, wrappers only to
explain a call that has failed, so that a correct eager call pays for none of them. They accept
symbolic integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from splitkern import _library, geometry

Ints = int | Sequence[int]
Bounds = Sequence[int] | None
Registered = TypeVar("Registered", bound=Callable[..., Any])

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "relu")
MAX_WINDOW_POSITIONS = 255
MAX_POSITION = 2**31 - 1
INTEGER = (int, torch.SymInt)

# Registrations live as long as this object does; the schemas come from the native library.
_library.load()
registrations = torch.library.Library("splitkern", "FRAGMENT")  # type: ignore[no-untyped-call]


def pair(value: Ints) -> Sequence[int]:
    """An option of both axes: an integer stands for itself twice."""
    return (value, value) if isinstance(value, INTEGER) else value


def fill_bounds(
    operator: str,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    bounds: tuple[Bounds, Bounds, Bounds, Bounds],
) -> list[Sequence[int]]:
    """The four boundary lists; an axis for which the caller gave none is one patch.

    Raises:
        TypeError, ValueError: for an input that is no 4-dimensional floating tensor, a list without
            its partner, or options that leave no output.
    """
    check_tensor(operator, "input", input, 4)
    filled: list[Sequence[int]] = [(), (), (), ()]
    for axis, name in ((0, "rows"), (1, "cols")):
        incoming, outgoing = bounds[axis], bounds[axis + 2]
        if incoming is None and outgoing is None:
            extent = input.shape[2 + axis]
            if extent < 1:
                raise ValueError(
                    f"{operator}: input must have a height and width of at least 1, got shape {list(input.shape)}"
                )
            check_options(operator, kernel, stride, padding, dilation)
            window = geometry.Window(kernel[axis], stride[axis], padding[axis], dilation[axis], ceil_mode)
            try:
                incoming, outgoing = (0, extent), (0, window.output_extent(extent))
            except ValueError as error:
                raise ValueError(f"{operator}: {name}: {error}") from None
        if incoming is None or outgoing is None:
            raise ValueError(
                f"{operator}: in_{name} and out_{name} must be given together or not at all, "
                f"got {incoming} and {outgoing}"
            )
        filled[axis], filled[axis + 2] = incoming, outgoing
    return filled


def call(overload: Any, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator; if it fails for a reason that ``check`` knows, raise that instead."""
    try:
        return overload(*args, **kwargs)
    except (RuntimeError, TypeError):
        check(*args, **kwargs)
        raise


def is_channels_last(tensor: Tensor) -> bool:
    """The memory format that outputs take over: channel stride 1 and not plainly contiguous."""
    return tensor.stride(1) == 1 and not tensor.is_contiguous()


def new_like(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An output in the memory format of ``tensor``."""
    channels_last = is_channels_last(tensor)
    return torch.empty(
        list(shape),
        dtype=dtype or tensor.dtype,
        device=tensor.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(operator: str, argument: str, value: Any, dimensions: int) -> None:
    """A tensor of a supported floating type with so many dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {argument} must be a Tensor, got {type(value).__name__}")
    if value.dim() != dimensions:
        raise ValueError(f"{operator}: {argument} must have {dimensions} dimensions, got shape {list(value.shape)}")
    if value.dtype not in FLOATING:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(
            f"{operator}: {argument} must be of type {allowed}, got {str(value.dtype).removeprefix('torch.')}"
        )


def check_like(
    operator: str,
    argument: str,
    value: Any,
    like: Tensor,
    of: str,
    *dtypes: torch.dtype,
) -> None:
    """Same device as ``like`` (the argument named ``of``), and its type or one of ``dtypes``."""
    allowed = dtypes or (like.dtype,)
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        rule = f"must have {of}'s type {names}" if not dtypes else f"must be of type {names}"
        raise TypeError(f"{operator}: {argument} {rule}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != like.device:
        raise ValueError(f"{operator}: {argument} must be on {of}'s device {like.device}, got {value.device}")


def check_shape(operator: str, argument: str, value: Tensor, shape: Sequence[int]) -> None:
    """Exactly this shape."""
    if len(value.shape) != len(shape) or any(came != wanted for came, wanted in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{operator}: {argument} must have shape {list(shape)}, got {list(value.shape)}")


def check_ints(operator: str, argument: str, values: Any, count: int | None = None) -> None:
    """A list of (``count``) integers."""
    if isinstance(values, str | Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{operator}: {argument} must be a list of integers, got {type(values).__name__}")
    if any(not isinstance(value, INTEGER) for value in values):
        raise TypeError(f"{operator}: {argument} must hold integers, got {list(values)}")
    if count is not None and len(values) != count:
        raise ValueError(f"{operator}: {argument} must hold {count} values, got {list(values)}")


def check_sizes(operator: str, argument: str, sizes: Any) -> None:
    """The four extents of a tensor to make."""
    check_ints(operator, argument, sizes, 4)
    if any(size < 0 for size in sizes):
        raise ValueError(f"{operator}: {argument} must not be negative, got {list(sizes)}")


def check_activation(operator: str, activation: Any) -> None:
    """One of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: activation must be 'none' or 'relu', got {activation!r}")


def check_options(
    operator: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Window options, two integers each."""
    for argument, values in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
        check_ints(operator, argument, values, 2)
        if any(value < 1 for value in values):
            raise ValueError(f"{operator}: {argument} must be at least 1, got {list(values)}")
    check_ints(operator, "padding", padding, 2)


def check_axes(
    operator: str,
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bounds: Sequence[Sequence[int]],
    outputs: Sequence[int] | None = None,
) -> None:
    """Window options and bounds of both axes.

    Args:
        operator: name that errors begin with.
        extents: input height and width.
        kernel, stride, padding, dilation: two values each.
        bounds: in_rows, in_cols, out_rows, out_cols.
        outputs: height and width of grad_output, where the operator has one.

    Raises:
        TypeError: for values that are not integers.
        ValueError: naming argument, rule and what came.
    """
    check_options(operator, kernel, stride, padding, dilation)
    for axis, name, what in ((0, "rows", "height"), (1, "cols", "width")):
        incoming, outgoing = bounds[axis], bounds[axis + 2]
        check_ints(operator, f"in_{name}", incoming)
        check_ints(operator, f"out_{name}", outgoing)
        if len(incoming) != len(outgoing):
            raise ValueError(
                f"{operator}: in_{name} and out_{name} must have the same length, "
                f"got {list(incoming)} and {list(outgoing)}"
            )
        geometry.check_bounds(operator, f"in_{name}", incoming, extents[axis], f"input {what}")
        end = outgoing[-1] if outputs is None else outputs[axis]
        geometry.check_bounds(operator, f"out_{name}", outgoing, end, f"grad_output {what}")
        values = (outgoing[-1], stride[axis], padding[axis], dilation[axis], kernel[axis])
        if all(isinstance(value, int) for value in (*values, extents[axis])):
            _check_positions(operator, name, extents[axis], *values)


def _check_positions(
    operator: str, axis: str, extent: int, outputs: int, stride: int, padding: int, dilation: int, kernel: int
) -> None:
    farthest = max((outputs - 1) * stride + dilation * (kernel - 1) + 1, extent) + abs(padding)
    if farthest > MAX_POSITION:
        raise ValueError(
            f"{operator}: window positions along {axis} must stay within {MAX_POSITION}, got "
            f"{farthest} (stride {stride}, padding {padding}, dilation {dilation}, kernel {kernel}, "
            f"{outputs} outputs)"
        )


def check_output(
    operator: str,
    argument: str,
    value: Any,
    like: Tensor,
    of: str,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    """A tensor to write to, if one was given."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {argument} must be a Tensor, got {type(value).__name__}")
    check_shape(operator, argument, value, shape)
    check_like(operator, argument, value, like, of, *((dtype,) if dtype is not None else ()))


def register_kernel(name: str, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False) -> None:
    """Register a kernel of ``splitkern::name`` for a dispatch key."""
    registrations.impl(name, kernel, key, with_keyset=with_keyset)  # type: ignore[no-untyped-call]


def refuse_gradients(name: str) -> None:
    """Register what an ``.out`` overload does under autograd: refuse, or write without a trace.

    The written tensors' version counters move on, so that autograd notices if it had saved them.
    """
    overload = getattr(torch.ops.splitkern, name).out

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> None:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, *kwargs.values()):
            raise RuntimeError(
                f"splitkern::{name}: output must not be given where gradients are recorded, got an "
                f"input that requires grad; use torch.no_grad() or leave output out"
            )
        for tensor in kwargs.values():
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    register_kernel(f"{name}.out", kernel, "Autograd", with_keyset=True)


def register_fake(name: str) -> Callable[[Registered], Registered]:
    """Register the decorated function as the shape rule of ``splitkern::name``."""

    def register(function: Registered) -> Registered:
        torch.library.register_fake(f"splitkern::{name}", function, lib=registrations)
        return function

    return register


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the gradient formula of ``splitkern::name``.

    ``torch.library.register_autograd`` with the same arguments does the same, but parses the schema again
    in every call that records a gradient: more than half of such a call's time on the host.
    """
    overload = getattr(torch.ops.splitkern, name).default
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs, keyset = arguments[:-1], arguments[-1]
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keyset & below, *inputs)
            setup_context(ctx, inputs, output)
        return output

    def backward_of_all(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return (*backward(ctx, *gradients), None)

    title = "".join(part.capitalize() for part in name.split("_"))
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    function: Any = type(title, (torch.autograd.Function,), methods)

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & below, *arguments)

    register_kernel(name, kernel, "Autograd", with_keyset=True)
