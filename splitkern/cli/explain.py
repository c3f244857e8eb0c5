"""`splitkern doctor --explain "conv2d ..."`: which kernels a call would take, and why not the faster ones.

Convolution, pooling, batch norm and copies. The native library answers from plain numbers, so neither a GPU nor a
tensor is needed; the shape is read here.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitkern._library import build_info
from splitkern.cli.common import UserError
from splitkern.geometry import AxisNode, Bounds, Window, even_bounds, propagate
from splitkern.ops.copy import explain_copy

PASSES = ("forward", "input_grad", "weight_grad")
LAYER_PASSES = {
    "max_pool2d": ("forward", "backward"),
    "avg_pool2d": ("forward", "backward"),
    "batch_norm": ("stats", "apply", "backward_reduce", "backward_apply"),
    "copy": ("offload", "prefetch"),  # of one patch of a larger tensor
}
DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16")  # tf32: fp32 tensors where PyTorch's setting allows tf32
LAYOUTS = ("channels_last", "contiguous")
_COMMON = "[fp64|fp32|tf32|fp16|bf16] [channels_last|contiguous] [grid RxC]"
USAGE = (
    f'"conv2d NxCxHxW KxCxRxS [stride S] [padding P] [dilation D] [groups G] {_COMMON} '
    f'[pass forward|input_grad|weight_grad]", "max_pool2d|avg_pool2d NxCxHxW kernel K [stride S] [padding P] '
    f'[dilation D] {_COMMON} [pass forward|backward]" or "batch_norm|copy NxCxHxW {_COMMON}"; K, S, P and D may be '
    "ROWSxCOLUMNS"
)
_ELEMENT_TYPES = {"fp64": 0, "fp32": 1, "tf32": 1, "fp16": 2, "bf16": 3}  # kernels::ElementType
_TORCH_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in the order of kernels::ElementType
_TEXT_BYTES = 16384


@dataclass(frozen=True)
class Device:
    """What the choice of a path depends on.

    Attributes:
        name: for people.
        compute_capability: 10 * major + minor.
        multiprocessors: number of streaming multiprocessors.
        shared_memory_bytes: shared memory that one block may opt in to.
    """

    name: str
    compute_capability: int
    multiprocessors: int
    shared_memory_bytes: int


# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (shared memory per block), and
# NVIDIA's data sheets of the named GPUs (multiprocessors).
ARCHITECTURES = {
    "sm_80": Device("sm_80, as the A100", 80, 108, 163 * 1024),
    "sm_86": Device("sm_86, as the RTX A6000", 86, 84, 99 * 1024),
    "sm_89": Device("sm_89, as the L40S", 89, 142, 99 * 1024),
    "sm_90": Device("sm_90, as the H100 and H200 SXM", 90, 132, 227 * 1024),
    "sm_100": Device("sm_100, as the B200", 100, 148, 227 * 1024),
    "sm_120": Device("sm_120, as the RTX 5090", 120, 170, 99 * 1024),
}


@dataclass(frozen=True)
class ConvShape:
    """A convolution as the text of `--explain` gives it; sizes as in PyTorch, pairs are (rows, columns)."""

    input_size: tuple[int, int, int, int]
    weight_size: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "bf16"
    layout: str = "channels_last"
    grid: tuple[int, int] = (1, 1)
    passes: tuple[str, ...] = PASSES


@dataclass(frozen=True)
class LayerShape:
    """Another operator as the text of `--explain` gives it, one of `LAYER_PASSES`; a window where it has one."""

    operator: str
    input_size: tuple[int, int, int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: str = "bf16"
    layout: str = "channels_last"
    grid: tuple[int, int] = (1, 1)
    passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The path of one pass.

    Attributes:
        operation: "forward", "input_grad" or "weight_grad" of a convolution, else one of `LAYER_PASSES`.
        path: name of the path.
        reason: why this one and, for each one preferred to it, why not.
        workspace_bytes: device memory that the call takes beside its tensors.
    """

    operation: str
    path: str
    reason: str
    workspace_bytes: int


def parse(text: str) -> ConvShape | LayerShape:
    """Reads the text of `--explain`.

    Raises:
        UserError: naming the word that is wrong and what is allowed there.

    Example:
        >>> parse("conv2d 32x64x56x56 128x64x3x3 stride 2 padding 1 grid 2x2").stride
        (2, 2)
    """
    words = text.split()
    operator = words[0] if words else ""
    if operator not in ("conv2d", *LAYER_PASSES):
        known = ", ".join(("conv2d", *LAYER_PASSES))
        raise UserError(f"--explain must begin with one of {known}, got {text!r}; the form is {USAGE}")
    names = ("input", "weight") if operator == "conv2d" else ("input",)
    if len(words) < 1 + len(names):
        raise UserError(
            f"--explain: {operator} needs the size of {' and '.join(names)}, got {text!r}; the form is {USAGE}"
        )
    found: dict[str, Any] = {}
    for name, word in zip(names, words[1:], strict=False):
        size = _whole_numbers(f"the {name} size", word, 4, 4)
        if math.prod(size) >= 2**62:  # strides are computed in 64 bits
            raise UserError(f"--explain: the {name} must hold fewer than 2^62 elements, got {word}")
        found[f"{name}_size"] = size
    given = _options(text, words[1 + len(names) :], operator)
    if operator == "conv2d":
        shape = ConvShape(**found, **given)
        channels, outputs = shape.input_size[1], shape.weight_size[0]
        if channels != shape.weight_size[1] * shape.groups or outputs % shape.groups:
            raise UserError(
                f"--explain: the weight must be K x C / groups x R x S with C = {channels}, groups = {shape.groups} "
                f"and K a multiple of the groups, got {'x'.join(map(str, shape.weight_size))}"
            )
        return shape
    if operator in ("max_pool2d", "avg_pool2d"):
        if "kernel" not in given:
            raise UserError(f"--explain: {operator} needs a kernel, got {text!r}; the form is {USAGE}")
        given.setdefault("stride", given["kernel"])  # PyTorch's default
    given.setdefault("passes", LAYER_PASSES[operator])
    return LayerShape(operator, **found, **given)


def _options(text: str, words: Sequence[str], operator: str) -> dict[str, Any]:
    """The words behind the sizes: types and layouts alone, the others with a value."""
    passes = PASSES if operator == "conv2d" else LAYER_PASSES[operator]
    window = ("stride", "padding", "dilation")
    own = {"conv2d": (*window, "groups"), "max_pool2d": (*window, "kernel"), "avg_pool2d": (*window, "kernel")}
    found: dict[str, Any] = {}

    def put(name: str, value: object) -> None:
        if name in found:
            raise UserError(f"--explain: {name} is given twice in {text!r}")
        found[name] = value

    rest = iter(words)
    for word in rest:
        if word in DTYPES:
            put("dtype", word)
        elif word in LAYOUTS:
            put("layout", word)
        elif word in (*own.get(operator, ()), "grid", "pass"):
            value = next(rest, None)
            if value is None:
                raise UserError(f"--explain: {word} needs a value, and {text!r} ends there")
            if word == "pass":
                if value not in passes:
                    raise UserError(f"--explain: pass must be one of {', '.join(passes)}, got {value!r}")
                put("passes", (value,))
            elif word == "groups":
                put(word, _whole_numbers(word, value, 1, 1)[0])
            else:
                minimum = 0 if word == "padding" else 1
                numbers = _whole_numbers(word, value, 2 if word == "grid" else 1, 2, minimum)
                put(word, (numbers[0], numbers[-1]))
        else:
            raise UserError(f"--explain: {word!r} means nothing here; the form is {USAGE}")
    return found


def device_for(architecture: str | None) -> Device:
    """The device that was asked for, else the current CUDA device.

    Raises:
        UserError: for an unknown architecture, or where none is given and there is no GPU.
    """
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            raise UserError(f"--architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
        return ARCHITECTURES[architecture]
    if not torch.cuda.is_available():
        raise UserError(f"there is no GPU here: name one by --architecture, one of {', '.join(ARCHITECTURES)}")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        name=properties.name,
        compute_capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_memory_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def explain(shape: ConvShape | LayerShape, device: Device, library: Path | None = None) -> tuple[Explanation, ...]:
    """Asks the native library which kernels each pass takes.

    Args:
        shape: the convolution, or another operator.
        device: what it would run on.
        library: another file that holds the kernels; this package's library unless given.

    Raises:
        UserError: where the window does not fit the input, the grid does not fit the output, or the library was built
            without the CUDA kernels.

    Example:
        >>> explain(parse("conv2d 1x3x8x8 4x3x3x3 fp64 pass forward"), ARCHITECTURES["sm_90"])[0].path  # doctest: +SKIP
        'plain'
    """
    loaded = ctypes.CDLL(str(library or build_info().library))
    name = "splitkern_explain_conv2d" if isinstance(shape, ConvShape) else "splitkern_explain_layer"
    ask = getattr(loaded, name, None)
    if ask is None:
        raise UserError(
            "this splitkern was built without the CUDA kernels; set CUDA_HOME to a CUDA 13 toolkit and rebuild"
        )
    kernel = shape.weight_size[2:] if isinstance(shape, ConvShape) else shape.kernel
    rows, columns = (_bounds(shape, kernel[axis], axis) for axis in (0, 1))
    if isinstance(shape, LayerShape) and shape.operator == "copy":
        return _explain_copies(shape, rows[0], columns[0], library)
    common = {
        "type": _ELEMENT_TYPES[shape.dtype],
        "channels_last": shape.layout == "channels_last",
        "input_size": shape.input_size,
        "stride": shape.stride,
        "padding": shape.padding,
        "dilation": shape.dilation,
        "row_patches": shape.grid[0],
        "column_patches": shape.grid[1],
        "in_rows": _array(rows[0]),
        "out_rows": _array(rows[1]),
        "in_columns": _array(columns[0]),
        "out_columns": _array(columns[1]),
    }
    found = []
    for operation in shape.passes:
        question: ctypes.Structure
        if isinstance(shape, ConvShape):
            question = _ConvQuestion(
                pass_=PASSES.index(operation),
                allow_tf32=shape.dtype == "tf32",
                compute_capability=device.compute_capability,
                multiprocessors=device.multiprocessors,
                shared_memory_bytes=device.shared_memory_bytes,
                groups=shape.groups,
                weight_size=shape.weight_size,
                **common,
            )
        else:
            question = _LayerQuestion(
                operation=list(LAYER_PASSES).index(shape.operator),
                pass_=LAYER_PASSES[shape.operator].index(operation),
                kernel=shape.kernel,
                **common,
            )
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        failed = ask(ctypes.byref(question), text, ctypes.c_int64(_TEXT_BYTES))
        answer = text.value.decode(errors="replace")
        if failed:
            raise UserError(f"--explain: {answer}")
        path, workspace, reason = answer.split("\n", 2)
        found.append(Explanation(operation, path, reason, int(workspace)))
    return tuple(found)


def _explain_copies(shape: LayerShape, rows: Bounds, columns: Bounds, library: Path | None) -> tuple[Explanation, ...]:
    """The first patch of the tensor on the device, dense on the host; only strides count, so nothing is allocated."""
    dtype = _TORCH_DTYPES[_ELEMENT_TYPES[shape.dtype]]
    format = torch.channels_last if shape.layout == "channels_last" else torch.contiguous_format
    whole = torch.empty(shape.input_size, dtype=dtype, device="meta", memory_format=format)
    patch = whole[:, :, : rows[1], : columns[1]]
    host = torch.empty(patch.shape, dtype=dtype, device="meta", memory_format=format)
    answer = explain_copy(patch, host, library=library)
    return tuple(Explanation(operation, answer.split(":")[0], answer, 0) for operation in shape.passes)


def conv_paths(library: Path | None = None) -> tuple[str, ...]:
    """Names of the paths that the library holds, the most preferred first; empty for a CPU-only build."""
    names = getattr(ctypes.CDLL(str(library or build_info().library)), "splitkern_conv_paths", None)
    if names is None:
        return ()
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split())


_PATCH_FIELDS = (
    ("row_patches", ctypes.c_int64),
    ("column_patches", ctypes.c_int64),
    ("in_rows", ctypes.POINTER(ctypes.c_int64)),
    ("out_rows", ctypes.POINTER(ctypes.c_int64)),
    ("in_columns", ctypes.POINTER(ctypes.c_int64)),
    ("out_columns", ctypes.POINTER(ctypes.c_int64)),
)


class _ConvQuestion(ctypes.Structure):
    """SplitkernConvQuestion of csrc/ops/cuda/explain.h."""

    _fields_ = [
        ("pass_", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("allow_tf32", ctypes.c_int32),
        ("compute_capability", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_memory_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("input_size", ctypes.c_int64 * 4),
        ("weight_size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        *_PATCH_FIELDS,
    ]


class _LayerQuestion(ctypes.Structure):
    """SplitkernLayerQuestion of csrc/ops/cuda/explain.h."""

    _fields_ = [
        ("operation", ctypes.c_int32),
        ("pass_", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("input_size", ctypes.c_int64 * 4),
        ("kernel", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        *_PATCH_FIELDS,
    ]


def _array(bounds: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(bounds))(*bounds)


def _bounds(shape: ConvShape | LayerShape, kernel: int, axis: int) -> tuple[Bounds, Bounds]:
    """Input and output boundaries of one axis: even at the output, carried to the input."""
    extent, parts = shape.input_size[2 + axis], shape.grid[axis]
    window = Window(kernel, shape.stride[axis], shape.padding[axis], shape.dilation[axis])
    try:
        outputs = even_bounds(window.output_extent(extent), parts)
        nodes = [AxisNode("output", ("input",), window)]
        found = propagate(nodes, {"input": extent, "output": outputs[-1]}, {"output": outputs})
    except ValueError as error:
        raise UserError(f"--explain: {('rows', 'columns')[axis]}: {error}") from None
    return found["input"], outputs


def _whole_numbers(name: str, word: str, least: int, most: int, minimum: int = 1) -> tuple[int, ...]:
    """Reads 2 or 2x3: from `least` to `most` numbers, each at least `minimum` and of nine digits at most."""
    parts = word.lower().split("x")
    if not least <= len(parts) <= most or not all(
        re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= minimum for part in parts
    ):
        form = {(4, 4): "four whole numbers such as 32x64x56x56", (2, 2): "two whole numbers such as 2x2"}.get(
            (least, most), "one whole number" if most == 1 else "one or two whole numbers such as 2 or 2x1"
        )
        raise UserError(f"--explain: {name} must be {form}, each at least {minimum} and below 10^9, got {word!r}")
    return tuple(map(int, parts))
