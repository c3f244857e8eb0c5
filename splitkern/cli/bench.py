"""`splitkern bench`: memory (live) and time (step) of Split-CNNs against the unsplit network.

The benchmarks of single kernels (conv, pool, copy) are in bench_kernels.py, the study of budgets in bench_budget.py,
training under a budget in bench_training.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitkern.cli import bench_budget, bench_kernels, bench_training
from splitkern.cli.common import (
    LARGEST_BATCH,
    LARGEST_IMAGE_SIZE,
    UserError,
    check_writable,
    device_of,
    grid,
    integer,
    mib,
    one_line,
    require,
    table,
    write_file,
)

_LIVE_DEFAULT = "vgg16:features.16 and resnet50:layer2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `splitkern bench`."""
    from splitkern.training.loop import MODEL_NAMES

    which = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    live_text = "peak live bytes of forward and backward in the split region"
    live = which.add_parser("live", help=live_text, description=live_text[0].upper() + live_text[1:] + ".")
    live.add_argument("--model", choices=MODEL_NAMES, metavar="NAME", help=f"default: {_LIVE_DEFAULT}")
    live.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    live.add_argument("--order", default="patch", choices=("patch", "layer"))
    live.add_argument("--memory-format", default="contiguous", choices=("contiguous", "channels_last"))
    step_text = "time of a training step, as interleaved pairs with an A/A control"
    step = which.add_parser("step", help=step_text, description=step_text[0].upper() + step_text[1:] + ".")
    step.add_argument("--model", choices=MODEL_NAMES, default="resnet18", metavar="NAME", help="default resnet18")
    step.add_argument("--recompute", action="store_true", help="recompute with order=patch")
    step.add_argument(
        "--compiled",
        action="store_true",
        help="a split model compiled without a budget beside the same model as it is, instead of split beside unsplit",
    )
    step.add_argument("--order", choices=("patch", "layer"), help="default: both, each beside the other")
    step.add_argument("--memory-format", choices=("contiguous", "channels_last"), help="default: both")
    step.add_argument("--pairs", type=integer(1), default=30, metavar="N", help="rounds that count (default 30)")
    step.add_argument("--warmup", type=integer(0), default=2, metavar="N", help="rounds before them (default 2)")
    for subparser, cells in ((live, (4, 4)), (step, (2, 2))):
        subparser.add_argument("--until", metavar="MODULE", help="last module of the region (default: as for train)")
        subparser.add_argument("--grid", type=grid, default=cells, metavar="RxC", help=f"default {cells[0]}x{cells[1]}")
        batch, image_size = integer(1, LARGEST_BATCH), integer(8, LARGEST_IMAGE_SIZE)
        subparser.add_argument("--batch", type=batch, default=8, metavar="N", help="default 8")
        subparser.add_argument("--image-size", type=image_size, default=224, metavar="PIXELS", help="default 224")
        subparser.add_argument("--boundary", default="zero", choices=("zero", "stochastic", "halo"))
        subparser.add_argument("--norm", default="patch", choices=("patch", "image", "frozen"))
        subparser.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu (default), cuda or cuda:N")
        subparser.add_argument("--json", action="store_true", help="print JSON instead of a table")
        subparser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON to a file")
    bench_budget.add_parser(which)
    bench_training.add_parser(which)
    bench_kernels.add_parsers(which)


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if args.benchmark in bench_kernels.NAMES:
        return bench_kernels.run(args)
    if args.benchmark == bench_budget.NAME:
        return bench_budget.run(args)
    if args.benchmark == bench_training.NAME:
        return bench_training.run(args)
    require("torchvision", "tqdm")
    from splitkern.benchmarks.common import commit, machine

    device = device_of(args.device)
    check_writable(args, "save")
    try:
        measured = _live(args, device) if args.benchmark == "live" else _step(args, device)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # of torch: no memory, images too small
        raise UserError(one_line(error)) from error
    record = {
        "benchmark": args.benchmark,
        "command": _command(args),
        "commit": commit(),
        "machine": machine(device),
        "results": measured,
    }
    text = json.dumps(record, indent=2)
    try:
        if args.save is not None:
            write_file("--save", args.save, lambda path: path.write_text(text + "\n"))
    finally:  # what was measured is not lost with the file
        if args.json:
            print(text)
        else:
            print(_live_table(measured) if args.benchmark == "live" else _step_table(measured))
    return 0


def _live(args: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
    from dataclasses import replace

    from tqdm import tqdm

    from splitkern.benchmarks.live import CASES, LiveCase, measure_live
    from splitkern.training import default_until

    if args.model is None:
        if args.until is not None:
            raise ValueError("--until needs --model")
        cases = list(CASES)
    else:
        cases = [LiveCase(args.model, args.until or default_until(args.model))]
    names = ("grid", "image_size", "batch", "boundary", "norm", "order", "recompute", "memory_format")
    changes = {name: getattr(args, name) for name in names}
    return [measure_live(replace(case, **changes), device=device) for case in tqdm(cases, disable=None, leave=False)]


def _step(args: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from splitkern.benchmarks.step import StepCase, measure_step
    from splitkern.training import default_until

    if args.recompute and args.order == "layer":
        raise ValueError("--recompute with --order layer is not possible: recomputation goes patch by patch")
    formats = [args.memory_format] if args.memory_format else ["contiguous", "channels_last"]
    results = []
    with tqdm(total=(args.warmup + args.pairs) * len(formats), unit="round", disable=None, leave=False) as bar:
        for memory_format in formats:
            case = StepCase(
                model=args.model,
                until=args.until or default_until(args.model),
                grid=args.grid,
                image_size=args.image_size,
                batch=args.batch,
                boundary=args.boundary,
                norm=args.norm,
                memory_format=memory_format,
                orders=(args.order,) if args.order else ("patch",) if args.compiled else ("patch", "layer"),
                compiled=args.compiled,
                recompute=args.recompute,
            )
            results.append(measure_step(case, pairs=args.pairs, warmup=args.warmup, device=device, on_round=bar.update))
    return results


def _live_table(results: Sequence[dict[str, Any]]) -> str:
    parts = []
    for result in results:
        case, unsplit, split = result["case"], result["unsplit"], result["split"]
        joins = [mib(2 * figures["join_bytes"]) for figures in (unsplit, split)]
        rows = [
            ["peak live bytes", mib(unsplit["peak_bytes"]), mib(split["peak_bytes"]), f"{result['ratio']:.3f}"],
            ["  of it the join and its gradient", *joins, ""],
        ]
        for name in ("input", "parameter", "parameter_gradient"):
            label = f"beside it: {name.replace('_', ' ')}{'' if name == 'input' else 's'}"
            rows.append([label, *[mib(figures[f"{name}_bytes"]) for figures in (unsplit, split)], ""])
        parts.append(f"{_describe(case)}\n" + table(["", "unsplit", "split", "split/unsplit"], rows))
    return "\n\n".join(parts)


def _step_table(results: Sequence[dict[str, Any]]) -> str:
    from splitkern.benchmarks.common import Quartiles

    parts = []
    for result in results:
        rows = [
            [name, *(Quartiles(**variant[key]).text() for key in ("step_ms", "ratio"))]
            for name, variant in result["variants"].items()
        ]
        header = ["median [quartiles]", "step, ms", f"ratio to {result['base']}"]
        title = f"{_describe(result['case'])}, {result['pairs']} interleaved rounds"
        parts.append(f"{title}\n" + table(header, rows))
    return "\n\n".join(parts)


def _describe(case: dict[str, Any]) -> str:
    rows, columns = case["grid"]
    orders = [case["order"]] if "order" in case else []
    extra = [f"order={order}" for order in orders] + (["recompute"] if case["recompute"] else [])
    return ", ".join(
        [
            f"{case['model']} until {case['until']}",
            f"{case['image_size']}x{case['image_size']}",
            f"batch {case['batch']}",
            f"grid {rows}x{columns}",
            f"boundary={case['boundary']}",
            f"norm={case['norm']}",
            *extra,
            case["memory_format"],
        ]
    )


def _command(args: argparse.Namespace) -> str:
    hidden = ("command", "benchmark", "json", "save", "version")
    words = ["splitkern", "bench", args.benchmark]
    for name, value in sorted(vars(args).items()):
        option = name.replace("_", "-")
        if name in hidden or value is None:
            continue
        if isinstance(value, bool):
            words += [f"--{option}"] if value else ([f"--no-{option}"] if args.benchmark == "live" else [])
        else:
            words += [f"--{option}", f"{value[0]}x{value[1]}" if name == "grid" else str(value)]
    return " ".join(words)
