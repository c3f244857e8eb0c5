# ruff: noqa: E501 - the table below reads by the line
"""Every refused argument: the error names operator, argument, rule and what came, in Python and in the library."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from splitkern import ops
from splitkern.ops import avg_pool, batch_norm, conv, max_pool

from .cases import make


@dataclass(frozen=True)
class Refusal:
    """A wrapper call on tensors that ``place`` puts on a device, and the error that it must raise."""

    name: str
    error: type[Exception]
    message: str
    call: Callable[[Callable[[Tensor], Tensor]], Any]
    #: the native library sees the same call (its error is a RuntimeError of the same text)
    native: bool = True

    def __str__(self) -> str:
        return self.name


HEIGHT, WIDTH = 9, 8


def _conv(place: Callable[[Tensor], Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "input": place(make((2, 4, HEIGHT, WIDTH), torch.float32)),
        "weight": place(make((6, 2, 3, 3), torch.float32)),
        "bias": place(make((6,), torch.float32)),
        "padding": 1,
        "groups": 2,
        "in_rows": [0, 4, 9],
        "in_cols": [0, 8],
        "out_rows": [0, 4, 9],
        "out_cols": [0, 8],
    }
    return ops.patch_conv2d(**(arguments | _placed(place, changes)))


def _input_grad(place: Callable[[Tensor], Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "grad_output": place(make((2, 6, HEIGHT, WIDTH), torch.float32)),
        "weight": place(make((6, 2, 3, 3), torch.float32)),
        "input_size": (2, 4, 9, 8),
        "padding": 1,
        "groups": 2,
        "in_rows": [0, 4, 9],
        "in_cols": [0, 8],
        "out_rows": [0, 4, 9],
        "out_cols": [0, 8],
    }
    return ops.patch_conv2d_input_grad(**(arguments | _placed(place, changes)))


def _weight_grad(place: Callable[[Tensor], Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "grad_output": place(make((2, 6, HEIGHT, WIDTH), torch.float32)),
        "input": place(make((2, 4, HEIGHT, WIDTH), torch.float32)),
        "weight_size": (6, 2, 3, 3),
        "padding": 1,
        "groups": 2,
        "in_rows": [0, 4, 9],
        "in_cols": [0, 8],
        "out_rows": [0, 4, 9],
        "out_cols": [0, 8],
    }
    return ops.patch_conv2d_weight_grad(**(arguments | _placed(place, changes)))


def _pool(function: Callable[..., Any], place: Callable[[Tensor], Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "input": place(make((2, 4, HEIGHT, WIDTH), torch.float32)),
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "in_rows": [0, 4, 9],
        "in_cols": [0, 8],
        "out_rows": [0, 4, 9],
        "out_cols": [0, 8],
    }
    return function(**(arguments | _placed(place, changes)))


def _max_backward(place: Callable[[Tensor], Tensor], gather: bool = False, **changes: Any) -> Any:
    grad_output = place(make((2, 4, HEIGHT, WIDTH), torch.float32))
    arguments: dict[str, Any] = {
        "offsets": torch.zeros_like(grad_output, dtype=torch.uint8),
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "in_rows": [0, 4, 9],
        "in_cols": [0, 8],
        "out_rows": [0, 4, 9],
        "out_cols": [0, 8],
    }
    if gather:
        return ops.patch_max_pool2d_gather(grad_output, **(arguments | _placed(place, changes)))
    arguments |= {"grad_output": grad_output, "input_size": (2, 4, 9, 8)}
    return ops.patch_max_pool2d_backward(**(arguments | _placed(place, changes)))


def _avg_backward(place: Callable[[Tensor], Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "grad_output": place(make((2, 4, HEIGHT, WIDTH), torch.float32)),
        "input_size": (2, 4, 9, 8),
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "in_rows": [0, 4, 9],
        "in_cols": [0, 8],
        "out_rows": [0, 4, 9],
        "out_cols": [0, 8],
    }
    return ops.patch_avg_pool2d_backward(**(arguments | _placed(place, changes)))


def _norm(function: Callable[..., Any], place: Callable[[Tensor], Tensor], **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "input": place(make((2, 4, HEIGHT, WIDTH), torch.float32)),
        "rows": [0, 4, 9],
        "cols": [0, 8],
    }
    if function is not ops.patch_batch_norm_stats:
        arguments |= {"weight": place(torch.ones(4)), "bias": place(torch.ones(4)), "activation": "none"}
    if function not in (ops.patch_batch_norm, ops.patch_batch_norm_stats):
        arguments |= {"mean": place(torch.ones(2, 4)), "invstd": place(torch.ones(2, 4))}
    if "backward" in function.__name__:
        arguments |= {"grad_output": place(make((2, 4, HEIGHT, WIDTH), torch.float32))}
    return function(**(arguments | _placed(place, changes)))


def _placed(place: Callable[[Tensor], Tensor], changes: dict[str, Any]) -> dict[str, Any]:
    """Tensors in ``changes`` go where the others are, unless wrapped in a list to stay as they are."""

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return place(value)
        if isinstance(value, tuple):
            return tuple(placed(item) for item in value)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return value[0]
        return value

    return {name: placed(value) for name, value in changes.items()}


def refusals() -> list[Refusal]:
    def conv2d(name: str, error: type[Exception], message: str, native: bool = True, **changes: Any) -> Refusal:
        return Refusal(
            f"conv2d_{name}",
            error,
            f"splitkern::patch_conv2d: {message}",
            lambda place: _conv(place, **changes),
            native,
        )

    def pool2d(
        kind: str, name: str, error: type[Exception], message: str, native: bool = True, **changes: Any
    ) -> Refusal:
        function = getattr(ops, f"patch_{kind}_pool2d")
        full = f"splitkern::patch_{kind}_pool2d: {message}"
        return Refusal(f"{kind}_pool2d_{name}", error, full, lambda place: _pool(function, place, **changes), native)

    def other(
        operator: str,
        build: Callable[..., Any],
        name: str,
        error: type[Exception],
        message: str,
        native: bool = True,
        **changes: Any,
    ) -> Refusal:
        full = f"splitkern::{operator}: {message}"
        return Refusal(f"{operator}_{name}", error, full, lambda place: build(place, **changes), native)

    def norm(
        name: str, what: str, error: type[Exception], message: str, native: bool = True, **changes: Any
    ) -> Refusal:
        function = getattr(ops, name)
        return other(name, lambda place, **c: _norm(function, place, **c), what, error, message, native, **changes)

    value, kind = ValueError, TypeError
    image = make((2, 4, HEIGHT, WIDTH), torch.float32)
    wide = {"in_cols": [0, 8], "out_cols": [0, 8]}
    found = [
        # boundaries
        conv2d("not_increasing", value, "in_rows must increase strictly, got [0, 4, 4, 9]", in_rows=[0, 4, 4, 9], out_rows=[0, 1, 4, 9]),
        conv2d("decreasing", value, "out_rows must increase strictly, got [0, 10, 9]", out_rows=[0, 10, 9]),
        conv2d("not_from_0", value, "in_rows must begin at 0, got [1, 4, 9]", in_rows=[1, 4, 9]),
        conv2d("not_to_the_end", value, "in_rows must end at the input height 9, got [0, 4, 8]", in_rows=[0, 4, 8]),
        conv2d("columns_not_to_the_end", value, "in_cols must end at the input width 8, got [0, 9]", in_cols=[0, 9]),
        conv2d("different_lengths", value, "in_rows and out_rows must have the same length, got [0, 4, 9] and [0, 9]", out_rows=[0, 9]),
        conv2d("one_boundary", value, "in_rows must hold at least 2 boundaries, got [0]", in_rows=[0], out_rows=[0]),
        conv2d("no_boundary", value, "in_cols must hold at least 2 boundaries, got []", in_cols=[], out_cols=[]),
        conv2d("bounds_of_floats", kind, "in_rows must hold integers, got [0, 4.5, 9]", False, in_rows=[0, 4.5, 9]),
        conv2d("bounds_half_given", value, "in_rows and out_rows must be given together or not at all, got [0, 4, 9] and None", False, out_rows=None),
        # window
        conv2d("zero_stride", value, "stride must be at least 1, got [0, 0]", stride=[0, 0]),
        conv2d("zero_dilation", value, "dilation must be at least 1, got [1, 0]", dilation=[1, 0]),
        conv2d("three_strides", value, "stride must hold 2 values, got [1, 1, 1]", stride=[1, 1, 1]),
        conv2d("text_stride", kind, "stride must be a list of integers, got str", False, stride="same"),
        conv2d("absurd_padding", value, "window positions along rows must stay within 2147483647, got", padding=[2**31, 0]),
        conv2d("absurd_stride", value, "window positions along cols must stay within 2147483647, got", stride=[1, 2**62]),
        conv2d("absurd_dilation", value, "window positions along rows must stay within 2147483647, got", dilation=[2**40, 1]),
        conv2d("too_small_without_bounds", value, "rows: Window: the effective kernel 23 must fit the padded input extent 11", False,
               dilation=11, in_rows=None, out_rows=None),
        conv2d("empty_image", value, "input must have a height and width of at least 1, got shape [2, 4, 0, 8]", False,
               input=torch.empty(2, 4, 0, 8), in_rows=None, out_rows=None),
        # channels and groups
        conv2d("groups_do_not_divide", value, "groups must divide the input channels 4, got 3", groups=3),
        conv2d("groups_do_not_divide_outputs", value, "groups must divide the output channels 5, got 2", weight=torch.ones(5, 2, 3, 3), bias=None),
        conv2d("zero_groups", value, "groups must be an integer of at least 1, got 0", groups=0),
        conv2d("channels", value, "weight must have 2 input channels per group (input channels 4, groups 2), got shape [6, 3, 3, 3]", weight=torch.ones(6, 3, 3, 3)),
        conv2d("bias_length", value, "bias must have shape [6], got [5]", bias=torch.ones(5)),
        conv2d("empty_kernel", value, "kernel_size must be at least 1, got [0, 3]", weight=torch.ones(6, 2, 0, 3)),
        # tensors
        conv2d("three_dimensions", value, "input must have 4 dimensions, got shape [4, 9, 8]", input=image[0]),
        conv2d("weight_dimensions", value, "weight must have 4 dimensions, got shape [6, 2, 3]", weight=torch.ones(6, 2, 3)),
        conv2d("integers", kind, "input must be of type float64, float32, float16, bfloat16, got int64", input=image.long()),
        conv2d("complex", kind, "input must be of type float64, float32, float16, bfloat16, got complex64", False, input=image.to(torch.complex64)),
        conv2d("mixed_types", kind, "weight must have input's type float32, got float64", weight=make((6, 2, 3, 3))),
        conv2d("mixed_bias", kind, "bias must have input's type float32, got bfloat16", bias=torch.ones(6, dtype=torch.bfloat16)),
        conv2d("no_tensor", kind, "input must be a Tensor, got list", False, input=[[1.0]]),
        conv2d("activation", value, "activation must be 'none' or 'relu', got 'gelu'", activation="gelu"),
        conv2d("output_shape", value, "output must have shape [2, 6, 9, 8], got [2, 6, 9, 7]", output=torch.empty(2, 6, 9, 7)),
        conv2d("output_type", kind, "output must", output=torch.empty(2, 6, 9, 8, dtype=torch.float64)),
        # gradients of the convolution
        other("patch_conv2d_input_grad", _input_grad, "extent", value, "out_rows must end at the grad_output height 9, got [0, 4, 8]", out_rows=[0, 4, 8]),
        other("patch_conv2d_input_grad", _input_grad, "size", value, "in_rows must end at the input height 10, got [0, 4, 9]", input_size=(2, 4, 10, 8)),
        other("patch_conv2d_input_grad", _input_grad, "batch", value, "grad_output must have shape [3, 6, 9, 8], got [2, 6, 9, 8]", input_size=(3, 4, 9, 8)),
        other("patch_conv2d_input_grad", _input_grad, "sizes", value, "input_size must hold 4 values, got [2, 4, 9]", input_size=[2, 4, 9]),
        other("patch_conv2d_input_grad", _input_grad, "negative", value, "input_size must not be negative, got [-2, 4, 9, 8]", input_size=[-2, 4, 9, 8]),
        other("patch_conv2d_input_grad", _input_grad, "type", kind, "weight must have grad_output's type float32, got float64", weight=make((6, 2, 3, 3))),
        other("patch_conv2d_weight_grad", _weight_grad, "channels", value, "grad_output must have shape [2, 8, 9, 8], got [2, 6, 9, 8]", weight_size=(8, 2, 3, 3)),
        other("patch_conv2d_weight_grad", _weight_grad, "groups", value, "groups must divide the input channels 4, got 3", groups=3),
        other("patch_conv2d_weight_grad", _weight_grad, "output", value, "output must have shape [6, 2, 3, 3], got [6, 2, 3, 1]", output=torch.empty(6, 2, 3, 1)),
        other("patch_conv2d_weight_grad", _weight_grad, "accumulate", value, "accumulate must come with output, got output None", False, accumulate=True),
        # pooling
        pool2d("max", "window_over_255", value, "kernel_size must have at most 255 positions, got [16, 16]", kernel_size=[16, 16]),
        pool2d("max", "not_to_the_end", value, "in_rows must end at the input height 9, got [0, 4, 8]", in_rows=[0, 4, 8]),
        pool2d("max", "zero_kernel", value, "kernel_size must be at least 1, got [0, 3]", kernel_size=[0, 3]),
        pool2d("max", "integers", kind, "input must be of type float64, float32, float16, bfloat16, got int32", input=image.int()),
        pool2d("max", "offsets_type", kind, "offsets must be of type uint8, got int64", output=(torch.empty(2, 4, 9, 8), torch.empty(2, 4, 9, 8, dtype=torch.long))),
        pool2d("avg", "zero_divisor", value, "divisor_override must not be 0, got 0", divisor_override=0),
        pool2d("avg", "divisor_of_a_float", kind, "divisor_override must be an integer or None, got float", False, divisor_override=2.5),
        pool2d("avg", "not_increasing", value, "out_rows must increase strictly, got [0, 9, 9]", out_rows=[0, 9, 9], **wide),
        pool2d("avg", "absurd_padding", value, "window positions along cols must stay within 2147483647, got", padding=[0, -(2**31)]),
        other("patch_max_pool2d_backward", _max_backward, "offsets_type", kind, "offsets must be of type uint8, got float32", offsets=torch.zeros(2, 4, 9, 8)),
        other("patch_max_pool2d_backward", _max_backward, "offsets_shape", value, "offsets must have shape [2, 4, 9, 8], got [2, 4, 9, 7]", offsets=torch.zeros(2, 4, 9, 7, dtype=torch.uint8)),
        other("patch_max_pool2d_backward", _max_backward, "channels", value, "grad_output must have shape [2, 5, 9, 8], got [2, 4, 9, 8]", input_size=(2, 5, 9, 8)),
        other("patch_max_pool2d_gather", lambda place, **c: _max_backward(place, gather=True, **c), "offsets", value,
              "offsets must have shape [2, 4, 9, 8], got [1, 4, 9, 8]", offsets=torch.zeros(1, 4, 9, 8, dtype=torch.uint8)),
        other("patch_avg_pool2d_backward", _avg_backward, "extent", value, "out_cols must end at the grad_output width 8, got [0, 7]", out_cols=[0, 7]),
        other("patch_avg_pool2d_backward", _avg_backward, "divisor", value, "divisor_override must not be 0, got 0", divisor_override=0),
        # batch norm
        norm("patch_batch_norm", "rows", value, "rows must end at the input height 9, got [0, 4, 8]", rows=[0, 4, 8]),
        norm("patch_batch_norm", "weight_length", value, "weight must have shape [4], got [5]", weight=torch.ones(5)),
        norm("patch_batch_norm", "weight_type", kind, "weight must be of type float32", weight=torch.ones(4, dtype=torch.float16)),
        norm("patch_batch_norm", "eps", value, "eps must not be negative, got -1", eps=-1.0),
        norm("patch_batch_norm", "eps_nan", value, "eps must not be negative, got nan", eps=float("nan")),
        norm("patch_batch_norm", "activation", value, "activation must be 'none' or 'relu', got 'tanh'", activation="tanh"),
        norm("patch_batch_norm", "integers", kind, "input must be of type float64, float32, float16, bfloat16, got int64", input=image.long()),
        norm("patch_batch_norm_stats", "cols", value, "cols must begin at 0, got [1, 8]", cols=[1, 8]),
        norm("patch_batch_norm_stats", "output", value, "m2 must have shape [2, 4], got [1, 4]", output=(torch.empty(2, 4), torch.empty(1, 4))),
        norm("patch_batch_norm_apply", "mean_shape", value, "mean must have shape [2, 4], got [1, 4]", mean=torch.ones(1, 4)),
        norm("patch_batch_norm_apply", "invstd_type", kind, "invstd must be of type float32, got float64", invstd=torch.ones(2, 4, dtype=torch.float64)),
        norm("patch_batch_norm_apply", "activation", value, "activation must be 'none' or 'relu', got ''", activation=""),
        norm("patch_batch_norm_backward_reduce", "shape", value, "grad_output must have shape [2, 4, 9, 8], got [2, 4, 9, 7]", grad_output=torch.ones(2, 4, 9, 7)),
        norm("patch_batch_norm_backward_reduce", "type", kind, "grad_output must have input's type float32, got float64", grad_output=image.double()),
        norm("patch_batch_norm_backward_apply", "one_sum", value, "sum_grad and sum_grad_centered must be given together or not at all, got only sum_grad", sum_grad=torch.ones(2, 4)),
        norm("patch_batch_norm_backward_apply", "sum_shape", value, "sum_grad_centered must have shape [2, 4], got [2, 3]", sum_grad=torch.ones(2, 4), sum_grad_centered=torch.ones(2, 3)),
    ]  # fmt: skip
    return found


REFUSALS = refusals()


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_python_refuses(refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match=re.escape(refusal.message)):
        refusal.call(lambda tensor: tensor)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_tracing_refuses(refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match=re.escape(refusal.message)):
        refusal.call(lambda tensor: tensor.to("meta"))


@pytest.mark.parametrize("refusal", [refusal for refusal in REFUSALS if refusal.native], ids=str)
def test_the_library_refuses_by_itself(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_python(overload: Any, check: Any, *args: Any, **kwargs: Any) -> Any:
        return overload(*args, **kwargs)

    for module in (conv, max_pool, avg_pool, batch_norm):
        monkeypatch.setattr(module, "call", without_python)
    with pytest.raises(RuntimeError, match=re.escape(refusal.message)):
        refusal.call(lambda tensor: tensor)


def test_valid_calls_of_the_table_work() -> None:
    """The calls above fail for the changed argument alone."""
    for place in (lambda tensor: tensor, lambda tensor: tensor.to("meta")):
        for call in (_conv, _input_grad, _weight_grad, _max_backward, _avg_backward):
            call(place)
        _max_backward(place, gather=True)
        for function in (ops.patch_max_pool2d, ops.patch_avg_pool2d):
            _pool(function, place)
        for name in ("", "_stats", "_apply", "_backward_reduce", "_backward_apply"):
            _norm(getattr(ops, f"patch_batch_norm{name}"), place)


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [
        (_conv, "weight", torch.empty(6, 2, 3, 3, device="meta")),
        (_conv, "bias", torch.empty(6, device="meta")),
        (_conv, "output", torch.empty(2, 6, 9, 8, device="meta")),
        (_input_grad, "weight", torch.empty(6, 2, 3, 3, device="meta")),
        (_weight_grad, "input", torch.empty(2, 4, 9, 8, device="meta")),
        (_max_backward, "offsets", torch.empty(2, 4, 9, 8, device="meta", dtype=torch.uint8)),
        (lambda place, **c: _norm(ops.patch_batch_norm, place, **c), "weight", torch.empty(4, device="meta")),
        (lambda place, **c: _norm(ops.patch_batch_norm_apply, place, **c), "mean", torch.empty(2, 4, device="meta")),
        (lambda place, **c: _norm(ops.patch_batch_norm_backward_apply, place, **c), "grad_output",
         torch.empty(2, 4, 9, 8, device="meta")),
    ],
    ids=["conv_weight", "conv_bias", "conv_output", "input_grad", "weight_grad", "max_backward", "norm", "apply", "backward_apply"],
)  # fmt: skip
def test_devices_must_agree(call: Callable[..., Any], argument: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must be on \w+'s device cpu, got meta"):
        call(lambda tensor: tensor, **{argument: [value]})


def test_a_valid_call_pays_for_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checked although nothing failed")

    for name in ("check_axes", "check_tensor", "check_like", "check_shape"):
        monkeypatch.setattr(conv, name, unexpected)
    _conv(lambda tensor: tensor)


def test_errors_of_other_kinds_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(conv, "_forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        _conv(lambda tensor: tensor)


def test_compile_reports_the_refusal() -> None:
    torch._dynamo.reset()
    x, w = make((1, 4, 9, 8)), make((4, 4, 3, 3))
    compiled = torch.compile(
        lambda x, w: ops.patch_conv2d(x, w, padding=1, in_rows=(0, 4, 8), out_rows=(0, 4, 9)),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match="in_rows must end at the input height 9"):
        compiled(x, w)


def test_an_output_that_holds_one_place_several_times_is_refused() -> None:
    output = torch.zeros(1).expand(1, 4, 8, 8)
    window = [[1, 1], [0, 0], [1, 1], 1, [0, 8], [0, 8], [0, 8], [0, 8]]
    with pytest.raises(
        RuntimeError, match="patch_conv2d: output must not hold one place several times, got stride 0 in"
    ):
        torch.ops.splitkern.patch_conv2d.out(
            torch.ones(1, 4, 8, 8), torch.ones(4, 4, 1, 1), None, *window, "none", output=output
        )
