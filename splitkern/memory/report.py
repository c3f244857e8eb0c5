"""What a plan says, for people and programs: pools, predicted times, what is offloaded and recomputed.

`splitkern plan` prints it; pictures and traces name and classify residencies by it. Nothing here decides or checks.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

DEVICE, PARAMETERS, HOST = "device", "parameters", "host"
OFFLOAD, PREFETCH = "offload", "prefetch"
WORKSPACE_STORAGE = -1

_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter + "b": int(1e3**_power), _letter + "ib": 1 << 10 * _power, _letter: 1 << 10 * _power}
_LARGEST = 2**63 - 1


def parse_bytes(text: str) -> int:
    """Bytes from text: "16GiB", "34 GB", "512M" (MiB), "1048576".

    Args:
        text: a number that is not negative and a unit: none or B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB,
            K, M, G, T (powers of 1024), in any case.

    Returns:
        Whole bytes: a fraction of one is left out, so that 1.7GiB can be said.

    Raises:
        ValueError: for anything else, and for 2^63 - 1 bytes or more.

    Example:
        >>> parse_bytes("1.5KiB")
        1536
    """
    match = re.fullmatch(r"\s*(\d+)(?:\.(\d+))?\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[3].lower())
    if match is None or unit is None:
        raise ValueError(f"must be bytes such as 16GiB, 34GB or 1048576, got {text!r}")
    decimals = match[2] or ""
    value = int(match[1] + decimals) * unit // int("1" + "0" * len(decimals))
    if value >= _LARGEST:
        raise ValueError(f"must be below 2^63 bytes, got {text!r}")
    return value


def bytes_text(size_bytes: int | None) -> str:
    """Bytes for people, four digits at most: "1.23 GiB"; "unlimited" for none.

    Example:
        >>> bytes_text(1536)
        '1.5 KiB'
    """
    if size_bytes is None:
        return "unlimited"
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size_bytes} B"
    return f"{value:.2f} {unit}" if unit in ("GiB", "TiB") else f"{value:.1f} {unit}"


def duration_text(duration_us: float) -> str:
    """A duration for people: "12.3 ms"."""
    if duration_us >= 1e6:
        return f"{duration_us / 1e6:.3f} s"
    return f"{duration_us / 1e3:.2f} ms" if duration_us >= 1e3 else f"{duration_us:.1f} µs"


def word(value: Any) -> str:
    """The name of an enum's value as JSON spells it: "device", "offload"."""
    return value if isinstance(value, str) else str(value.name).lower()


class Role(StrEnum):
    """What a residency is there for."""

    PARAMETER = "parameter"  # parameters and buffers
    PARAMETER_GRADIENT = "parameter gradient"
    INPUT = "input"
    KEPT = "kept"  # written in forward, read in backward, on the device all the time
    PASSING = "passing"  # written and last read in forward
    OFFLOADED = "offloaded"  # until its copy to the host has left
    PREFETCHED = "prefetched"  # once it is back
    RECOMPUTED = "recomputed"
    ERROR = "error"  # gradient of an activation
    WORKSPACE = "workspace"
    HOST = "host"


class PlanView:
    """A graph and a plan for it, with what both say together worked out once.

    The vectors of the bound C++ types become new lists whenever they are read; here they are read once.

    Attributes:
        graph, plan: as given: a `_core.Graph` and a `_core.Plan`, or anything with the same fields.
        operations, instances, boundaries, residencies, copies: the vectors, as lists.
        names: of every planned storage: its members, "a + b".
        sizes: of every planned storage, in bytes.
        roles: of every residency.
        first_backward: the first instance of a backward operation; the number of instances where there is none.
    """

    def __init__(self, graph: Any, plan: Any) -> None:
        self.graph, self.plan = graph, plan
        self.operations: list[Any] = list(graph.operations)
        self.instances: list[Any] = list(plan.instances)
        self.boundaries: list[Any] = list(plan.boundaries)
        self.residencies: list[Any] = list(plan.residencies)
        self.copies: list[Any] = list(plan.copies)
        storages, planned = list(graph.storages), list(plan.storages)
        members = [list(storage.members) for storage in planned]
        self.names = [" + ".join(storages[member].name for member in one) for one in members]
        self.sizes = [int(storage.size_bytes) for storage in planned]
        self._member_kinds = [{word(storages[member].kind) for member in one} for one in members]
        self._planned_of = {member: index for index, one in enumerate(members) for member in one}
        self._tensor_storage = [int(tensor.storage) for tensor in graph.tensors]
        self.first_backward = next(
            (i for i, one in enumerate(self.instances) if self.operations[one.operation].is_backward),
            len(self.instances),
        )
        self._writes: list[list[int]] = [[] for _ in planned]
        self._reads: list[list[int]] = [[] for _ in planned]
        for index, instance in enumerate(self.instances):
            operation = self.operations[instance.operation]
            for uses, tensors in ((self._writes, operation.writes), (self._reads, operation.reads)):
                for storage in dict.fromkeys(self._planned(tensor) for tensor in tensors):
                    uses[storage].append(index)
        sources = {copy.source for copy in self.copies if word(copy.kind) == OFFLOAD}
        destinations = {copy.destination for copy in self.copies if word(copy.kind) == PREFETCH}
        self.roles = [
            self._role(residency, index in sources, index in destinations)
            for index, residency in enumerate(self.residencies)
        ]

    def _planned(self, tensor: int) -> int:
        return self._planned_of[self._tensor_storage[tensor]]

    def operation_of(self, instance: int) -> Any:
        """The operation that an instance runs."""
        return self.operations[self.instances[instance].operation]

    def writers(self, residency: Any) -> list[int]:
        """Instances that write into a residency of the device, in order; of workspace, its instance."""
        return self._within(self._writes, residency)

    def readers(self, residency: Any) -> list[int]:
        """Instances that read from a residency of the device, in order."""
        return [] if residency.storage == WORKSPACE_STORAGE else self._within(self._reads, residency)

    def is_saved(self, storage: int) -> bool:
        """Whether a planned storage is an activation that is written in forward and read in backward."""
        writes, reads = self._writes[storage], self._reads[storage]
        if self._member_kinds[storage] != {"activation"} or not writes or not reads:
            return False
        forward = [index for index in writes if not self.operation_of(index).is_backward]
        return bool(forward) and any(self.operation_of(index).is_backward for index in reads)

    def _within(self, uses: Sequence[Sequence[int]], residency: Any) -> list[int]:
        if residency.storage == WORKSPACE_STORAGE:
            return [residency.begin]
        instances = uses[residency.storage]
        return list(instances[bisect_left(instances, residency.begin) : bisect_left(instances, residency.end)])

    def _role(self, residency: Any, leaves: bool, arrives: bool) -> Role:
        pool = word(residency.pool)
        if pool == HOST:
            return Role.HOST
        if residency.storage == WORKSPACE_STORAGE:
            return Role.WORKSPACE
        kinds = self._member_kinds[residency.storage]
        if "parameter" in kinds:
            return Role.PARAMETER
        if "gradient" in kinds:
            return Role.PARAMETER_GRADIENT
        if kinds == {"input"}:
            return Role.INPUT
        if arrives:
            return Role.PREFETCHED
        if leaves:
            return Role.OFFLOADED
        writers = self.writers(residency)
        if writers and self.instances[writers[0]].is_recomputation:
            return Role.RECOMPUTED
        if writers and self.operation_of(writers[0]).is_backward:
            return Role.ERROR
        return Role.KEPT if residency.end > self.first_backward else Role.PASSING


@dataclass(frozen=True)
class PoolReport:
    """One pool, in bytes.

    Attributes:
        name: "device", "parameters" or "host".
        peak_bytes: highest end of an occupied address.
        lower_bound_bytes: largest sum of live bytes.
        limit_bytes: the budget; None for none, and for the device's two pools, which share one.
    """

    name: str
    peak_bytes: int
    lower_bound_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True)
class Moved:
    """A storage that is offloaded: its bytes, how often it comes back, and who wrote it."""

    name: str
    size_bytes: int
    prefetches: int
    module: str


@dataclass(frozen=True)
class Repeated:
    """Recomputations of one kind of operation."""

    target: str
    count: int
    duration_us: float


@dataclass(frozen=True)
class PlanReport:
    """A plan in figures; `text` is for people, `as_dict` for programs.

    Attributes:
        graph: its name.
        durations_from: where its durations come from.
        operations, storages: how many the graph has.
        planned_storages: how many remain once storages share bytes.
        fused_sums: sums that their producers add in place.
        strategy: how it was planned.
        device_limit_bytes, host_limit_bytes: budgets; None for none.
        offload_gbps, prefetch_gbps: the link, in 10^9 bytes per second.
        pools: device, parameters, host.
        device_total_bytes: peak of the device's two pools together, which the budget is held against.
        step_us: predicted time of the step, the sum of the following three.
        compute_us: of it the captured operations.
        recompute_us: of it recomputations.
        stall_us: of it waits for copies.
        saved_bytes: activations that forward leaves to backward, in the captured step.
        offloaded_bytes, prefetched_bytes: what the copies move.
        offload_busy_us, prefetch_busy_us: how long the two copy streams are busy.
        offloaded: largest first.
        recomputed: longest first.
    """

    graph: str
    durations_from: str
    operations: int
    storages: int
    planned_storages: int
    fused_sums: int
    strategy: str
    device_limit_bytes: int | None
    host_limit_bytes: int | None
    offload_gbps: float
    prefetch_gbps: float
    pools: tuple[PoolReport, ...]
    device_total_bytes: int
    step_us: float
    compute_us: float
    recompute_us: float
    stall_us: float
    saved_bytes: int
    offloaded_bytes: int
    prefetched_bytes: int
    offload_busy_us: float
    prefetch_busy_us: float
    offloaded: tuple[Moved, ...]
    recomputed: tuple[Repeated, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def text(self, *, rows: int = 8) -> str:
        """For people.

        Args:
            rows: how many of the offloaded storages and recomputed kinds to name.
        """
        slower = self.step_us / self.compute_us - 1 if self.compute_us else 0.0
        lines = [
            f"graph        {self.graph or 'unnamed'}: {self.operations:,} operations, {self.storages:,} storages "
            f"({self.planned_storages:,} planned, {self.fused_sums:,} sums added in place)",
            f"durations    {self.durations_from or 'as the graph has them'}",
            f"limits       device {bytes_text(self.device_limit_bytes)}, host {bytes_text(self.host_limit_bytes)}, "
            f"link {_gbps(self.offload_gbps)} to the host, {_gbps(self.prefetch_gbps)} back",
            f"strategy     {self.strategy}; the plan is proven valid",
            "",
            *_table(
                ("pool", "peak", "lower bound", "limit"),
                [
                    *(
                        (pool.name, bytes_text(pool.peak_bytes), bytes_text(pool.lower_bound_bytes), _limit(pool))
                        for pool in self.pools
                    ),
                    ("device, total", bytes_text(self.device_total_bytes), "", bytes_text(self.device_limit_bytes)),
                ],
            ),
            "",
            f"step         {duration_text(self.step_us)} predicted, {slower:+.1%} to the operations alone",
            f"  compute    {duration_text(self.compute_us)}",
            f"  recompute  {duration_text(self.recompute_us)}",
            f"  stall      {duration_text(self.stall_us)}",
            "",
        ]
        share = f" of {bytes_text(self.saved_bytes)} that forward leaves to backward" if self.saved_bytes else ""
        if self.offloaded:
            lines.append(
                f"offloaded    {len(self.offloaded):,} storages, {bytes_text(self.offloaded_bytes)}{share}; "
                f"link busy {duration_text(self.offload_busy_us)} out, {duration_text(self.prefetch_busy_us)} back"
            )
            lines += _indented(
                ("storage", "size", "module"),
                [(_short(one.name), bytes_text(one.size_bytes), _short(one.module)) for one in self.offloaded],
                rows,
            )
        else:
            lines.append(f"offloaded    nothing{share}")
        if self.recomputed:
            count = sum(one.count for one in self.recomputed)
            lines.append(f"recomputed   {count:,} operations, {duration_text(self.recompute_us)}")
            lines += _indented(
                ("operation", "times", "duration"),
                [(one.target, f"{one.count:,}", duration_text(one.duration_us)) for one in self.recomputed],
                rows,
            )
        else:
            lines.append("recomputed   nothing")
        return "\n".join(lines)


def report(view: PlanView, copies_us: Iterable[tuple[float, float]]) -> PlanReport:
    """Puts a plan into figures.

    Args:
        view: the graph and the plan.
        copies_us: predicted begin and end of every copy, in µs.
    """
    graph, plan = view.graph, view.plan
    predicted, limits = plan.predicted, plan.limits
    parameters_live = sum(one.size_bytes for one in view.residencies if word(one.pool) == PARAMETERS)
    pools = (
        PoolReport(DEVICE, predicted.device_peak_bytes, predicted.device_lower_bound_bytes, None),
        PoolReport(PARAMETERS, predicted.parameters_peak_bytes, parameters_live, None),
        PoolReport(HOST, predicted.host_peak_bytes, predicted.host_lower_bound_bytes, limits.host_bytes),
    )
    moved_bytes, busy_us = {OFFLOAD: 0, PREFETCH: 0}, {OFFLOAD: 0.0, PREFETCH: 0.0}
    prefetches: dict[int, int] = {}
    for copy, (begin_us, end_us) in zip(view.copies, copies_us, strict=True):
        kind = word(copy.kind)
        moved_bytes[kind] += view.sizes[copy.storage]
        busy_us[kind] += end_us - begin_us
        if kind == PREFETCH:
            prefetches[copy.storage] = prefetches.get(copy.storage, 0) + 1
    offloaded = []
    for copy in view.copies:
        if word(copy.kind) == OFFLOAD:
            writers = view.writers(view.residencies[copy.source])
            module = view.operation_of(writers[-1]).module if writers else ""
            back = prefetches.get(copy.storage, 0)
            offloaded.append(Moved(view.names[copy.storage], view.sizes[copy.storage], back, module))
    repeated: dict[str, tuple[int, float]] = {}
    for instance in view.instances:
        if instance.is_recomputation:
            operation = view.operations[instance.operation]
            count, duration_us = repeated.get(operation.target, (0, 0.0))
            repeated[operation.target] = (count + 1, duration_us + operation.duration_us)
    return PlanReport(
        graph=graph.name,
        durations_from=graph.durations_from,
        operations=len(view.operations),
        storages=len(graph.storages),
        planned_storages=len(view.names),
        fused_sums=len(plan.fused),
        strategy=plan.strategy,
        device_limit_bytes=limits.device_bytes,
        host_limit_bytes=limits.host_bytes,
        offload_gbps=limits.offload_gbps,
        prefetch_gbps=limits.prefetch_gbps,
        pools=pools,
        device_total_bytes=predicted.device_peak_bytes + predicted.parameters_peak_bytes,
        step_us=predicted.step_us,
        compute_us=predicted.compute_us,
        recompute_us=predicted.recompute_us,
        stall_us=predicted.stall_us,
        saved_bytes=sum(size for storage, size in enumerate(view.sizes) if view.is_saved(storage)),
        offloaded_bytes=moved_bytes[OFFLOAD],
        prefetched_bytes=moved_bytes[PREFETCH],
        offload_busy_us=busy_us[OFFLOAD],
        prefetch_busy_us=busy_us[PREFETCH],
        offloaded=tuple(sorted(offloaded, key=lambda one: (-one.size_bytes, one.name))),
        recomputed=tuple(
            sorted(
                (Repeated(target, count, duration_us) for target, (count, duration_us) in repeated.items()),
                key=lambda one: (-one.duration_us, one.target),
            )
        ),
    )


def _limit(pool: PoolReport) -> str:
    return bytes_text(pool.limit_bytes) if pool.name == HOST else ""


def _gbps(rate: float) -> str:
    return f"{rate:g} GB/s" if rate else "none"


def _short(name: str, width: int = 48) -> str:
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column aligned left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in (header, *rows)
    ]


def _indented(header: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> list[str]:
    lines = ["  " + line for line in _table(header, rows[:limit])]
    if len(rows) > limit:
        lines.append(f"  and {len(rows) - limit:,} more")
    return lines
