"""`splitkern._core.validate` on plans as JSON: a valid plan passes, and each mutant of it is refused with its reason.
The proof itself is checked in C++ against a brute-force interpreter (tests/memory/native/validator*.cpp).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from splitkern import _core

Document = dict[str, Any]
BYTES = 1024

# Planned storages, residencies, copies and instances of the plan below, by their positions.
WEIGHT, IMAGES, HIDDEN, ACTIVE, LOSS, GRAD = range(6)
AT_WEIGHT, AT_IMAGES, AT_GRAD, HIDDEN_BEFORE, HIDDEN_AFTER, HIDDEN_HOST, ACTIVE_FIRST, ACTIVE_AGAIN, AT_LOSS = range(9)
OFFLOAD, PREFETCH = range(2)


def graph_document() -> Document:
    """A convolution, a ReLU, a loss and the weight gradient, which reads what both layers made."""
    names = ["weight", "images", "hidden", "active", "loss", "grad"]
    kinds = ["parameter", "input", "activation", "activation", "activation", "gradient"]
    return {
        "format": "splitkern.graph",
        "version": 1,
        "name": "step",
        "storages": [
            {"name": name, "size_bytes": BYTES, "kind": kind, "is_output": name == "loss"}
            for name, kind in zip(names, kinds, strict=True)
        ],
        "tensors": [
            {"name": name, "storage": i, "sizes": [BYTES], "strides_bytes": [1]} for i, name in enumerate(names)
        ],
        "operations": [
            {"name": "conv", "target": "conv2d", "duration_us": 10, "reads": [IMAGES, WEIGHT], "writes": [HIDDEN]},
            {"name": "relu", "target": "relu", "duration_us": 1, "reads": [HIDDEN], "writes": [ACTIVE]},
            {"name": "pool", "target": "mean", "duration_us": 1, "reads": [ACTIVE], "writes": [LOSS]},
            {
                "name": "back",
                "target": "conv2d_weight_grad",
                "duration_us": 10,
                "reads": [LOSS, HIDDEN, ACTIVE],
                "writes": [GRAD],
            },
        ],
    }


def plan_document(graph: _core.Graph) -> Document:
    """`hidden` is offloaded under the ReLU and fetched again; `active` is dropped and made again by a second ReLU."""

    def residency(storage: int, pool: str, slot: int, begin: int, end: int) -> Document:
        place = {"offset_bytes": slot * BYTES, "size_bytes": BYTES, "begin": begin, "end": end}
        return {"storage": storage, "pool": pool, **place}

    return {
        "format": "splitkern.plan",
        "version": 1,
        "graph_fingerprint": graph.fingerprint,
        "strategy": "by hand",
        "limits": {
            "device_bytes": 6 * BYTES,
            "host_bytes": BYTES,
            "offload_gbps": 10,
            "prefetch_gbps": 10,
            "alignment_bytes": 512,
        },
        "storages": [{"size_bytes": BYTES, "members": [i]} for i in range(6)],
        "instances": [
            {"operation": 0},
            {"operation": 1},
            {"operation": 2},
            {"operation": 1, "is_recomputation": True},
            {"operation": 3},
        ],
        "boundaries": [
            {},
            {"issues": [OFFLOAD]},
            {"waits": [OFFLOAD], "issues": [PREFETCH]},
            {"waits": [PREFETCH]},
            {},
            {},
        ],
        "residencies": [
            residency(WEIGHT, "parameters", 0, 0, 5),
            residency(IMAGES, "parameters", 1, 0, 5),
            residency(GRAD, "parameters", 2, 0, 5),
            residency(HIDDEN, "device", 0, 0, 2),
            residency(HIDDEN, "device", 0, 2, 5),
            residency(HIDDEN, "host", 0, 1, 3),
            residency(ACTIVE, "device", 1, 1, 3),
            residency(ACTIVE, "device", 1, 3, 5),
            residency(LOSS, "device", 2, 2, 5),
        ],
        "copies": [
            {"kind": "offload", "storage": HIDDEN, "source": 3, "destination": 5, "issue": 1, "wait": 2},
            {"kind": "prefetch", "storage": HIDDEN, "source": 5, "destination": 4, "issue": 2, "wait": 3},
        ],
        "predicted": {
            "device_peak_bytes": 3 * BYTES,
            "parameters_peak_bytes": 3 * BYTES,
            "host_peak_bytes": BYTES,
            "device_lower_bound_bytes": 3 * BYTES,
            "host_lower_bound_bytes": BYTES,
        },
    }


@pytest.fixture
def graph() -> _core.Graph:
    """The graph of the document."""
    return _core.Graph.from_json(json.dumps(graph_document()))


def validate(graph: _core.Graph, document: Document) -> None:
    """Through text, as a plan comes from a file."""
    _core.validate(graph, _core.Plan.from_json(json.dumps(document)))


def test_the_plan_itself_is_valid(graph: _core.Graph) -> None:
    validate(graph, plan_document(graph))


def shift_an_offset(plan: Document) -> None:
    plan["residencies"][AT_LOSS]["offset_bytes"] = BYTES


def shift_an_offset_off_the_grid(plan: Document) -> None:
    plan["residencies"][AT_LOSS]["offset_bytes"] += 1


def drop_a_wait(plan: Document) -> None:
    plan["boundaries"][3]["waits"] = []


def wait_too_late(plan: Document) -> None:
    plan["boundaries"][3]["waits"] = []
    plan["boundaries"][4]["waits"] = [PREFETCH]
    plan["copies"][PREFETCH]["wait"] = 4
    plan["residencies"][HIDDEN_HOST]["end"] = 4


def give_up_the_host_bytes_too_early(plan: Document) -> None:
    plan["residencies"][HIDDEN_HOST]["end"] = 2


def issue_before_the_bytes_are_free(plan: Document) -> None:
    plan["boundaries"][2]["issues"] = []
    plan["boundaries"][1]["issues"] = [OFFLOAD, PREFETCH]
    plan["copies"][PREFETCH]["issue"] = 1


def swap_the_issues(plan: Document) -> None:
    plan["boundaries"][1]["issues"], plan["boundaries"][2]["issues"] = [PREFETCH], [OFFLOAD]


def swap_endpoints(plan: Document) -> None:
    copied = plan["copies"][OFFLOAD]
    copied["source"], copied["destination"] = copied["destination"], copied["source"]


def reorder_instances(plan: Document) -> None:
    instances = plan["instances"]
    instances[1], instances[2] = instances[2], instances[1]


def repeat_an_instance_as_the_first(plan: Document) -> None:
    del plan["instances"][3]["is_recomputation"]


def recompute_the_wrong_operation(plan: Document) -> None:
    plan["instances"][3]["operation"] = 2


def shrink_in_time(plan: Document) -> None:
    plan["residencies"][ACTIVE_FIRST]["end"] = 2


def shrink_in_bytes(plan: Document) -> None:
    plan["residencies"][ACTIVE_FIRST]["size_bytes"] = 512


def forget_a_member(plan: Document) -> None:
    plan["storages"][ACTIVE]["members"] = [LOSS]


def change_a_storage(plan: Document) -> None:
    plan["storages"][ACTIVE]["size_bytes"] = 512


def move_a_parameter(plan: Document) -> None:
    plan["residencies"][AT_WEIGHT]["begin"] = 1


def lower_the_device_budget(plan: Document) -> None:
    plan["limits"]["device_bytes"] = 6 * BYTES - 1


def lower_the_host_budget(plan: Document) -> None:
    plan["limits"]["host_bytes"] = BYTES - 1


def cut_the_link(plan: Document) -> None:
    plan["limits"]["offload_gbps"] = 0


def predict_too_little(plan: Document) -> None:
    plan["predicted"]["device_peak_bytes"] -= 1


def fuse_what_is_no_sum(plan: Document) -> None:
    plan["fused"] = [{"sum": 2, "producer": 1}]


def point_nowhere(plan: Document) -> None:
    plan["copies"][OFFLOAD]["destination"] = 9


def give_up_the_output(plan: Document) -> None:
    plan["residencies"].append(dict(plan["residencies"][AT_LOSS], begin=4))
    plan["residencies"][AT_LOSS]["end"] = 4


@pytest.mark.parametrize(
    ("change", "reason", "part"),
    [
        (shift_an_offset, "overlap", "residency 8"),
        (shift_an_offset_off_the_grid, "alignment", "512"),
        (drop_a_wait, "wait", "copy 1"),
        (wait_too_late, "before arrival", "copy 1"),
        (give_up_the_host_bytes_too_early, "outside its residency", "residency 5"),
        (issue_before_the_bytes_are_free, "outside its residency", "residency 4"),
        (swap_the_issues, "issue", "boundary 1"),
        (swap_endpoints, "endpoints", "copy 0"),
        (reorder_instances, "order", '"pool"'),
        (repeat_an_instance_as_the_first, "order", "instance 3"),
        (recompute_the_wrong_operation, "wrong value", '"active"'),
        (shrink_in_time, "not resident", '"active"'),
        (shrink_in_bytes, "size", "512"),
        (forget_a_member, "membership", "storage 4"),
        (change_a_storage, "size", "1024"),
        (move_a_parameter, "pool", '"weight"'),
        (lower_the_device_budget, "budget", "6143"),
        (lower_the_host_budget, "budget", "1023"),
        (cut_the_link, "link", "offload_gbps"),
        (predict_too_little, "prediction", "3071"),
        (fuse_what_is_no_sum, "fused", '"pool"'),
        (point_nowhere, "index", "9"),
        (give_up_the_output, "wrong value", '"loss"'),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_mutant_is_refused(graph: _core.Graph, change: Callable[[Document], None], reason: str, part: str) -> None:
    document = plan_document(graph)
    before = copy.deepcopy(document)
    change(document)
    assert document != before
    with pytest.raises(_core.InvalidPlan) as caught:
        validate(graph, document)
    assert caught.value.reason == reason, str(caught.value)
    assert part in str(caught.value)


def test_a_plan_for_another_graph_is_refused(graph: _core.Graph) -> None:
    document = graph_document()
    document["operations"][0]["duration_us"] = 11
    other = _core.Graph.from_json(json.dumps(document))
    with pytest.raises(_core.InvalidPlan) as caught:
        validate(other, plan_document(graph))
    assert caught.value.reason == "other graph"
