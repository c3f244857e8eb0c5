"""How large a batch a plan allows under a budget, against how much slower a step then is: by prediction, for every
strategy, on machines of the cost models.

A network is captured at two batch sizes; every size, offset, stride and count of the step is affine in the batch, so
that the step of any batch follows, which a third capture proves. Nothing here is measured: results are estimates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitkern.benchmarks.networks import NetworkOptions, capture_network
from splitkern.memory.cost_model import CostModel, with_durations

if TYPE_CHECKING:
    from splitkern.memory.capture import CapturedStep

SLOWDOWNS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)
CAPTURED_BATCHES = (2, 4, 7)
NETWORKS = ("vgg19", "resnet50")
GRIDS = ((1, 1), (2, 2), (4, 4))
_LARGEST_BATCH = 1 << 16
_ROUNDING = 1e-9  # of a slowdown


class ScaleError(ValueError):
    """A step that is not affine in its batch."""


@dataclass(frozen=True)
class Cost:
    """What a cost model reads of an operation."""

    target: str
    flop: int
    bytes: int
    call: Any = None


@dataclass(frozen=True)
class _Call:
    overload: str


@dataclass(frozen=True)
class ScalableStep:
    """A training step at any batch, from captures at two.

    Attributes:
        batches: of the captures.
        values: what was captured at each: the graph, as JSON holds it, and "costs", [flop, bytes] per operation.
        calls: name of every operation's call.
    """

    batches: tuple[int, int]
    values: tuple[Mapping[str, Any], Mapping[str, Any]]
    calls: Sequence[str]

    @classmethod
    def capture(cls, options: NetworkOptions, *, batches: Sequence[int] = CAPTURED_BATCHES) -> ScalableStep:
        """Captures a network at three batches and proves the third from the others.

        Args:
            options: the network; its batch does not matter.
            batches: three different ones.

        Raises:
            ScaleError: where the third is not what the other two predict; the text says where.
        """
        low, high, proof = batches
        steps = [capture_network(replace(options, batch=batch)) for batch in (low, high, proof)]
        values = [_value(step) for step in steps]
        step = cls((low, high), (values[0], values[1]), [str(one.call.overload) for one in steps[0].operations])
        difference = _first_difference(step.at(proof), values[2], "step")
        if difference is not None:
            raise ScaleError(f"{options.text} is not affine in its batch: at batch {proof} {difference}")
        return step

    def at(self, batch: int) -> dict[str, Any]:
        """The graph at a batch, as JSON holds it, with "costs".

        Raises:
            ScaleError: where the two captures differ in more than numbers.
        """
        found: dict[str, Any] = _between(self.values[0], self.values[1], *self.batches, batch, "step")
        return found

    def graph_json(self, batch: int, model: CostModel, name: str) -> str:
        """The graph at a batch with a cost model's durations, as JSON text."""
        graph = self.at(batch)
        costs = graph.pop("costs")
        durations_us = model.durations_us(
            Cost(operation["target"], flop, size_bytes, _Call(call))
            for operation, (flop, size_bytes), call in zip(graph["operations"], costs, self.calls, strict=True)
        )
        return json.dumps({**with_durations(graph, durations_us, model.label), "name": name})


def _value(step: CapturedStep) -> dict[str, Any]:
    graph = step.graph_dict()
    # Names of tensors hold their shapes.
    tensors = [{**tensor, "name": f"tensor {index}"} for index, tensor in enumerate(graph["tensors"])]
    costs = [[one.flop, one.bytes] for one in step.operations]
    return {**graph, "name": "", "tensors": tensors, "costs": costs}


def _between(low: Any, high: Any, low_batch: int, high_batch: int, batch: int, where: str) -> Any:
    """Every number on the line through its values at two batches; everything else must be equal."""
    # Most of a step does not depend on the batch: equal parts are shared, not copied.
    if type(low) is type(high) and low == high:
        return low
    if isinstance(low, dict) and isinstance(high, dict) and low.keys() == high.keys():
        return {
            key: _between(value, high[key], low_batch, high_batch, batch, f"{where}.{key}")
            for key, value in low.items()
        }
    if isinstance(low, list) and isinstance(high, list) and len(low) == len(high):
        return [
            _between(one, other, low_batch, high_batch, batch, f"{where}[{index}]")
            for index, (one, other) in enumerate(zip(low, high, strict=True))
        ]
    if type(low) is int and type(high) is int:
        rise, rest = divmod((high - low) * (batch - low_batch), high_batch - low_batch)
        if not rest:
            return low + rise
    raise ScaleError(f"{where} is {_short(low)} at batch {low_batch} and {_short(high)} at batch {high_batch}")


def _first_difference(predicted: Any, captured: Any, where: str) -> str | None:
    if isinstance(predicted, dict) and isinstance(captured, dict) and predicted.keys() == captured.keys():
        pairs = [(f"{where}.{key}", value, captured[key]) for key, value in predicted.items()]
    elif isinstance(predicted, list) and isinstance(captured, list) and len(predicted) == len(captured):
        pairs = [
            (f"{where}[{index}]", one, other)
            for index, (one, other) in enumerate(zip(predicted, captured, strict=True))
        ]
    elif predicted == captured:
        return None
    else:
        return f"{where} is {_short(captured)}, predicted was {_short(predicted)}"
    return next(
        (found for place, one, other in pairs if (found := _first_difference(one, other, place)) is not None), None
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Point:
    """A plan: batch, and predicted time per image in µs; None where nothing fits."""

    batch: int
    image_us: float | None


@dataclass(frozen=True)
class Plain:
    """What everything is compared with: not split, nothing offloaded or recomputed, the largest batch that fits."""

    batch: int
    image_us: float


def largest_plain(evaluate: Callable[[int], float | None]) -> Plain:
    """The largest batch that fits, by doubling and bisection.

    Args:
        evaluate: predicted µs per image of a batch, None where it does not fit.

    Raises:
        ValueError: where not even one image fits.
    """
    fits, image_us = 0, evaluate(1)
    if image_us is None:
        raise ValueError("not even a batch of 1 fits the budget")
    fits, above = 1, 2
    found = image_us
    while above <= _LARGEST_BATCH and (image_us := evaluate(above)) is not None:
        fits, above, found = above, 2 * above, image_us
    while above - fits > 1:
        middle = (fits + above) // 2
        if (image_us := evaluate(middle)) is None:
            above = middle
        else:
            fits, found = middle, image_us
    return Plain(fits, found)


def largest_batches(
    evaluate: Callable[[int], float | None],
    plain: Plain,
    *,
    slowdowns: Sequence[float] = SLOWDOWNS,
    resolution: float = 0.02,
) -> tuple[dict[float, int], list[Point]]:
    """The largest batch within each slowdown per image.

    A coarse search upwards from the plain batch, then bisection between the last batch within the slowdown and the next
    one beyond it. Slowdowns need not rise steadily with the batch: the answer is the largest batch found, not a proof
    that no larger one exists.

    Args:
        evaluate: predicted µs per image of a batch, None where it does not fit.
        plain: what to compare with.
        slowdowns: 0.1 for 10 %.
        resolution: the answer is this share of itself below the next batch that was found to be too slow, or one image.

    Returns:
        Largest batch by slowdown, 0 where there is none; and every point that was evaluated, by batch.
    """
    points: dict[int, float | None] = {}

    def slowdown(batch: int) -> float:
        if batch not in points:
            points[batch] = evaluate(batch)
        image_us = points[batch]
        return math.inf if image_us is None else image_us / plain.image_us - 1

    steps, misses = [plain.batch], 0
    if slowdown(plain.batch) > max(slowdowns):
        # Splitting or moving may cost so much that a smaller batch has to do.
        while steps[0] > 1 and slowdown(steps[0]) > max(slowdowns):
            steps.insert(0, max(1, steps[0] * 2 // 3))
    while misses < 2 and steps[-1] < _LARGEST_BATCH:
        steps.append(max(steps[-1] + 1, round(steps[-1] * 1.4)))
        misses = misses + 1 if slowdown(steps[-1]) > max(slowdowns) else 0
    answers = {}
    for limit in slowdowns:
        within = [batch for batch in sorted(points) if slowdown(batch) <= limit + _ROUNDING]
        if not within:
            answers[limit] = 0
            continue
        low = within[-1]
        high = min((batch for batch in points if batch > low), default=low + 1)
        while high - low > max(1, int(resolution * low)):
            middle = (low + high) // 2
            low, high = (middle, high) if slowdown(middle) <= limit + _ROUNDING else (low, middle)
        answers[limit] = low
    return answers, [Point(batch, points[batch]) for batch in sorted(points)]


class Planner:
    """Plans a network at any batch on one machine; graphs are kept, as every strategy asks for the same ones."""

    def __init__(self, step: ScalableStep, model: CostModel, name: str) -> None:
        self._step, self._model, self._name = step, model, name
        self._graphs: dict[int, Any] = {}
        self._host_bytes: dict[tuple[int, str], int] = {}

    def host_bytes(self, batch: int, strategy: str) -> int:
        """Pinned host memory of a plan that `image_us` has made; 0 for none."""
        return self._host_bytes.get((batch, strategy), 0)

    def image_us(self, batch: int, strategy: str) -> float | None:
        """Predicted µs per image, or None where no plan of that strategy fits the machine's memory."""
        from splitkern import _core

        if batch not in self._graphs:
            text = self._step.graph_json(batch, self._model, f"{self._name}, batch {batch}")
            self._graphs[batch] = _core.Graph.from_json(text)
        graph = self._graphs[batch]
        limits = _core.Limits(
            device_bytes=self._model.device_bytes,
            offload_gbps=self._model.offload_gbps,
            prefetch_gbps=self._model.prefetch_gbps,
            copy_latency_us=self._model.copy_latency_us,
        )
        try:
            plan = _core.plan(graph, limits, strategy=strategy)
        except _core.Infeasible:
            return None
        _core.validate(graph, plan)
        self._host_bytes[batch, strategy] = plan.predicted.host_peak_bytes
        return float(plan.predicted.step_us) / batch


@dataclass(frozen=True)
class Curve:
    """One strategy on one grid of one network on one machine.

    Attributes:
        machine, network, grid, strategy: which.
        plain_batch: largest batch of the network as it is.
        plain_image_us: its time per image.
        batches: largest batch by slowdown.
        host_bytes: pinned host memory that its plan needs, by slowdown.
        points: everything evaluated.
    """

    machine: str
    network: str
    grid: tuple[int, int]
    strategy: str
    plain_batch: int
    plain_image_us: float
    batches: Mapping[float, int]
    host_bytes: Mapping[float, int]
    points: Sequence[Point]

    def as_row(self) -> dict[str, Any]:
        """As JSON holds it; slowdowns as text."""
        by_slowdown = {
            name: {f"{limit:.2f}": value for limit, value in getattr(self, name).items()}
            for name in ("batches", "host_bytes")
        }
        return {**asdict(self), **by_slowdown}

    @property
    def multipliers(self) -> dict[float, float]:
        """Batch over the plain batch, by slowdown."""
        return {limit: batch / self.plain_batch for limit, batch in self.batches.items()}


def curve_of_row(row: Mapping[str, Any]) -> Curve:
    """What `Curve.as_row` wrote."""
    return Curve(
        machine=row["machine"],
        network=row["network"],
        grid=(row["grid"][0], row["grid"][1]),
        strategy=row["strategy"],
        plain_batch=row["plain_batch"],
        plain_image_us=row["plain_image_us"],
        batches={float(limit): batch for limit, batch in row["batches"].items()},
        host_bytes={float(limit): size for limit, size in row["host_bytes"].items()},
        points=[Point(**point) for point in row["points"]],
    )


def best(curves: Sequence[Curve]) -> dict[tuple[str, str, str], dict[float, tuple[float, tuple[int, int]]]]:
    """Of every (machine, network, strategy) the largest multiplier by slowdown, and the grid that reaches it."""
    found: dict[tuple[str, str, str], dict[float, tuple[float, tuple[int, int]]]] = {}
    for curve in curves:
        entry = found.setdefault((curve.machine, curve.network, curve.strategy), {})
        for limit, multiplier in curve.multipliers.items():
            if limit not in entry or multiplier > entry[limit][0]:
                entry[limit] = (multiplier, curve.grid)
    return found


def plot(path: Path, curves: Sequence[Curve]) -> None:
    """Draws multiplier against slowdown: a chart per machine and network, a line per strategy, its best grid.

    Args:
        path: the PNG to write.
        curves: of any machines, networks, grids and strategies.

    Raises:
        OSError: where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = best(curves)
    machines = list(dict.fromkeys(curve.machine for curve in curves))
    networks = list(dict.fromkeys(curve.network for curve in curves))
    strategies = list(dict.fromkeys(curve.strategy for curve in curves))
    figure = Figure(figsize=(5.4 * len(networks) + 0.4, 3.7 * len(machines) + 0.7), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(machines), len(networks), squeeze=False)
    colors = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
    for row, machine in enumerate(machines):
        for column, network in enumerate(networks):
            axes = grid[row][column]
            for index, strategy in enumerate(strategies):
                entry = found.get((machine, network, strategy), {})
                limits = [limit for limit in sorted(entry) if entry[limit][0] > 0]
                axes.plot(
                    [100 * limit for limit in limits],
                    [entry[limit][0] for limit in limits],
                    marker="o",
                    markersize=4,
                    linewidth=4 if strategy == "default" else 1.3,
                    color=colors[index % len(colors)],
                    label=strategy,
                    zorder=2 if strategy == "default" else 3,  # where they agree, both are seen
                )
            axes.set_title(f"{network}, {machine}", loc="left", fontsize=10.5)
            axes.set_xlabel("predicted slowdown per image, at most, %")
            axes.set_ylabel("batch, times the plain one")
            axes.set_ylim(bottom=0)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png")
