"""The JSON file of a kernel benchmark: written after every row, by renaming, so that a run can be cut off and resumed.

A row is written as "started" before it runs. One that is still so when a run resumes took the process with it (a
hang, a lost device): it is kept as "lost" and not tried again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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


def write_atomically(path: Path, value: Any) -> None:
    """Writes JSON so that a reader, or a kill, finds the old file or the new one.

    Raises:
        RecordError: where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)
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
            before = json.loads(path.read_text())
            rows: dict[str, Row] = before["rows"]
            differing = [name for name in _SAME if before.get(name) != json.loads(json.dumps(header[name]))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} cannot be resumed: it is not a record of a benchmark ({error})") from error
        if differing:
            what = "; ".join(f"{name} was {before.get(name)}, is {header[name]}" for name in differing)
            raise RecordError(f"{path} cannot be resumed: {what}")
        for row in rows.values():
            if row["status"] == STARTED:
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
