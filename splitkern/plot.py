"""Pictures of memory over a training step, written as PNG without a display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Curve:
    """Live bytes over one step.

    Attributes:
        label: name in the legend.
        samples: (ms since the step's begin, live bytes), in order.
        backward_ms: where the backward pass begins.
    """

    label: str
    samples: Sequence[tuple[float, int]]
    backward_ms: float

    @property
    def peak(self) -> tuple[float, int]:
        """The first sample at which the largest value is reached."""
        return max(self.samples, key=lambda sample: sample[1], default=(0.0, 0))


_COLORS = ("#7d8ca3", "#d1495b", "#2e7d6b", "#edae49")


def plot_live_bytes(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Draws live bytes over the step, one curve per model.

    Args:
        path: the PNG to write.
        curves: at most four; the first one is the baseline to which the others' peaks are compared.
        title: heading, such as the model and batch.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8), dpi=144, layout="constrained")
    baseline_peak = curves[0].peak[1] if curves else 0
    top = max((curve.peak[1] for curve in curves), default=0) / MIB or 1.0
    right = max((curve.samples[-1][0] for curve in curves if curve.samples), default=1.0)
    for index, (curve, color) in enumerate(zip(curves, _COLORS, strict=False)):
        times = [0.0, *(offset for offset, _ in curve.samples)]
        values = [0.0, *(live / MIB for _, live in curve.samples)]
        at, peak = curve.peak
        ratio = f" ({peak / baseline_peak:.2f} of {curves[0].label})" if index and baseline_peak else ""
        label = f"{curve.label}: peak {peak / MIB:.1f} MiB{ratio}"
        axes.fill_between(times, values, step="post", color=color, alpha=0.16 if index == 0 else 0.28, linewidth=0)
        axes.step(times, values, where="post", color=color, linewidth=1.4, label=label)
        axes.hlines(peak / MIB, 0, right, color=color, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.plot([at], [peak / MIB], marker="o", markersize=5, color=color, zorder=5)
        axes.axvline(curve.backward_ms, color=color, linewidth=1, linestyle="--", alpha=0.8)
        axes.annotate(
            f"backward, {curve.label}",
            (curve.backward_ms, 0.985),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            rotation=90,
            va="top",
            ha="left",
            fontsize=8,
            color=color,
        )
    axes.set_xlim(0, right * 1.01)
    axes.set_ylim(0, top * 1.35)
    axes.set_xlabel("time in one training step, ms (measured step, with the counting)")
    axes.set_ylabel("live activations and gradients of them, MiB")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper right", frameon=False, ncols=1, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)
