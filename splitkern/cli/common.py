"""What the subcommands share: errors, argument types, tables."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 2**20
LARGEST_INTEGER = 2**63 - 1  # of C++
# Far above what is trained, and small enough that no size in bytes leaves 64 bits.
LARGEST_BATCH = 2**20
LARGEST_IMAGE_SIZE = 2**16


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


def require(*modules: str) -> None:
    """Raises UserError, naming the pip extra, if one of the optional packages cannot be imported."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            package = {"sklearn": "scikit-learn"}.get(name, name)
            raise UserError(
                f"this command needs {package}, which cannot be imported ({error}); install it with: "
                f"pip install 'splitkern[demo]'"
            ) from error


def grid(text: str) -> tuple[int, int]:
    """Argument type: ROWSxCOLUMNS."""
    rows, separator, columns = text.lower().partition("x")
    if not separator or not all(part.isdecimal() and part.strip("0") for part in (rows, columns)):
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS, both at least 1, such as 2x2; got {text!r}")
    if max(len(rows), len(columns)) > 9:
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS, both below 10^9, such as 2x2; got {text!r}")
    return int(rows), int(columns)


def integer(minimum: int, maximum: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Argument type: a whole number of at least `minimum` and at most `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at most {maximum}, got {text!r}")
        return value

    return parse


def number(
    *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf, at_most: float = math.inf
) -> Callable[[str], float]:
    """Argument type: a finite number in the given range."""
    bounds = [("above", above), ("at least", at_least), ("below", below), ("at most", at_most)]
    rule = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value < below and at_least <= value <= at_most):
            raise argparse.ArgumentTypeError(f"must be a number {rule}, got {text!r}")
        return value

    return parse


def device_of(text: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: where it names none, or one that is not here.
    """
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {text}: torch finds no GPU (splitkern doctor says more)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {text}: there are {torch.cuda.device_count()} GPUs")
    return device


def one_line(error: BaseException) -> str:
    """What an error says, without the line breaks, and without the C++ stack that torch may add."""
    text = " ".join(str(error).split("Exception raised from")[0].split())
    return text or type(error).__name__


def check_writable(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError where a file of these options cannot be written: before the work, not behind it."""
    from splitkern.benchmarks import record

    for name in names:
        path = getattr(args, name)
        if path is not None:
            try:
                record.check_writable(path)
            except OSError as error:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {path} cannot be written: {error.strerror or error}") from error


def write_file(option: str, path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside `path`, and puts it in its place only once it is whole.

    Raises:
        UserError: where it cannot be written; what was there before is there still.
    """
    from splitkern.benchmarks.record import replacing

    try:
        with replacing(path) as temporary:
            write(temporary)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror or error}") from error


def mib(size_bytes: int) -> str:
    """Bytes as text in MiB."""
    return f"{size_bytes / MIB:.1f} MiB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text table; the first column is aligned left, the others right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([text(lines[0]), "  ".join("-" * width for width in widths), *map(text, lines[1:])])
