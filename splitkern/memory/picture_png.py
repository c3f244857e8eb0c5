"""Draws a `Scene` as a PNG, with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitkern.memory.picture import KINDS, Panel, Scene

_MOST_ARROWS = 160


def write_png(path: Path, scene: Scene, *, width_inches: float = 16.0, height_inches: float = 9.5) -> None:
    """Draws a picture.

    Of more than 160 copies only the largest are drawn as arrows, so that the rectangles stay in sight.

    Args:
        path: the PNG to write.
        scene: what to draw.
        width_inches, height_inches: at 150 dots per inch.

    Raises:
        OSError: where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(scene.panels),
        1,
        height_ratios=[panel.share for panel in scene.panels],
        left=0.065,
        right=0.985,
        top=0.905,
        bottom=0.095,
        hspace=0.16,
    )
    axes: list[Any] = []
    scale = 1e-3 if scene.unit == "µs" else 1.0
    for index, panel in enumerate(scene.panels):
        one = figure.add_subplot(grid[index, 0], sharex=axes[0] if axes else None)
        _draw_panel(one, panel, scene, scale)
        one.tick_params(labelbottom=index == len(scene.panels) - 1)
        axes.append(one)
    _draw_arrows(figure, axes, scene, scale)
    if not scene.unit:
        axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0].set_xlim(scene.begin * scale, scene.end * scale)
    axes[-1].set_xlabel("time in the step, ms (predicted)" if scene.unit else "time")
    figure.text(0.065, 0.965, scene.title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.065, 0.936, scene.subtitle, fontsize=9, color="#555555", va="center")
    _draw_legend(figure, scene)
    figure.savefig(path, format="png")


def _draw_panel(axes: Any, panel: Panel, scene: Scene, scale: float) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    # Narrower than a dot a rectangle would vanish; kinds with few and narrow ones (stalls) matter most.
    narrowest = (scene.end - scene.begin) / 2400
    # Neighbours of one kind are told apart by two shades, and by edges where these do not hide the rectangle.
    drawn: dict[tuple[str, int], list[tuple[list[tuple[float, float]], float]]] = {}
    for index, one in enumerate(panel.rectangles):
        left, right = one.left * scale, max(one.right, one.left + narrowest) * scale
        corners = [(left, one.bottom), (left, one.top), (right, one.top), (right, one.bottom)]
        is_large = one.top - one.bottom > panel.top / 100 and one.right - one.left > 6 * narrowest
        edge = 0.5 if is_large and not panel.tracks else 0.0
        drawn.setdefault((one.kind, 0 if panel.tracks else index % 2), []).append((corners, edge))
    for kind in KINDS:
        for shade in (0, 1):
            polygons = drawn.get((kind, shade), [])
            axes.add_collection(
                PolyCollection(
                    [corners for corners, _ in polygons],
                    facecolor=_lighter(KINDS[kind][0], 0.22 * shade),
                    edgecolor="white",
                    linewidths=[edge for _, edge in polygons] or 0,
                )
            )
    axes.set_ylim(0, panel.top)
    axes.set_title(panel.title, loc="left", fontsize=9.5, pad=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.tracks:
        axes.set_yticks([row + 0.5 for row in range(len(panel.tracks))], labels=panel.tracks)
        axes.tick_params(axis="y", length=0)
        return
    axes.yaxis.set_major_locator(MultipleLocator(_tick_bytes(panel.top, count=round(2 + 1.2 * panel.share))))
    axes.yaxis.set_major_formatter(FuncFormatter(_axis_text(panel.top)))
    axes.set_ylabel("address")
    for level in panel.levels:
        if level.value > panel.top:
            continue
        line_color, style = ("#c1121f", "-") if level.is_budget else ("#111111", (0, (6, 3)))
        axes.axhline(level.value, color=line_color, linestyle=style, linewidth=1.1, zorder=4)
        axes.annotate(
            level.label,
            (1.0 if level.is_budget else 0.0, level.value),
            xycoords=("axes fraction", "data"),
            xytext=(-4 if level.is_budget else 4, 2),
            textcoords="offset points",
            ha="right" if level.is_budget else "left",
            va="bottom",
            fontsize=8,
            color=line_color,
            zorder=5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )


def _lighter(color: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with that share of white."""
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share


def _tick_bytes(top: float, count: int) -> float:
    """The smallest power of two that cuts the axis into at most `count` parts."""
    step = 1.0
    while top / step > count:
        step *= 2
    return step


def _axis_text(top: float) -> Any:
    """What writes addresses of an axis that ends at `top`: all in one unit."""
    unit, size = next(
        (name, size) for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)) if top >= size
    )
    return lambda value, _: f"{value / size:g} {unit}"


def _draw_arrows(figure: Any, axes: Sequence[Any], scene: Scene, scale: float) -> None:
    from matplotlib.patches import ConnectionPatch

    largest = sorted(range(len(scene.arrows)), key=lambda index: (-scene.arrows[index].size_bytes, index))
    faint = len(scene.arrows) > 60
    for index in sorted(largest[:_MOST_ARROWS]):
        arrow = scene.arrows[index]
        (source_panel, source_time, source_address), (target_panel, target_time, target_address) = (
            arrow.source,
            arrow.target,
        )
        figure.add_artist(
            ConnectionPatch(
                (source_time * scale, source_address),
                (target_time * scale, target_address),
                coordsA=axes[source_panel].transData,
                coordsB=axes[target_panel].transData,
                arrowstyle="-|>",
                mutation_scale=7,
                color="#7a4b00" if arrow.kind == "offload" else "#5c5700",
                linewidth=0.5 if faint else 0.9,
                alpha=0.45 if faint else 0.8,
                zorder=6,
            )
        )
    hidden = len(scene.arrows) - _MOST_ARROWS
    if hidden > 0:
        figure.text(
            0.985,
            0.965,
            f"arrows: the {_MOST_ARROWS} largest of {len(scene.arrows)} copies",
            fontsize=8,
            color="#555555",
            ha="right",
            va="center",
        )


def _draw_legend(figure: Any, scene: Scene) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=KINDS[kind][0], label=KINDS[kind][1]) for kind in scene.kinds]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.06, 0.004),
        ncols=min(9, (len(handles) + 1) // 2),
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        columnspacing=1.4,
    )
