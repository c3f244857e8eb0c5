"""What the subcommands share: errors, argument types, tables."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from importlib import import_module

MIB = 2**20


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
    if not separator or not rows.isdigit() or not columns.isdigit() or not int(rows) or not int(columns):
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS, both at least 1, such as 2x2; got {text!r}")
    return int(rows), int(columns)


def integer(minimum: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
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
