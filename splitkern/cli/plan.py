"""`splitkern plan`: the memory of one training step, planned: from a network, a graph or a placement problem.

A plan is validated before anything of it is printed or written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitkern.cli.common import (
    LARGEST_BATCH,
    LARGEST_IMAGE_SIZE,
    UserError,
    check_writable,
    device_of,
    grid,
    integer,
    number,
    one_line,
    require,
    write_file,
)

if TYPE_CHECKING:
    from splitkern.memory.cost_model import CostModel
    from splitkern.memory.picture import Scene

EXIT_DOES_NOT_FIT = 1
_DTYPES = ("fp32", "bf16")
# Options by what they apply to; all of them default to None, so that one given in vain is noticed.
_OF_MODELS = ("batch", "image_size", "grid", "until", "norm", "dtype", "memory_format", "measure", "device", "no_cache")
_OF_PLANS = (
    "budget",
    "host_budget",
    "cost_model",
    "offload_gbps",
    "prefetch_gbps",
    "strategy",
    "save",
    "graph_out",
    "trace",
)
_OF_PLACEMENTS = ("capacity", "out", "alignment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `splitkern plan`."""
    from splitkern.memory.cost_model import COST_MODELS

    parser.epilog = (
        "Exit code: 0 when everything fits, 1 when it does not, 2 for what cannot be planned at all. "
        "Sizes: 16GiB, 34GB, 1048576."
    )
    parser.add_argument(
        "what",
        metavar="MODEL|GRAPH.json|TRACE.csv",
        help="a torchvision VGG or ResNet; a splitkern.graph file; or a placement problem in MiniMalloc's CSV format",
    )
    network = parser.add_argument_group("a network")
    network.add_argument("--batch", type=integer(1, LARGEST_BATCH), metavar="N", help="images per step (default 64)")
    image_size = integer(8, LARGEST_IMAGE_SIZE)
    network.add_argument("--image-size", type=image_size, metavar="PIXELS", help="height and width (default 224)")
    network.add_argument("--grid", type=grid, metavar="RxC", help="patches per axis (default: not split)")
    network.add_argument("--until", metavar="MODULE", help="last module of the split region (default: as for train)")
    network.add_argument(
        "--norm", choices=("patch", "frozen"), help="how BatchNorm sees patches (default patch, where there is one)"
    )
    network.add_argument("--dtype", choices=_DTYPES, help="bf16: under autocast (default: the cost model's, else fp32)")
    network.add_argument("--memory-format", choices=("contiguous", "channels_last"), help="default contiguous")

    machine = parser.add_argument_group("the machine")
    how = machine.add_mutually_exclusive_group()
    names = "; ".join(f"{name}: {model.description}" for name, model in COST_MODELS.items())
    how.add_argument(
        "--cost-model",
        choices=tuple(COST_MODELS),
        metavar="NAME",
        help=f"a machine by its rates: durations, link and budget are estimates. {names} (default paper)",
    )
    how.add_argument(
        "--measure",
        action="store_true",
        default=None,
        help="measure every operation and the link on this machine instead",
    )
    machine.add_argument(
        "--device", metavar="DEVICE", help="with --measure: cpu, cuda or cuda:N (default: cuda if any)"
    )
    machine.add_argument(
        "--no-cache", action="store_true", default=None, help="with --measure: neither use nor keep measurements"
    )
    machine.add_argument("--budget", type=_size, metavar="SIZE", help="device memory (default: the machine's)")
    machine.add_argument("--host-budget", type=_size, metavar="SIZE", help="pinned host memory (default: unlimited)")
    rate = number(at_least=0)
    machine.add_argument("--offload-gbps", type=rate, metavar="GB/S", help="link to the host; 0: no copies")
    machine.add_argument("--prefetch-gbps", type=rate, metavar="GB/S", help="link back")

    parser.add_argument("--strategy", metavar="NAME", help="default, none, recompute, hmms-paper or layerwise")

    placement = parser.add_argument_group("a placement problem")
    placement.add_argument("--capacity", type=_size, metavar="SIZE", help="what all buffers together must fit into")
    placement.add_argument("--alignment", type=integer(1), metavar="BYTES", help="of every offset (default 1)")
    placement.add_argument("--out", type=Path, metavar="PLACED.csv", help="the problem with a column of offsets")

    results = parser.add_argument_group("results")
    results.add_argument("--save", type=Path, metavar="PLAN.json", help="the plan")
    results.add_argument("--graph-out", type=Path, metavar="GRAPH.json", help="the graph, with its durations")
    results.add_argument("--picture", type=Path, metavar="FILE.png", help="time across, address up")
    results.add_argument("--html", type=Path, metavar="FILE.html", help="the same as a page that can be zoomed")
    results.add_argument("--trace", type=Path, metavar="FILE.json", help="timeline for ui.perfetto.dev")
    results.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Plans and prints.

    Returns:
        0, or 1 where it does not fit.

    Raises:
        UserError: for arguments, files and networks that cannot be planned.
    """
    if args.picture is not None:
        require("matplotlib")
    check_writable(args, "out", "save", "graph_out", "picture", "html", "trace")
    suffix = Path(args.what).suffix.lower()
    if suffix == ".csv":
        _refuse(args, (*_OF_MODELS, *_OF_PLANS), "a placement problem")
        return _place(args)
    _refuse(args, _OF_PLACEMENTS, "a graph" if suffix == ".json" else "a network")
    if suffix == ".json":
        _refuse(args, _OF_MODELS, "a graph, which has its operations and durations already")
        return _plan(args, _read_graph(Path(args.what)), _machine_of_graph(args))
    return _plan(args, *_capture(args))


def _size(text: str) -> int:
    """Argument type: bytes."""
    from splitkern.memory.report import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _refuse(args: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise UserError(f"{args.what} is {what}: {', '.join(given)} cannot apply to it")


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """Tells a terminal what takes long."""
    if not sys.stderr.isatty():
        with nullcontext():
            yield
        return
    print(f"{text} …", end="", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        yield
    finally:
        print(f"\r{text}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from error


# --- plans --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Machine:
    """Budgets and link; None: unlimited."""

    device_bytes: int | None
    host_bytes: int | None
    offload_gbps: float
    prefetch_gbps: float
    copy_latency_us: float


def _machine(
    args: argparse.Namespace, device_bytes: int | None, link: tuple[float, float], latency_us: float
) -> _Machine:
    offload, prefetch = args.offload_gbps, args.prefetch_gbps
    return _Machine(
        device_bytes=device_bytes if args.budget is None else args.budget,
        host_bytes=args.host_budget,
        offload_gbps=link[0] if offload is None else offload,
        prefetch_gbps=link[1] if prefetch is None else prefetch,
        copy_latency_us=latency_us,
    )


def _machine_of(args: argparse.Namespace, model: CostModel) -> _Machine:
    return _machine(args, model.device_bytes, (model.offload_gbps, model.prefetch_gbps), model.copy_latency_us)


def _machine_of_graph(args: argparse.Namespace) -> _Machine:
    """Of a cost model where one is named; else what the options say, and no copies unless they give the link."""
    if args.cost_model is not None:
        from splitkern.memory.cost_model import cost_model

        return _machine_of(args, cost_model(args.cost_model))
    return _machine(args, None, (0.0, 0.0), 0.0)


def _read_graph(path: Path) -> Any:
    from splitkern import _core

    text = _read(path)
    try:
        return _core.Graph.from_json(text)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def _capture(args: argparse.Namespace) -> tuple[Any, _Machine]:
    """The graph of a network's training step with durations, and the machine."""
    require("torchvision")
    import torch

    from splitkern import _core
    from splitkern.benchmarks.networks import NetworkOptions, capture_network
    from splitkern.memory.cost_model import COST_MODELS, cost_model

    for option in ("device", "no_cache"):
        if getattr(args, option) is not None and not args.measure:
            raise UserError(f"--{option.replace('_', '-')} needs --measure")
    model = None
    if not args.measure:
        of_dtype = [one.name for one in COST_MODELS.values() if args.dtype in (None, one.dtype)]
        model = cost_model(args.cost_model or of_dtype[0])
        if args.dtype not in (None, model.dtype):
            raise UserError(
                f"cost model {model.name} knows the rates of {model.dtype}, not of {args.dtype}; "
                f"of that type: {', '.join(of_dtype)}"
            )
    default = "cuda" if args.measure and torch.cuda.is_available() else "cpu"
    device = device_of(default if args.device is None else args.device)
    options = NetworkOptions(
        model=args.what,
        batch=args.batch or 64,
        image_size=args.image_size or 224,
        grid=args.grid or (1, 1),
        until=args.until,
        norm=args.norm,
        dtype=args.dtype or (model.dtype if model else "fp32"),
        memory_format=args.memory_format or "contiguous",
        device=str(device),
        device_type=device.type if args.measure else "cuda",
    )
    try:
        with _stage(f"capturing {options.text}"):
            step = capture_network(options)
        if model is not None:
            machine = _machine_of(args, model)
            step = step.with_durations(model.durations_us(step.operations), model.label)
        else:
            step, machine = _measure(args, step, device)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(one_line(error)) from error
    return _core.Graph.from_json(step.graph_json()), machine


def _measure(args: argparse.Namespace, step: Any, device: Any) -> tuple[Any, _Machine]:
    require("tqdm")
    import torch
    from tqdm import tqdm

    from splitkern.memory.profile import DurationCache, measure_link, measure_step

    with tqdm(desc="measuring", unit="operation", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        cache = None if args.no_cache else DurationCache()
        profile = measure_step(step, device=device, cache=cache, progress=progress)
    step = step.with_durations(profile.durations_us, profile.label, workspace_bytes=profile.workspace_bytes)
    with _stage("measuring the link"):
        link = measure_link(device)
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return step, _machine(args, total, (link.offload_computing_gbps, link.prefetch_computing_gbps), 0.0)


def _plan(args: argparse.Namespace, graph: Any, machine: _Machine) -> int:
    from splitkern import _core
    from splitkern.memory.picture import scene_of_plan
    from splitkern.memory.report import PlanView, report
    from splitkern.memory.timeline import Timeline, write_trace

    strategy = args.strategy or "default"
    names = _core.strategy_names()
    if strategy not in names:
        raise UserError(f"--strategy must be one of {', '.join(names)}, got {strategy!r}")
    try:
        limits = _core.Limits(
            device_bytes=machine.device_bytes,
            host_bytes=machine.host_bytes,
            offload_gbps=machine.offload_gbps,
            prefetch_gbps=machine.prefetch_gbps,
            copy_latency_us=machine.copy_latency_us,
        )
        with _stage(f"planning {len(graph.operations):,} operations"):
            plan = _core.plan(graph, limits, strategy=strategy)
        with _stage("validating"):
            _core.validate(graph, plan)
    except _core.Infeasible as error:
        print(f"splitkern plan: {one_line(error)}", file=sys.stderr)
        if args.json:
            found = {
                "fits": False,
                "pool": error.pool,
                "budget_bytes": error.budget_bytes,
                "smallest_feasible_bytes": error.smallest_feasible_bytes,
            }
            print(json.dumps(found, indent=2))
        return EXIT_DOES_NOT_FIT
    except ValueError as error:
        raise UserError(one_line(error)) from error
    view = PlanView(graph, plan)
    timeline = Timeline.of(_core.simulate(graph, plan))
    told = report(view, [(span.begin_us, span.end_us) for span in timeline.copies])
    try:
        if args.save is not None:
            write_file("--save", args.save, lambda path: path.write_text(plan.to_json() + "\n", encoding="utf-8"))
        if args.graph_out is not None:
            text = graph.to_json() + "\n"
            write_file("--graph-out", args.graph_out, lambda path: path.write_text(text, encoding="utf-8"))
        if args.trace is not None:
            write_file("--trace", args.trace, lambda path: write_trace(path, view, timeline))
        if args.picture is not None or args.html is not None:
            _draw(args, scene_of_plan(view, timeline))
    finally:  # what was planned, and perhaps measured, is not lost with a file
        print(json.dumps({"fits": True, **told.as_dict()}, indent=2) if args.json else told.text())
    return 0


def _draw(args: argparse.Namespace, scene: Scene) -> None:
    if args.picture is not None:
        from splitkern.memory.picture_png import write_png

        with _stage("drawing"):
            write_file("--picture", args.picture, lambda path: write_png(path, scene))
    if args.html is not None:
        from splitkern.memory.picture_html import write_html

        write_file("--html", args.html, lambda path: write_html(path, scene))


# --- placement problems -------------------------------------------------------------------------------------------


def _place(args: argparse.Namespace) -> int:
    from splitkern import _core

    path = Path(args.what)
    text = _read(path)
    try:
        problem = _core.read_minimalloc_csv(text)
        buffers = problem.buffers
        with _stage(f"placing {len(buffers):,} buffers"):
            placed = _core.place(buffers, alignment_bytes=args.alignment or 1, capacity_bytes=args.capacity)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    fits = args.capacity is None or placed.peak_bytes <= args.capacity
    try:
        if fits:
            _write_placement(args, problem, placed)
    finally:
        _print_placement(args, len(buffers), placed)
    if not fits:
        over = placed.peak_bytes - args.capacity
        print(
            f"splitkern plan: {path} does not fit --capacity {args.capacity}: {over:,} bytes too many, no file is "
            "written",
            file=sys.stderr,
        )
    return 0 if fits else EXIT_DOES_NOT_FIT


def _write_placement(args: argparse.Namespace, problem: Any, placed: Any) -> None:
    from splitkern import _core
    from splitkern.memory.picture import scene_of_placement

    buffers = problem.buffers
    if args.out is not None:
        solved = _core.MinimallocCsv(ids=problem.ids, buffers=buffers, offsets=placed.offsets)
        csv = _core.write_minimalloc_csv(solved)
        write_file("--out", args.out, lambda file: file.write_text(csv, encoding="utf-8"))
    if args.picture is not None or args.html is not None:
        scene = scene_of_placement(
            Path(args.what).stem,
            [one.begin for one in buffers],
            [one.end for one in buffers],
            [one.size_bytes for one in buffers],
            placed.offsets,
            problem.ids,
            lower_bound_bytes=placed.lower_bound_bytes,
            capacity_bytes=args.capacity,
        )
        _draw(args, scene)


def _print_placement(args: argparse.Namespace, buffers: int, placed: Any) -> None:
    from splitkern.memory.report import bytes_text

    fits = args.capacity is None or placed.peak_bytes <= args.capacity
    found = {
        "fits": fits,
        "buffers": buffers,
        "peak_bytes": placed.peak_bytes,
        "lower_bound_bytes": placed.lower_bound_bytes,
        "capacity_bytes": args.capacity,
    }
    if args.json:
        print(json.dumps(found, indent=2))
        return
    ratio = f"{placed.peak_bytes / placed.lower_bound_bytes:.4f} of it" if placed.lower_bound_bytes else "equal to it"
    print(f"{args.what}: {buffers:,} buffers")
    print(f"lower bound  {placed.lower_bound_bytes:,} bytes ({bytes_text(placed.lower_bound_bytes)})")
    print(f"peak         {placed.peak_bytes:,} bytes ({bytes_text(placed.peak_bytes)}), {ratio}")
    if args.capacity is not None:
        over = placed.peak_bytes - args.capacity
        verdict = "everything fits" if fits else f"does not fit: {over:,} bytes too many"
        print(f"capacity     {args.capacity:,} bytes ({bytes_text(args.capacity)}): {verdict}")
