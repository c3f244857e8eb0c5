"""offload, prefetch and their compressed forms on the CPU: bytes, layouts, refusals, and what PyTorch asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from splitkern import ops
from tests.kernel_checks import copies as checks
from tests.kernel_checks.copies import DTYPES, EXPANDED, LAYOUTS, Copies

NAMES = [*LAYOUTS, *EXPANDED]
COMPRESSED = ("offload_compressed", "prefetch_compressed")


@pytest.fixture(scope="module")
def copies() -> Copies:
    return Copies(torch.ops.splitkern)


def buffer_for(tensor: Tensor) -> Tensor:
    return torch.zeros(ops.compressed_bytes(tensor), dtype=torch.uint8)


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_plain_copies(copies: Copies, name: str, dtype: torch.dtype) -> None:
    checks.plain(copies, name, dtype, "auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compressed_copies(copies: Copies, name: str, dtype: torch.dtype) -> None:
    checks.compressed(copies, name, dtype)


@pytest.mark.parametrize("zeros", [0.0, 0.03, 0.97, 1.0])
def test_few_and_many_zeros(copies: Copies, zeros: float) -> None:
    checks.compressed(copies, "three chunks and a bit", torch.bfloat16, zeros)


def test_every_16_bit_pattern(copies: Copies) -> None:
    checks.every_16_bit_pattern(copies)


def test_special_floats(copies: Copies) -> None:
    checks.special_floats(copies)


def test_large_copies_use_several_threads(copies: Copies) -> None:
    source = checks.values(1_000_003, torch.bfloat16, 0.5)
    checks.round_trip(copies, source)
    checks.round_trip(copies, source[:1_000_000].reshape(1000, 1000).t())


def test_half_zeros_cross_in_so_many_fewer_bytes() -> None:
    x = checks.values(1 << 16, torch.bfloat16, 0.5)
    buffer = ops.offload_compressed(x, buffer_for(x))
    moved = ops.bytes_on_link(buffer)
    kept = int((x.view(torch.int16) != 0).sum())
    assert moved - 128 - 2**16 // 8 == pytest.approx(2 * kept, abs=15 * 32)
    assert 1.7 < 2 * x.numel() / moved < 1.85
    assert ops.bytes_on_link(ops.offload_compressed(torch.ones(5), buffer_for(torch.ones(5)))) == 128 + 128 + 32


def test_worst_case_grows_by_the_masks_alone() -> None:
    for dtype in DTYPES:
        x = torch.ones(1 << 16).to(dtype)
        assert ops.compressed_bytes(x) == 128 + x.numel() * x.element_size() + x.numel() // 8
        assert ops.bytes_on_link(ops.offload_compressed(x, buffer_for(x))) == ops.compressed_bytes(x)


# --- Damaged buffers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "byte", [0, 7, 8, 12, 16, 25, 28, 32, 36, 40, 48, 104, 127], ids=lambda byte: f"header byte {byte}"
)
def test_foreign_header_is_refused(copies: Copies, byte: int) -> None:
    with pytest.raises(
        RuntimeError, match=r"prefetch_compressed: src must (begin with a version 1 header|hold a tensor)"
    ):
        checks.foreign_buffer(copies, checks.damage_header(byte))


def test_buffer_of_another_shape_is_named() -> None:
    buffer = ops.offload_compressed(torch.ones(4, 6), buffer_for(torch.ones(4, 6)))
    with pytest.raises(RuntimeError, match=r"dst's shape \[6, 4\] with 4 bytes an element, got \[4, 6\] with 4"):
        ops.prefetch_compressed(buffer, torch.zeros(6, 4))


def test_damaged_masks_write_nothing_outside(copies: Copies) -> None:
    checks.foreign_buffer(copies, checks.damage_everything_else)


# --- Refusals -------------------------------------------------------------------------------------

X = torch.zeros(2, 3)


@pytest.mark.parametrize("name", ["offload", "prefetch"])
@pytest.mark.parametrize(
    ("src", "dst", "kind", "text"),
    [
        (X, torch.zeros(3, 2), ValueError, r"dst must have shape \[2, 3\], got \[3, 2\]"),
        (X, torch.zeros(6), ValueError, r"dst must have shape \[2, 3\], got \[6\]"),
        (X, X.double(), TypeError, "dst must have src's type float32, got float64"),
        (X, torch.zeros(3).expand(2, 3), ValueError, r"dst must not hold one place several times, got stride 0"),
        (torch.zeros([2] * 9), torch.zeros([2] * 9), ValueError, "src must have at most 8 dimensions of more than 1"),
        (X, None, TypeError, "dst must be a Tensor, got NoneType"),
    ],
    ids=["shape", "rank", "type", "expanded", "dimensions", "none"],
)
def test_plain_refusals(name: str, src: Tensor, dst: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"splitkern::{name}: {text}"):
        getattr(ops, name)(src, dst)


def test_contiguous_dimensions_do_not_count_as_one() -> None:
    """The limit is on the shape, so that it does not depend on strides."""
    with pytest.raises(ValueError, match="at most 8 dimensions"):
        ops.offload(torch.zeros([2] * 9), torch.zeros([2] * 9))
    assert ops.offload(torch.ones([1, 2] * 5), torch.zeros([1, 2] * 5)).sum() == 32


@pytest.mark.parametrize(
    ("tensor", "buffer", "kind", "text"),
    [
        (X, torch.zeros(287, dtype=torch.uint8), ValueError, r"must have at least 288 bytes for shape \[2, 3\]"),
        (X, torch.zeros(300), TypeError, "must be of type uint8, got float32"),
        (X, torch.zeros(3, 100, dtype=torch.uint8), ValueError, "must have 1 dimension of stride 1"),
        (X, torch.zeros(600, dtype=torch.uint8)[::2], ValueError, "must have 1 dimension of stride 1"),
        (X, torch.zeros(600, dtype=torch.uint8)[8:], ValueError, "must begin at a multiple of 16 bytes"),
        (
            X.to(torch.complex128),
            torch.zeros(600, dtype=torch.uint8),
            TypeError,
            "must have elements of 1, 2, 4 or 8 bytes",
        ),
        (torch.zeros([1] * 9), torch.zeros(600, dtype=torch.uint8), ValueError, "must have at most 8 dimensions"),
    ],
    ids=["small", "type", "rank", "stride", "alignment", "element", "dimensions"],
)
def test_compressed_refusals(tensor: Tensor, buffer: Tensor, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"splitkern::offload_compressed: (src|dst) {text}"):
        ops.offload_compressed(tensor, buffer)
    with pytest.raises(kind, match=f"splitkern::prefetch_compressed: (src|dst) {text}"):
        ops.prefetch_compressed(buffer, tensor)


def test_native_checks_say_the_same() -> None:
    """Without the wrappers, the library itself refuses."""
    native = torch.ops.splitkern
    with pytest.raises(RuntimeError, match=r"splitkern::offload: dst must have src's shape \[2, 3\], got \[3, 2\]"):
        native.offload(X, torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match="splitkern::prefetch: dst must have src's type Float, got Double"):
        native.prefetch(X, X.double())
    with pytest.raises(RuntimeError, match="splitkern::offload_compressed: dst must have at least 288 bytes"):
        native.offload_compressed(X, torch.zeros(287, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="splitkern::prefetch: by must be 'auto', 'engine' or 'kernel', got 'dma'"):
        native.prefetch.by(X, X.clone(), by="dma")


def test_by_is_checked() -> None:
    for name in ("offload", "prefetch"):
        with pytest.raises(ValueError, match=f"splitkern::{name}: by must be 'auto', 'engine' or 'kernel', got 'dma'"):
            getattr(ops, name)(X, X.clone(), by="dma")
        for by in ("engine", "kernel"):
            target = torch.ones(2, 3)
            assert getattr(ops, name)(X, target, by=by) is target
            assert (target == 0).all()


def test_sizes_of_elements_that_cannot_be_compressed() -> None:
    with pytest.raises(TypeError, match=r"must have elements of 1, 2, 4 or 8 bytes, got torch\.complex128"):
        ops.compressed_bytes(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="must begin with a version 1 header"):
        ops.bytes_on_link(torch.zeros(200, dtype=torch.uint8))


# --- Autograd, opcheck, compile -------------------------------------------------------------------


def samples() -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).relu()
    patch = x[:, :, 1:4, 1:]
    buffer = ops.offload_compressed(patch, buffer_for(patch))
    return {
        "offload": (patch, torch.zeros(patch.shape)),
        "prefetch": (torch.ones(patch.shape), patch),
        "offload_compressed": (patch, torch.zeros_like(buffer)),
        "prefetch_compressed": (buffer, torch.zeros(patch.shape)),
    }


OVERLOADS = [*((name, "default") for name in samples()), ("offload", "by"), ("prefetch", "by")]


@pytest.mark.parametrize(("name", "kind"), OVERLOADS)
def test_opcheck(name: str, kind: str) -> None:
    options = {"by": "kernel"} if kind == "by" else {}
    torch.library.opcheck(getattr(getattr(torch.ops.splitkern, name), kind), samples()[name], options)


@pytest.mark.parametrize(("name", "kind"), OVERLOADS)
def test_gradients_are_refused(name: str, kind: str) -> None:
    options = {"by": "kernel"} if kind == "by" else {}
    overload = getattr(getattr(torch.ops.splitkern, name), kind)
    src, dst = samples()[name]
    position = 0 if src.is_floating_point() else 1
    recorded = [src, dst]
    recorded[position] = recorded[position].detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"splitkern::{name}: src and dst must not require grad"):
        overload(*recorded, **options)
    with torch.no_grad():
        overload(*recorded, **options)
    with torch.inference_mode():
        overload(src, torch.zeros_like(dst), **options)


@pytest.mark.parametrize("name", list(samples()))
def test_dst_moves_to_a_new_version(name: str) -> None:
    src, dst = samples()[name]
    version = dst._version
    getattr(ops, name)(src, dst)
    assert dst._version > version


def test_compiles_whole() -> None:
    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        host = ops.offload(x, torch.empty(x.shape))
        buffer = ops.offload_compressed(x, torch.zeros(ops.compressed_bytes(x), dtype=torch.uint8))
        return ops.prefetch(host, torch.empty_like(x)), ops.prefetch_compressed(buffer, torch.empty_like(x))

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="aot_eager")
    for extent in (5, 9):
        x = torch.randn(3, extent).relu()
        for back in compiled(x):
            assert torch.equal(back, x)


def test_fakes_check_shapes() -> None:
    with pytest.raises(ValueError, match=r"splitkern::offload: dst must have shape \[2, 3\], got \[3, 2\]"):
        torch.ops.splitkern.offload(X.to("meta"), torch.zeros(3, 2, device="meta"))
    with pytest.raises(ValueError, match="must have at least 288 bytes"):
        torch.ops.splitkern.offload_compressed(X.to("meta"), torch.zeros(10, dtype=torch.uint8, device="meta"))


def test_fakes_of_gpu_and_host_tensors_mix() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, host = torch.empty(2, 3, device="cuda"), torch.empty(2, 3)
        assert ops.prefetch(ops.offload(x, host), x) is x


@pytest.mark.large
def test_more_than_2_31_elements(copies: Copies) -> None:
    x = torch.zeros(2**31 + 4097, dtype=torch.uint8)
    x[[5, 2**31 - 1, 2**31, -1]] = 7
    checks.round_trip(copies, x)
