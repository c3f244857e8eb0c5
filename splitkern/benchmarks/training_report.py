"""The table and the picture of `splitkern bench training`.

Batches are timed one after the other, perhaps under another load or clock. Images per second are therefore plain
PyTorch's at its largest batch, divided by the slowdown per image, which is taken within a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitkern.benchmarks.common import Quartiles
from splitkern.benchmarks.record import OK, Row
from splitkern.benchmarks.report import Format
from splitkern.benchmarks.training_methods import PLAIN
from splitkern.memory.report import bytes_text

SLOWDOWN = 0.10


def report(record: Mapping[str, Any], table: Format) -> str:
    """Everything that is to be said of a record.

    Args:
        record: as `Record.data` holds it.
        table: makes a table of a header and rows.
    """
    rows = record["rows"]
    searches = [row for key, row in rows.items() if key.startswith("largest ")]
    timings = timed_rows(record)
    plain = next((row.get("largest", 0) for row in searches if row["method"] == PLAIN), 0)
    header = [
        "method", "largest batch", "times plain", "peak", "images/s at it", "slower per image at it",
        f"slower at batch {plain}", f"largest timed within {SLOWDOWN:.0%}", "",
    ]  # fmt: skip
    lines = [_line(row, timings, plain, _plain_rate(timings)) for row in searches]
    machine = record["machine"]
    device = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {machine['threads']} thread"
    title = f"{record['title']}; {device}, torch {machine['torch']}, commit {record['commit']}"
    return f"{title}\n\n{table(header, lines)}"


def timed_rows(record: Mapping[str, Any]) -> list[Row]:
    """What was timed, by batch."""
    rows = [row for key, row in record["rows"].items() if key.startswith("time ") and row["status"] == OK]
    return sorted(rows, key=lambda row: int(row["batch"]))


def _plain_rate(timings: Sequence[Row]) -> float:
    """Images per second of plain PyTorch at its largest batch."""
    return next((float(row["methods"][PLAIN]["images_per_s"]) for row in timings if PLAIN in row["methods"]), 0.0)


def _line(search: Row, timings: Sequence[Row], plain: int, plain_rate: float) -> list[str]:
    name = search["method"]
    note = search.get("note", "")
    if search["status"] != OK:
        return [search["text"], "-", "", "", "", "", "", "", search.get("message", search["status"])]
    largest = search["largest"]
    own = {row["batch"]: row["methods"][name] for row in timings if name in row["methods"]}
    at_largest, at_plain = own.get(largest), own.get(plain)
    within = [batch for batch, one in own.items() if one["slowdown"]["median"] <= SLOWDOWN]
    if not largest:
        note = "; ".join(part for part in (note, search["trials"][-1]["reason"]) if part)
    return [
        search["text"],
        str(largest),
        f"{largest / plain:.2f}" if plain else "",
        bytes_text(at_largest["peak_bytes"]) if at_largest else "",
        f"{plain_rate / (1 + at_largest['slowdown']['median']):.4g}" if at_largest else "",
        _percent(at_largest) if at_largest else "",
        _percent(at_plain) if at_plain else "",
        f"{max(within)} ({max(within) / plain:.2f}x)" if within else "-",
        note,
    ]


def _percent(one: Mapping[str, Any]) -> str:
    slowdown = Quartiles(**one["slowdown"])
    return f"{slowdown.median:+.0%} [{slowdown.lower:+.0%}, {slowdown.upper:+.0%}]"


def plot(path: Path, record: Mapping[str, Any]) -> None:
    """Draws images per second against the batch, a curve per method that ends at its largest batch.

    Args:
        path: the PNG to write.
        record: as `Record.data` holds it.

    Raises:
        OSError: where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    timings = timed_rows(record)
    rate = _plain_rate(timings)
    colors = ("#444444", "#d55e00", "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#8c564b")
    names = [key.removeprefix("largest ") for key in record["rows"] if key.startswith("largest ")]
    for index, name in enumerate(names):
        points = [(row["batch"], row["methods"][name]) for row in timings if name in row["methods"]]
        if not points:
            continue
        low, medians, high = (
            [rate / (1 + one["slowdown"][quartile]) for _, one in points] for quartile in ("upper", "median", "lower")
        )
        errors = [
            [median - least for median, least in zip(medians, low, strict=True)],
            [most - median for most, median in zip(high, medians, strict=True)],
        ]
        axes.errorbar(
            [batch for batch, _ in points],
            medians,
            yerr=errors,
            label=record["rows"][f"largest {name}"]["text"],
            color=colors[index % len(colors)],
            marker="o",
            markersize=4,
            linewidth=2.4 if name.startswith("splitkern") else 1.3,
            elinewidth=0.8,
            capsize=2,
        )
    axes.set_title(record["title"], loc="left", fontsize=10.5)
    axes.set_xlabel("images per step; a curve ends where no more fit the budget")
    axes.set_ylabel("images per second")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, format="png")
