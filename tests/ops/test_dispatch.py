"""What PyTorch asks of every operator: opcheck, compile, export, ``.out`` overloads, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from splitkern import ops

from .cases import make

ROWS, OUT_ROWS = [0, 4, 9], [0, 2, 5]
COLS, OUT_COLS = [0, 3, 8], [0, 2, 4]
WINDOW = ([2, 2], [1, 1], [1, 1])  # stride, padding, dilation
BOUNDS = (ROWS, COLS, OUT_ROWS, OUT_COLS)
SHAPE, OUT_SHAPE, WEIGHT = (2, 4, 9, 8), (2, 4, 5, 4), (4, 2, 3, 3)


def samples(layout: str = "nchw") -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator as the dispatcher sees them; float64, no gradients recorded."""
    x, y = make(SHAPE, layout=layout), make(OUT_SHAPE, layout=layout, seed=1)
    w, b = make(WEIGHT, seed=2), make((4,), seed=3)
    mean, invstd = make((4, 4), seed=4), make((4, 4), seed=5).abs()
    pool = ([3, 3], *WINDOW, *BOUNDS)
    average = ([3, 3], *WINDOW[:2], True, None, *BOUNDS)
    offsets = torch.ops.splitkern.patch_max_pool2d(x, *pool)[1]
    norm, patches = (x, mean, invstd, b, b), (ROWS, COLS)
    return {
        "patch_conv2d": (x, w, b, *WINDOW, 2, *BOUNDS, "relu"),
        "patch_conv2d_input_grad": (y, w, list(SHAPE), *WINDOW, 2, *BOUNDS),
        "patch_conv2d_weight_grad": (y, x, list(WEIGHT), *WINDOW, 2, *BOUNDS),
        "patch_max_pool2d": (x, *pool),
        "patch_max_pool2d_backward": (y, offsets, list(SHAPE), *pool),
        "patch_max_pool2d_gather": (x, offsets, *pool),
        "patch_avg_pool2d": (x, *average),
        "patch_avg_pool2d_backward": (y, list(SHAPE), *average),
        "patch_batch_norm": (x, b, b, *patches, 1e-5, "relu"),
        "patch_batch_norm_stats": (x, *patches),
        "patch_batch_norm_apply": (*norm, *patches, "relu"),
        "patch_batch_norm_backward_reduce": (x, *norm, *patches, "relu"),
        "patch_batch_norm_backward_apply": (x, *norm, mean, mean, *patches, "relu"),
    }


NAMES = list(samples())
NOT_DIFFERENTIABLE = ("patch_batch_norm_backward_reduce", "patch_batch_norm_backward_apply")


def overload(name: str, kind: str = "default") -> Any:
    return getattr(getattr(torch.ops.splitkern, name), kind)


def returned(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    result = overload(name)(*arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def out_arguments(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*arguments, False) if name == "patch_conv2d_weight_grad" else arguments


def output_names(name: str) -> list[str]:
    schema = overload(name, "out")._schema
    return [argument.name for argument in schema.arguments if argument.alias_info is not None]


def strided_like(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A parent full of 7 and a view of it shaped as ``tensor``, no axis contiguous."""
    parent = torch.full([2 * extent + 3 for extent in tensor.shape], 7, dtype=tensor.dtype)
    return parent, parent[tuple(slice(2, 2 + 2 * extent, 2) for extent in tensor.shape)]


# --- opcheck --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "gradients"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, layout: str, gradients: bool) -> None:
    arguments = samples(layout)[name]
    if gradients:
        if name in NOT_DIFFERENTIABLE:
            assert all(not value.requires_grad for value in arguments if isinstance(value, Tensor))
            return
        arguments = tuple(
            value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in arguments
        )
    torch.library.opcheck(overload(name), arguments)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_out(name: str) -> None:
    arguments = samples()[name]
    outputs = [strided_like(tensor)[1] for tensor in returned(name, arguments)]
    given = dict(zip(output_names(name), outputs, strict=True))
    torch.library.opcheck(overload(name, "out"), out_arguments(name, arguments), given)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_shapes_types_and_strides_of_the_results(name: str, layout: str) -> None:
    """opcheck does not compare strides."""
    arguments = samples(layout)[name]
    wanted = returned(name, arguments)
    fakes = returned(name, tuple(value.to("meta") if isinstance(value, Tensor) else value for value in arguments))
    for fake, tensor in zip(fakes, wanted, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (tensor.shape, tensor.dtype, tensor.stride())


def test_every_operator_of_the_library_is_sampled() -> None:
    defined = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("splitkern::")}
    copies = ("offload", "prefetch", "offload_compressed", "prefetch_compressed")  # in test_copy_ops.py
    whole = ("split_forward", "split_untraced")  # composite; in tests/memory/test_dynamo.py
    assert defined == {f"splitkern::{name}" for name in (*NAMES, *copies, *whole)}


# --- .out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("name", NAMES)
def test_out_writes_a_strided_view_and_nothing_else(name: str, layout: str) -> None:
    arguments = samples(layout)[name]
    wanted = returned(name, arguments)
    parents, views = zip(*(strided_like(tensor) for tensor in wanted), strict=True)
    versions = [view._version for view in views]
    given = dict(zip(output_names(name), views, strict=True))
    assert overload(name, "out")(*out_arguments(name, arguments), **given) is None
    for parent, view, tensor, version in zip(parents, views, wanted, versions, strict=True):
        torch.testing.assert_close(view, tensor, rtol=1e-12, atol=1e-12)
        assert view._version > version
        view.fill_(7)
        assert (parent == 7).all(), "written outside the view"


@pytest.mark.parametrize("name", NAMES)
def test_out_is_refused_where_gradients_are_recorded(name: str) -> None:
    arguments = samples()[name]
    wanted = returned(name, arguments)
    given = dict(zip(output_names(name), (torch.empty_like(tensor) for tensor in wanted), strict=True))
    first = next(i for i, value in enumerate(arguments) if isinstance(value, Tensor))
    recorded = (*arguments[:first], arguments[first].detach().requires_grad_(), *arguments[first + 1 :])
    with pytest.raises(RuntimeError, match=f"splitkern::{name}: output must not be given"):
        overload(name, "out")(*out_arguments(name, recorded), **given)
    with torch.no_grad():
        overload(name, "out")(*out_arguments(name, recorded), **given)
    with torch.inference_mode():
        overload(name, "out")(*out_arguments(name, arguments), **given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["shape", "type"])
def test_out_of_another_shape_or_type_is_refused(name: str, fault: str) -> None:
    arguments = samples()[name]
    wanted = returned(name, arguments)
    names = output_names(name)
    for position, argument in enumerate(names):
        outputs = [torch.empty_like(tensor) for tensor in wanted]
        if fault == "shape":
            outputs[position] = outputs[position][:, :, :-1] if outputs[position].dim() == 4 else outputs[position][:-1]
        else:
            outputs[position] = outputs[position].to(torch.float32)
        with pytest.raises(RuntimeError, match=rf"splitkern::{name}: {argument} must (have|be)"):
            overload(name, "out")(*out_arguments(name, arguments), **dict(zip(names, outputs, strict=True)))


def test_wrappers_return_the_output_they_are_given() -> None:
    x, w = make(SHAPE), make(WEIGHT)
    y = torch.empty(2, 4, 7, 6, dtype=torch.float64)
    assert ops.patch_conv2d(x, w, groups=2, output=y) is y
    pooled = torch.empty(2, 4, 4, 4, dtype=torch.float64)
    offsets = torch.empty(2, 4, 4, 4, dtype=torch.uint8)
    values = ops.patch_max_pool2d(x, 2, output=(pooled, offsets))
    assert values[0] is pooled
    assert values[1] is offsets
    assert ops.patch_avg_pool2d(x, 2, output=pooled) is pooled
    statistics = (torch.empty(1, 4, dtype=torch.float64), torch.empty(1, 4, dtype=torch.float64))
    assert ops.patch_batch_norm_stats(x, output=statistics)[1] is statistics[1]
    assert ops.patch_batch_norm_apply(x, *statistics, output=x) is x


# --- torch.compile and torch.export ---------------------------------------------------------------


def _bounds(x: Tensor, row: int) -> dict[str, Any]:
    """3×3, stride 2, padding 1, cut at an output row that is itself an argument."""
    return {"in_rows": (0, 2 * row, x.shape[2]), "out_rows": (0, row, (x.shape[2] - 1) // 2 + 1)}


def _conv(x: Tensor, w: Tensor, row: int) -> Tensor:
    return ops.patch_conv2d(x, w, stride=2, padding=1, groups=2, activation="relu", **_bounds(x, row))


def _max_pool(x: Tensor, w: Tensor, row: int) -> Tensor:
    values, offsets = ops.patch_max_pool2d(x, 3, stride=2, padding=1, **_bounds(x, row))
    return values * offsets


def _avg_pool(x: Tensor, w: Tensor, row: int) -> Tensor:
    return ops.patch_avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False, **_bounds(x, row))


def _batch_norm(x: Tensor, w: Tensor, row: int) -> Tensor:
    result = ops.patch_batch_norm(x, w[0, 0].flatten()[:4], None, rows=(0, row, x.shape[2]), activation="relu")
    return result.output + result.mean.sum() + result.m2.sum()


def _statistics_and_apply(x: Tensor, w: Tensor, row: int) -> Tensor:
    rows = (0, row, x.shape[2])
    mean, m2 = ops.patch_batch_norm_stats(x, rows=rows)
    return ops.patch_batch_norm_apply(x, mean, (m2 + 1).rsqrt(), rows=rows)


def _unsplit(x: Tensor, w: Tensor, row: int) -> Tensor:
    y = ops.patch_conv2d(x, w, padding=(1, 0), groups=2)
    return ops.patch_avg_pool2d(ops.patch_max_pool2d(y, 3, stride=2)[0], 2) * row


def _ceil_mode(x: Tensor, w: Tensor, row: int) -> Tensor:
    return ops.patch_max_pool2d(x, 2, ceil_mode=True)[0] + ops.patch_avg_pool2d(x, 2, ceil_mode=True)


def _gradients(x: Tensor, w: Tensor, row: int) -> Tensor:
    y = _conv(x, w, row)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2, **_bounds(x, row)}
    options |= {"in_cols": (0, x.shape[3]), "out_cols": (0, y.shape[3])}
    wide = ops.patch_conv2d_input_grad(y, w, x.shape, **options)
    return wide.sum() + ops.patch_conv2d_weight_grad(y, wide, w.shape, **options)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "conv": _conv,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "statistics_and_apply": _statistics_and_apply,
    "unsplit": _unsplit,
    "gradients": _gradients,
}


COMPILED = FUNCTIONS | {"ceil_mode": _ceil_mode}


@pytest.mark.parametrize("function", COMPILED.values(), ids=COMPILED.keys())
def test_compile_fullgraph_dynamic(function: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for size, row in (((5, 4, 17, 13), 6), ((6, 4, 21, 14), 7), ((6, 4, 21, 14), 10)):
        x, w = make(size).requires_grad_(), make(WEIGHT, seed=1).requires_grad_()
        came, wanted = compiled(x, w, row), function(x, w, row)
        torch.testing.assert_close(came, wanted)
        g = make(wanted.shape, seed=2)
        came_g = torch.autograd.grad(came, (x, w), g, allow_unused=True)
        torch.testing.assert_close(came_g, torch.autograd.grad(wanted, (x, w), g, allow_unused=True))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1], "recompiled for another size or boundary"


def test_compile_writes_through_out() -> None:
    torch._dynamo.reset()
    x, w, joined = make(SHAPE), make(WEIGHT, seed=1), torch.zeros(2, 4, 7, 12, dtype=torch.float64)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def write(joined: Tensor) -> Tensor:
        with torch.no_grad():
            ops.patch_conv2d(x, w, groups=2, output=joined[..., 6:])
        return joined.sum()

    total = write(joined)
    wanted = ops.patch_conv2d(x, w, groups=2)
    torch.testing.assert_close(joined[..., 6:], wanted)
    torch.testing.assert_close(total, wanted.sum())


class _Exported(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.function(x, w, 3)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_export(function: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    w = make(WEIGHT, seed=1)
    axes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=9, max=512)}
    program = torch.export.export(_Exported(function), (make((2, 4, 11, 9)), w), dynamic_shapes=(axes, None))
    assert any("splitkern" in str(node.target) for node in program.graph.nodes)
    for size in ((2, 4, 11, 9), (3, 4, 14, 9)):
        x = make(size, seed=3)
        torch.testing.assert_close(program.module()(x, w), function(x, w, 3))


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_explicit_casts(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"padding": 1, "in_rows": (0, 4, 9), "out_rows": (0, 4, 9)}
    leaves = [make(shape, torch.float32).requires_grad_() for shape in ((2, 2, 9, 8), (4, 2, 3, 3), (4,))]
    with torch.autocast("cpu", dtype):
        came = ops.patch_conv2d(*leaves, **options)
    wanted = ops.patch_conv2d(*(tensor.to(dtype) for tensor in leaves), **options)
    assert came.dtype == dtype
    assert torch.equal(came, wanted)
    g = make(came.shape, dtype, seed=1)
    for one, other in zip(torch.autograd.grad(came, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_autocast_leaves_float64_and_disabled_regions_alone() -> None:
    x, w = make((2, 2, 9, 8)), make((4, 2, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.patch_conv2d(x, w).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert ops.patch_conv2d(x.float(), w.float()).dtype == torch.float32
    assert ops.patch_conv2d(x.float(), w.float()).dtype == torch.float32


def test_autocast_mixes_types() -> None:
    x, w = make((2, 2, 9, 8), torch.bfloat16), make((4, 2, 3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.patch_conv2d(x, w), ops.patch_conv2d(x, w.bfloat16()))


def test_autocast_out_takes_the_autocast_type() -> None:
    x, w = make((2, 2, 9, 8), torch.float32), make((4, 2, 3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.patch_conv2d(x, w, output=torch.empty(2, 4, 7, 6, dtype=torch.bfloat16))
        assert torch.equal(y, ops.patch_conv2d(x, w))
        with pytest.raises(TypeError, match="output must have input's type bfloat16, got float32"):
            ops.patch_conv2d(x, w, output=torch.empty(2, 4, 7, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_pooling_and_batch_norm_in_the_inputs_type(dtype: torch.dtype) -> None:
    x = make((2, 2, 8, 8), dtype)
    w = torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.patch_max_pool2d(x, 2)[0].dtype == dtype
        assert ops.patch_avg_pool2d(x, 2).dtype == dtype
        result = ops.patch_batch_norm(x, w, w)
        assert result.output.dtype == dtype
        assert result.mean.dtype == torch.float32
        assert ops.patch_batch_norm_apply(x, result.mean, result.invstd, w, w).dtype == dtype


def test_backward_inside_autocast_keeps_the_forwards_type() -> None:
    x, w = make((2, 2, 9, 8), torch.float32).requires_grad_(), make((4, 2, 3, 3), torch.float32).requires_grad_()

    def second_order() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(ops.patch_conv2d(x, w).square().sum(), (x, w), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return (*first, *torch.autograd.grad(penalty, (x, w)))

    wanted = second_order()
    with torch.autocast("cpu", enabled=False):
        y = ops.patch_conv2d(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        came = (*first, *torch.autograd.grad(penalty, (x, w)))
    for one, other in zip(came, wanted, strict=True):
        assert torch.equal(one, other)


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    x, w = make((2, 4, 11, 9), torch.float32), make(WEIGHT, torch.float32)

    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _conv(x, w, 3)

    came = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")(x, w)
    assert came.dtype == torch.bfloat16
    assert torch.equal(came, function(x, w))
