"""`splitkern plan`: networks, graphs and placement problems in; exit codes, files, and errors of one line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from splitkern import _core
from splitkern.benchmarks import record
from splitkern.cli import main

CSV = "id,lower,upper,size\na,0,4,16\nb,0,2,8\nc,2,4,8\n"
KIB = 1024


def step(activations: int = 6, size_bytes: int = 64 * KIB) -> dict[str, Any]:
    """A chain of operations, each 100 µs: every activation is written in forward and read in backward."""
    storages: list[dict[str, Any]] = [
        {"name": "images", "size_bytes": KIB, "kind": "input"},
        {"name": "weight", "size_bytes": KIB, "kind": "parameter"},
        {"name": "grad.weight", "size_bytes": KIB, "kind": "gradient"},
    ]
    storages += [{"name": f"a{i}", "size_bytes": size_bytes, "kind": "activation"} for i in range(activations)]
    storages += [{"name": f"g{i}", "size_bytes": size_bytes, "kind": "activation"} for i in range(activations)]
    tensors = [
        {
            "name": storage["name"],
            "storage": index,
            "offset_bytes": 0,
            "sizes": [storage["size_bytes"]],
            "strides_bytes": [1],
            "element_bytes": 1,
        }
        for index, storage in enumerate(storages)
    ]

    def operation(name: str, reads: list[int], writes: list[int], backward: bool) -> dict[str, Any]:
        timed = {"name": name, "target": "conv2d", "duration_us": 100.0, "module": name}
        return {**timed, "reads": reads, "writes": writes, "is_backward": backward}

    first, gradients = 3, 3 + activations
    operations = [
        operation(f"forward{i}", [first + i - 1 if i else 0, 1], [first + i], False) for i in range(activations)
    ]
    for i in reversed(range(activations)):
        reads = [first + i, *([gradients + i + 1] if i + 1 < activations else [])]
        operations.append(operation(f"backward{i}", reads, [gradients + i], True))
    operations.append(operation("weight_grad", [gradients], [2], True))
    return {
        "format": "splitkern.graph",
        "version": 1,
        "name": "chain",
        "durations_from": "estimate: by hand",
        "storages": storages,
        "tensors": tensors,
        "operations": operations,
    }


@pytest.fixture
def graph(tmp_path: Path) -> str:
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(step()))
    return str(path)


def told(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_graph_without_limits(graph: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", graph]) == 0
    out, err = told(capsys)
    for part in ("chain: 13 operations", "estimate: by hand", "device unlimited", "proven valid", "nothing"):
        assert part in out
    assert err == ""


def test_graph_under_a_budget_offloads(graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / "new" / name for name in ("plan.json", "out.json", "p.png", "p.html", "trace.json")}
    options = ["--budget", "320KiB", "--offload-gbps", "2", "--prefetch-gbps", "2", "--json"]
    names = ("--save", "--graph-out", "--picture", "--html", "--trace")
    written = [word for name, file in zip(names, files.values(), strict=True) for word in (name, str(file))]
    assert main(["plan", graph, *options, *written]) == 0
    found = json.loads(told(capsys)[0])
    assert found["fits"] and found["device_total_bytes"] <= 320 * KIB == found["device_limit_bytes"]
    assert found["offloaded_bytes"] > 0 or found["recomputed"]
    assert found["step_us"] == pytest.approx(found["compute_us"] + found["recompute_us"] + found["stall_us"])
    kept = _core.Graph.from_json(files["out.json"].read_text())
    assert kept == _core.Graph.from_json(Path(graph).read_text())
    plan = _core.Plan.from_json(files["plan.json"].read_text())
    _core.validate(kept, plan)
    assert plan.predicted.step_us == found["step_us"]
    assert files["p.png"].read_bytes().startswith(b"\x89PNG") and "<canvas" in files["p.html"].read_text()
    slices = [one for one in json.loads(files["trace.json"].read_text())["traceEvents"] if one["ph"] == "X"]
    assert max(one["ts"] + one["dur"] for one in slices) == pytest.approx(found["step_us"])


@pytest.mark.parametrize("strategy", _core.strategy_names())
def test_every_strategy(graph: str, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", graph, "--cost-model", "paper", "--strategy", strategy, "--json"]) == 0
    found = json.loads(told(capsys)[0])
    assert (found["strategy"], found["offload_gbps"], found["device_limit_bytes"]) == (strategy, 34.0, 16 * 10**9)


def test_a_budget_that_nothing_fits(graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    assert main(["plan", graph, "--budget", "100KiB", "--json", "--save", str(plan)]) == 1
    out, err = told(capsys)
    found = json.loads(out)
    assert (found["fits"], found["pool"], found["budget_bytes"]) == (False, "device", 100 * KIB)
    assert err.startswith("splitkern plan: ") and err.count("\n") == 1
    assert not plan.exists()
    smallest = str(found["smallest_feasible_bytes"])
    assert main(["plan", graph, "--budget", smallest]) == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"format": "splitkern.graph", "version": 1', "line 1, column"),
        ('{"format": "splitkern.plan", "version": 1}', "format"),
        ("", "line 1"),
        (json.dumps({**step(), "storages": []}), "storage"),
    ],
)
def test_bad_graphs(tmp_path: Path, content: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main(["plan", str(path)]) == 2
    err = told(capsys)[1]
    assert err.startswith("splitkern plan: error: ") and err.count("\n") == 1
    assert str(path) in err and text in err


def test_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem, placed = tmp_path / "few.csv", tmp_path / "placed.csv"
    problem.write_text(CSV)
    assert main(["plan", str(problem), "--capacity", "24", "--out", str(placed)]) == 0
    out = told(capsys)[0]
    assert "3 buffers" in out and "24 bytes (24 B): everything fits" in out
    read = _core.read_minimalloc_csv(placed.read_text())
    assert list(read.ids) == ["a", "b", "c"] and placed.read_text().startswith("id,lower,upper,size,offset\n")
    ends = [buffer.size_bytes + offset for buffer, offset in zip(read.buffers, read.offsets, strict=True)]
    assert max(ends) == 24
    a, b, c = ((offset, end) for offset, end in zip(read.offsets, ends, strict=True))
    assert all(a[1] <= other[0] or other[1] <= a[0] for other in (b, c))


def test_placement_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem, placed = tmp_path / "few.csv", tmp_path / "placed.csv"
    problem.write_text(CSV)
    page = tmp_path / "page.html"
    assert main(["plan", str(problem), "--capacity", "23", "--out", str(placed), "--html", str(page)]) == 1
    out, err = told(capsys)
    assert "does not fit: 1 bytes too many" in out
    assert err == f"splitkern plan: {problem} does not fit --capacity 23: 1 bytes too many, no file is written\n"
    assert list(tmp_path.iterdir()) == [problem]
    assert main(["plan", str(problem), "--capacity", "23", "--json"]) == 1
    assert json.loads(told(capsys)[0]) == {
        "fits": False,
        "buffers": 3,
        "peak_bytes": 24,
        "lower_bound_bytes": 24,
        "capacity_bytes": 23,
    }


def test_placement_with_alignment_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem, page = tmp_path / "few.csv", tmp_path / "few.html"
    problem.write_text(CSV)
    assert main(["plan", str(problem), "--alignment", "64", "--html", str(page), "--json"]) == 0
    assert json.loads(told(capsys)[0])["peak_bytes"] == 128
    assert "few: 3 buffers" in page.read_text()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("id,lower,upper,size\na,0,4\n", "line 2"),
        ("id,lower,upper,size\na,4,4,1\n", "line 2"),
        ("id,lower,upper\n", "line 1"),
        ("", "line 1"),
    ],
)
def test_bad_placements(tmp_path: Path, content: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    assert main(["plan", str(path)]) == 2
    err = told(capsys)[1]
    assert err.count("\n") == 1 and text in err and str(path) in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.json"], "missing.json cannot be read: No such file or directory"),
        (["missing.csv"], "missing.csv cannot be read: No such file or directory"),
        (["graph", "--capacity", "1", "--out", "x.csv"], "a graph: --capacity, --out cannot apply"),
        (["graph", "--batch", "4", "--measure"], "operations and durations already: --batch, --measure cannot apply"),
        (["few.csv", "--budget", "1GiB", "--grid", "2x2"], "a placement problem: --grid, --budget cannot apply"),
        (["graph", "--strategy", "best"], "--strategy must be one of "),
        (["graph", "--budget", "16GiBs"], "must be bytes such as 16GiB"),
        (["graph", "--cost-model", "a100"], "invalid choice: 'a100'"),
        (["graph", "--cost-model", "paper", "--measure"], "not allowed with argument"),
        (["graph", "--save", "/dev/null/plan.json"], "--save /dev/null/plan.json cannot be written"),
        (["graph", "--html", "/dev/null/page.html"], "--html /dev/null/page.html cannot be written"),
        (["graph", "--offload-gbps", "-1"], "must be a number at least 0"),
        (["few.csv", "--alignment", "9" * 22], f"must be a whole number of at most {2**63 - 1}, got '{'9' * 22}'"),
        (["resnet18", "--batch", "9" * 20], f"must be a whole number of at most {2**20}, got '{'9' * 20}'"),
        (["resnet18", "--image-size", "99999999999"], f"must be a whole number of at most {2**16}, got '99999999999'"),
        (["resnet18", "--grid", "\u00b2x2"], "must be ROWSxCOLUMNS, both at least 1, such as 2x2; got"),
        (["resnet18", "--grid", f"2x{'9' * 5000}"], "must be ROWSxCOLUMNS, both below 10^9, such as 2x2"),
    ],
)
def test_bad_arguments(graph: str, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *(graph if word == "graph" else word for word in arguments)]) == 2
    out, err = told(capsys)
    assert text in err and out == "" and "Traceback" not in err


NETWORK = ["plan", "resnet18", "--batch", "4", "--image-size", "32"]


@pytest.mark.torchvision
def test_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "graph.json"
    split = ["--grid", "2x2", "--until", "layer1"]
    assert main([*NETWORK, *split, "--json", "--graph-out", str(out)]) == 0
    found = json.loads(told(capsys)[0])
    assert found["graph"] == "resnet18, batch 4, 32x32, 2x2 until layer1, fp32"
    assert (found["durations_from"], found["device_limit_bytes"]) == ("estimate: paper", 16 * 10**9)
    graph = _core.Graph.from_json(out.read_text())
    assert {operation.patch for operation in graph.operations} == {-1, 0, 1, 2, 3}
    assert all(operation.duration_us >= 5 for operation in graph.operations)
    # The graph alone says the same.
    assert main(["plan", str(out), "--cost-model", "paper", "--json"]) == 0
    assert json.loads(told(capsys)[0]) == found


@pytest.mark.torchvision
def test_network_in_bf16_halves_the_activations(capsys: pytest.CaptureFixture[str]) -> None:
    saved = {}
    for dtype in ("fp32", "bf16"):
        assert main([*NETWORK, "--batch", "256", "--dtype", dtype, "--json"]) == 0
        found = json.loads(told(capsys)[0])
        saved[dtype] = found["saved_bytes"]
        assert found["durations_from"] == {"fp32": "estimate: paper", "bf16": "estimate: h200-bf16"}[dtype]
    assert 0.4 < saved["bf16"] / saved["fp32"] < 0.75  # copies of the weights in bf16 are saved, too


@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lenet"], "model must be one of vgg11"),
        (["resnet18", "--until", "layer1"], "until and norm need a grid"),
        (["resnet18", "--grid", "2x2", "--until", "layer9", "--image-size", "32"], "layer9"),
        (["resnet18", "--cost-model", "h200-bf16", "--dtype", "fp32"], "knows the rates of bf16, not of fp32"),
        (["resnet18", "--device", "cpu"], "--device needs --measure"),
        (["resnet18", "--no-cache"], "--no-cache needs --measure"),
        (["resnet18", "--measure", "--device", "tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["resnet18", "--measure", "--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_bad_networks(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--batch", "2"]) == 2
    out, err = told(capsys)
    assert text in err and out == "" and err.count("\n") == 1


@pytest.mark.torchvision
def test_measured_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from splitkern.memory import profile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    link = profile.LinkRates(20.0, 21.0, 10.0, 11.0, 1)
    monkeypatch.setattr(profile, "measure_link", lambda device: link)
    arguments = ["plan", "resnet18", "--batch", "2", "--image-size", "33", "--measure", "--device", "cpu", "--json"]
    assert main(arguments) == 0
    first = json.loads(told(capsys)[0])
    assert first["durations_from"].startswith("measured: ") and first["step_us"] > 0
    # What the link does while the device computes is what a plan can count on.
    assert (first["offload_gbps"], first["prefetch_gbps"], first["device_limit_bytes"]) == (10.0, 11.0, None)
    files = list((tmp_path / "splitkern" / "durations").rglob("*.json"))
    assert files

    def fail(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(profile, "_measure", fail)
    assert main(arguments) == 0
    assert json.loads(told(capsys)[0]) == first


def test_a_capacity_beyond_64_bits_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    problem = tmp_path / "few.csv"
    problem.write_text(CSV)
    assert main(["plan", str(problem), "--capacity", str(2**63)]) == 2
    assert "below 2^63" in told(capsys)[1]


def test_the_largest_alignment_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    problem = tmp_path / "few.csv"
    problem.write_text(CSV)
    assert main(["plan", str(problem), "--alignment", str(2**63 - 1)]) == 2
    assert told(capsys)[1].count("\n") == 1


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_file(
    graph: str, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, marked = tmp_path / "few.csv", tmp_path / "marked.json"
    problem.write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", end).encode())
    marked.write_bytes(b"\xef\xbb\xbf" + Path(graph).read_bytes())
    for path in (problem, marked):
        assert main(["plan", str(path), "--json"]) == 0, told(capsys)


OUTPUTS = ("--save", "--graph-out", "--picture", "--html", "--trace")


@pytest.mark.parametrize("option", OUTPUTS)
def test_a_full_disk_keeps_the_file_that_was_there(
    graph: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "before"
    file.write_text("as it was")

    def full(source: Path, target: Path) -> None:
        assert Path(source).stat().st_size > 100 and file.read_text() == "as it was"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "replace", full)
    assert main(["plan", graph, option, str(file)]) == 2
    out, err = told(capsys)
    assert err == f"splitkern plan: error: {option} {file} cannot be written: No space left on device\n"
    assert "proven valid" in out, "what was planned is told all the same"
    assert file.read_text() == "as it was"
    assert sorted(tmp_path.iterdir()) == sorted([file, Path(graph)])


@pytest.mark.parametrize("option", [*OUTPUTS, "--out"])
def test_what_cannot_be_written_is_said_before_anything_is_planned(
    graph: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr(_core, "plan", fail)
    monkeypatch.setattr(_core, "place", fail)
    problem = tmp_path / "few.csv"
    problem.write_text(CSV)
    assert main(["plan", str(problem) if option == "--out" else graph, option, str(tmp_path)]) == 2
    assert told(capsys)[1] == f"splitkern plan: error: {option} {tmp_path} cannot be written: Is a directory\n"


@pytest.mark.torchvision
def test_a_batch_that_only_another_machine_holds(capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["plan", "resnet18", "--batch", str(2**20), "--strategy", "none", "--budget", "9000000TB", "--json"]
    assert main([*batch, "--image-size", "1024"]) == 0
    found = json.loads(told(capsys)[0])
    assert found["device_total_bytes"] > 2**20 * 3 * 1024**2 * 4
    assert main([*batch, "--image-size", "65536"]) == 2
    out, err = told(capsys)
    assert out == "" and err.count("\n") == 1
    assert "images of 65536x65536 pixels is 54043195528445952 bytes, more than can be addressed here" in err
