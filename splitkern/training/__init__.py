"""Data, loop and checkpoints of `splitkern train`."""

from splitkern.training.budget import BudgetOptions
from splitkern.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from splitkern.training.data import DataError, ImageData, load_data
from splitkern.training.loop import (
    OptionsError,
    Progress,
    RunResult,
    SplitOptions,
    TrainOptions,
    default_until,
    train,
)

__all__ = [
    "BudgetOptions",
    "CheckpointError",
    "DataError",
    "ImageData",
    "OptionsError",
    "Progress",
    "RunResult",
    "SplitOptions",
    "TrainOptions",
    "default_until",
    "load_checkpoint",
    "load_data",
    "save_checkpoint",
    "train",
]
