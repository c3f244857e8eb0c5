# ruff: noqa: E501 - the tables of cases read by the line
"""Named cases and the comparison rule that the operator tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("nchw", "nhwc", "strided")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One call: the input's shape, the window's options, and the patches' boundaries."""

    name: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    in_rows: Sequence[int]
    out_rows: Sequence[int]
    in_cols: Sequence[int]
    out_cols: Sequence[int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    outputs: int = 4  # output channels of a convolution
    bounds: dict[str, Sequence[int]] = field(init=False)

    def __post_init__(self) -> None:
        names = ("in_rows", "in_cols", "out_rows", "out_cols")
        object.__setattr__(self, "bounds", {name: getattr(self, name) for name in names})

    def __str__(self) -> str:
        return self.name

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.outputs, self.shape[1] // self.groups, *self.kernel)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.shape[0], self.outputs, self.out_rows[-1], self.out_cols[-1])

    @property
    def conv(self) -> dict[str, Any]:
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return {**options, "groups": self.groups, **self.bounds}

    @property
    def max_pool(self) -> dict[str, Any]:
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return {"kernel_size": self.kernel, **options, **self.bounds}

    @property
    def avg_pool(self) -> dict[str, Any]:
        return {name: value for name, value in self.max_pool.items() if name != "dilation"}


def _case(name: str, shape: tuple[int, int, int, int], kernel: int, rows: Any, cols: Any, **options: Any) -> Case:
    for option in ("stride", "padding", "dilation"):
        if isinstance(options.get(option), int):
            options[option] = (options[option],) * 2
    return Case(name, shape, (kernel, kernel), *rows, *cols, **options)


def same(*bounds: int) -> tuple[Sequence[int], Sequence[int]]:
    """Input and output boundaries of a window operation that keeps the extent."""
    return bounds, bounds


# fmt: off
CASES = (
    _case("one_patch", (2, 4, 7, 9), 3, same(0, 7), same(0, 9), padding=1),
    _case("2x2_even", (2, 4, 8, 8), 3, same(0, 4, 8), same(0, 4, 8), padding=1),
    _case("5x3_uneven", (1, 4, 17, 13), 3, same(0, 1, 5, 9, 10, 17), same(0, 6, 7, 13), padding=1),
    _case("1x1_kernel", (2, 4, 5, 6), 1, same(0, 2, 5), same(0, 3, 6)),
    _case("1x1_image", (3, 4, 1, 1), 3, same(0, 1), same(0, 1), padding=1),
    _case("1x1_patches", (1, 4, 3, 3), 3, same(0, 1, 2, 3), same(0, 1, 2, 3), padding=1),
    _case("even_kernel", (1, 4, 9, 8), 4, ((0, 4, 9), (0, 5, 8)), ((0, 3, 8), (0, 4, 7)), padding=1),
    _case("stride_2", (2, 4, 11, 9), 3, ((0, 5, 11), (0, 3, 6)), ((0, 4, 9), (0, 2, 5)), stride=2, padding=1),
    _case("stride_3", (1, 4, 14, 15), 5, ((0, 6, 14), (0, 2, 5)), ((0, 9, 15), (0, 3, 5)), stride=3, padding=2),
    _case("stride_above_kernel", (1, 4, 11, 10), 2, ((0, 6, 11), (0, 2, 4)), ((0, 5, 10), (0, 2, 4)), stride=3, padding=1),
    _case("begin_cropped", (1, 4, 11, 10), 1, ((0, 4, 11), (0, 2, 4)), ((0, 4, 10), (0, 2, 4)), stride=3),
    _case("end_cropped", (1, 4, 12, 12), 3, ((0, 7, 12), (0, 2, 4)), ((0, 9, 12), (0, 3, 4)), stride=3),
    _case("more_begin_than_end", (1, 4, 8, 8), 5, ((0, 2, 8), (0, 4, 6)), ((0, 3, 8), (0, 5, 6)), padding=1),
    _case("dilation", (1, 4, 12, 11), 3, same(0, 5, 12), same(0, 4, 11), padding=2, dilation=2),
    _case("dilation_and_stride", (1, 4, 13, 12), 3, ((0, 6, 13), (0, 3, 6)), ((0, 7, 12), (0, 3, 5)), stride=2, padding=2, dilation=2),
    _case("negative_padding", (1, 4, 9, 9), 3, ((0, 4, 9), (0, 3, 5)), ((0, 5, 9), (0, 3, 5)), padding=-1),
    _case("outside_the_intervals", (1, 4, 9, 9), 3, ((0, 8, 9), (0, 2, 9)), ((0, 1, 9), (0, 8, 9)), padding=1),
    _case("window_sees_nothing", (1, 4, 12, 12), 3, ((0, 1, 12), (0, 9, 12)), ((0, 11, 12), (0, 3, 12)), padding=1),
    Case("unequal_axes", (2, 4, 10, 9), (3, 2), (0, 4, 10), (0, 2, 5), (0, 9), (0, 8), (2, 1), (1, 0), (1, 1)),
    _case("batch_1_odd", (1, 4, 7, 5), 3, same(0, 3, 7), same(0, 2, 5), padding=1),
    _case("empty_batch", (0, 4, 8, 8), 3, same(0, 4, 8), same(0, 4, 8), padding=1),
)
CONV_CASES = (
    *CASES,
    _case("groups", (2, 6, 8, 8), 3, same(0, 4, 8), same(0, 4, 8), padding=1, groups=3, outputs=6),
    _case("depthwise", (2, 4, 8, 8), 3, same(0, 4, 8), same(0, 3, 8), padding=1, groups=4),
    _case("depthwise_multiplier", (1, 3, 9, 8), 3, ((0, 5, 9), (0, 2, 4)), ((0, 4, 8), (0, 2, 4)), stride=2, groups=3, outputs=6),
    _case("one_channel", (2, 1, 9, 9), 3, same(0, 4, 9), same(0, 4, 9), padding=1, outputs=1),
)
# fmt: on


def by_name(*names: str) -> list[Case]:
    """The cases of these names."""
    found = {case.name: case for case in CONV_CASES}
    return [found[name] for name in names]


def make(shape: Sequence[int], dtype: torch.dtype = torch.float64, layout: str = "nchw", seed: int = 0) -> Tensor:
    """Reproducible normal values; "strided" is a view into a larger tensor, no axis contiguous."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = values.to(dtype)
    if layout == "nhwc":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        n, c, h, w = shape
        parent = torch.full((n + 1, c + 2, h + 3, 2 * w + 3), float("nan"), dtype=dtype)
        view = parent[1:, 1 : c + 1, 2 : h + 2, 1 : 2 * w + 1 : 2]
        view.copy_(values)
        return view
    return values


def relative_error(came: Tensor, exact: Tensor) -> float:
    """Relative L2 error; absolute where the exact result is zero."""
    size = exact.double().norm().item()
    return (came.double() - exact.double()).norm().item() / (size or 1.0)


def assert_accurate(came: Tensor, exact: Tensor, pytorch: Tensor, reduction: int, what: str = "output") -> None:
    """The project's rule: error at most twice PyTorch's in the same type, plus √K · 2⁻²⁴."""
    assert came.shape == exact.shape
    assert came.dtype == pytorch.dtype
    if came.numel() == 0:
        return
    assert torch.equal(came.isfinite(), exact.isfinite()), f"{what}: other elements are finite"
    finite = exact.isfinite()
    assert torch.equal(came[~finite].double(), exact[~finite].double())
    came, exact, pytorch = came[finite], exact[finite], pytorch[finite]
    if came.numel() == 0:
        return
    error, allowed = relative_error(came, exact), 2 * relative_error(pytorch, exact) + math.sqrt(reduction) * 2.0**-24
    if came.dtype == torch.float64:
        allowed = min(allowed, 1e-12)
    largest = (came.double() - exact.double()).abs().max().item()
    assert error <= allowed, (
        f"{what}: relative L2 error {error:.3g} over {allowed:.3g}, largest element error {largest:.3g}"
    )


def assert_format_of(came: Tensor, like: Tensor) -> None:
    """Outputs take over the input's memory format."""
    if like.stride(1) == 1 and not like.is_contiguous():
        assert came.is_contiguous(memory_format=torch.channels_last), came.stride()
    else:
        assert came.is_contiguous(), came.stride()


def gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """Gradients of ``function`` at detached copies of ``tensors`` (strides are kept)."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, grad_output))


class CalledOperators(TorchDispatchMode):
    """Names of the splitkern operators that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "splitkern":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


class SavedBytes:
    """Bytes of the distinct storages that autograd saves inside, apart from the given tensors'."""

    def __init__(self, *apart: Tensor) -> None:
        self.apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self.storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.apart:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    @property
    def total(self) -> int:
        return sum(self.storages.values())
