"""The memory that a plan's offsets count from, and tensors in it."""

from __future__ import annotations

import torch
from torch import Tensor

from splitkern import _core
from splitkern.memory.capture import CapturedTensor
from splitkern.memory.report import bytes_text

_ALIGNMENT_BYTES = 512


class _Blocks:
    """An upstream of the pool: its blocks are tensors of PyTorch's allocator."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._device, self._pinned = device, pinned
        self._tensors: dict[int, Tensor] = {}
        #: Why there was no memory.
        self.failure: Exception | None = None

    def allocate(self, size_bytes: int, alignment_bytes: int) -> int:
        size_bytes += alignment_bytes
        try:
            tensor = torch.empty(size_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        except Exception as error:
            self.failure = error
            raise
        address = -(-tensor.data_ptr() // alignment_bytes) * alignment_bytes
        self._tensors[address] = tensor
        return address

    def free(self, address: int, size_bytes: int) -> None:
        del self._tensors[address]

    def view(self, arena: _core.Arena) -> Tensor:
        """The bytes of an arena that is a block of its own."""
        tensor = self._tensors[arena.base]
        skipped = arena.base - tensor.data_ptr()
        return tensor[skipped : skipped + arena.size_bytes]


def _reserve(size_bytes: int, device: torch.device, *, pinned: bool = False) -> tuple[_core.Arena, Tensor]:
    """An arena of a pool over PyTorch's allocator, and its bytes; the pool lives as long as the arena."""
    blocks = _Blocks(device, pinned=pinned)
    # Streams are ordered by `Arenas.follow`: the block is given back as a tensor of PyTorch's.
    pool = _core.Pool.from_functions(blocks.allocate, blocks.free, limit_bytes=max(size_bytes, 1) + _ALIGNMENT_BYTES)
    try:
        arena = pool.reserve(max(size_bytes, 1))
    except _core.OutOfMemory as error:
        raise blocks.failure or error from None
    return arena, blocks.view(arena)[:size_bytes]


class Arenas:
    """A device arena and a host arena, each all of a pool whose upstream is PyTorch's allocator.

    Attributes:
        device, host: their bytes.

    Args:
        device_bytes, host_bytes: sizes.
        device: of the step.

    Raises:
        RuntimeError: the device or pinned host memory cannot be had; the text says what to do.
    """

    def __init__(self, device_bytes: int, host_bytes: int, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what measuring the step has left there would lie beside the arena
        self._device_arena, self.device = _reserve(device_bytes, device)
        pinned = device.type == "cuda"
        try:
            self._host_arena, self.host = _reserve(host_bytes, torch.device("cpu"), pinned=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"{bytes_text(host_bytes)} of {kind} for what is offloaded cannot be had: {reason}; "
                "give a smaller host_budget, or close what holds host memory"
            ) from error
        self._typed: dict[torch.dtype, Tensor] = {}
        self._stream = current_stream(device)

    def touch(self, view: Tensor) -> None:
        """Notes that a step uses a tensor of the device arena."""
        if view.numel():
            last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
            self._device_arena.touch(view.data_ptr() - self._device_arena.base, (last + 1) * view.element_size())

    @property
    def touched_bytes(self) -> int:
        """Behind the last byte of the device arena that was touched since the last `reset_touched`."""
        return int(self._device_arena.touched_bytes)

    def reset_touched(self) -> None:
        """Forgets what was touched."""
        self._device_arena.reset_touched()

    def view(self, tensor: CapturedTensor, offset_bytes: int) -> Tensor:
        """A tensor of the step whose storage begins so many bytes behind the start of the device arena."""
        item = tensor.element_bytes
        typed = self._typed.get(tensor.dtype)
        if typed is None:
            typed = self._typed[tensor.dtype] = self.device[: self.device.numel() // item * item].view(tensor.dtype)
        offset = typed.storage_offset() + (offset_bytes + tensor.offset_bytes) // item
        return typed.as_strided(tensor.sizes, tensor.strides, offset)

    def follow(self, stream: torch.cuda.Stream | None) -> None:
        """Moves to another stream, behind all that was launched on the one before, whichever executor did.

        Args:
            stream: of the step that begins; None on the CPU.
        """
        if stream is None or stream == self._stream:
            return
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self.device.record_stream(stream)
        self._stream = stream


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The caller's stream; None on the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
