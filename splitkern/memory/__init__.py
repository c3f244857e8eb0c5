"""Memory of a training step: what is live when."""

from splitkern.memory.live_bytes import LiveBytes, Sample

__all__ = ["LiveBytes", "Sample"]
