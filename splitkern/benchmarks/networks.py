"""torchvision networks as captured training steps: what `splitkern plan` and the budget study plan."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from splitkern.memory.capture import CapturedStep

CLASS_COUNT = 1000
_MAP_NORESERVE = 0x4000  # Source: Linux, include/uapi/asm-generic/mman-common.h; Python's mmap lacks it before 3.13
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class NetworkOptions:
    """A training step of a torchvision network: cross entropy over 1,000 classes.

    Attributes:
        model: "vgg11" to "vgg19_bn", "resnet18" to "resnet152".
        batch: images.
        image_size: height and width in pixels.
        grid: patches per axis; (1, 1) is the network itself, not split.
        until: last module of the split region; None as `splitkern train` chooses it.
        norm: how BatchNorm sees patches, "patch" or "frozen"; None is "patch" where there is one.
        dtype: "fp32", or "bf16" for autocast.
        memory_format: "contiguous" or "channels_last".
        device: where the step is captured.
        device_type: "cpu" or "cuda": where its operations will run.
    """

    model: str
    batch: int = 64
    image_size: int = 224
    grid: tuple[int, int] = (1, 1)
    until: str | None = None
    norm: str | None = None
    dtype: str = "fp32"
    memory_format: str = "contiguous"
    device: str = "cpu"
    device_type: str = "cuda"

    @property
    def is_split(self) -> bool:
        """Whether there is more than one patch."""
        return self.grid != (1, 1)

    @property
    def text(self) -> str:
        """For people, and as the graph's name: "resnet50, batch 64, 224x224, 4x4 until layer2, fp32"."""
        rows, columns = self.grid
        split = f"{rows}x{columns} until {self.region_end}" if self.is_split else "not split"
        return f"{self.model}, batch {self.batch}, {self.image_size}x{self.image_size}, {split}, {self.dtype}"

    @property
    def region_end(self) -> str:
        """The last module of the split region."""
        from splitkern.training import default_until

        return self.until or default_until(self.model)


def capture_network(options: NetworkOptions) -> CapturedStep:
    """Captures the training step of a network.

    Nothing is computed; parameters are random.

    Args:
        options: which.

    Returns:
        The step, named by `options.text`; its durations are 0.

    Raises:
        ValueError: for a model, split or type that there is not, and for options that do not go together.
    """
    from torch.nn.functional import cross_entropy

    from splitkern import split_
    from splitkern.memory.capture import capture
    from splitkern.training.loop import MEMORY_FORMATS, MODEL_NAMES, build_model

    if options.model not in MODEL_NAMES:
        raise ValueError(f"model must be one of {', '.join(MODEL_NAMES)}, got {options.model!r}")
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format must be one of {', '.join(MEMORY_FORMATS)}, got {options.memory_format!r}")
    if not options.is_split and (options.until is not None or options.norm is not None):
        raise ValueError("until and norm need a grid of more than one patch, such as 2x2")
    memory_format = MEMORY_FORMATS[options.memory_format]
    model = build_model(options.model, class_count=CLASS_COUNT, device=options.device)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    size = options.image_size
    images = _blank_images(options.batch, size, options.device, memory_format)
    classes = torch.zeros(options.batch, dtype=torch.int64, device=options.device)
    if options.is_split:
        has_norm = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        norm = options.norm or ("patch" if has_norm else None)
        split_(model, images[:1], grid=options.grid, until=options.region_end, order="patch", norm=norm)
    autocast = (
        torch.autocast(torch.device(options.device).type, torch.bfloat16) if options.dtype == "bf16" else nullcontext()
    )
    with autocast:
        return capture(
            model, images, loss=cross_entropy, targets=classes, device_type=options.device_type, name=options.text
        )


def _blank_images(batch: int, size: int, device: str, memory_format: torch.memory_format) -> torch.Tensor:
    """Images that take no memory on the CPU, so that a batch can be planned that only another machine holds."""
    if torch.device(device).type != "cpu":
        return torch.empty(batch, 3, size, size, device=device, memory_format=memory_format)
    size_bytes = batch * 3 * size * size * torch.float32.itemsize
    try:
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, OverflowError, ValueError):
        raise ValueError(
            f"a batch of {batch} images of {size}x{size} pixels is {size_bytes} bytes, more than can be addressed here"
        ) from None
    flat = torch.frombuffer(memory, dtype=torch.float32)
    if memory_format == torch.channels_last:
        return flat.view(batch, size, size, 3).permute(0, 3, 1, 2)
    return flat.view(batch, 3, size, size)
