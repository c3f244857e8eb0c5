"""Checkpoints of `splitkern train`: one file, written whole or not at all, read with `weights_only=True`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

_FORMAT = "splitkern-train"
_VERSION = 1
_TYPES: dict[str, tuple[type, ...]] = {
    "arguments": (dict,),
    "split": (dict, type(None)),
    "epoch": (int,),
    "model": (dict,),
    "optimizer": (dict,),
    "scheduler": (dict,),
    "scaler": (dict,),
    "rng": (dict,),
    "record": (dict,),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message names the file and the reason."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` holds either the old checkpoint or the new one, also after a kill.

    Args:
        path: the file.
        state: tensors, numbers, strings, and lists, tuples and dicts of them, under the keys of a training run.

    Raises:
        CheckpointError: where the file cannot be written, such as on a full disk. No part of it stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": _FORMAT, "version": _VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint {path} cannot be written: {reason}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code from it.

    Raises:
        CheckpointError: for a file that is missing, truncated or from something else.
    """
    try:
        with path.open("rb") as file:
            state = _load(path, file)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint {path} was not written by splitkern train")
    if state.get("version") != _VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {state.get('version')}, this splitkern reads version {_VERSION}"
        )
    missing = [key for key in _TYPES if key not in state]
    if missing:
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(missing)}")
    for key, types in _TYPES.items():
        if not isinstance(state[key], types):
            kind = type(state[key]).__name__
            raise CheckpointError(f"checkpoint {path} is damaged: its {key} is of type {kind}, not {types[0].__name__}")
    return state


def _load(path: Path, file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged input makes it raise many types, also OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or not a splitkern checkpoint: {reason}") from error


def describe_difference(saved: dict[str, Any], given: dict[str, Any]) -> tuple[str, str] | None:
    """Where two configurations differ, as "name=value" lists of the saved and the given one (None: nowhere)."""
    names = [name for name in {**saved, **given} if saved.get(name) != given.get(name)]
    if not names:
        return None
    return (
        ", ".join(f"{name}={_text(saved.get(name))}" for name in names),
        ", ".join(f"{name}={_text(given.get(name))}" for name in names),
    )


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
