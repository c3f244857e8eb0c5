"""Tables of a kernel benchmark's record, as text for the terminal and as Markdown for the README.

Means are geometric, over every row that was measured and right; rows that are wrong, failed or missing are counted
beside them, and the worst row is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from splitkern.benchmarks.record import OK, Row

Format = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

# Key of a row, and its heading. Above 1 ours is faster.
RATIOS = {
    "conv": {
        "cudnn_over_layer": "cuDNN / one launch",
        "cudnn_over_patch": "cuDNN / per patch",
        "loop_over_layer": "loop / one launch",
        "loop_over_patch": "loop / per patch",
    },
    "pool": {"torch_over_layer": "PyTorch / one launch", "torch_over_patch": "PyTorch / per patch"},
    "copy": {"torch_over_ours": "PyTorch / ours", "memcpy2d_over_ours": "memcpy2D / ours"},
}


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive values.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    return math.exp(sum(math.log(value) for value in values) / len(values))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(record: Mapping[str, Any], table: Format, *, summary: bool = False) -> str:
    """Everything that is to be said of a record.

    Args:
        record: as `Record.data` holds it.
        table: makes a table of a header and rows.
        summary: leave out the table of single rows.
    """
    kind = record["benchmark"]
    rows = list(record["rows"].values())
    parts = [_heading(record)]
    if not rows:
        return "\n".join([*parts, "no row has been measured"])
    if not summary:
        parts.append({"conv": _conv_table, "pool": _pool_table, "copy": _copy_table}[kind](rows, table))
    parts.append(_summary(kind, rows, table))
    failures = [f"  {key}: {row['status']}: {row.get('message', '')}" for key, row in record["rows"].items()
                if row["status"] != OK]  # fmt: skip
    if failures:
        parts.append("\n".join(["Not counted in any mean:", *failures]))
    return "\n\n".join(parts)


def _heading(record: Mapping[str, Any]) -> str:
    machine, ceilings = record["machine"], record.get("ceilings")
    lines = [f"{machine['device']}, torch {machine['torch']}, cuDNN {machine.get('cudnn')}, commit {record['commit']}"]
    if ceilings:
        text = f"measured ceilings: {ceilings['matmul_tflops']:.0f} TFLOP/s, copy {ceilings['copy_gbps']:.0f} GB/s"
        if ceilings.get("to_device_gbps"):
            text += (
                f", link {ceilings['to_device_gbps']:.1f} GB/s to the device, "
                f"{ceilings['from_device_gbps']:.1f} GB/s from it"
            )
        lines.append(text)
    return "\n".join(lines)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ms(row: Row, name: str) -> str:
    candidate = row.get("candidates", {}).get(name)
    if candidate is None:
        return ""
    median, spread = candidate["ms"]["median"], candidate["ms"]["upper"] - candidate["ms"]["lower"]
    gaps = " h" if candidate["gaps"] else ""
    return f"{median:.4g} ±{spread / 2 / median:.0%}{gaps}" if median else "0"


def _host_us(row: Row) -> str:
    """Time in which the host queues ours; above the device's time a call by itself is bound by it."""
    candidates = row.get("candidates", {})
    return " ".join(f"{candidates[name]['host_us']:.0f}" for name in ("layer", "patch") if name in candidates)


def _grid(row: Row) -> str:
    return f"{row['grid'][0]}x{row['grid'][1]}"


def _note(row: Row) -> str:
    return "" if row["status"] == OK else row["status"].upper()


def _conv_table(rows: Sequence[Row], table: Format) -> str:
    header = [
        "layer", "shape", "pass", "grid", "batch", "path", "one launch ms", "per patch ms", "cuDNN ms", "loop ms",
        "cuDNN/one", "cuDNN/patch", "loop/one", "TFLOP/s", "of matmul", "of copy", "bound",
        "host µs, one and per patch", "",
    ]  # fmt: skip
    lines = [
        [
            row["layer"], row["shape"], row["pass"], _grid(row), str(row["batch"]), row.get("path", ""),
            *(_ms(row, name) for name in ("layer", "patch", "cudnn", "loop")),
            *(_text(row.get(key), ".2f") for key in ("cudnn_over_layer", "cudnn_over_patch", "loop_over_layer")),
            _text(row.get("tflops"), ".0f"), _text(row.get("matmul_share"), ".0%"), _text(row.get("copy_share"), ".0%"),
            row.get("bound", ""), _host_us(row), _note(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def _pool_table(rows: Sequence[Row], table: Format) -> str:
    header = [
        "layer", "operation", "pass", "grid", "batch", "one launch ms", "per patch ms", "PyTorch ms", "PyTorch/one",
        "PyTorch/patch", "GB/s", "of copy", "",
    ]  # fmt: skip
    lines = [
        [
            row["layer"], row["shape"], row["pass"], _grid(row), str(row["batch"]),
            *(_ms(row, name) for name in ("layer", "patch", "torch")),
            *(_text(row.get(key), ".2f") for key in ("torch_over_layer", "torch_over_patch")),
            _text(row.get("gbps"), ".0f"), _text(row.get("copy_share"), ".0%"), _note(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def _copy_table(rows: Sequence[Row], table: Format) -> str:
    header = [
        "copy", "direction", "view", "bytes", "ours ms", "engine ms", "kernel ms", "PyTorch ms", "memcpy2D ms",
        "PyTorch/ours", "GB/s", "of link", "slows a convolution by", "",
    ]  # fmt: skip
    lines = [
        [
            row["layer"], row["pass"], row["shape"], str(row["bytes"]),
            *(_ms(row, name) for name in ("ours", "engine", "kernel", "torch", "memcpy2d")),
            _text(row.get("torch_over_ours"), ".2f"), _text(row.get("gbps"), ".1f"),
            _text(row.get("link_share"), ".0%"), _text(row.get("slowdown"), ".1%"), _note(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


def _share(row: Row, bound: str) -> float | None:
    """One launch's share of the ceiling that bounds the layer, None if another does."""
    return row.get(f"{bound}_share") if row.get("bound", "copy") == bound else None


def _summary(kind: str, rows: Sequence[Row], table: Format) -> str:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        group: tuple[str, ...] = (row["pass"],)
        if kind != "copy":
            group += (_grid(row), str(row["batch"]))
        groups.setdefault(group, []).append(row)
    bounds = [bound for bound in ("matmul", "copy") if any(_share(row, bound) for row in rows)]
    used = {key: text for key, text in RATIOS[kind].items() if any(key in row for row in rows)}
    header = ["geometric mean", *([] if kind == "copy" else ["grid", "batch"]), "rows", *used.values()]
    header += [f"of {bound}, where it bounds" for bound in bounds]
    header += ["worst row", "not counted"]
    first = next(iter(RATIOS[kind]))
    lines = []
    for group, members in groups.items():
        right = [row for row in members if row["status"] == OK]
        means = []
        for key in used:
            values = [row[key] for row in right if key in row]
            means.append(f"{geometric_mean(values):.2f}" if values else "")
        for bound in bounds:
            shares = [share for row in right if (share := _share(row, bound))]
            means.append(f"{geometric_mean(shares):.0%}" if shares else "")
        ranked = sorted((row for row in right if first in row), key=lambda row: float(row[first]))
        worst = f"{ranked[0]['layer']} {ranked[0][first]:.2f}" if ranked else ""
        lines.append(
            [*group, str(len(right)), *means, worst, str(len(members) - len(right)) if right != members else ""]
        )
    return table(header, lines)
