"""What the picture of a plan shows: time across, address up, a rectangle per residency, copies, budgets and bounds.

A `Scene` holds it without saying how it is drawn; picture_png.py and picture_html.py draw scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitkern.memory.report import (
    DEVICE,
    HOST,
    OFFLOAD,
    PARAMETERS,
    PlanView,
    Role,
    bytes_text,
    duration_text,
    word,
)
from splitkern.memory.timeline import Timeline

# Colour and what the legend says, by kind, in the legend's order. Colours keep apart for the colour-blind: the
# Okabe-Ito palette, where greys carry what the planner has no say in.
KINDS: dict[str, tuple[str, str]] = {
    "parameter": ("#8c939e", "parameters, buffers"),
    "parameter gradient": ("#aab1bb", "parameter gradients"),
    "input": ("#c9ced6", "inputs"),
    "kept": ("#0072b2", "kept from forward to backward"),
    "passing": ("#a6cee8", "used in forward only"),
    "offloaded": ("#e69f00", "on its way to the host"),
    "prefetched": ("#f0e442", "back from the host"),
    "recomputed": ("#009e73", "recomputed"),
    "error": ("#cc79a7", "gradients of activations"),
    "workspace": ("#333a44", "workspace"),
    "host": ("#e6c98a", "on the host"),
    "forward": ("#56b4e9", "forward"),
    "backward": ("#cc79a7", "backward"),
    "recomputation": ("#009e73", "recomputation"),
    "stall": ("#d55e00", "stall: waits for a copy"),
    "offload": ("#e69f00", "offload"),
    "prefetch": ("#c9b900", "prefetch"),
    "buffer": ("#0072b2", "buffer"),
}


@dataclass(frozen=True)
class Rectangle:
    """Something that occupies a stretch of time and of addresses (or of a track).

    Attributes:
        kind: a key of KINDS.
        left, right: time.
        bottom, top: address in bytes, or position in a panel of tracks.
        text: what a pointer over it is told, one fact per line.
    """

    kind: str
    left: float
    right: float
    bottom: float
    top: float
    text: str


@dataclass(frozen=True)
class Level:
    """A horizontal line: a budget or a lower bound."""

    value: float
    label: str
    is_budget: bool


@dataclass(frozen=True)
class Arrow:
    """A copy: from one panel's rectangle to another's.

    Attributes:
        kind: "offload" or "prefetch".
        source, target: (panel, time, address).
        size_bytes: where not all arrows can be drawn, the largest are.
    """

    kind: str
    source: tuple[int, float, float]
    target: tuple[int, float, float]
    size_bytes: int


@dataclass(frozen=True)
class Panel:
    """One of the charts above each other that share the time axis.

    Attributes:
        title: what it shows.
        rectangles: in drawing order.
        levels: lines across it.
        top: end of its axis, in bytes or tracks.
        tracks: names of rows, from the bottom, for a panel without addresses.
        share: of the picture's height.
    """

    title: str
    rectangles: Sequence[Rectangle]
    levels: Sequence[Level] = ()
    top: float = 1.0
    tracks: Sequence[str] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A picture.

    Attributes:
        title, subtitle: headings.
        end: of the time axis, which begins at `begin`.
        unit: of time: "µs", or "" where times are counts.
        panels: from the top.
        arrows: copies.
    """

    title: str
    subtitle: str
    end: float
    unit: str
    panels: Sequence[Panel]
    arrows: Sequence[Arrow] = ()
    begin: float = 0.0

    @property
    def kinds(self) -> list[str]:
        """The kinds that occur, in the legend's order."""
        found = {one.kind for panel in self.panels for one in panel.rectangles}
        return [kind for kind in KINDS if kind in found]


def scene_of_plan(view: PlanView, timeline: Timeline) -> Scene:
    """The picture of a plan: what the streams do, the device's memory, the host's.

    The device's parameters pool lies at the bottom and its general pool above, so that the budget of both is one line.

    Args:
        view: a graph and a plan for it.
        timeline: predicted times.
    """
    plan = view.plan
    predicted, limits = plan.predicted, plan.limits
    times = timeline.boundaries_us()
    base = int(predicted.parameters_peak_bytes)
    panel_of = {PARAMETERS: 1, DEVICE: 1, HOST: 2}
    shift = {PARAMETERS: 0, DEVICE: base, HOST: 0}
    rectangles: dict[int, list[Rectangle]] = {1: [], 2: []}
    places: list[Rectangle] = []
    for residency, role in zip(view.residencies, view.roles, strict=True):
        pool = word(residency.pool)
        bottom = residency.offset_bytes + shift[pool]
        text = _residency_text(view, residency, role, times)
        place = Rectangle(
            str(role), times[residency.begin], times[residency.end], bottom, bottom + residency.size_bytes, text
        )
        places.append(place)
        rectangles[panel_of[pool]].append(place)
    arrows = []
    for copy, span in zip(view.copies, timeline.copies, strict=True):
        source, target = places[copy.source], places[copy.destination]
        ends = (1, 2) if word(copy.kind) == OFFLOAD else (2, 1)
        arrows.append(
            Arrow(
                word(copy.kind),
                (ends[0], span.begin_us, (source.bottom + source.top) / 2),
                (ends[1], span.end_us, (target.bottom + target.top) / 2),
                view.sizes[copy.storage],
            )
        )
    device_peak = base + int(predicted.device_peak_bytes)
    bound = base + int(predicted.device_lower_bound_bytes)
    levels = [Level(bound, f"lower bound {bytes_text(bound)}", False)]
    if limits.device_bytes is not None:
        levels.append(Level(limits.device_bytes, f"budget {bytes_text(limits.device_bytes)}", True))
    device = Panel(
        f"device memory: peak {bytes_text(device_peak)}, budget {_limit_text(limits.device_bytes)}",
        rectangles[1],
        levels,
        # A budget far above the peak would squeeze the picture: then the line is left out of sight.
        top=_axis_end(device_peak, [level.value for level in levels]),
        share=5.0,
    )
    panels = [_streams(view, timeline), device]
    if rectangles[2]:
        peak = int(predicted.host_peak_bytes)
        host_levels = [
            Level(
                predicted.host_lower_bound_bytes, f"lower bound {bytes_text(predicted.host_lower_bound_bytes)}", False
            )
        ]
        if limits.host_bytes is not None:
            host_levels.append(Level(limits.host_bytes, f"budget {bytes_text(limits.host_bytes)}", True))
        top = 1.12 * _axis_end(peak, [level.value for level in host_levels])
        title = f"pinned host memory: peak {bytes_text(peak)}, budget {_limit_text(limits.host_bytes)}"
        panels.append(Panel(title, rectangles[2], host_levels, top, share=2.2))
    slower = predicted.step_us / predicted.compute_us - 1 if predicted.compute_us else 0.0
    return Scene(
        title=f"{view.graph.name or 'a training step'}: strategy {plan.strategy}",
        subtitle=f"{duration_text(predicted.step_us)} per step predicted ({slower:+.1%} to the operations alone; "
        f"recomputation {duration_text(predicted.recompute_us)}, stall {duration_text(predicted.stall_us)}); "
        f"durations {view.graph.durations_from or 'as given'}; {len(view.instances):,} instances, "
        f"{len(view.residencies):,} residencies, {len(view.copies):,} copies",
        end=timeline.step_us or 1.0,
        unit="µs",
        panels=panels,
        arrows=arrows,
    )


def scene_of_placement(
    name: str,
    lower: Sequence[int],
    upper: Sequence[int],
    sizes: Sequence[int],
    offsets: Sequence[int],
    ids: Sequence[str],
    *,
    lower_bound_bytes: int,
    capacity_bytes: int | None,
) -> Scene:
    """The picture of placed buffers.

    Args:
        name: of the instance.
        lower, upper: a buffer lives from lower to upper, exclusive.
        sizes, offsets: in bytes.
        ids: names of the buffers.
        lower_bound_bytes: largest sum of live bytes.
        capacity_bytes: what they should fit, or None.
    """
    rectangles = [
        Rectangle(
            "buffer",
            begin,
            end,
            offset,
            offset + size,
            f"{identity}\n{bytes_text(size)} ({size:,} bytes)\naddress {offset:,}\nlives [{begin:,}, {end:,})",
        )
        for identity, begin, end, size, offset in zip(ids, lower, upper, sizes, offsets, strict=True)
    ]
    peak = max((int(one.top) for one in rectangles), default=0)
    levels = [Level(lower_bound_bytes, f"lower bound {bytes_text(lower_bound_bytes)}", False)]
    if capacity_bytes is not None:
        levels.append(Level(capacity_bytes, f"capacity {bytes_text(capacity_bytes)}", True))
    begin = min(lower, default=0)
    end = max(upper, default=1)
    return Scene(
        title=f"{name}: {len(rectangles):,} buffers",
        subtitle=f"peak {bytes_text(peak)} ({peak:,} bytes), {_ratio(peak, lower_bound_bytes)} of the lower bound",
        begin=begin,
        end=end if end > begin else begin + 1,
        unit="",
        panels=[Panel("address", rectangles, levels, _axis_end(peak, [level.value for level in levels]))],
    )


def _limit_text(limit_bytes: int | None) -> str:
    return "none" if limit_bytes is None else bytes_text(limit_bytes)


def _ratio(peak: int, bound: int) -> str:
    return f"{peak / bound:.4f}" if bound else "1"


def _axis_end(peak: float, levels: Sequence[float]) -> float:
    visible = [level for level in levels if level <= 1.6 * peak]
    return 1.06 * max([peak, *visible], default=1.0) or 1.0


def _streams(view: PlanView, timeline: Timeline) -> Panel:
    """Three tracks: compute above, offload, prefetch below."""
    rectangles = []
    for index, (instance, span) in enumerate(zip(view.instances, timeline.instances, strict=True)):
        operation = view.operations[instance.operation]
        kind = "recomputation" if instance.is_recomputation else "backward" if operation.is_backward else "forward"
        text = f"{operation.name} ({operation.target})\n{duration_text(span.end_us - span.begin_us)}, instance {index}"
        text += f"\nmodule {operation.module}" if operation.module else ""
        text += f"\npatch {operation.patch}" if operation.patch >= 0 else ""
        rectangles.append(Rectangle(kind, span.begin_us, span.end_us, 2.1, 2.9, text))
    for boundary, span in timeline.stalls():
        waits = [f"waits for {_copy_name(view, copy)}" for copy in view.boundaries[boundary].waits]
        text = "\n".join([f"stall of {duration_text(span.end_us - span.begin_us)}", *waits[:6]])
        rectangles.append(Rectangle("stall", span.begin_us, span.end_us, 2.1, 2.9, text))
    for index, (copy, span) in enumerate(zip(view.copies, timeline.copies, strict=True)):
        kind = word(copy.kind)
        bottom = 1.1 if kind == OFFLOAD else 0.1
        size = bytes_text(view.sizes[copy.storage])
        text = f"{_copy_name(view, index)}\n{size}, {duration_text(span.end_us - span.begin_us)}"
        text += f"\nissued before instance {copy.issue}, awaited before {copy.wait}"
        rectangles.append(Rectangle(kind, span.begin_us, span.end_us, bottom, bottom + 0.8, text))
    return Panel("streams", rectangles, top=3.0, tracks=("prefetch", "offload", "compute"), share=1.0)


def _copy_name(view: PlanView, copy: int) -> str:
    return f"{word(view.copies[copy].kind)} of {view.names[view.copies[copy].storage]}"


def _residency_text(view: PlanView, one: Any, role: Role, times: Sequence[float]) -> str:
    size = (
        f"{bytes_text(one.size_bytes)} ({one.size_bytes:,} bytes) at {one.offset_bytes:,} of the {word(one.pool)} pool"
    )
    when = f"boundaries {one.begin} to {one.end}, {times[one.begin] / 1e3:.3f} to {times[one.end] / 1e3:.3f} ms"
    if role is Role.WORKSPACE:
        operation = view.operation_of(one.begin)
        return f"workspace of {operation.name}\n{size}\n{when}"
    lines = [view.names[one.storage], f"{KINDS[str(role)][1]}", size, when]
    if role is not Role.HOST:
        writers, readers = view.writers(one), view.readers(one)
        for verb, instances in (("written by", writers), ("read by", readers)):
            if instances:
                first = view.operation_of(instances[0])
                module = f" in {first.module}" if first.module else ""
                more = f" and {len(instances) - 1} more" if len(instances) > 1 else ""
                lines.append(f"{verb} {first.name}{module}{more}")
    return "\n".join(lines)
