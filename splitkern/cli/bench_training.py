"""`splitkern bench training`: largest batch and throughput under an equal byte budget, measured, against the peers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitkern.cli.bench_kernels import EXIT_OUT_OF_TIME
from splitkern.cli.common import (
    LARGEST_BATCH,
    LARGEST_IMAGE_SIZE,
    UserError,
    check_writable,
    grid,
    integer,
    number,
    one_line,
    require,
    table,
    write_file,
)

if TYPE_CHECKING:
    from splitkern.benchmarks.record import Record
    from splitkern.benchmarks.training_methods import Method, TrainingCase

NAME = "training"
_TEXT = "largest batch and throughput of training under an equal byte budget, against other ways to save memory"


def add_parser(which: Any) -> None:
    """Adds the benchmark to the choices of `splitkern bench`."""
    from splitkern.training.loop import MODEL_NAMES

    parser = which.add_parser(NAME, help=_TEXT, description=_TEXT[0].upper() + _TEXT[1:] + ".")
    parser.epilog = (
        "The budget covers all device memory of a step: parameters, gradients, momentum, inputs, activations, scratch. "
        "On a GPU: splitkern bench training --device cuda --network vgg19 --precision bf16 "
        "--memory-format channels_last --budget 16GiB --save vgg19.json --plot vgg19.png"
    )
    parser.add_argument("--network", default="resnet18", choices=MODEL_NAMES, metavar="NAME", help="default resnet18")
    image_size = integer(8, LARGEST_IMAGE_SIZE)
    parser.add_argument("--image-size", type=image_size, default=224, metavar="PIXELS", help="default 224")
    parser.add_argument("--budget", required=True, metavar="SIZE", help="device bytes of a step, such as 16GiB")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast")
    parser.add_argument("--memory-format", default="contiguous", choices=("contiguous", "channels_last"))
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--methods",
        metavar="NAME,NAME",
        help="of plain, splitkern, splitkern-split, layerwise, save_on_cpu, checkpoint, torch.compile-SHARE "
        "(default: all; plain is always there)",
    )
    parser.add_argument(
        "--activation-budget",
        action="append",
        type=number(at_least=0, at_most=1),
        metavar="SHARE",
        help="activation_memory_budget of torch.compile, may be repeated (default: 0.5 and 0.1)",
    )
    parser.add_argument("--grid", type=grid, default=(2, 2), metavar="RxC", help="of splitkern-split (default 2x2)")
    parser.add_argument("--until", metavar="MODULE", help="last module of the split region (default: as for train)")
    parser.add_argument("--rounds", type=integer(1), default=10, metavar="N", help="rounds that count (default 10)")
    parser.add_argument(
        "--points", type=integer(0), default=3, metavar="N", help="batches timed between the largest ones (default 3)"
    )
    at_most = integer(1, LARGEST_BATCH)
    parser.add_argument("--at-most", type=at_most, default=4096, metavar="N", help="largest batch that is tried")
    parser.add_argument(
        "--resolution",
        type=number(at_least=0, below=1),
        default=0.0,
        metavar="SHARE",
        help="how far the next batch that does not fit may lie above a largest one (default 0: it is the next)",
    )
    parser.add_argument("--seconds", type=number(above=0), metavar="S", help="begin no row after that time")
    parser.add_argument("--commit", metavar="ID", help="what to record where git cannot tell")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to a file after every row")
    parser.add_argument("--resume", action="store_true", help="continue the file where it was cut off")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw images per second against the batch")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    output.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    require("torchvision", "tqdm", *(["matplotlib"] if args.plot else []))
    from splitkern.benchmarks.record import Record, RecordError
    from splitkern.benchmarks.training_report import plot

    if args.resume and args.save is None:
        raise UserError("--resume needs --save FILE, the file to continue")
    check_writable(args, "save", "plot")
    try:
        case, chosen = _case(args), _methods(args)
        _check(case, chosen)
        record = Record(_header(args, case, chosen), args.save, resume=args.resume)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(one_line(error)) from error
    try:
        is_done = _measure(args, case, chosen, record)
    except RecordError as error:  # the disk is full: what was measured is not lost with the file
        _print(args, record)
        raise UserError(one_line(error)) from error
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error
    try:
        if is_done and args.plot is not None:
            write_file("--plot", args.plot, lambda path: plot(path, record.data))
    finally:
        _print(args, record)
    if not is_done:
        where = f"; go on with --resume --save {args.save}" if args.save else ""
        print(f"splitkern bench: out of time after {len(record.rows)} rows{where}", file=sys.stderr)
    return 0 if is_done else EXIT_OUT_OF_TIME


def _print(args: argparse.Namespace, record: Record) -> None:
    from splitkern.benchmarks.report import markdown
    from splitkern.benchmarks.training_report import report

    data = record.data
    print(json.dumps(data, indent=1) if args.json else report(data, markdown if args.markdown else table))


def _case(args: argparse.Namespace) -> TrainingCase:
    from splitkern.benchmarks.training_methods import TrainingCase
    from splitkern.memory.report import parse_bytes

    try:
        budget = parse_bytes(args.budget)
    except ValueError as error:
        raise ValueError(f"--budget {error}") from error
    if budget == 0:
        raise ValueError(f"--budget must be above 0 bytes, got {args.budget!r}")
    return TrainingCase(
        network=args.network,
        image_size=args.image_size,
        budget=budget,
        precision=args.precision,
        memory_format=args.memory_format,
        device=args.device,
        grid=args.grid,
        until=args.until,
    )


def _methods(args: argparse.Namespace) -> dict[str, Method]:
    from splitkern.benchmarks.training_methods import ACTIVATION_BUDGETS, PLAIN, methods

    known = methods(tuple(args.activation_budget or ACTIVATION_BUDGETS))
    names = list(known) if args.methods is None else [name.strip() for name in args.methods.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"--methods must be of {', '.join(known)}, got {name!r}")
    return {name: method for name, method in known.items() if name == PLAIN or name in names}


def _check(case: TrainingCase, chosen: Mapping[str, Method]) -> None:
    """Refuses, before anything is measured, what could only fail in the middle."""
    from splitkern.benchmarks.training_methods import SPLIT, check_split
    from splitkern.training.loop import TrainOptions, check_options

    check_options(
        TrainOptions(model=case.network, image_size=case.image_size, precision=case.precision, device=case.device)
    )
    if SPLIT in chosen:
        check_split(case)


def _header(args: argparse.Namespace, case: TrainingCase, chosen: Mapping[str, Method]) -> dict[str, Any]:
    import torch

    from splitkern.benchmarks.common import commit, machine

    return {
        "benchmark": NAME,
        "options": {name: getattr(args, name) for name in _OPTIONS} | {"methods": list(chosen)},
        "commit": args.commit or commit(),
        "machine": machine(torch.device(args.device)),
        "title": case.text,
    }


def _measure(args: argparse.Namespace, case: TrainingCase, chosen: Mapping[str, Method], record: Record) -> bool:
    """Adds what the record lacks; returns whether that was all."""
    from tqdm import tqdm

    from splitkern.benchmarks.training import OutOfTime, TrainingBench

    with tqdm(bar_format="{desc} [{elapsed}]", disable=None, leave=False) as bar:
        seconds = args.seconds or math.inf
        bench = TrainingBench(case, chosen, record, on_change=bar.set_description_str, seconds=seconds)
        try:
            largest = bench.find_largest(at_most=args.at_most, resolution=args.resolution)
            bench.time_batches(largest, points=args.points, rounds=args.rounds)
        except OutOfTime:
            return False
    return True


_OPTIONS = (
    "network", "image_size", "budget", "precision", "memory_format", "device", "grid", "until", "rounds", "points",
    "at_most", "resolution",
)  # fmt: skip
