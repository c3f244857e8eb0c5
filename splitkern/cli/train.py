"""`splitkern train`: trains a torchvision model as a Split-CNN and shows what that saves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitkern.cli.common import UserError, grid, integer, mib, number, require, table

if TYPE_CHECKING:
    from splitkern.training import BudgetOptions, Progress, RunResult, SplitOptions, TrainOptions

_CHECKPOINTS = {"split": "checkpoint.pt", "unsplit": "baseline.pt"}
_PLOT, _RECORD = "live_bytes.png", "results.json"
# None where they weren't given, so that one given in vain is noticed.
_SPLIT_ARGUMENTS = ("grid", "until", "depth", "boundary", "wiggle", "norm", "order", "recompute", "evaluation")
_MODELS_TEXT = "vgg11, 13, 16, 19 (each also with _bn), resnet18, 34, 50, 101, 152"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `splitkern train`."""
    from splitkern import _core
    from splitkern.training.loop import MODEL_NAMES

    parser.epilog = (
        "Without arguments: ResNet-18 on scikit-learn's handwritten digits, split 2x2 until layer1 with recomputation. "
        "Results go to the folder --out: results.json, live_bytes.png, checkpoint.pt (and baseline.pt)."
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", default="resnet18", metavar="NAME", choices=MODEL_NAMES, help=_MODELS_TEXT)
    what.add_argument(
        "--data",
        default="digits",
        choices=("digits", "cifar10", "imagenet-folder"),
        help="digits come with scikit-learn; the others must lie in --root",
    )
    what.add_argument(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="folder of the data: of cifar-10-batches-py, or of train/CLASS/*.jpg and val/CLASS/*.jpg",
    )
    what.add_argument(
        "--image-size",
        type=integer(8),
        metavar="PIXELS",
        help="height and width (default: 64 digits, 32 cifar10, 224 imagenet-folder)",
    )

    split = parser.add_argument_group("how to split")
    split.add_argument("--grid", type=grid, metavar="RxC", help="patches per axis (default 2x2)")
    where = split.add_mutually_exclusive_group()
    where.add_argument(
        "--until",
        metavar="MODULE",
        help="last module of the split region (default: layer2, on the digits layer1; a VGG's third pooling)",
    )
    where.add_argument(
        "--depth",
        type=number(above=0, at_most=1),
        metavar="SHARE",
        help="share of the window modules that is split, instead of --until",
    )
    split.add_argument("--boundary", choices=("zero", "stochastic", "halo"), help="default zero")
    split.add_argument(
        "--wiggle",
        type=number(at_least=0, below=0.5),
        metavar="W",
        help="wiggle room of stochastic boundaries (default 0.2)",
    )
    split.add_argument(
        "--norm",
        choices=("patch", "image", "frozen"),
        help="how BatchNorm sees patches (default patch)",
    )
    split.add_argument("--order", choices=("patch", "layer"), help="default patch")
    split.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in backward (default: yes with --order patch)",
    )
    split.add_argument("--evaluation", choices=("unsplit", "split"), help="how the test set is seen (default unsplit)")
    split.add_argument("--no-split", action="store_true", help="train the unsplit model only")
    split.add_argument("--compare", action="store_true", help="also train the unsplit model, from the same weights")

    how = parser.add_argument_group("how to train")
    how.add_argument("--epochs", type=integer(1), default=4, metavar="N", help="default 4, enough for the digits")
    how.add_argument("--batch", type=integer(1), default=32, metavar="N", help="images per step (default 32)")
    how.add_argument(
        "--lr",
        type=number(above=0),
        default=0.05,
        metavar="RATE",
        help="peak of the one-cycle learning rate (default 0.05)",
    )
    how.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="autocast type")
    how.add_argument("--memory-format", default="contiguous", choices=("contiguous", "channels_last"))
    how.add_argument("--seed", type=integer(0), default=0, metavar="N")
    how.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    how.add_argument("--workers", type=integer(0), default=0, metavar="N", help="processes that read images")

    memory = parser.add_argument_group("memory budget")
    memory.add_argument(
        "--budget",
        metavar="SIZE",
        help="all device memory of a step, such as 16GiB: its memory is planned, by offload and recomputation. "
        "The baseline of --compare is trained without",
    )
    memory.add_argument("--host-budget", metavar="SIZE", help="host memory for what is offloaded (default: no limit)")
    memory.add_argument(
        "--strategy", choices=tuple(_core.strategy_names()), metavar="NAME", help="of planning (default: default)"
    )

    output = parser.add_argument_group("results")
    output.add_argument(
        "--out", type=Path, default=Path("splitkern-output"), metavar="FOLDER", help="default: splitkern-output"
    )
    output.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out, if any")
    output.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Trains, writes the results and prints them."""
    _refuse_vain(args)
    require("torchvision", "tqdm", "matplotlib", *(["sklearn"] if args.data == "digits" else []))
    import torch

    from splitkern.training import CheckpointError, DataError, OptionsError, TrainOptions
    from splitkern.training.data import DEFAULT_IMAGE_SIZE

    options = TrainOptions(
        model=args.model,
        data=args.data,
        image_size=args.image_size or DEFAULT_IMAGE_SIZE[args.data],
        batch=args.batch,
        epochs=args.epochs,
        lr=args.lr,
        precision=args.precision,
        seed=args.seed,
        memory_format=args.memory_format,
        workers=args.workers,
        device=("cuda" if torch.cuda.is_available() else "cpu") if args.device is None else args.device,
        split=None if args.no_split else _split(args),
        budget=_budget(args),
    )
    try:
        with _output_folder(args.out):
            results = _train_all(args, options)
            record = _write(args.out, options, results)
    except (OptionsError, DataError, CheckpointError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if args.json:
        print(json.dumps(record, indent=2, allow_nan=False))
    else:
        print(_table(results))
        print(f"\nin {args.out}: {_PLOT}, {_RECORD}, {', '.join(_CHECKPOINTS[name] for name in results)}")
    return 0


def _refuse_vain(args: argparse.Namespace) -> None:
    """Raises UserError for options that others leave without effect."""
    if args.no_split and args.compare:
        raise UserError("--compare needs a split model beside the baseline, so it excludes --no-split")
    given = [name for name in _SPLIT_ARGUMENTS if getattr(args, name) is not None]
    if args.no_split and given:
        shown = ["no-recompute" if name == "recompute" and not args.recompute else name for name in given]
        names = ", ".join(f"--{name}" for name in shown)
        raise UserError(f"--no-split trains the unsplit model only, so it excludes {names}")
    if args.until == "":
        raise UserError("--until must name a module of the model, got ''")
    if args.wiggle is not None and args.boundary != "stochastic":
        raise UserError(f"--wiggle needs --boundary stochastic, got --boundary {args.boundary or 'zero'}")
    if args.root is not None and args.data == "digits":
        raise UserError(f"--data digits comes with scikit-learn and excludes --root, got --root {args.root}")


def _split(args: argparse.Namespace) -> SplitOptions:
    from splitkern.training import SplitOptions, default_until

    given = {name: value for name in _SPLIT_ARGUMENTS if (value := getattr(args, name)) is not None}
    split = SplitOptions(**given)
    if args.until is None and args.depth is None:
        until = default_until(args.model)
        # On images as small as the digits, a later join costs accuracy: patches are then mostly border.
        split = replace(split, until="layer1" if until == "layer2" and args.data == "digits" else until)
    return split if args.recompute is not None else replace(split, recompute=split.order == "patch")


def _budget(args: argparse.Namespace) -> BudgetOptions | None:
    from splitkern.memory.report import parse_bytes
    from splitkern.training import BudgetOptions

    sizes = {}
    for name in ("budget", "host_budget"):
        text = getattr(args, name)
        try:
            sizes[name] = None if text is None else parse_bytes(text)
        except ValueError as error:
            raise UserError(f"--{name.replace('_', '-')} {error}") from error
    if sizes["budget"] is None:
        for name in ("host_budget", "strategy"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --budget")
        return None
    return BudgetOptions(sizes["budget"], sizes["host_budget"], args.strategy or "default")


@contextmanager
def _output_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, and tries that files can be written to it: training shall not be in vain.

    What it made and what is still empty at the end, because something was refused, is removed again.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".splitkern-", buffering=0) as file:
                file.write(b"x")
        except OSError as error:
            reason = "is no folder" if isinstance(error, FileExistsError) else f"cannot be written: {error.strerror}"
            raise UserError(f"--out {folder} {reason}") from error
        for name in (*_CHECKPOINTS.values(), _PLOT, _RECORD):
            if (folder / name).is_dir():
                raise UserError(f"--out {folder} cannot be written: {name} in it is a folder")
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _train_all(args: argparse.Namespace, options: TrainOptions) -> dict[str, RunResult]:
    """The runs, unsplit first where both were made."""
    from splitkern.training import load_data, train
    from splitkern.training.loop import check_options

    check_options(options)
    data = load_data(options.data, image_size=options.image_size, root=args.root)
    runs = {"split" if options.split else "unsplit": options}
    if args.compare:
        runs["unsplit"] = replace(options, split=None, budget=None)
    results = {}
    before = {path: _stamp(path) for path in (args.out / _CHECKPOINTS[name] for name in runs)}
    for name, run_options in runs.items():
        checkpoint = args.out / _CHECKPOINTS[name]
        bar = _progress_bar(name)
        if args.resume and not checkpoint.exists():
            print(f"{checkpoint} isn't there yet: the {name} run begins at the beginning", file=sys.stderr)
        try:
            results[name] = train(run_options, data, checkpoint=checkpoint, resume=args.resume, progress=bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_resume_hint(before, resume=args.resume)) from None
        finally:
            bar.end()
    return dict(sorted(results.items(), reverse=True))


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes with every file that is put in place; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _resume_hint(before: Mapping[Path, tuple[int, int] | None], *, resume: bool) -> str:
    """Names the checkpoints to go on from. A file that this command neither wrote nor was to read is another run's."""
    reached = [
        str(path) for path, stamp in before.items() if (now := _stamp(path)) is not None and (resume or now != stamp)
    ]
    if not reached:
        return "no epoch was finished, so this run has no checkpoint"
    return f"the finished epochs are in {' and '.join(reached)}; go on with the same command and --resume"


def _progress_bar(name: str) -> Progress:
    """A bar on a terminal; elsewhere one line per epoch. Both on stderr, so that stdout is the results alone."""
    from tqdm import tqdm

    from splitkern.training import Progress

    class Bar(Progress):
        def begin(self, epochs: int, steps: int, first_epoch: int) -> None:
            self._epochs = epochs
            self._tqdm = tqdm(
                total=epochs * steps, initial=first_epoch * steps, desc=f"{name:7}", unit="step", disable=None
            )

        def planning(self) -> None:
            print(f"{name:7} planning the memory of a step; operations not seen before are measured", file=sys.stderr)

        def planned(self, text: str) -> None:
            print(f"{name:7} {text}", file=sys.stderr)

        def step(self, loss: float) -> None:
            self._tqdm.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._tqdm.update()

        def epoch(self, epoch: int, loss: float, accuracy: float) -> None:
            text = f"{name:7} epoch {epoch}/{self._epochs}: loss {loss:.4f}, test accuracy {accuracy:.2%}"
            tqdm.write(text, file=sys.stderr)

        def end(self) -> None:
            if hasattr(self, "_tqdm"):
                self._tqdm.close()

    return Bar()


def _write(folder: Path, options: TrainOptions, results: dict[str, RunResult]) -> dict[str, Any]:
    """Writes results.json and live_bytes.png; returns what went into results.json."""
    import torch

    from splitkern.plot import Curve, plot_live_bytes

    curves = [Curve(name, result.timeline, result.backward_ms) for name, result in results.items()]
    size = options.image_size
    title = f"{options.model}, batch {options.batch}, {size}×{size}, {options.data}"
    if options.split is not None:
        rows, columns = options.split.grid
        where = options.split.until or f"depth {options.split.depth:g}"
        title += f", grid {rows}×{columns} until {where}, order {options.split.order}"
        title += ", recomputed" if options.split.recompute else ""
    record: dict[str, Any] = {
        "options": asdict(options),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "results": {name: result.summary() for name, result in results.items()},
    }
    if len(results) == 2:
        unsplit, split = results["unsplit"], results["split"]
        record["split_to_unsplit"] = {
            name: _ratio(getattr(split, name), getattr(unsplit, name))
            for name in ("peak_bytes", "total_peak_bytes", "device_peak_bytes", "median_step_ms")
        }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    try:
        _write_whole(folder / _PLOT, lambda path: plot_live_bytes(path, curves, title=title))
        _write_whole(folder / _RECORD, lambda path: path.write_text(text))
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error
    return record


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file by way of another one, so that there is the old content or the new one, and no part of it."""
    temporary = path.with_name(f".{path.name}")  # the suffix tells matplotlib the format
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _ratio(split: float | None, unsplit: float | None) -> float | None:
    return None if split is None or unsplit is None else split / unsplit


def _table(results: dict[str, RunResult]) -> str:
    runs = list(results.values())
    rows = [
        ["test accuracy, evaluated unsplit", *(_percent(run.accuracy_unsplit) for run in runs)],
        ["test accuracy, evaluated split", *(_percent(run.accuracy_split) for run in runs)],
        ["peak live bytes of a step", *(mib(run.peak_bytes) for run in runs)],
        ["  with parameter gradients", *(mib(run.total_peak_bytes) for run in runs)],
        ["  beside it: parameters", *(mib(run.parameter_bytes) for run in runs)],
        ["  beside it: input batch", *(mib(run.input_bytes) for run in runs)],
        ["all device memory of a step, measured", *(mib(run.device_peak_bytes) for run in runs)],
        *_plan_rows(runs),
        ["step time, median", *("-" if (ms := run.median_step_ms) is None else f"{ms:.1f} ms" for run in runs)],
    ]
    header = ["", *results]
    if len(runs) == 2:
        header.append("split/unsplit")
        unsplit, split = runs
        ratios = {
            "peak live bytes of a step": split.peak_bytes / unsplit.peak_bytes,
            "  with parameter gradients": split.total_peak_bytes / unsplit.total_peak_bytes,
            "all device memory of a step, measured": split.device_peak_bytes / unsplit.device_peak_bytes,
            "step time, median": _ratio(split.median_step_ms, unsplit.median_step_ms),
        }
        texts = {label: "-" if ratio is None else f"{ratio:.3f}" for label, ratio in ratios.items()}
        rows = [[*row, texts.get(row[0], "")] for row in rows]
    return table(header, rows)


def _plan_rows(runs: Sequence[RunResult]) -> list[list[str]]:
    """What the plans say, where there are any."""
    if all(run.plan is None for run in runs):
        return []

    def row(label: str, text: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [label, *("-" if run.plan is None else text(run.plan) for run in runs)]

    def done(plan: Mapping[str, Any]) -> str:
        counts = f"{plan['copies']} copies, {plan['recomputed']} recomputed"
        return "left alone: it fits" if plan["is_left_alone"] else counts

    return [
        row("  predicted by the plan", lambda plan: mib(plan["peak_bytes"])),
        row("    arena", lambda plan: mib(plan["arena_bytes"])),
        row("    reserve", lambda plan: mib(plan["reserve_bytes"])),
        row("    host memory", lambda plan: mib(plan["host_bytes"])),
        row("    what it does", done),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
