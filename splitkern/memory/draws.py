"""Steps of a compiled model whose patch boundaries are drawn afresh: one plan's decisions, an executor for every draw.

A forward pass draws as the model that is not compiled does: from PyTorch's CPU generator, before anything else. While a
step runs, a thread prepares the one that comes next if nobody else draws until then; where somebody does, the forward
pass prepares its own draw. Called by :mod:`splitkern.memory.compile`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor, nn

from splitkern import _core, geometry
from splitkern.geometry import Span
from splitkern.memory.arenas import Arenas
from splitkern.memory.capture import CapturedStep, CaptureError
from splitkern.memory.executor import ExecutorOptions, StepExecutor
from splitkern.memory.family import Draw, DrawError, Family, fit
from splitkern.split.layout import Layout
from splitkern.split.surgery import SplitForward, make_layout, split_forward_of
from splitkern.split.trace import Program

__all__ = ["Drawing", "DrawnSteps", "capture_family", "decide", "drawing_split_of"]

#: Draws, beside the even boundaries, at which a plan's decisions must fit the budget.
SAMPLED_DRAWS = 32
#: Draws of one forward pass that do not fit before it is given up.
TRIES = 32
#: Steps that are kept ready: boundaries of few values come again soon.
_KEPT = 4
_ROUNDS = 4
#: Work on the addresses of a draw, where simple rules do not fit them in: as of `splitkern._core.place_again`.
_EFFORT = 10_000


def drawing_split_of(model: nn.Module) -> SplitForward | None:
    """The split of the model, or of a module inside it, that draws its boundaries in training; None without one.

    Raises:
        CaptureError: there are several.
    """
    found = {id(split): split for module in model.modules() if (split := split_forward_of(module)) is not None}
    drawing = [split for split in found.values() if split.is_drawing]
    if len(drawing) > 1:
        raise CaptureError(
            f'a compiled model can hold one split with boundary="stochastic", got {len(drawing)}; '
            'split the others with boundary="zero"'
        )
    return drawing[0] if drawing else None


# --- boundaries ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """Where a split draws its boundaries, for one input size.

    Attributes:
        split: draws.
        program: its traced model.
        extents: height and width of the images.
        join: name of the value whose boundaries are drawn.
        ranges: smallest and largest value of every interior boundary there, rows first.
        even: the layout with even boundaries.
    """

    split: SplitForward
    program: Program
    extents: tuple[int, int]
    join: str
    ranges: tuple[Span, ...]
    even: Layout

    @classmethod
    def of(cls, split: SplitForward, program: Program, extents: tuple[int, int]) -> Drawing:
        """Of a split for images of these extents."""
        options, region = split.options, program.region
        even = make_layout(program, extents, options)
        read = {name for operation in region.operations for name in operation.inputs}
        join = next(name for name in region.outputs if name not in read)
        ranges: list[Span] = []
        for axis, cut in zip((even.rows, even.cols), options.grid, strict=True):
            if isinstance(cut, int):
                ranges += geometry.draw_ranges(axis.extents[join], cut, options.wiggle)
            else:
                ranges += ((bound, bound) for bound in cut[1:-1])
        return cls(split, program, extents, join, tuple(ranges), even)

    @property
    def rows(self) -> int:
        """How many of the boundaries are of rows."""
        return len(self.even.rows.bounds[self.join]) - 2

    def of_layout(self, layout: Layout) -> Draw:
        """The boundaries of a layout."""
        return layout.rows.bounds[self.join][1:-1] + layout.cols.bounds[self.join][1:-1]

    def layout(self, draw: Draw) -> Layout:
        """The layout with given boundaries.

        Raises:
            ValueError: where they do not fit the network.
        """
        rows, cols = (
            (0, *bounds, axis.extents[self.join])
            for axis, bounds in (
                (self.even.rows, draw[: self.rows]),
                (self.even.cols, draw[self.rows :]),
            )
        )
        return make_layout(self.program, self.extents, replace(self.split.options, grid=(rows, cols)))

    def samples(self, count: int, seed: int = 0) -> list[Draw]:
        """Different draws that fit the network, at most `count`; PyTorch's own random state stays as it is."""
        generator = torch.Generator().manual_seed(seed)
        layouts = (self.split.draw(self.program, self.extents, generator) for _ in range(count))
        return list(dict.fromkeys(self.of_layout(layout) for layout in layouts))

    def alone(self) -> Iterator[Layout]:
        """The layouts that differ from the even one in one boundary alone, wherever the network allows it."""
        origin = self.of_layout(self.even)
        for place, (low, high) in enumerate(self.ranges):
            for bound in range(low, high + 1):
                try:
                    yield self.layout((*origin[:place], bound, *origin[place + 1 :]))
                except ValueError:
                    continue  # not with the others even: `_Lines.require` sees to such a draw when it comes

    def fits(self, draw: Draw) -> bool:
        """Whether the network can be cut there."""
        try:
            self.layout(draw)
        except ValueError:
            return False
        return True

    def extreme(self, odd_rows: bool, odd_cols: bool) -> Draw:
        """Boundaries at the ends of their ranges, up and down in turn: every other patch is as small as can be."""
        rows = [span[(i + odd_rows) % 2] for i, span in enumerate(self.ranges[: self.rows])]
        return (*rows, *(span[(i + odd_cols) % 2] for i, span in enumerate(self.ranges[self.rows :])))

    def one_step(self) -> list[Draw]:
        """For every boundary that can move, a draw that differs from the even ones by one in it alone.

        Raises:
            DrawError: a boundary can be drawn elsewhere, but not next to its even place.
        """
        origin = self.of_layout(self.even)
        found: list[Draw] = []
        for place, (low, high) in enumerate(self.ranges):
            if low == high:
                continue
            moved = [
                (*origin[:place], origin[place] + step, *origin[place + 1 :])
                for step in (1, -1)
                if low <= origin[place] + step <= high
            ]
            fitting = [draw for draw in moved if self.fits(draw)]
            if not fitting:
                raise DrawError(f"boundary {place} of {list(origin)} fits the network nowhere else than there")
            found.append(fitting[0])
        return found


class _Lines:
    """Along an axis every boundary moves in step with the join's, each value's by its own total stride.

    Raises:
        DrawError: for a boundary that does not, wherever it can be drawn alone.
    """

    def __init__(self, drawing: Drawing) -> None:
        self._join, self._even = drawing.join, drawing.even
        self._strides: list[dict[str, int]] = []
        moves = [drawing.layout(draw) for draw in drawing.one_step()]
        for even, others in (
            (drawing.even.rows, [layout.rows for layout in moves]),
            (drawing.even.cols, [layout.cols for layout in moves]),
        ):
            moved = next((other for other in others if other.bounds != even.bounds), even)
            shift = sum(moved.bounds[drawing.join]) - sum(even.bounds[drawing.join])
            self._strides.append(
                {name: (sum(moved.bounds[name]) - sum(even.bounds[name])) * shift for name in even.bounds}
            )
        for layout in drawing.alone():
            self.require(layout)

    def require(self, layout: Layout) -> None:
        """Refuse a layout that is off these lines: the family does not hold there.

        Raises:
            DrawError: naming the value.
        """
        for strides, even, drawn in zip(
            self._strides, (self._even.rows, self._even.cols), (layout.rows, layout.cols), strict=True
        ):
            moved = [one - other for one, other in zip(drawn.bounds[self._join], even.bounds[self._join], strict=True)]
            for name, bounds in drawn.bounds.items():
                if any(
                    bound != other + strides[name] * by
                    for bound, other, by in zip(bounds, even.bounds[name], moved, strict=True)
                ):
                    raise DrawError(
                        f"the boundaries {list(bounds)} of {name} do not move in step with those of {self._join}; "
                        'use boundary="zero"'
                    )


# --- capture and decisions ----------------------------------------------------------------------------------------


def capture_family(split: SplitForward, capture: Callable[[], CapturedStep]) -> tuple[Family, Drawing]:
    """The steps of all draws, from captures at a few.

    Args:
        split: inside the model that is captured.
        capture: captures the model.

    Raises:
        DrawError: the step is no exact function of the boundaries.
        CaptureError: the step cannot be captured, or does not run the split once, first of all that is random.
    """
    seen: list[tuple[Program, tuple[int, int]]] = []

    def even(program: Program, extents: tuple[int, int]) -> Layout:
        seen.append((program, extents))
        return make_layout(program, extents, split.options)

    with split.choosing(even):
        base = capture()
    if len(seen) != 1:
        raise CaptureError(f'a step must run a split with boundary="stochastic" once, got {len(seen)} times')
    region = next((i for i, one in enumerate(base.operations) if one.segment == "region"), 0)
    early = next((one.name for one in base.operations[:region] if one.is_random), None)
    if early is not None and base.device.type == "cpu":
        raise CaptureError(f"{early} draws random numbers before the boundaries are drawn; split from there on")
    drawing = Drawing.of(split, *seen[0])

    def at(draw: Draw) -> CapturedStep:
        layout = drawing.layout(draw)
        with split.choosing(lambda program, extents: layout):
            return capture()

    extremes = [drawing.extreme(rows, cols) for rows, cols in ((False, False), (True, True), (False, True))]
    joint = [draw for draw in (*extremes, *drawing.samples(8, seed=1)) if drawing.fits(draw)]
    family = fit(
        at,
        base,
        drawing.of_layout(drawing.even),
        drawing.rows,
        single=drawing.one_step(),
        joint=joint,
        held_out=[draw for draw in dict.fromkeys((extremes[1], *drawing.samples(1, seed=2))) if drawing.fits(draw)],
    )
    return family, drawing


def decide(graph: _core.Graph, samples: Sequence[_core.Graph], limits: _core.Limits, strategy: str) -> _core.Plan:
    """A plan whose decisions fit the limits at other sizes too.

    Args:
        graph: planned.
        samples: the same graph at other sizes.
        limits: budgets and bandwidths.
        strategy: as of `splitkern._core.plan`.

    Raises:
        splitkern._core.Infeasible: no plan was found; with the smallest budget that would do.
    """
    if not samples:
        return _core.plan(graph, limits, strategy=strategy)
    tried, smallest = limits, None
    for _ in range(_ROUNDS):
        try:
            plan = _core.plan(graph, tried, strategy=strategy)
        except _core.Infeasible as error:
            if error.pool == "device":
                smallest = error.smallest_feasible_bytes
                break
            spared = _unlimited(limits.host_bytes) - _unlimited(tried.host_bytes)
            raise _refusal(strategy, error.pool, limits.host_bytes, error.smallest_feasible_bytes + spared) from error
        device, host = _needs(plan, samples, limits)
        over = max(0, device - _unlimited(limits.device_bytes)), max(0, host - _unlimited(limits.host_bytes))
        if over == (0, 0):
            return plan if plan.limits == limits else _core.place_again(graph, plan, limits)
        predicted = plan.predicted
        own = predicted.device_peak_bytes + predicted.parameters_peak_bytes
        tried = _with_budgets(
            tried,
            None if tried.device_bytes is None else max(0, min(tried.device_bytes, own) - over[0]),
            None if tried.host_bytes is None else max(0, min(tried.host_bytes, predicted.host_peak_bytes) - over[1]),
        )
    # What needs the least for itself is taken to need the least at other sizes.
    if smallest is None:
        smallest = _smallest(graph, tried, strategy)
    plan = _core.plan(graph, _with_budgets(tried, smallest, tried.host_bytes), strategy=strategy)
    device, host = _needs(plan, samples, limits)
    for pool, budget, needed in (("device", limits.device_bytes, device), ("host", limits.host_bytes, host)):
        if budget is not None and needed > budget:
            raise _refusal(strategy, pool, budget, needed)
    return _core.place_again(graph, plan, limits)


def _smallest(graph: _core.Graph, limits: _core.Limits, strategy: str) -> int:
    try:
        _core.plan(graph, _with_budgets(limits, 0, limits.host_bytes), strategy=strategy)
    except _core.Infeasible as error:
        return error.smallest_feasible_bytes
    return 0


def _refusal(strategy: str, pool: str, budget_bytes: int | None, needed_bytes: int) -> _core.Infeasible:
    error = _core.Infeasible(
        f"strategy {strategy!r} finds no plan within the {pool} budget of {budget_bytes} bytes whose decisions fit the "
        f"sampled draws of the boundaries: {needed_bytes} bytes would do"
    )
    error.pool, error.budget_bytes, error.smallest_feasible_bytes = pool, _unlimited(budget_bytes), needed_bytes
    return error


def _needs(plan: _core.Plan, samples: Sequence[_core.Graph], limits: _core.Limits) -> tuple[int, int]:
    """Most device and host bytes that the plan's decisions take at any of the sizes."""
    predicted = plan.predicted
    device, host = predicted.device_peak_bytes + predicted.parameters_peak_bytes, predicted.host_peak_bytes
    for graph in samples:
        placed = _placed(graph, plan, limits)
        if isinstance(placed, _core.Infeasible):
            if placed.pool == "host":
                host = max(host, placed.smallest_feasible_bytes)
                placed = _placed(graph, plan, _with_budgets(limits, limits.device_bytes, None))
            if isinstance(placed, _core.Infeasible):
                device = max(device, placed.smallest_feasible_bytes)
                continue
        predicted = placed.predicted
        device = max(device, predicted.device_peak_bytes + predicted.parameters_peak_bytes)
        host = max(host, predicted.host_peak_bytes)
    return device, host


def _placed(graph: _core.Graph, plan: _core.Plan, limits: _core.Limits) -> _core.Plan | _core.Infeasible:
    try:
        return _core.place_again(graph, plan, limits, placement_effort=_EFFORT)
    except _core.Infeasible as error:
        return error


def _unlimited(budget: int | None) -> int:
    return 2**62 if budget is None else budget


def _with_budgets(limits: _core.Limits, device_bytes: int | None, host_bytes: int | None) -> _core.Limits:
    return _core.Limits(
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        offload_gbps=limits.offload_gbps,
        prefetch_gbps=limits.prefetch_gbps,
        copy_latency_us=limits.copy_latency_us,
        alignment_bytes=limits.alignment_bytes,
    )


# --- steps --------------------------------------------------------------------------------------------------------


class DrawnSteps:
    """An executor for every draw, all with one plan's decisions and in the same arenas.

    The arenas are allocated once: what no placement of any draw should need, at most what the budget leaves. One thread
    calls `take` and `look_ahead`.

    Args:
        drawing: where boundaries are drawn.
        family: steps of the draws.
        graph: of the family's base.
        plan: whose decisions all draws share, and whose limits none exceeds.
        options: of executors.
        arena_bytes: largest device arena that the budget leaves room for; None: no limit.

    Attributes:
        redraws: draws that did not fit, and were drawn again.
    """

    def __init__(
        self,
        drawing: Drawing,
        family: Family,
        graph: _core.Graph,
        plan: _core.Plan,
        options: ExecutorOptions,
        arena_bytes: int | None = None,
    ) -> None:
        self.redraws = 0
        self._drawing, self._family, self._graph, self._plan = drawing, family, graph, plan
        self._options, self._lines = options, _Lines(drawing)
        limits = plan.limits
        largest = _core.with_sizes(graph, family.graph_numbers(family.largest(drawing.ranges)))
        bound = _core.place_again(largest, plan, _with_budgets(limits, None, None)).predicted
        resident = plan.predicted.parameters_peak_bytes
        device_bytes = max(bound.device_peak_bytes, plan.predicted.device_peak_bytes)
        device_bytes = min(device_bytes, _unlimited(arena_bytes))
        host_bytes = max(bound.host_peak_bytes, plan.predicted.host_peak_bytes)
        host_bytes = min(host_bytes, _unlimited(limits.host_bytes))
        self.arenas = Arenas(device_bytes, host_bytes, family.base.device)
        self._limits = _with_budgets(limits, device_bytes + resident, host_bytes)
        #: Of the even boundaries.
        self.even = StepExecutor(family.base, graph, plan, options, arenas=self.arenas)
        self._reset()
        self._ready[family.origin] = self.even

    def _reset(self) -> None:
        self._process = os.getpid()
        self._ready: OrderedDict[Draw, StepExecutor | None] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="splitkern-draws")
        self._pending: Future[None] | None = None

    def take(self) -> StepExecutor:
        """Draws boundaries as a forward pass does, and gives the executor of the step.

        Raises:
            DrawError: no draw fits.
            Exception: whatever went wrong while the thread prepared this step.
        """
        self._follow_fork()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        for _ in range(TRIES):
            executor = self._executor(self._draw(None))
            if executor is not None:
                return executor
            self.redraws += 1
        raise DrawError(f"none of {TRIES} draws of the boundaries fits the budget that the step was planned for")

    def look_ahead(self) -> None:
        """Begins to prepare the step that `take` gives next if nobody draws from PyTorch's CPU generator before."""
        self._follow_fork()
        device = self._family.base.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._pending = self._pool.submit(self._guess, torch.get_rng_state(), stream)

    def executor(self, draw: Draw) -> StepExecutor | None:
        """The executor for given boundaries, None where they do not fit the budget."""
        return self._executor(self._drawing.layout(draw))

    def executors(self) -> list[StepExecutor]:
        """Those that are kept ready; nothing is prepared any more."""
        self._follow_fork()
        self._pool.shutdown()
        others = (one for one in self._ready.values() if one is not None and one is not self.even)
        return [self.even, *others]

    def _guess(self, state: Tensor, stream: torch.cuda.Stream | None) -> None:
        generator = torch.Generator()
        generator.set_state(state)
        with torch.cuda.stream(stream):  # without effect for None
            for _ in range(TRIES):
                if self._executor(self._draw(generator)) is not None:
                    return

    def _draw(self, generator: torch.Generator | None) -> Layout:
        drawing = self._drawing
        return drawing.split.draw(drawing.program, drawing.extents, generator)

    def _executor(self, layout: Layout) -> StepExecutor | None:
        draw = self._drawing.of_layout(layout)
        with self._lock:
            if draw not in self._ready:
                self._lines.require(layout)
                self._ready[draw] = self._make(draw)
                if len(self._ready) > _KEPT:
                    _, gone = self._ready.popitem(last=False)
                    if gone is not None and gone is not self.even:
                        gone.retire()
            self._ready.move_to_end(draw)
            return self._ready[draw]

    def _make(self, draw: Draw) -> StepExecutor | None:
        numbers = self._family.numbers(draw)
        graph = _core.with_sizes(self._graph, self._family.graph_numbers(numbers))
        plan = _placed(graph, self._plan, self._limits)
        if isinstance(plan, _core.Infeasible):
            return None
        step = self._family.step(numbers)
        return StepExecutor(step, graph, plan, self._options, arenas=self.arenas, layout=self.even.layout)

    def _follow_fork(self) -> None:
        """A forked process has none of its parent's threads: it makes its own, and keeps what would wait for those."""
        if self._process != os.getpid():
            self._of_parent = self._pool, self._ready, self._pending
            self._reset()
