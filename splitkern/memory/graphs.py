"""CUDA graphs of a planned step: stretches of operations between which no copy is issued or waited for, each captured
once and replayed with one launch.

Copies stay outside the graphs, so that the pipeline paces them as it does without. A step without copies is one graph
for every part of it.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from splitkern import _core

Replay = Callable[[], None]


def require_graphs(device: torch.device, *, debug: bool) -> None:
    """Refuses where there are no CUDA graphs.

    Raises:
        ValueError: the device is not a GPU, or `debug` is on, which acts between all operations.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a model on a GPU, got one on {device}")
    if debug:
        raise ValueError("cuda_graphs and debug exclude each other: debug checks memory between all operations")


def new_pool() -> Any:
    """A memory pool, that graphs may share which never run at the same time and leave nothing in it."""
    return torch.cuda.graph_pool_handle()


@functools.cache
def stream_of(device: torch.device) -> Any:
    """The stream to capture on: one for each device, as cuBLAS keeps a workspace for each for good. PyTorch's own is of
    the device that was current when the first graph of the process was captured.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def capture(run: Callable[[], None], pool: Any, stream: Any) -> Replay:
    """Captures what a function launches on the current stream of a stream's device, without running it.

    Args:
        run: launches.
        pool: of :func:`new_pool`, for what the function allocates.
        stream: of :func:`stream_of`.

    Returns:
        Launches it on the current stream.
    """
    graph = torch.cuda.CUDAGraph()
    # What the garbage collector ends meanwhile would wait for streams, which breaks a capture.
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        _capture_into(graph, run, pool, stream)
    finally:
        if was_collecting:
            gc.enable()
    return graph.replay


def _capture_into(graph: torch.cuda.CUDAGraph, run: Callable[[], None], pool: Any, stream: Any) -> None:
    # Of this thread alone: those that feed copies wait for events meanwhile, which a global capture forbids.
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        run()


class PieceGraphs:
    """Graphs of a plan's pieces, captured when each is first run after a warm-up.

    Args:
        plan: whose boundaries divide it.
        run: runs one instance eagerly.
        device: of the step.
    """

    #: Runs of a piece before it is captured: the first call of a shape chooses algorithms and allocates.
    WARM_UPS = 1

    def __init__(self, plan: _core.Plan, run: Callable[[int], None], device: torch.device) -> None:
        self._run, self._device = run, device
        self._active = [bool(one.waits or one.issues) for one in plan.boundaries]
        self._graphs: dict[tuple[int, int, frozenset[int]], Replay] = {}
        # One for all pieces: what their operations allocate is there once, as without graphs.
        self._pool: Any = None
        self._warm: dict[tuple[int, int, frozenset[int]], int] = {}

    def clear(self) -> None:
        """Forgets all graphs: what they point to has moved."""
        self._graphs.clear()
        self._pool = None  # an empty pool cannot be captured into again

    def pieces(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Divides instances at the boundaries where copies are issued or waited for."""
        cuts = [number for number in range(begin + 1, end) if self._active[number]]
        return [(first, last) for first, last in zip([begin, *cuts], [*cuts, end], strict=True) if first < last]

    def run_piece(self, begin: int, end: int, zeros_at: frozenset[int] = frozenset()) -> None:
        """Runs the instances of a piece, whose first boundary has been passed.

        Args:
            begin, end: of the piece.
            zeros_at: instances of it that give zeros without running, by which graphs differ.
        """
        piece = begin, end, zeros_at
        replay = self._graphs.get(piece)
        if replay is None:
            if self._warm.get(piece, 0) < self.WARM_UPS:
                self._warm[piece] = self._warm.get(piece, 0) + 1
                for number in range(begin, end):
                    self._run(number)
                return

            def run() -> None:
                for number in range(begin, end):
                    self._run(number)

            if self._pool is None:
                self._pool = new_pool()
            replay = self._graphs[piece] = capture(run, self._pool, stream_of(self._device))
        replay()
