"""Writes a `Scene` as one HTML page that can be zoomed: no network, no other files. The page is picture.html."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from splitkern.memory.picture import KINDS, Panel, Scene


def write_html(path: Path, scene: Scene) -> None:
    """Writes the page.

    Args:
        path: the file to write.
        scene: what to show.

    Raises:
        OSError: where the file cannot be written.
    """
    path.write_text(page(scene), encoding="utf-8")


def page(scene: Scene) -> str:
    """The page as text."""
    template = resources.files("splitkern.memory").joinpath("picture.html").read_text(encoding="utf-8")
    # Inside a script element only "<" could end the data.
    data = json.dumps(_as_dict(scene), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = template.split("@SCENE@")
    return before.replace("@TITLE@", html.escape(scene.title)) + data + after


def _as_dict(scene: Scene) -> dict[str, Any]:
    kinds = scene.kinds
    number = {kind: index for index, kind in enumerate(kinds)}
    return {
        "title": scene.title,
        "subtitle": scene.subtitle,
        "begin": scene.begin,
        "end": scene.end,
        "unit": scene.unit,
        "kinds": [{"color": KINDS[kind][0], "label": KINDS[kind][1]} for kind in kinds],
        "panels": [_panel(panel, number) for panel in scene.panels],
        "arrows": [{"source": arrow.source, "target": arrow.target} for arrow in scene.arrows],
    }


def _panel(panel: Panel, number: dict[str, int]) -> dict[str, Any]:
    """Columns rather than objects: a third of the size."""
    return {
        "title": panel.title,
        "top": panel.top,
        "share": panel.share,
        "tracks": list(panel.tracks),
        "levels": [{"value": one.value, "label": one.label, "budget": one.is_budget} for one in panel.levels],
        "kind": [number[one.kind] for one in panel.rectangles],
        "left": [one.left for one in panel.rectangles],
        "right": [one.right for one in panel.rectangles],
        "bottom": [one.bottom for one in panel.rectangles],
        "upper": [one.top for one in panel.rectangles],
        "text": [one.text for one in panel.rectangles],
    }
