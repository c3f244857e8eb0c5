"""Models, machine description and statistics that the benchmarks share."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float

    def text(self) -> str:
        """median [lower, upper]."""
        return f"{self.median:.3f} [{self.lower:.3f}, {self.upper:.3f}]"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of at least one value."""
    if len(values) < 2:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code, without anything that tells one machine from its like."""
    from splitkern import __version__

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "splitkern": __version__,
    }


def commit() -> str | None:
    """The commit of the checkout that the package runs from, "-dirty" if changed; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def prefix(model: nn.Module, until: str) -> nn.Module:
    """The part of a VGG or ResNet up to and including `until`, as a chain that keeps the names of its modules.

    Args:
        model: a torchvision VGG or ResNet.
        until: "features.N" of a VGG, a top-level module before the average pooling of a ResNet.

    Raises:
        ValueError: for a module that doesn't end such a part.
    """
    head, _, index = until.partition(".")
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential):
        if head != "features" or not index.isdigit() or int(index) >= len(features):
            raise ValueError(f"until must be features.0 to features.{len(features) - 1}, got {until!r}")
        return nn.Sequential(OrderedDict(features=features[: int(index) + 1]))
    names = [name for name, _ in model.named_children() if name not in ("avgpool", "fc")]
    if until not in names:
        raise ValueError(f"until must be one of {', '.join(names)}, got {until!r}")
    children = dict(model.named_children())
    return nn.Sequential(OrderedDict((name, children[name]) for name in names[: names.index(until) + 1]))
