"""Copies between device memory and pinned host memory: plain, and with zeros left out.

All four are queued on the current stream and return at once. They record no gradient: they move saved tensors, not
values of a computation.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from splitkern import _library
from splitkern.ops._common import call, check_shape, register_fake, register_kernel

_OFFLOAD = "splitkern::offload"
_PREFETCH = "splitkern::prefetch"
_OFFLOAD_COMPRESSED = "splitkern::offload_compressed"
_PREFETCH_COMPRESSED = "splitkern::prefetch_compressed"

_offload = torch.ops.splitkern.offload
_prefetch = torch.ops.splitkern.prefetch
_offload_compressed = torch.ops.splitkern.offload_compressed.default
_prefetch_compressed = torch.ops.splitkern.prefetch_compressed.default

METHODS = ("auto", "engine", "kernel")
MAX_DIMS = 8

# The compressed layout, as csrc/kernels/copy/params.h describes it.
HEADER_BYTES = 128
CHUNK_BYTES = 4096


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_tensors(operator: str, src: Any, dst: Any) -> None:
    for argument, value in (("src", src), ("dst", dst)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {argument} must be a Tensor, got {type(value).__name__}")


def _check_host(operator: str, argument: str, host: Tensor, device: Tensor) -> None:
    """Host memory, and pinned where a GPU is to reach it. Fake and meta tensors have no memory to ask about."""
    if host.is_meta or is_fake(host):
        return
    if host.device.type != "cpu":
        raise ValueError(f"{operator}: {argument} must be a host (CPU) tensor, got one on {host.device}")
    if device.is_cuda and device.numel() > 0 and not host.is_pinned():
        raise ValueError(
            f"{operator}: {argument} must be pinned host memory (tensor.pin_memory()), got pageable memory"
        )


def _check_written(operator: str, dst: Tensor) -> None:
    for dim, (extent, stride) in enumerate(zip(dst.shape, dst.stride(), strict=True)):
        if extent > 1 and stride == 0:
            raise ValueError(
                f"{operator}: dst must not hold one place several times, got stride 0 in dimension {dim} of "
                f"shape {list(dst.shape)}"
            )


def _check_copy(operator: str, src: Tensor, dst: Tensor, by: str) -> None:
    _check_tensors(operator, src, dst)
    if by not in METHODS:
        raise ValueError(f"{operator}: by must be 'auto', 'engine' or 'kernel', got {by!r}")
    if src.dtype != dst.dtype:
        raise TypeError(f"{operator}: dst must have src's type {_dtype_name(src)}, got {_dtype_name(dst)}")
    check_shape(operator, "dst", dst, src.shape)
    _check_written(operator, dst)
    if sum(extent > 1 for extent in src.shape) > MAX_DIMS:
        raise ValueError(
            f"{operator}: src must have at most {MAX_DIMS} dimensions of more than 1, got shape {list(src.shape)}"
        )


# --- offload and prefetch -------------------------------------------------------------------------


def offload(src: Tensor, dst: Tensor, *, by: str = "auto") -> Tensor:
    """Copy a device tensor to pinned host memory, on the current stream.

    Args:
        src: CUDA (or CPU) tensor of any shape, strides and element type; up to 8 dimensions of more than 1.
        dst: pinned CPU tensor of ``src``'s shape and type; any strides that name no place twice. Fastest where it is
            contiguous in ``src``'s order of dimensions. Until the stream has passed the copy, keep ``src`` unchanged,
            leave ``dst`` alone, and keep both alive.
        by: ``"auto"`` decides between a copy engine of the GPU and a kernel that writes host memory itself,
            ``"engine"`` and ``"kernel"`` force one. The bytes are the same.

    Returns:
        ``dst``.

    Raises:
        TypeError: for types that differ.
        ValueError: for shapes that differ, a ``dst`` that is not pinned host memory, or another ``by``.
        RuntimeError: where gradients are recorded and one of the tensors requires one, or where the engine is asked
            for strides that it would need more than 65,536 calls for.

    Example:
        >>> patch = torch.arange(12.0).view(3, 4)[:, 1:3]
        >>> offload(patch, torch.empty(3, 2)).tolist()
        [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]
    """
    if by == "auto":
        call(_offload.default, _explain_offload, src, dst)
    else:
        call(_offload.by, _explain_offload, src, dst, by=by)
    return dst


def prefetch(src: Tensor, dst: Tensor, *, by: str = "auto") -> Tensor:
    """Copy pinned host memory to a device tensor, on the current stream: the way back from :func:`offload`.

    Args:
        src: pinned CPU tensor, any strides.
        dst: CUDA (or CPU) tensor of ``src``'s shape and type, any strides that name no place twice; up to 8 dimensions
            of more than 1. Keep both alive, and ``src`` unchanged, until the stream has passed the copy.
        by: ``"auto"``, ``"engine"`` or ``"kernel"``, as for :func:`offload`.

    Returns:
        ``dst``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`offload`.

    Example:
        >>> parent = torch.zeros(2, 3)
        >>> prefetch(torch.tensor([1.0, 2.0]), parent[:, 1]).tolist()
        [1.0, 2.0]
    """
    if by == "auto":
        call(_prefetch.default, _explain_prefetch, src, dst)
    else:
        call(_prefetch.by, _explain_prefetch, src, dst, by=by)
    return dst


def explain_copy(device: Tensor, host: Tensor, *, library: Path | None = None) -> str:
    """Say what moves a copy between a CUDA tensor and a pinned one, and why. Needs no GPU: only strides count.

    Args:
        device: the tensor on the GPU (or one on the CPU that stands for it).
        host: the tensor in host memory, of the same shape and type.
        library: the native library to ask; by default this package's.

    Returns:
        "engine: ..." for a copy engine of the GPU, "kernel: ..." for a kernel that reaches host memory itself, or
        "cpu: ..." from a library without CUDA kernels.

    Raises:
        TypeError, ValueError: as :func:`offload`, but for pinning.

    Example:
        >>> rows = torch.empty(8, 4096)
        >>> explain_copy(rows, torch.empty(8, 4096)).split(":")[0] in ("engine", "cpu")
        True
    """
    _check_copy(_OFFLOAD, device, host, "auto")
    if device.numel() == 0:
        return "nothing to copy"
    ask = getattr(ctypes.CDLL(str(library or _library.build_info().library)), "splitkern_explain_copy", None)
    if ask is None:
        return "cpu: the library was built without CUDA kernels"
    dims = [dim for dim, extent in enumerate(device.shape) if extent > 1]
    size = device.element_size()
    values = ctypes.c_int64 * len(dims)
    text = ctypes.create_string_buffer(1024)
    ask.restype = None
    ask(
        ctypes.c_int64(size),
        ctypes.c_int64(len(dims)),
        values(*(device.shape[dim] for dim in dims)),
        values(*(host.stride(dim) * size for dim in dims)),
        values(*(device.stride(dim) * size for dim in dims)),
        text,
        ctypes.c_int64(len(text)),
    )
    return text.value.decode()


def _check_offload(src: Tensor, dst: Tensor, *, by: str = "auto") -> None:
    _check_copy(_OFFLOAD, src, dst, by)


def _check_prefetch(src: Tensor, dst: Tensor, *, by: str = "auto") -> None:
    _check_copy(_PREFETCH, src, dst, by)


def _explain_offload(src: Tensor, dst: Tensor, *, by: str = "auto") -> None:
    _check_offload(src, dst, by=by)
    _check_host(_OFFLOAD, "dst", dst, src)


def _explain_prefetch(src: Tensor, dst: Tensor, *, by: str = "auto") -> None:
    _check_prefetch(src, dst, by=by)
    _check_host(_PREFETCH, "src", src, dst)


register_fake("offload")(_check_offload)
register_fake("offload.by")(_check_offload)
register_fake("prefetch")(_check_prefetch)
register_fake("prefetch.by")(_check_prefetch)


# --- offload_compressed and prefetch_compressed ---------------------------------------------------


def compressed_bytes(tensor: Tensor) -> int:
    """Bytes that a compressed buffer of such a tensor must have, whatever its values.

    128 bytes of header, one bit per element in chunks of 4096 bytes of elements, and the elements.

    Args:
        tensor: any shape; elements of 1, 2, 4 or 8 bytes. Only its shape and type count.

    Returns:
        The size of the worst case, in bytes.

    Raises:
        TypeError: for elements of another size.

    Example:
        >>> compressed_bytes(torch.empty(2048, dtype=torch.bfloat16))
        4480
    """
    size = tensor.element_size()
    if size not in (1, 2, 4, 8):
        raise TypeError(f"splitkern: a compressed tensor must have elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    elements_bytes = tensor.numel() * size
    chunks = (elements_bytes + CHUNK_BYTES - 1) // CHUNK_BYTES
    return HEADER_BYTES + chunks * (CHUNK_BYTES // size // 8) + (elements_bytes + 15) // 16 * 16


def offload_compressed(src: Tensor, dst: Tensor) -> Tensor:
    """Copy a device tensor to pinned host memory without its zeros, losslessly, on the current stream.

    An element is left out exactly when all its bits are 0: negative zero and every NaN come back bit by bit. What
    shrinks is the time on the link; ``dst`` has the size of the worst case, so that no size ever comes back to the
    host. At half zeros, bfloat16 crosses in 1.78 times fewer bytes.

    Args:
        src: CUDA (or CPU) tensor with elements of 1, 2, 4 or 8 bytes; any strides, up to 8 dimensions.
        dst: pinned uint8 CPU tensor [at least ``compressed_bytes(src)``], stride 1, beginning at a multiple of 16
            bytes. Its layout is described in csrc/kernels/copy/params.h and carries a version.

    Returns:
        ``dst``.

    Raises:
        TypeError: for elements of another size or a ``dst`` that is not uint8.
        ValueError: for a ``dst`` that is too small, not pinned or not one run of bytes.
        RuntimeError: where gradients are recorded and ``src`` requires one.

    Example:
        >>> x = torch.tensor([0.0, -0.0, 3.0])
        >>> buffer = offload_compressed(x, torch.empty(compressed_bytes(x), dtype=torch.uint8))
        >>> prefetch_compressed(buffer, torch.empty(3)).tolist()
        [0.0, -0.0, 3.0]
    """
    call(_offload_compressed, _explain_offload_compressed, src, dst)
    return dst


def prefetch_compressed(src: Tensor, dst: Tensor) -> Tensor:
    """Bring back what :func:`offload_compressed` wrote, on the current stream.

    Args:
        src: pinned uint8 CPU tensor that :func:`offload_compressed` has filled from a tensor of ``dst``'s shape and
            element size; its first ``compressed_bytes(dst)`` bytes are read at most.
        dst: CUDA (or CPU) tensor; any strides that name no place twice. Fastest with the strides of the tensor that
            was offloaded. Whatever ``src`` holds, nothing outside ``dst`` is written. A CUDA call returns before
            ``src`` has been read, so it cannot raise for a foreign header: ``dst`` is then filled with 0xff bytes, NaN
            in every floating type.

    Returns:
        ``dst``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`offload_compressed`; RuntimeError on the CPU for a header that
            is not that of such a tensor.

    Example:
        >>> x = torch.eye(4, dtype=torch.float16)
        >>> buffer = offload_compressed(x, torch.empty(compressed_bytes(x), dtype=torch.uint8))
        >>> bool((prefetch_compressed(buffer, torch.empty_like(x)) == x).all())
        True
    """
    call(_prefetch_compressed, _explain_prefetch_compressed, src, dst)
    return dst


def bytes_on_link(buffer: Tensor) -> int:
    """Bytes that one crossing of a compressed buffer moves: header, masks, and values in multiples of 16 bytes.

    Args:
        buffer: uint8 CPU tensor that :func:`offload_compressed` has filled; the stream must have passed the copy.

    Returns:
        A number of bytes, at most ``compressed_bytes`` of the tensor.

    Raises:
        ValueError: for a buffer without a header of this version.

    Example:
        >>> x = torch.zeros(2048, dtype=torch.bfloat16)
        >>> bytes_on_link(offload_compressed(x, torch.empty(compressed_bytes(x), dtype=torch.uint8)))
        384
    """
    header = bytes(buffer[:HEADER_BYTES].tolist())
    version = int.from_bytes(header[8:12], "little")
    if header[:8] != b"SPLKZERO" or version != 1:
        raise ValueError(f"splitkern: buffer must begin with a version 1 header, got {header[:12]!r}")
    size = int.from_bytes(header[12:16], "little")
    count = int.from_bytes(header[16:24], "little")
    mask_bytes = CHUNK_BYTES // size // 8
    chunks = math.ceil(count * size / CHUNK_BYTES)
    slots = buffer[HEADER_BYTES:]
    masks = torch.as_strided(slots, (chunks, mask_bytes), (mask_bytes + CHUNK_BYTES, 1), slots.storage_offset())
    bits = sum((masks >> bit & 1).sum(dim=1) for bit in range(8))
    values_bytes = int(((bits * size + 15) // 16 * 16).sum()) if isinstance(bits, Tensor) else 0
    return HEADER_BYTES + chunks * mask_bytes + values_bytes


def _check_compressed(operator: str, device_argument: str, device: Tensor, host_argument: str, host: Tensor) -> None:
    if device.element_size() not in (1, 2, 4, 8):
        raise TypeError(
            f"{operator}: {device_argument} must have elements of 1, 2, 4 or 8 bytes, got {_dtype_name(device)}"
        )
    if device.dim() > MAX_DIMS:
        raise ValueError(
            f"{operator}: {device_argument} must have at most {MAX_DIMS} dimensions, got shape {list(device.shape)}"
        )
    if host.dtype != torch.uint8:
        raise TypeError(f"{operator}: {host_argument} must be of type uint8, got {_dtype_name(host)}")
    if host.dim() != 1 or (host.shape[0] > 1 and host.stride(0) != 1):
        raise ValueError(
            f"{operator}: {host_argument} must have 1 dimension of stride 1, got shape {list(host.shape)} and "
            f"strides {list(host.stride())}"
        )
    wanted = compressed_bytes(device)
    if host.shape[0] < wanted:
        raise ValueError(
            f"{operator}: {host_argument} must have at least {wanted} bytes for shape {list(device.shape)} of "
            f"{_dtype_name(device)}, got {host.shape[0]}"
        )


def _check_offload_compressed(src: Tensor, dst: Tensor) -> None:
    _check_tensors(_OFFLOAD_COMPRESSED, src, dst)
    _check_compressed(_OFFLOAD_COMPRESSED, "src", src, "dst", dst)


def _check_prefetch_compressed(src: Tensor, dst: Tensor) -> None:
    _check_tensors(_PREFETCH_COMPRESSED, src, dst)
    _check_compressed(_PREFETCH_COMPRESSED, "dst", dst, "src", src)
    _check_written(_PREFETCH_COMPRESSED, dst)


def _check_aligned(operator: str, argument: str, host: Tensor) -> None:
    if not (host.is_meta or is_fake(host)) and host.data_ptr() % 16 != 0:
        raise ValueError(
            f"{operator}: {argument} must begin at a multiple of 16 bytes, got storage offset {host.storage_offset()}"
        )


def _explain_offload_compressed(src: Tensor, dst: Tensor) -> None:
    _check_offload_compressed(src, dst)
    _check_host(_OFFLOAD_COMPRESSED, "dst", dst, src)
    _check_aligned(_OFFLOAD_COMPRESSED, "dst", dst)


def _explain_prefetch_compressed(src: Tensor, dst: Tensor) -> None:
    _check_prefetch_compressed(src, dst)
    _check_host(_PREFETCH_COMPRESSED, "src", src, dst)
    _check_aligned(_PREFETCH_COMPRESSED, "src", src)


register_fake("offload_compressed")(_check_offload_compressed)
register_fake("prefetch_compressed")(_check_prefetch_compressed)


# --- Gradients ------------------------------------------------------------------------------------


def _refuse_gradients(name: str) -> None:
    """What a copy does under autograd: refuse, or write without a trace."""
    operator, _, kind = name.partition(".")
    overload = getattr(getattr(torch.ops.splitkern, operator), kind or "default")

    def kernel(keyset: torch._C.DispatchKeySet, src: Tensor, dst: Tensor, **options: Any) -> None:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(src, dst):
            raise RuntimeError(
                f"splitkern::{operator}: src and dst must not require grad where gradients are recorded; copy under "
                f"torch.no_grad() or pass src.detach()"
            )
        if isinstance(dst, Tensor) and not dst.is_inference():
            torch.autograd.graph.increment_version(dst)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, src, dst, **options)

    register_kernel(name, kernel, "Autograd", with_keyset=True)


for _name in ("offload", "offload.by", "prefetch", "prefetch.by", "offload_compressed", "prefetch_compressed"):
    _refuse_gradients(_name)
