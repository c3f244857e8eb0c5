"""Checkpoints: whole or not at all, never code, and errors that name the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from splitkern.training import CheckpointError, load_checkpoint, save_checkpoint
from splitkern.training.checkpoint import describe_difference


def state() -> dict[str, Any]:
    return {
        "arguments": {"lr": 0.1},
        "split": {"grid": [2, 2]},
        "epoch": 3,
        "model": {"weight": torch.arange(6.0)},
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "rng": {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)},
        "record": {"timeline": [(0.5, 10)]},
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state())
    loaded = load_checkpoint(path)
    assert loaded["epoch"] == 3
    assert loaded["split"] == {"grid": [2, 2]}
    assert torch.equal(loaded["model"]["weight"], torch.arange(6.0))
    assert loaded["rng"]["python"] == (3, (1, 2), None)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state())
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {**state(), "model": lambda: None})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path)["epoch"] == 3


def test_a_full_disk_is_one_line_and_no_part_stays(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state())
    before = path.read_bytes()
    (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be written: No space left on device$"):
        save_checkpoint(path, {**state(), "model": {"weight": torch.zeros(1 << 20)}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match=r"c\.pt cannot be written: Not a directory$"):
        save_checkpoint(path / "c.pt", state())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_checkpoint_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged or not a splitkern checkpoint"):
        load_checkpoint(path)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_text("not a checkpoint at all")
    with pytest.raises(CheckpointError, match=r"other\.pt is damaged or not"):
        load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"other\.pt was not written by splitkern train"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="was not written by"):
        load_checkpoint(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt cannot be read: No such file"):
        load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_checkpoint(tmp_path)


def test_other_version_and_missing_parts(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "splitkern-train", "version": 99}, path)
    with pytest.raises(CheckpointError, match="format version 99, this splitkern reads version 1"):
        load_checkpoint(path)
    torch.save({"format": "splitkern-train", "version": 1, "epoch": 2}, path)
    with pytest.raises(CheckpointError, match="lacks arguments, split, model"):
        load_checkpoint(path)


@pytest.mark.parametrize("part", ["arguments", "split", "epoch", "model", "optimizer", "scaler", "rng", "record"])
def test_parts_of_another_type(tmp_path: Path, part: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {**state(), part: [1, 2]})
    with pytest.raises(
        CheckpointError, match=rf"checkpoint\.pt is damaged: its {part} is of type list, not (dict|int)"
    ):
        load_checkpoint(path)


class Attack:
    """Writes a file when unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.victim, "written"))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "victim"
    torch.save({"format": "splitkern-train", "version": 1, "model": Attack(victim)}, path)
    with pytest.raises(CheckpointError, match="damaged or not"):
        load_checkpoint(path)
    assert not victim.exists()


def test_describe_difference() -> None:
    assert describe_difference({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) is None
    assert describe_difference({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": "x"}) == ("b=2, c=None", "b=3, c='x'")
