"""Reports of plans: sizes as text, roles of residencies, figures; traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitkern.memory.report import Role, bytes_text, parse_bytes, report
from splitkern.memory.timeline import Span, Timeline, trace, write_trace
from tests.memory import sample_plan
from tests.memory.sample_plan import KIB


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("16GiB", 16 << 30),
        ("16 gib", 16 << 30),
        ("16G", 16 << 30),
        ("16GB", 16 * 10**9),
        ("1.5KiB", 1536),
        ("0.3kB", 300),
        ("1.7GiB", 1825361100),
        ("1.0001KiB", 1024),
        ("0.5", 0),
        (" 7 b ", 7),
        ("9223372036854775806", 2**63 - 2),
    ],
)
def test_parse_bytes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "16 GiBs", "nan", "8EiB", "1 2"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="bytes"):
        parse_bytes(text)


def test_parse_bytes_refuses_what_no_integer_holds() -> None:
    for text in ("9223372036854775807", "8388608TiB"):
        with pytest.raises(ValueError, match=r"below 2\^63"):
            parse_bytes(text)


def test_bytes_text() -> None:
    texts = {1023: "1023 B", 1024: "1.0 KiB", 38535168: "36.8 MiB", 16 << 30: "16.00 GiB", 5 << 40: "5.00 TiB"}
    assert {size: bytes_text(size) for size in texts} == texts
    assert bytes_text(None) == "unlimited"


def test_roles() -> None:
    assert sample_plan.view().roles == [
        Role.INPUT,
        Role.PARAMETER,
        Role.PARAMETER_GRADIENT,
        Role.OFFLOADED,
        Role.WORKSPACE,
        Role.PASSING,  # its value is written again for backward
        Role.PASSING,
        Role.KEPT,
        Role.ERROR,
        Role.ERROR,
        Role.PREFETCHED,
        Role.RECOMPUTED,
        Role.HOST,
    ]


def test_uses_are_those_of_the_residency() -> None:
    view = sample_plan.view()
    first, again = view.residencies[5], view.residencies[11]
    assert (view.writers(first), view.readers(first)) == ([1], [2, 3])
    assert (view.writers(again), view.readers(again)) == ([6], [7])
    assert (view.writers(view.residencies[4]), view.readers(view.residencies[4])) == ([0], [])


def test_saved_is_what_forward_leaves_to_backward() -> None:
    view = sample_plan.view()
    assert [name for storage, name in enumerate(view.names) if view.is_saved(storage)] == ["c", "r", "d"]


def test_report() -> None:
    timeline = sample_plan.timeline()
    told = report(sample_plan.view(), [(span.begin_us, span.end_us) for span in timeline.copies])
    assert [(pool.name, pool.peak_bytes, pool.lower_bound_bytes) for pool in told.pools] == [
        ("device", 28 * KIB, 24 * KIB),
        ("parameters", 6 * KIB, 6 * KIB),
        ("host", 8 * KIB, 8 * KIB),
    ]
    assert told.device_total_bytes == 34 * KIB
    assert (told.device_limit_bytes, told.host_limit_bytes) == (40 * KIB, None)
    assert told.saved_bytes == 18 * KIB
    assert (told.offloaded_bytes, told.prefetched_bytes) == (8 * KIB, 8 * KIB)
    assert (told.offload_busy_us, told.prefetch_busy_us) == (16.0, 32.0)
    assert [(one.name, one.prefetches, one.module) for one in told.offloaded] == [("c", 1, "stem.conv")]
    assert [(one.target, one.count, one.duration_us) for one in told.recomputed] == [("relu", 1, 10.0)]
    assert json.loads(json.dumps(told.as_dict()))["offloaded"][0]["size_bytes"] == 8 * KIB


def test_report_text_says_everything() -> None:
    timeline = sample_plan.timeline()
    text = report(sample_plan.view(), [(span.begin_us, span.end_us) for span in timeline.copies]).text()
    for part in (
        "sample: 7 operations, 9 storages (9 planned, 0 sums added in place)",
        "estimate: by hand",
        "device 40.0 KiB, host unlimited, link 0.5 GB/s to the host, 0.25 GB/s back",
        "102.0 µs predicted, +45.7% to the operations alone",
        "1 storages, 8.0 KiB of 18.0 KiB that forward leaves to backward; link busy 16.0 µs out, 32.0 µs back",
        "recomputed   1 operations, 10.0 µs",
    ):
        assert part in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_timeline_boundaries_and_stalls() -> None:
    timeline = sample_plan.timeline()
    assert timeline.boundaries_us() == [0, 10, 20, 30, 40, 50, 82, 92, 102]
    assert timeline.stalls() == [(6, Span(60.0, 82.0))]
    waits_at_the_end = Timeline(instances=[Span(0.0, 1.0)], copies=[], step_us=3.0)
    assert waits_at_the_end.stalls() == [(1, Span(1.0, 3.0))]


def events(**wanted: Any) -> list[dict[str, Any]]:
    found = trace(sample_plan.view(), sample_plan.timeline())["traceEvents"]
    return [event for event in found if all(event.get(key) == value for key, value in wanted.items())]


def test_trace_tracks() -> None:
    compute = events(ph="X", tid=1)
    assert [(one["name"], one["cat"], one["ts"], one["dur"]) for one in compute] == [
        ("conv2d", "forward", 0, 10),
        ("relu", "forward", 10, 10),
        ("aten.sum.default", "forward", 20, 10),
        ("conv2d", "forward", 30, 10),
        ("aten.mean.dim", "backward", 40, 10),
        ("conv2d_input_grad", "backward", 50, 10),
        ("relu", "recomputation", 82, 10),
        ("conv2d_weight_grad", "backward", 92, 10),
        ("stall", "stall", 60, 22),
    ]
    assert compute[1]["args"] == {"operation": "relu", "instance": 1, "module": "stem.relu", "patch": 2}
    assert compute[-1]["args"]["waits for"] == ["prefetch of c"]
    assert [(one["name"], one["cat"], one["ts"], one["dur"]) for one in events(ph="X", tid=2)] == [
        ("c", "offload", 10, 16)
    ]
    assert [(one["name"], one["cat"], one["ts"], one["dur"]) for one in events(ph="X", tid=3)] == [
        ("c", "prefetch", 50, 32)
    ]
    prefetch = {"bytes": 8 * KIB, "issue": 5, "wait": 6, "after": [0]}
    assert [one["args"] for one in events(ph="X", cat="prefetch")] == [prefetch]
    names = {one["tid"]: one["args"]["name"] for one in events(ph="M", name="thread_name")}
    assert names == {1: "compute", 2: "offload (device to host)", 3: "prefetch (host to device)"}


def test_trace_arrows_lie_within_the_slices_that_they_bind_to() -> None:
    slices = [(one["tid"], one["ts"], one["ts"] + one["dur"]) for one in events(ph="X")]
    for arrow in (*events(ph="s"), *events(ph="f")):
        assert any(arrow["tid"] == track and begin <= arrow["ts"] <= end for track, begin, end in slices), arrow
    assert len(events(ph="s")) == len(events(ph="f")) == 4


def test_trace_counters() -> None:
    device = [(one["ts"], one["args"]["bytes"] // KIB) for one in events(ph="C", name="device pool, live bytes")]
    # c and workspace; c and r; and scratch; r, scratch and d; d and grad.d; grad.d, c and grad.r; r instead of grad.d.
    assert device == [(0, 11), (10, 16), (20, 17), (30, 11), (40, 4), (50, 18), (82, 24), (102, 0)]
    host = [(one["ts"], one["args"]["bytes"] // KIB) for one in events(ph="C", name="host pool, live bytes")]
    assert host == [(10, 8), (82, 0)]


def test_trace_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, sample_plan.view(), sample_plan.timeline())
    assert json.loads(path.read_text()) == json.loads(json.dumps(trace(sample_plan.view(), sample_plan.timeline())))
