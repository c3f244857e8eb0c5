"""A small training step and a plan for it, by hand: one activation goes to the host and back, one is recomputed, one is
kept. As JSON holds them, and as objects with the fields of `splitkern._core`'s, whatever the planner decides today.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from splitkern.memory.report import PlanView
from splitkern.memory.timeline import Span, Timeline

KIB = 1024


def _operation(name: str, target: str, reads: list[int], writes: list[int], **other: Any) -> SimpleNamespace:
    fields = {"duration_us": 10.0, "workspace_bytes": 0, "is_backward": False, "patch": -1, "module": ""}
    return SimpleNamespace(name=name, target=target, reads=reads, writes=writes, **(fields | other))


def _storage(name: str, size_bytes: int, kind: str = "activation") -> SimpleNamespace:
    return SimpleNamespace(name=name, size_bytes=size_bytes, kind=kind, is_output=False)


def graph() -> SimpleNamespace:
    """conv (c) → relu (r) → conv (d) → loss, and back. Tensor i is the whole of storage i."""
    storages = [
        _storage("images", 4 * KIB, "input"),  # 0
        _storage("weight", KIB, "parameter"),  # 1
        _storage("grad.weight", KIB, "gradient"),  # 2
        _storage("c", 8 * KIB),  # 3
        _storage("r", 8 * KIB),  # 4
        _storage("d", 2 * KIB),  # 5
        _storage("grad.d", 2 * KIB),  # 6
        _storage("grad.r", 8 * KIB),  # 7
        _storage("scratch", KIB),  # 8
    ]
    operations = [
        _operation("conv", "conv2d", [0, 1], [3], module="stem.conv", workspace_bytes=3 * KIB),
        _operation("relu", "relu", [3], [4], module="stem.relu", patch=2),
        _operation("norm", "aten.sum.default", [4], [8]),
        _operation("conv_1", "conv2d", [4, 1, 8], [5], module="head"),
        _operation("loss", "aten.mean.dim", [5], [6], is_backward=True),
        _operation("conv_1_input_grad", "conv2d_input_grad", [6, 1], [7], is_backward=True, module="head"),
        _operation("conv_weight_grad", "conv2d_weight_grad", [7, 3, 4, 0], [2], is_backward=True, module="stem.conv"),
    ]
    return SimpleNamespace(
        name="sample",
        durations_from="estimate: by hand",
        storages=storages,
        tensors=[SimpleNamespace(name=one.name, storage=index) for index, one in enumerate(storages)],
        operations=operations,
    )


def plan() -> SimpleNamespace:
    """Instances 0 to 7: 0 conv, 1 relu, 2 norm, 3 conv_1, 4 loss, 5 conv_1_input_grad, 6 relu again, 7 weight grad."""
    steps = graph()

    def residency(storage: int, pool: str, offset: int, size: int, begin: int, end: int) -> SimpleNamespace:
        return SimpleNamespace(
            storage=storage, pool=pool, offset_bytes=offset * KIB, size_bytes=size * KIB, begin=begin, end=end
        )

    def copy(kind: str, source: int, destination: int, issue: int, wait: int, after: list[int]) -> SimpleNamespace:
        return SimpleNamespace(
            kind=kind, storage=3, source=source, destination=destination, issue=issue, wait=wait, after=after
        )

    residencies = [
        residency(0, "parameters", 0, 4, 0, 8),  # 0
        residency(1, "parameters", 4, 1, 0, 8),  # 1
        residency(2, "parameters", 5, 1, 0, 8),  # 2
        residency(3, "device", 0, 8, 0, 3),  # 3: c, until it is on the host
        residency(-1, "device", 8, 3, 0, 1),  # 4: workspace of conv
        residency(4, "device", 8, 8, 1, 4),  # 5: r, the first time
        residency(8, "device", 20, 1, 2, 4),  # 6: scratch
        residency(5, "device", 16, 2, 3, 5),  # 7: d
        residency(6, "device", 18, 2, 4, 6),  # 8: grad.d
        residency(7, "device", 20, 8, 5, 8),  # 9: grad.r
        residency(3, "device", 0, 8, 5, 8),  # 10: c, back
        residency(4, "device", 8, 8, 6, 8),  # 11: r, recomputed
        residency(3, "host", 0, 8, 1, 6),  # 12: c, on the host
    ]
    boundaries = [SimpleNamespace(waits=[], issues=[]) for _ in range(9)]
    boundaries[1].issues, boundaries[3].waits = [0], [0]
    boundaries[5].issues, boundaries[6].waits = [1], [1]
    return SimpleNamespace(
        strategy="by hand",
        limits=SimpleNamespace(device_bytes=40 * KIB, host_bytes=None, offload_gbps=0.5, prefetch_gbps=0.25),
        storages=[SimpleNamespace(size_bytes=one.size_bytes, members=[i]) for i, one in enumerate(steps.storages)],
        fused=[],
        instances=[
            SimpleNamespace(operation=operation, is_recomputation=again, accumulate=False)
            for operation, again in [*((one, False) for one in range(6)), (1, True), (6, False)]
        ],
        boundaries=boundaries,
        residencies=residencies,
        copies=[copy("offload", 3, 12, 1, 3, []), copy("prefetch", 12, 10, 5, 6, [0])],
        predicted=SimpleNamespace(
            step_us=102.0,
            compute_us=70.0,
            recompute_us=10.0,
            stall_us=22.0,
            device_peak_bytes=28 * KIB,
            parameters_peak_bytes=6 * KIB,
            host_peak_bytes=8 * KIB,
            device_lower_bound_bytes=24 * KIB,
            host_lower_bound_bytes=8 * KIB,
        ),
    )


def timeline() -> Timeline:
    """The offload is hidden; the prefetch takes 32 µs and makes instance 6 wait for 22."""
    begins = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 82.0, 92.0)
    return Timeline(
        instances=[Span(begin, begin + 10) for begin in begins],
        copies=[Span(10.0, 26.0), Span(50.0, 82.0)],
        step_us=102.0,
    )


def view() -> PlanView:
    """Graph and plan."""
    return PlanView(graph(), plan())
