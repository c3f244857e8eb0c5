"""A plan's decisions at other sizes: `with_sizes` and `place_again`."""

from __future__ import annotations

import numpy as np
import pytest

from splitkern import _core
from tests.memory.test_core import small_graph

LIMITS = _core.Limits(device_bytes=30_000, host_bytes=100_000, offload_gbps=10, prefetch_gbps=10)


def numbers_of(graph: _core.Graph) -> list[int]:
    numbers = [storage.size_bytes for storage in graph.storages]
    for tensor in graph.tensors:
        numbers += (tensor.offset_bytes, *tensor.sizes, *tensor.strides_bytes)
    return numbers


def scaled(graph: _core.Graph, factor: float) -> _core.Graph:
    """Activations of other sizes."""
    sizes = [
        int(factor * one.size_bytes)
        if one.kind == _core.StorageKind.ACTIVATION and not one.is_output
        else one.size_bytes
        for one in graph.storages
    ]
    numbers = np.array([*sizes, *(n for tensor in graph.tensors for n in (0, sizes[tensor.storage], 1))])
    return _core.with_sizes(graph, numbers)


def test_sizes_go_where_they_belong() -> None:
    graph = small_graph()
    numbers = np.array(numbers_of(graph))
    assert _core.with_sizes(graph, numbers) == graph
    other = _core.with_sizes(graph, numbers + np.arange(len(numbers)))
    assert numbers_of(other) == (numbers + np.arange(len(numbers))).tolist()
    assert other.operations == graph.operations and other.fingerprint != graph.fingerprint
    with pytest.raises(_core.InvalidArgument, match=f"must hold {len(numbers)} values for this graph, got 3"):
        _core.with_sizes(graph, numbers[:3])


@pytest.mark.parametrize("factor", [0.5, 1, 1.25])
def test_decisions_stay_and_places_are_made_anew(factor: float) -> None:
    graph = small_graph()
    plan = _core.plan(graph, LIMITS)
    other = scaled(graph, factor)
    placed = _core.place_again(other, plan, LIMITS)
    _core.validate(other, placed)
    assert (placed.instances, placed.boundaries, placed.copies, placed.fused) == (
        plan.instances, plan.boundaries, plan.copies, plan.fused,
    )  # fmt: skip
    assert placed.limits == LIMITS and placed.graph_fingerprint == other.fingerprint
    if factor == 1:
        assert placed == plan
    else:
        assert placed.predicted.device_peak_bytes != plan.predicted.device_peak_bytes
        with pytest.raises(_core.InvalidPlan):
            _core.validate(other, plan)


def test_a_budget_that_does_not_hold_names_what_would() -> None:
    graph = small_graph()
    plan = _core.plan(graph, LIMITS)
    other = scaled(graph, 4)
    with pytest.raises(_core.Infeasible, match="decisions need") as caught:
        _core.place_again(other, plan, LIMITS)
    assert (caught.value.pool, caught.value.budget_bytes) == ("device", 30_000)
    enough = caught.value.smallest_feasible_bytes
    placed = _core.place_again(other, plan, _core.Limits(device_bytes=enough, offload_gbps=10, prefetch_gbps=10))
    _core.validate(other, placed)
    predicted = placed.predicted
    assert predicted.device_peak_bytes + predicted.parameters_peak_bytes <= enough


def test_a_plan_of_another_structure_is_refused() -> None:
    graph = small_graph()
    plan = _core.plan(graph, LIMITS)
    fewer = small_graph(operations=graph.operations[:3])
    with pytest.raises(_core.InvalidArgument, match="operations must be below 3"):
        _core.place_again(fewer, plan, LIMITS)
