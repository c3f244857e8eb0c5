"""When everything in a plan happens, as predicted; and the same as a trace for chrome://tracing or ui.perfetto.dev.

The times come from the simulator of the memory library; nothing here predicts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitkern.memory.report import OFFLOAD, PlanView, word


@dataclass(frozen=True)
class Span:
    """A stretch of time, in µs since the step's begin."""

    begin_us: float
    end_us: float


@dataclass(frozen=True)
class Timeline:
    """Predicted times of a plan.

    Attributes:
        instances: when each instance runs.
        copies: when each copy runs.
        step_us: when the last of them has ended.
    """

    instances: Sequence[Span]
    copies: Sequence[Span]
    step_us: float

    @classmethod
    def of(cls, simulated: Any) -> Timeline:
        """From what `_core.simulate` returns."""
        return cls(
            [Span(span.begin_us, span.end_us) for span in simulated.instances],
            [Span(span.begin_us, span.end_us) for span in simulated.copies],
            simulated.step_us,
        )

    def boundaries_us(self) -> list[float]:
        """When the compute stream has passed each boundary and its waits: instances + 1 times, never falling."""
        return [*(span.begin_us for span in self.instances), self.step_us]

    def stalls(self, *, at_least_us: float = 1e-6) -> list[tuple[int, Span]]:
        """Where the compute stream stands still: (boundary, from the end before to the begin after)."""
        ends = [0.0, *(span.end_us for span in self.instances)]
        passed = self.boundaries_us()
        return [
            (boundary, Span(end_us, begin_us))
            for boundary, (end_us, begin_us) in enumerate(zip(ends, passed, strict=True))
            if begin_us - end_us > at_least_us
        ]


_PROCESS = 1
_COMPUTE, _OFFLOAD, _PREFETCH = 1, 2, 3
_TRACKS = {_COMPUTE: "compute", _OFFLOAD: "offload (device to host)", _PREFETCH: "prefetch (host to device)"}
# Names of chrome://tracing's palette; Perfetto chooses its own colours, by name.
_COLORS = {
    "forward": "thread_state_running",
    "backward": "thread_state_runnable",
    "recomputation": "thread_state_iowait",
    "stall": "terrible",
    "offload": "rail_response",
    "prefetch": "rail_animation",
}


def trace(view: PlanView, timeline: Timeline) -> dict[str, Any]:
    """A trace of the predicted step in the Trace Event Format: three tracks, arrows, counters of bytes.

    Format: "Trace Event Format", the Chromium project.

    Args:
        view: a graph and a plan for it.
        timeline: its times.

    Returns:
        The JSON object, times in µs.
    """
    graph, plan = view.graph, view.plan
    events: list[dict[str, Any]] = [
        _metadata("process_name", 0, f"splitkern plan of {graph.name or 'a graph'}, {graph.durations_from}"),
        *(_metadata("thread_name", track, name) for track, name in _TRACKS.items()),
        *({**_metadata("thread_sort_index", track, ""), "args": {"sort_index": track}} for track in _TRACKS),
    ]
    events += _compute_events(view, timeline)
    events += _copy_events(view, timeline)
    events += _counter_events(view, timeline)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"durations": graph.durations_from, "strategy": plan.strategy, "predicted": "true"},
    }


def write_trace(path: Path, view: PlanView, timeline: Timeline) -> None:
    """Writes `trace` to a file.

    Raises:
        OSError: where it cannot be written.
    """
    with path.open("w", encoding="utf-8") as file:
        json.dump(trace(view, timeline), file, separators=(",", ":"))


def _metadata(name: str, track: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": track, "name": name, "args": {"name": text}}


def _slice(track: int, name: str, kind: str, span: Span, args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": _PROCESS,
        "tid": track,
        "name": name,
        "cat": kind,
        "cname": _COLORS[kind],
        "ts": span.begin_us,
        "dur": span.end_us - span.begin_us,
        "args": dict(args),
    }


def _compute_events(view: PlanView, timeline: Timeline) -> list[dict[str, Any]]:
    events = []
    for index, (instance, span) in enumerate(zip(view.instances, timeline.instances, strict=True)):
        operation = view.operations[instance.operation]
        kind = "recomputation" if instance.is_recomputation else "backward" if operation.is_backward else "forward"
        args = {"operation": operation.name, "instance": index, "module": operation.module}
        if operation.patch >= 0:
            args["patch"] = operation.patch
        if operation.workspace_bytes:
            args["workspace_bytes"] = operation.workspace_bytes
        if instance.accumulate:
            args["accumulates"] = True
        events.append(_slice(_COMPUTE, operation.target, kind, span, args))
    for boundary, span in timeline.stalls():
        waits = [_copy_text(view, copy) for copy in view.boundaries[boundary].waits]
        events.append(_slice(_COMPUTE, "stall", "stall", span, {"boundary": boundary, "waits for": waits}))
    return events


def _copy_text(view: PlanView, copy: int) -> str:
    return f"{word(view.copies[copy].kind)} of {view.names[view.copies[copy].storage]}"


def _copy_events(view: PlanView, timeline: Timeline) -> list[dict[str, Any]]:
    starts = timeline.boundaries_us()
    instances = timeline.instances
    events = []
    for index, (copy, span) in enumerate(zip(view.copies, timeline.copies, strict=True)):
        kind = word(copy.kind)
        track = _OFFLOAD if kind == OFFLOAD else _PREFETCH
        args = {"bytes": view.sizes[copy.storage], "issue": copy.issue, "wait": copy.wait, "after": list(copy.after)}
        events.append(_slice(track, view.names[copy.storage], kind, span, args))
        # Arrows: from the instance after which it was issued, and to the one that waits for it.
        if copy.issue > 0:
            from_us = (instances[copy.issue - 1].begin_us + instances[copy.issue - 1].end_us) / 2
            events += _arrow(f"issue {index}", "issue", (_COMPUTE, from_us), (track, span.begin_us))
        if copy.wait < len(instances):
            # The arrow binds to the slice that encloses it, so it must not lie on the slice's edge.
            begin_us = max(starts[copy.wait], span.end_us)
            events += _arrow(f"wait {index}", "wait", (track, (span.begin_us + span.end_us) / 2), (_COMPUTE, begin_us))
    return events


def _arrow(identity: str, name: str, source: tuple[int, float], target: tuple[int, float]) -> list[dict[str, Any]]:
    common = {"pid": _PROCESS, "name": name, "cat": name, "id": identity}
    return [
        {**common, "ph": "s", "tid": source[0], "ts": source[1]},
        {**common, "ph": "f", "bp": "e", "tid": target[0], "ts": target[1]},
    ]


def _counter_events(view: PlanView, timeline: Timeline) -> list[dict[str, Any]]:
    """Live bytes of each pool, whenever one of them changes."""
    starts = timeline.boundaries_us()
    changes: dict[str, dict[float, int]] = {}
    for residency in view.residencies:
        pool = changes.setdefault(word(residency.pool), {})
        begin, end = starts[residency.begin], starts[residency.end]
        pool[begin] = pool.get(begin, 0) + residency.size_bytes
        pool[end] = pool.get(end, 0) - residency.size_bytes
    events = []
    for name, pool in sorted(changes.items()):
        live = 0
        for time_us in sorted(pool):
            live += pool[time_us]
            events.append(
                {
                    "ph": "C",
                    "pid": _PROCESS,
                    "name": f"{name} pool, live bytes",
                    "ts": time_us,
                    "args": {"bytes": live},
                }
            )
    return events
