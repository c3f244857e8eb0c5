"""Memory of a training step: what is live when, and the plans that `torch.compile` runs."""

from typing import TYPE_CHECKING, Any

from splitkern.memory.live_bytes import LiveBytes, Sample

if TYPE_CHECKING:
    from splitkern.memory.dynamo import PlannedGraph, plans

__all__ = ["LiveBytes", "PlannedGraph", "Sample", "plans"]


def __getattr__(name: str) -> Any:
    # Not imported with the package: importing it tells the split that graphs are made for the planner.
    if name in ("PlannedGraph", "plans"):
        from splitkern.memory import dynamo

        return getattr(dynamo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
