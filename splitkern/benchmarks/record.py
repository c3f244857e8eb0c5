"""The JSON file of a benchmark: written after every row, by renaming, so that a run can be cut off and resumed.

A row is written as "started" before it runs. One that is still so when a run resumes took the process with it (a
hang, a lost device): it is kept as "lost" and not tried again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]

STARTED = "started"
LOST = "lost"
OK = "ok"
WRONG = "wrong"
ERROR = "error"

# What a resumed run must share with the one that it continues.
_SAME = ("benchmark", "options", "commit", "machine")


class RecordError(ValueError):
    """A file that cannot be resumed or written, with the reason."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole; nothing stays of one that is not.

    Args:
        path: its folder is made. Through a link, the file behind it is replaced; a pipe or a device is written itself.

    Raises:
        OSError: where there can be no such file.
    """
    if _is_stream(path):
        yield path
        return
    target, temporary = _beside(path)
    try:
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError where `replacing` could not write; leaves no file behind."""
    if not _is_stream(path):
        _, temporary = _beside(path)
        temporary.touch()
        temporary.unlink()


def _is_stream(path: Path) -> bool:
    # What the shell redirects to may be a file: its place must not be taken, as the shell goes on writing the old one.
    return str(path).startswith(("/dev/std", "/dev/fd/", "/proc/")) or (
        path.exists() and not path.is_file() and not path.is_dir()
    )


def _beside(path: Path) -> tuple[Path, Path]:
    target = Path(os.path.realpath(path))
    problem = None
    if target.is_dir():
        problem = errno.EISDIR
    elif target.exists() and not os.access(target, os.W_OK):
        problem = errno.EACCES  # a rename would not ask
    if problem is not None:
        raise OSError(problem, os.strerror(problem), str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    return target, target.with_name(f".{target.name}.{os.getpid()}")


def _difference(name: str, before: Any, now: Any) -> str:
    """What was, and what is; of options those alone that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        before, now = {key: before.get(key) for key in keys}, {key: now.get(key) for key in keys}
    return f"{name} was {before}, is {now}"


def write_atomically(path: Path, value: Any) -> None:
    """Writes JSON so that a reader, or a kill, finds the old file or the new one.

    Raises:
        RecordError: where the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}") from error


class Record:
    """Rows by key, in memory and, with a path, on disk."""

    def __init__(self, header: Mapping[str, Any], path: Path | None = None, *, resume: bool = False) -> None:
        """Begins a record, or continues the one at `path`.

        Args:
            header: "benchmark", "options", "commit", "machine": a resumed record must have been begun with the same.
            path: the file, or None to keep the record in memory.
            resume: continue the file, if there is one; else it is written anew with the first row.

        Raises:
            RecordError: for a file that holds something else.
        """
        self.path = path
        self.data: dict[str, Any] = {"schema": 1, **header, "ceilings": None, "rows": {}}
        if resume and path is not None and path.exists():
            self._continue(path, header)

    def _continue(self, path: Path, header: Mapping[str, Any]) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8-sig"))
            rows: dict[str, Row] = before["rows"]
            # A curve of `bench budget` has no status: it is there or not.
            begun = [row for row in rows.values() if row.get("status") == STARTED]
            now = json.loads(json.dumps({name: header[name] for name in _SAME}))  # as the file holds it
            differing = [name for name in _SAME if before.get(name) != now[name]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecordError(f"{path} cannot be resumed: it is not a record of a benchmark ({error})") from error
        if differing:
            what = "; ".join(_difference(name, before.get(name), now[name]) for name in differing)
            raise RecordError(f"{path} cannot be resumed: {what}")
        for row in begun:
            row |= {"status": LOST, "message": "the process ended during this row: a hang or a lost device"}
        self.data = before

    @property
    def rows(self) -> dict[str, Row]:
        """All rows so far, by key."""
        rows: dict[str, Row] = self.data["rows"]
        return rows

    def has(self, key: str) -> bool:
        """Whether a row is there already."""
        return key in self.rows

    def put(self, key: str, row: Row) -> None:
        """Adds or replaces a row and writes the file."""
        self.rows[key] = row
        self.save()

    def save(self) -> None:
        """Writes the file."""
        if self.path is not None:
            write_atomically(self.path, self.data)
