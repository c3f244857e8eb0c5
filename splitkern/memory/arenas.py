"""The memory that a plan's offsets count from, and tensors in it."""

from __future__ import annotations

import torch
from torch import Tensor

from splitkern.memory.capture import CapturedTensor
from splitkern.memory.report import bytes_text

_ALIGNMENT_BYTES = 512


class Arenas:
    """A device arena and a host arena.

    Args:
        device_bytes, host_bytes: sizes.
        device: of the step.

    Raises:
        RuntimeError: the device or pinned host memory cannot be had; the text says what to do.
    """

    def __init__(self, device_bytes: int, host_bytes: int, device: torch.device) -> None:
        self.device = _arena(device_bytes, device)
        pinned = device.type == "cuda"
        try:
            self.host = _arena(host_bytes, torch.device("cpu"), pinned=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"{bytes_text(host_bytes)} of {kind} for what is offloaded cannot be had: {reason}; "
                "give a smaller host_budget, or close what holds host memory"
            ) from error
        self._typed: dict[torch.dtype, Tensor] = {}
        self._stream = current_stream(device)

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


def _arena(size_bytes: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Bytes at an aligned address."""
    whole = torch.empty(size_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
    skipped = -whole.data_ptr() % _ALIGNMENT_BYTES
    return whole[skipped : skipped + size_bytes]
