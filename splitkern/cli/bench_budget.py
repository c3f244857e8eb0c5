"""`splitkern bench budget`: by prediction, how large a batch fits a memory budget, against how much slower it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitkern.cli.common import (
    LARGEST_IMAGE_SIZE,
    UserError,
    check_writable,
    grid,
    integer,
    one_line,
    require,
    table,
    write_file,
)

if TYPE_CHECKING:
    from splitkern.benchmarks.budget import Curve, Plain, Planner
    from splitkern.benchmarks.record import Record

NAME = "budget"
_TEXT = "batch multiplier against predicted slowdown under a memory budget, for every planning strategy (estimates)"


def add_parser(which: Any) -> None:
    """Adds the benchmark to the choices of `splitkern bench`."""
    from splitkern.memory.cost_model import COST_MODELS

    parser = which.add_parser(NAME, help=_TEXT, description=_TEXT[0].upper() + _TEXT[1:] + ".")
    parser.add_argument(
        "--machine", action="append", choices=tuple(COST_MODELS), help="may be repeated (default: all cost models)"
    )
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="may be repeated (default: vgg19 and resnet50)"
    )
    parser.add_argument(
        "--grid", action="append", type=grid, metavar="RxC", help="may be repeated (default: 1x1, 2x2 and 4x4)"
    )
    parser.add_argument("--strategy", action="append", metavar="NAME", help="may be repeated (default: all)")
    parser.add_argument("--until", metavar="MODULE", help="last module of the split region (default: as for train)")
    image_size = integer(8, LARGEST_IMAGE_SIZE)
    parser.add_argument("--image-size", type=image_size, default=224, metavar="PIXELS", help="default 224")
    parser.add_argument("--jobs", type=integer(1), default=2, metavar="N", help="plans at a time (default 2)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to a file after every curve")
    parser.add_argument("--resume", action="store_true", help="continue the file where it was cut off")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the best grid of every strategy")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Plans and prints."""
    require("torchvision", "tqdm", *(["matplotlib"] if args.plot else []))
    from splitkern.benchmarks.budget import plot
    from splitkern.benchmarks.record import Record, RecordError

    if args.resume and args.save is None:
        raise UserError("--resume needs --save FILE, the file to continue")
    check_writable(args, "save", "plot")
    try:
        record = Record(_header(args), args.save, resume=args.resume)
    except RecordError as error:
        raise UserError(one_line(error)) from error
    try:
        _curves(record)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{args.save} cannot be resumed: a row of it is no curve of bench budget") from error
    try:
        _fill(args, record)
    except RecordError as error:  # the disk is full: what was planned is not lost with the file
        _print(args, record)
        raise UserError(one_line(error)) from error
    except (ValueError, RuntimeError, MemoryError) as error:
        raise UserError(one_line(error)) from error
    try:
        if args.plot is not None:
            write_file("--plot", args.plot, lambda path: plot(path, _curves(record)))
    finally:
        _print(args, record)
    return 0


def _curves(record: Record) -> list[Curve]:
    from splitkern.benchmarks.budget import curve_of_row

    return [curve_of_row(row) for row in record.rows.values()]


def _print(args: argparse.Namespace, record: Record) -> None:
    print(json.dumps(record.data, indent=1) if args.json else _tables(_curves(record), markdown=args.markdown))


def _header(args: argparse.Namespace) -> dict[str, Any]:
    from splitkern import __version__
    from splitkern.benchmarks.common import commit

    options = {"image_size": args.image_size, "until": args.until}
    # The machine is the cost models': this one has no say in the figures.
    return {"benchmark": NAME, "options": options, "commit": commit(), "machine": {"splitkern": __version__}}


def _fill(args: argparse.Namespace, record: Record) -> None:
    """Adds every curve that is not there yet."""
    from tqdm import tqdm

    from splitkern import _core
    from splitkern.benchmarks.budget import GRIDS, NETWORKS, Planner, ScalableStep
    from splitkern.benchmarks.networks import NetworkOptions
    from splitkern.memory.cost_model import COST_MODELS

    strategies = args.strategy or list(_core.strategy_names())
    for strategy in strategies:
        if strategy not in _core.strategy_names():
            raise UserError(f"--strategy must be one of {', '.join(_core.strategy_names())}, got {strategy!r}")
    machines = [COST_MODELS[name] for name in args.machine or COST_MODELS]
    networks, grids = args.model or NETWORKS, args.grid or GRIDS
    total = len(machines) * len(networks) * len(grids) * len(strategies)
    with tqdm(total=total, unit="curve", disable=None, leave=False) as bar:
        for network in networks:
            for machine in machines:
                keys = {
                    (cells, strategy): f"{machine.name} {network} {cells[0]}x{cells[1]} {strategy}"
                    for cells in grids
                    for strategy in strategies
                }
                missing = [one for one, key in keys.items() if not record.has(key)]
                bar.update(len(keys) - len(missing))
                if not missing:
                    continue

                def planner(cells: tuple[int, int], network: str = network, machine: Any = machine) -> Planner:
                    until = args.until if cells != (1, 1) else None
                    options = NetworkOptions(
                        network, 1, args.image_size, cells, until, dtype=machine.dtype, device_type="cuda"
                    )
                    bar.set_description(f"capturing {network} {cells[0]}x{cells[1]}")
                    return Planner(ScalableStep.capture(options), machine, f"{network} {cells[0]}x{cells[1]}")

                plain_planner = planner((1, 1))
                plain = _plain(plain_planner)
                for cells in dict.fromkeys(cells for cells, _ in missing):
                    one = plain_planner if cells == (1, 1) else planner(cells)
                    wanted = [strategy for at, strategy in missing if at == cells]
                    bar.set_description(f"{machine.name} {network} {cells[0]}x{cells[1]}")
                    make = partial(_curve, one, plain, machine.name, network, cells)
                    with ThreadPoolExecutor(args.jobs) as pool:
                        made = pool.map(make, wanted)
                        for strategy, curve in zip(wanted, made, strict=True):
                            record.put(keys[cells, strategy], curve.as_row())
                            bar.update()


def _plain(planner: Planner) -> Plain:
    from splitkern.benchmarks.budget import largest_plain

    return largest_plain(lambda batch: planner.image_us(batch, "none"))


def _curve(planner: Planner, plain: Plain, machine: str, network: str, cells: tuple[int, int], strategy: str) -> Curve:
    from splitkern.benchmarks.budget import Curve, largest_batches

    batches, points = largest_batches(lambda batch: planner.image_us(batch, strategy), plain)
    host_bytes = {limit: planner.host_bytes(batch, strategy) for limit, batch in batches.items()}
    return Curve(machine, network, cells, strategy, plain.batch, plain.image_us, batches, host_bytes, points)


def _tables(curves: Sequence[Curve], *, markdown: bool) -> str:
    from splitkern.memory.cost_model import COST_MODELS
    from splitkern.memory.report import bytes_text

    parts = []
    for machine, network in dict.fromkeys((curve.machine, curve.network) for curve in curves):
        chosen = [curve for curve in curves if (curve.machine, curve.network) == (machine, network)]
        plain = chosen[0]
        slowdowns = list(plain.batches)
        title = (
            f"{network}, {COST_MODELS[machine].label}: plain batch {plain.plain_batch}, "
            f"{plain.plain_image_us / 1e3:.3f} ms per image"
        )
        header = ["slowdown per image at most", "grid", *(f"{limit:.0%}" for limit in slowdowns), "host, most"]
        rows = [
            [
                curve.strategy,
                "not split" if curve.grid == (1, 1) else f"{curve.grid[0]}x{curve.grid[1]}",
                *(
                    f"{curve.multipliers[limit]:.2f}x ({curve.batches[limit]})" if curve.batches[limit] else "-"
                    for limit in slowdowns
                ),
                bytes_text(max(curve.host_bytes.values(), default=0)),
            ]
            for curve in chosen
        ]
        if markdown:
            lines = [header, ["---", "---", *("---:" for _ in header[2:])], *rows]
            parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        else:
            parts.append(f"{title}\n" + table(header, rows))
    return "\n\n".join(parts)
