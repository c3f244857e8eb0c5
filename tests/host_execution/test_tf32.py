"""fp32 convolutions round to tf32 only where the registered query, PyTorch's setting, allows it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from splitkern import _library
from tests.kernel_checks.comparisons import Operators

WINDOW = [[1, 1], [1, 1], [1, 1], 1, [0, 2, 4], [0, 4], [0, 2, 4], [0, 4]]


class Query:
    """Stands for PyTorch's setting and counts how often it is read."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> int:
        self.times += 1
        return 1


@pytest.fixture
def query(host_library: Path) -> Iterator[Query]:
    setter = ctypes.CDLL(str(host_library)).splitkern_set_tf32_query
    answer = Query()
    callback = _library._Tf32Query(answer)
    setter(callback)
    yield answer
    setter(None)


def run_all(operators: Operators, dtype: torch.dtype) -> None:
    ops = operators.namespace
    image, weight = torch.ones(1, 2, 4, 4, dtype=dtype), torch.ones(3, 2, 3, 3, dtype=dtype)
    output = ops.patch_conv2d(image, weight, None, *WINDOW, "none")
    ops.patch_conv2d_input_grad(output, weight, [1, 2, 4, 4], *WINDOW)
    ops.patch_conv2d_weight_grad(output, image, [3, 2, 3, 3], *WINDOW)


def test_each_fp32_convolution_asks_once(operators: Operators, query: Query) -> None:
    run_all(operators, torch.float32)
    assert query.times == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types_do_not_ask(operators: Operators, query: Query, dtype: torch.dtype) -> None:
    run_all(operators, dtype)
    assert query.times == 0


@pytest.fixture
def settings() -> Iterator[None]:
    yield
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, in both its old and its new names
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        (lambda: None, 1),
        (lambda: setattr(torch.backends.cudnn, "allow_tf32", False), 0),
        (lambda: setattr(torch.backends.cudnn, "allow_tf32", True), 1),
        (lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"), 0),
        (lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"), 1),
    ],
    ids=["default", "allow_tf32 off", "allow_tf32 on", "ieee", "tf32"],
)
def test_the_package_reads_either_way_of_setting_it(change: Callable[[], None], allowed: int) -> None:
    change()
    assert _library._allows_tf32() == allowed


def test_inside_the_context_manager_of_cudnn() -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert _library._allows_tf32() == 0
    assert _library._allows_tf32() == 1
