"""A run small enough for tests: a few dozen digits of 32 pixels."""

from __future__ import annotations

import dataclasses

from torch.utils.data import Subset

from splitkern.training import ImageData, SplitOptions, TrainOptions, load_data

SPLIT = SplitOptions(grid=(2, 2), until="layer1", norm="patch", order="patch", recompute=True)


def small_data(image_size: int = 32) -> ImageData:
    """48 digits to train on, 40 to test on."""
    data = load_data("digits", image_size=image_size)
    return dataclasses.replace(data, train=Subset(data.train, range(48)), test=Subset(data.test, range(40)))


def small_options(split: SplitOptions | None = None, **changes: object) -> TrainOptions:
    """Three epochs of three steps."""
    options = TrainOptions(image_size=32, batch=16, epochs=3, lr=0.02, split=split)
    return dataclasses.replace(options, **changes)  # type: ignore[arg-type]
