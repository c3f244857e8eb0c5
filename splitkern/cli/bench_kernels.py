"""`splitkern bench conv|pool|copy|report`: single kernels on a GPU, against PyTorch's in the same run; and tables of
what was saved.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitkern.cli.common import LARGEST_BATCH, UserError, check_writable, grid, integer, number, one_line, table

if TYPE_CHECKING:
    from splitkern.benchmarks.gpu_timing import Timer
    from splitkern.benchmarks.layers import Cell
    from splitkern.benchmarks.record import Row
    from splitkern.benchmarks.rows import Setting

NAMES = ("conv", "pool", "copy", "report")
EXIT_DEVICE_LOST = 3
EXIT_OUT_OF_TIME = 4

_TEXTS = {
    "conv": "convolution kernels, layer by layer, against cuDNN's unsplit convolution and the slice loop",
    "pool": "pooling and BatchNorm kernels against PyTorch's unsplit operations",
    "copy": "offload and prefetch against Tensor.copy_ and cudaMemcpy2DAsync, and the link's bandwidth",
    "report": "the tables of a file that conv, pool, copy, training or make gpu-evidence has saved",
}
_CANDIDATES = {
    "conv": ("layer", "patch", "cudnn", "loop"),
    "pool": ("layer", "patch", "torch"),
    "copy": ("ours", "engine", "kernel", "torch", "memcpy2d"),
}
_PASSES = {
    "conv": ("forward", "input_grad", "weight_grad"),
    "pool": ("forward", "backward"),
    "copy": ("offload", "prefetch"),
}


def add_parsers(which: Any) -> None:
    """Adds the benchmarks to the choices of `splitkern bench`."""
    for name in ("conv", "pool", "copy"):
        parser = which.add_parser(name, help=_TEXTS[name], description=f"Measures {_TEXTS[name]}.")
        if name != "copy":
            group = parser.add_mutually_exclusive_group()
            group.add_argument(
                "--core", action="store_true", help="layers of the split region, batch 32, grids 2x2 and 4x4 (default)"
            )
            group.add_argument(
                "--full", action="store_true", help="every layer, batch 32 and 128, grids 1x1, 2x2, 4x4 and 3x2"
            )
            parser.add_argument("--grids", type=_list_of(grid), metavar="RxC,...", help="only these grids")
            parser.add_argument(
                "--batch", type=_list_of(integer(1, LARGEST_BATCH)), metavar="N,...", help="only these batch sizes"
            )
        if name == "conv":
            paths = ("plain", "depthwise", "first_layer", "sm80", "sm90")
            parser.add_argument("--path", choices=paths, help="make ours take this path (default: the library chooses)")
        passes, candidates = _PASSES[name], _CANDIDATES[name]
        parser.add_argument("--layers", default="*", metavar="GLOB", help="only what matches, e.g. 'vgg19.conv3_*'")
        parser.add_argument(
            "--passes", type=_names(passes), metavar="NAME,...", help=f"only these of {', '.join(passes)}"
        )
        parser.add_argument(
            "--candidates", type=_names(candidates), metavar="NAME,...", help=f"only these of {', '.join(candidates)}"
        )
        parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
        parser.add_argument(
            "--budget-ms", type=number(above=0), default=80.0, metavar="MS", help="time per candidate (default 80)"
        )
        parser.add_argument("--seconds", type=number(above=0), metavar="S", help="begin no row after that time")
        parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to a file after every row")
        parser.add_argument("--resume", action="store_true", help="continue the file where it was cut off")
        parser.add_argument("--commit", metavar="ID", help="what to record where git cannot tell")
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser = which.add_parser("report", help=_TEXTS["report"], description=f"Prints {_TEXTS['report']}.")
    parser.add_argument("file", type=Path, metavar="FILE", help="from --save, or from `make gpu-evidence`")
    parser.add_argument("--markdown", action="store_true", help="as Markdown, for a README")
    parser.add_argument("--summary", action="store_true", help="the means alone, of kernels")


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(allowed)}, got {name!r}")
        return names

    return parse


def make_timer() -> Timer:
    """The timer of the current CUDA device.

    Raises:
        UserError: where there is none.
    """
    import torch

    from splitkern.benchmarks.gpu_timing import DeviceTimer

    if not torch.cuda.is_available():
        raise UserError(
            "this benchmark measures GPU kernels, and torch finds no GPU (splitkern doctor says more); "
            "nothing was measured"
        )
    return DeviceTimer(torch.device("cuda", torch.cuda.current_device()))


def ceilings_options(benchmark: str) -> dict[str, Any]:
    """How the ceilings are measured: those of the link only for what uses it."""
    return {"link": benchmark == "copy"}


def make_explain(dtype: str) -> Callable[[Cell], dict[str, str]]:
    """What tells the path of a cell on the current device, and why it is that one.

    Args:
        dtype: "bf16", "fp16" or "fp32".
    """
    import torch

    from splitkern.benchmarks.layers import ConvLayer
    from splitkern.cli import explain

    device = explain.device_for(None)
    if dtype == "fp32" and torch.backends.cudnn.allow_tf32:
        dtype = "tf32"

    def of(cell: Cell) -> dict[str, str]:
        layer = cell.layer
        assert isinstance(layer, ConvLayer)
        shape = explain.ConvShape(
            input_size=(cell.batch, layer.channels, layer.size, layer.size),
            weight_size=(layer.outputs, layer.channels, layer.kernel, layer.kernel),
            stride=(layer.stride,) * 2,
            padding=(layer.padding,) * 2,
            dtype=dtype,
            grid=cell.grid,
            passes=(cell.direction,),
        )
        (found,) = explain.explain(shape, device)
        return {"path": found.path, "reason": found.reason}

    return of


def run(args: argparse.Namespace) -> int:
    """Measures what the record lacks, and prints.

    Returns:
        0; 3 after a lost device and 4 when the time ran out: then `--resume` goes on.
    """
    if args.benchmark == "report":
        return _report(args)
    if args.resume and args.save is None:
        raise UserError("--resume needs --save FILE, the file to continue")
    from splitkern.benchmarks.common import commit, machine
    from splitkern.benchmarks.gpu_timing import Ceilings, device_facts, measure_ceilings
    from splitkern.benchmarks.record import Record, RecordError
    from splitkern.benchmarks.rows import DTYPES, DeviceLost, Setting, run_rows

    timer = make_timer()
    check_writable(args, "save")
    names = ("full", "grids", "batch", "path", "layers", "passes", "candidates", "dtype", "budget_ms")
    header = {
        "benchmark": args.benchmark,
        "options": {name: value for name in names if (value := getattr(args, name, None)) is not None},
        "commit": args.commit or commit(),
        "machine": machine(timer.device) | device_facts(timer.device),
    }
    try:
        record = Record(header, args.save, resume=args.resume)
    except RecordError as error:
        raise UserError(one_line(error)) from error
    try:
        dtype = DTYPES[args.dtype]
        if record.data["ceilings"] is None:
            record.data["ceilings"] = vars(measure_ceilings(timer, dtype, **ceilings_options(args.benchmark)))
        setting = Setting(
            timer, Ceilings(**record.data["ceilings"]), dtype, args.budget_ms,
            tuple(args.candidates) if args.candidates else None,
        )  # fmt: skip
        tasks = list(_tasks(args, setting))
        done = run_rows(
            record, tasks, timer, seconds=args.seconds or math.inf, on_row=_progress(len(tasks), record.rows)
        )
    except RecordError as error:  # the disk is full: what was measured is not lost with the file
        _print(record.data, args)
        raise UserError(one_line(error)) from error
    except ValueError as error:
        raise UserError(one_line(error)) from error
    except DeviceLost as error:
        where = f"; go on with --resume --save {args.save}" if args.save else ""
        print(f"splitkern bench: the device no longer answers ({error}){where}", file=sys.stderr)
        return EXIT_DEVICE_LOST
    _print(record.data, args)
    if not done:
        print(f"splitkern bench: out of time after {len(record.rows)} of {len(tasks)} rows", file=sys.stderr)
    return 0 if done else EXIT_OUT_OF_TIME


def _tasks(args: argparse.Namespace, setting: Setting) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    from splitkern.benchmarks.conv import conv_tasks
    from splitkern.benchmarks.copy import copy_cases, copy_tasks
    from splitkern.benchmarks.layers import CONV_LAYERS, POOL_LAYERS, cells
    from splitkern.benchmarks.pool import pool_tasks

    if args.benchmark == "copy":
        return copy_tasks(setting, copy_cases(args.layers), args.passes or _PASSES["copy"])
    which = {
        "full": args.full, "pattern": args.layers, "passes": args.passes, "grids": args.grids, "batches": args.batch,
    }  # fmt: skip
    if args.benchmark == "conv":
        explain = make_explain(args.dtype)
        return conv_tasks(setting, cells(CONV_LAYERS, **which), path=args.path, explain=explain)
    return pool_tasks(setting, cells(POOL_LAYERS, **which))


def _progress(total: int, rows: dict[str, Row]) -> Callable[[str, Row], None]:
    def on_row(key: str, row: Row) -> None:
        from splitkern.benchmarks.report import RATIOS

        figures = [f"{name} {row[name]:.2f}" for names in RATIOS.values() for name in names if name in row]
        text = f"[{len(rows)}/{total}] {key}: {row['status']}  {'  '.join(figures)}  {row.get('message', '')}"
        print(f"{text.rstrip()}  ({row['seconds']:.1f} s)", file=sys.stderr, flush=True)

    return on_row


def _print(record: dict[str, Any], args: argparse.Namespace) -> None:
    from splitkern.benchmarks.report import report

    print(json.dumps(record, indent=1) if args.json else report(record, table))


def _report(args: argparse.Namespace) -> int:
    from splitkern.benchmarks import training_report
    from splitkern.benchmarks.report import markdown, report

    form = markdown if args.markdown else table
    try:
        content = json.loads(args.file.read_text(encoding="utf-8-sig"))
        # The evidence file holds one record per benchmark among its steps.
        steps = content.get("steps")
        records = [content] if steps is None else [step["record"] for step in steps.values() if step.get("record")]
        texts = [
            training_report.report(record, form)
            if record["benchmark"] == "training"
            else report(record, form, summary=args.summary)
            for record in records
        ]
    except OSError as error:
        raise UserError(f"{args.file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{args.file} must be a file of splitkern bench conv, pool, copy or training, or of make gpu-evidence, "
            f"and is none"
        ) from error
    print("\n\n".join(texts) or "no benchmark has been measured")
    return 0
