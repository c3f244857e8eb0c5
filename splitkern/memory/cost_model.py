"""Named machines: how long an operation would take there, and the budgets and links of that machine.

For plans of machines that are not at hand. Graphs whose durations come from here say so: "estimate: NAME". What the
machine at hand takes is measured by profile.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol


class Counted(Protocol):
    """An operation with what it computes and moves; a `CapturedOperation` is one."""

    @property
    def target(self) -> str:
        """What it computes, as in `Operation::target`: "conv2d", "relu", "aten.mean.dim"."""

    @property
    def flop(self) -> int:
        """Multiplications and additions of its matrix products; 0 where it has none."""

    @property
    def bytes(self) -> int:
        """Bytes of what it reads and of what it writes, each once."""


@dataclass(frozen=True)
class Rates:
    """How near operations of one kind come to the machine's rates.

    Attributes:
        matmul_share: of the machine's matrix-product rate.
        memory_share: of its copy bandwidth.
        traffic: bytes moved for every byte that is read or written: above 1 where an operation must pass over its
            input more than once.
        overhead_us: time of a call that computes nothing.
    """

    matmul_share: float = 1.0
    memory_share: float = 1.0
    traffic: float = 1.0
    overhead_us: float = 0.0


@dataclass(frozen=True)
class CostModel:
    """A machine by its rates.

    Attributes:
        name: as `--cost-model` takes it.
        description: one line for people.
        sources: where every figure comes from.
        dtype: "fp32" or "bf16": the type in which its matrix-product rate holds.
        matmul_tflops: rate of matrix products, in 10^12 operations per second (a product and a sum are two).
        memory_gbps: bandwidth of its memory, bytes read and written counted, in 10^9 bytes per second.
        device_bytes: budget unless told.
        offload_gbps, prefetch_gbps: link to and from pinned host memory, in 10^9 bytes per second.
        copy_latency_us: time of a copy of nothing.
        other: rates of the operations that `rates` does not name.
        rates: rates by target, or by the name of the call where one target has several
            ("splitkern.patch_batch_norm_backward_apply.default").
    """

    name: str
    description: str
    sources: tuple[str, ...]
    dtype: str
    matmul_tflops: float
    memory_gbps: float
    device_bytes: int
    offload_gbps: float
    prefetch_gbps: float
    copy_latency_us: float
    other: Rates
    rates: Mapping[str, Rates] = field(default_factory=lambda: MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, one.name) for one in fields(self))
        return CostModel, tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    @property
    def label(self) -> str:
        """What `Graph.durations_from` says of durations from here."""
        return f"estimate: {self.name}"

    def duration_us(self, operation: Counted) -> float:
        """Time of one operation on the machine, in µs.

        The roofline (Williams, Waterman, Patterson 2009) with the share of each roof that the kind of operation
        reaches, and the time that a call takes whatever its size.

        Args:
            operation: what it computes and moves.

        Raises:
            ValueError: for negative counts.
        """
        if operation.flop < 0 or operation.bytes < 0:
            raise ValueError(
                f"flop and bytes of {operation.target} must not be negative, got {operation.flop} and {operation.bytes}"
            )
        call = str(getattr(getattr(operation, "call", None), "overload", operation.target))
        rates = self.rates.get(call) or self.rates.get(operation.target, self.other)
        matmul_us = operation.flop / (self.matmul_tflops * rates.matmul_share * 1e6)
        memory_us = operation.bytes * rates.traffic / (self.memory_gbps * rates.memory_share * 1e3)
        return rates.overhead_us + max(matmul_us, memory_us)

    def durations_us(self, operations: Iterable[Counted]) -> list[float]:
        """Times of operations, in µs, in their order."""
        return [self.duration_us(operation) for operation in operations]


# A BatchNorm reads its input for the statistics and again to normalise it (3 passes where reads and writes count 2);
# its backward reads both operands twice (5 where they count 3), in one call or in two. bench/results counts the same
# passes.
_BATCH_NORM_TRAFFIC = 3 / 2
_BATCH_NORM_BACKWARD_TRAFFIC = 5 / 3
_BATCH_NORM_BACKWARD_CALLS = (
    "splitkern.patch_batch_norm_backward_reduce.default",
    "splitkern.patch_batch_norm_backward_apply.default",
)

PAPER = CostModel(
    name="paper",
    description="the class of machine of Jin and Hong 2019: fp32, 12 TFLOP/s, 34 GB/s each way, 16 GB",
    sources=(
        "12 TFLOP/s, 34 GB/s each way and 16 GB: the class of machine on which Split-CNN was evaluated (Jin and Hong, "
        "ASPLOS 2019), a Tesla P100 over NVLink; here every convolution and matrix product runs at that rate",
        "732 GB/s: NVIDIA's data sheet of the Tesla P100 with 16 GB of HBM2; of it 75 % is assumed to be reached",
        "5 µs per call and 10 µs per copy: assumed",
    ),
    dtype="fp32",
    matmul_tflops=12.0,
    memory_gbps=732.0,
    device_bytes=16 * 10**9,
    offload_gbps=34.0,
    prefetch_gbps=34.0,
    copy_latency_us=10.0,
    other=Rates(memory_share=0.75, overhead_us=5.0),
    rates=MappingProxyType(
        {
            "batch_norm": Rates(memory_share=0.75, traffic=_BATCH_NORM_TRAFFIC, overhead_us=5.0),
            "batch_norm_backward": Rates(memory_share=0.75, traffic=_BATCH_NORM_BACKWARD_TRAFFIC, overhead_us=5.0),
            **dict.fromkeys(_BATCH_NORM_BACKWARD_CALLS, Rates(memory_share=0.75, overhead_us=5.0)),
        }
    ),
)

H200_BF16 = CostModel(
    name="h200-bf16",
    description="NVIDIA H200 over PCIe 5, bf16, with the kernels of this package; budget 16 GiB",
    sources=(
        "788 TFLOP/s, 4285 GB/s and 55.3 GB/s each way: ceilings of bench/results/nvidia-h200-2026-11-26.json "
        "(product of 8192x8192 matrices, copy of 2 GiB on the device, copies of 512 MiB from and to pinned memory)",
        "shares and overheads: per kind of operation, fitted to the times of its rows in the same file, layer by layer "
        "and patch by patch (least squares of the logarithm). Geometric means of predicted over measured lie within "
        "2 % per kind, single rows within 5 to 31 % (rms); worst is ResNet-50's first layer, by up to a factor of 3",
        "relu, add and the rest: as pooling in forward, which streams as they do; mm, addmm: as a convolution",
        "8 µs per copy: from the rows of 12.8 MB and 3.2 MB of the same file",
        "16 GiB: not the device's memory (141 GB) but the budget that this project's targets name",
    ),
    dtype="bf16",
    matmul_tflops=788.2,
    memory_gbps=4285.0,
    device_bytes=16 * 2**30,
    offload_gbps=55.3,
    prefetch_gbps=55.3,
    copy_latency_us=8.0,
    other=Rates(memory_share=0.90, overhead_us=4.0),
    rates=MappingProxyType(
        {
            "conv2d": Rates(matmul_share=0.90, memory_share=0.70, overhead_us=6.0),
            "conv2d_input_grad": Rates(matmul_share=0.85, memory_share=1.0, overhead_us=6.0),
            "conv2d_weight_grad": Rates(matmul_share=0.80, memory_share=0.55, overhead_us=11.5),
            "mm": Rates(matmul_share=0.90, memory_share=0.70, overhead_us=6.0),
            "addmm": Rates(matmul_share=0.90, memory_share=0.70, overhead_us=6.0),
            "max_pool2d": Rates(memory_share=0.90, overhead_us=4.0),
            "max_pool2d_backward": Rates(memory_share=0.80, overhead_us=4.0),
            "avg_pool2d": Rates(memory_share=0.90, overhead_us=4.0),
            "avg_pool2d_backward": Rates(memory_share=0.80, overhead_us=4.0),
            "batch_norm": Rates(memory_share=0.65, traffic=_BATCH_NORM_TRAFFIC, overhead_us=13.5),
            "batch_norm_backward": Rates(memory_share=0.55, traffic=_BATCH_NORM_BACKWARD_TRAFFIC, overhead_us=21.5),
            **dict.fromkeys(_BATCH_NORM_BACKWARD_CALLS, Rates(memory_share=0.55, overhead_us=21.5 / 2)),
        }
    ),
)

COST_MODELS: Mapping[str, CostModel] = MappingProxyType({model.name: model for model in (PAPER, H200_BF16)})


def cost_model(name: str) -> CostModel:
    """The cost model of a name.

    Args:
        name: "paper" or "h200-bf16".

    Raises:
        ValueError: for another name.

    Example:
        >>> cost_model("paper").label
        'estimate: paper'
    """
    if name not in COST_MODELS:
        raise ValueError(f"cost model must be one of {', '.join(COST_MODELS)}, got {name!r}")
    return COST_MODELS[name]


def with_durations(graph: Mapping[str, Any], durations_us: Sequence[float], label: str) -> dict[str, Any]:
    """A graph, as JSON holds it, with other durations.

    Args:
        graph: of the format "splitkern.graph"; not changed.
        durations_us: one per operation.
        label: where they come from.

    Returns:
        A new graph that shares everything but the operations.

    Raises:
        ValueError: where there are not as many durations as operations.
    """
    operations = graph["operations"]
    if len(durations_us) != len(operations):
        raise ValueError(f"the graph has {len(operations)} operations, got {len(durations_us)} durations")
    timed = [
        {**operation, "duration_us": float(duration)}
        for operation, duration in zip(operations, durations_us, strict=True)
    ]
    return {**graph, "operations": timed, "durations_from": label}
