"""Pictures: what the scene of a plan holds, and that both drawings show it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from splitkern.memory.picture import KINDS, Scene, scene_of_placement, scene_of_plan
from splitkern.memory.picture_html import page, write_html
from splitkern.memory.report import PlanView
from tests.memory import sample_plan
from tests.memory.sample_plan import KIB


@pytest.fixture
def scene() -> Scene:
    return scene_of_plan(sample_plan.view(), sample_plan.timeline())


def placement(**other: Any) -> Scene:
    arguments: dict[str, Any] = {"lower_bound_bytes": 30, "capacity_bytes": 40} | other
    return scene_of_placement("few", [-3, 0, 2], [2, 5, 9], [10, 20, 10], [0, 10, 0], ["a", "b", "c"], **arguments)


def test_device_panel_has_a_rectangle_per_residency(scene: Scene) -> None:
    streams, device, host = scene.panels
    assert len(device.rectangles) == 12 and len(host.rectangles) == 1
    places = {
        (one.text.splitlines()[0], one.kind): (one.left, one.right, one.bottom / KIB, one.top / KIB)
        for one in device.rectangles
    }
    # The general pool lies above the parameters' 6 KiB.
    assert places["images", "input"] == (0, 102, 0, 4)
    assert places["c", "offloaded"] == (0, 30, 6, 14)
    assert places["c", "prefetched"] == (50, 102, 6, 14)
    assert places["workspace of conv", "workspace"] == (0, 10, 14, 17)
    assert places["r", "passing"] == (10, 40, 14, 22)
    assert places["r", "recomputed"] == (82, 102, 14, 22)
    assert places["d", "kept"] == (30, 50, 22, 24)
    assert places["grad.r", "error"] == (50, 102, 26, 34)
    assert (host.rectangles[0].left, host.rectangles[0].right) == (10, 82)
    assert streams.tracks == ("prefetch", "offload", "compute")
    assert scene.end == 102


def test_no_two_rectangles_of_a_panel_overlap(scene: Scene) -> None:
    for panel in scene.panels:
        for index, one in enumerate(panel.rectangles):
            for other in panel.rectangles[:index]:
                apart = one.right <= other.left or other.right <= one.left
                assert apart or one.top <= other.bottom or other.top <= one.bottom, (one, other)


def test_levels_are_those_of_both_device_pools(scene: Scene) -> None:
    _, device, host = scene.panels
    assert [(level.value / KIB, level.is_budget) for level in device.levels] == [(30, False), (40, True)]
    assert [(level.value / KIB, level.is_budget) for level in host.levels] == [(8, False)]
    assert "peak 34.0 KiB, budget 40.0 KiB" in device.title and "budget none" in host.title


def test_arrows_go_from_where_a_copy_begins_to_where_it_ends(scene: Scene) -> None:
    assert [(arrow.kind, arrow.source, arrow.target) for arrow in scene.arrows] == [
        ("offload", (1, 10.0, 10 * KIB), (2, 26.0, 4 * KIB)),
        ("prefetch", (2, 50.0, 4 * KIB), (1, 82.0, 10 * KIB)),
    ]


def test_texts_name_storage_bytes_times_and_operations(scene: Scene) -> None:
    text = next(one.text for one in scene.panels[1].rectangles if one.kind == "recomputed")
    assert text.splitlines() == [
        "r",
        "recomputed",
        "8.0 KiB (8,192 bytes) at 8,192 of the device pool",
        "boundaries 6 to 8, 0.082 to 0.102 ms",
        "written by relu in stem.relu",
        "read by conv_weight_grad in stem.conv",
    ]
    stall = next(one.text for one in scene.panels[0].rectangles if one.kind == "stall")
    assert stall.splitlines() == ["stall of 22.0 µs", "waits for prefetch of c"]


def test_a_budget_far_above_the_peak_does_not_squeeze_the_picture() -> None:
    plan = sample_plan.plan()
    plan.limits.device_bytes = 10**12
    device = scene_of_plan(PlanView(sample_plan.graph(), plan), sample_plan.timeline()).panels[1]
    assert device.top < 2 * 34 * KIB
    assert "budget 931.32 GiB" in device.title


def test_a_plan_without_copies_has_no_host_panel() -> None:
    plan = sample_plan.plan()
    plan.copies, plan.residencies = [], [one for one in plan.residencies if one.pool != "host"]
    for boundary in plan.boundaries:
        boundary.waits, boundary.issues = [], []
    timeline = sample_plan.timeline()
    timeline = type(timeline)(timeline.instances, [], timeline.step_us)
    scene = scene_of_plan(PlanView(sample_plan.graph(), plan), timeline)
    assert len(scene.panels) == 2 and not scene.arrows


def test_scene_of_placement() -> None:
    scene = placement()
    assert (scene.begin, scene.end, scene.unit) == (-3, 9, "")
    assert [(one.left, one.right, one.bottom, one.top) for one in scene.panels[0].rectangles] == [
        (-3, 2, 0, 10),
        (0, 5, 10, 30),
        (2, 9, 0, 10),
    ]
    assert "peak 30 B (30 bytes), 1.0000 of the lower bound" in scene.subtitle
    assert [level.value for level in scene.panels[0].levels] == [30, 40]
    empty = scene_of_placement("none", [], [], [], [], [], lower_bound_bytes=0, capacity_bytes=None)
    assert empty.end > empty.begin and not empty.panels[0].rectangles


def data(html: str) -> Any:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="scene">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_page_holds_the_scene(scene: Scene) -> None:
    held = data(page(scene))
    assert (held["begin"], held["end"], held["title"]) == (0, 102, scene.title)
    for panel, drawn in zip(held["panels"], scene.panels, strict=True):
        for index, one in enumerate(drawn.rectangles):
            column = [panel[name][index] for name in ("left", "right", "bottom", "upper", "text")]
            assert column == [one.left, one.right, one.bottom, one.top, one.text]
            assert held["kinds"][panel["kind"][index]]["label"] == KINDS[one.kind][1]
    assert [arrow["source"] for arrow in held["arrows"]] == [list(arrow.source) for arrow in scene.arrows]


def test_page_needs_no_network_and_names_cannot_break_it() -> None:
    evil = "</script><script>alert(1)</script><!-- &"
    html = page(scene_of_placement(evil, [0], [1], [4], [0], [evil], lower_bound_bytes=4, capacity_bytes=None))
    assert data(html)["panels"][0]["text"][0].startswith(evil)

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.scripts = 0
            self.addresses: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.scripts += tag == "script"
            self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    reader = Reader()
    reader.feed(html)
    assert reader.scripts == 2 and not reader.addresses
    assert not re.findall(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", html)


def test_files_are_written(scene: Scene, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from splitkern.memory.picture_png import write_png

    write_html(tmp_path / "plan.html", scene)
    assert data((tmp_path / "plan.html").read_text(encoding="utf-8"))["subtitle"] == scene.subtitle
    for name, one in (("plan.png", scene), ("placement.png", placement())):
        write_png(tmp_path / name, one, width_inches=6, height_inches=4)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_png_draws_every_kind_in_its_place(scene: Scene, tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.image")
    from splitkern.memory.picture_png import write_png

    write_png(tmp_path / "plan.png", scene, width_inches=9, height_inches=6)
    image = pyplot.imread(tmp_path / "plan.png")[..., :3]
    for kind in scene.kinds:
        color = [int(KINDS[kind][0][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        # The darker or the lighter shade; what the legend shows lies below.
        shades = (color, [one + (1 - one) * 0.22 for one in color])
        drawn = image[: int(0.9 * len(image))]
        dots = sum(int((abs(drawn - shade).max(axis=2) < 0.01).sum()) for shade in shades)
        assert dots > 100, kind
