"""Pure-integer geometry of window operations on image patches, one axis at a time.

Everything in the package takes its boundaries, paddings and extents from here: operators, the
transformation, the reference and the tests. The arithmetic follows Split-CNN (Jin and Hong,
ASPLOS 2019, section 3), extended to dilation, strides above the kernel, graphs and halos.

One axis of a window operation has kernel ``k``, stride ``s``, dilation ``d``, begin padding ``p``
and effective kernel ``e = d(k-1)+1``. Output ``o`` reads the inputs ``[o·s - p, o·s - p + e)``.
A split is a pair of boundary lists ``x = [0, ..., L]`` and ``y = [0, ..., O]`` of equal length:
patch ``i`` reads only inputs ``[x_i, x_{i+1})`` and writes outputs ``[y_i, y_{i+1})``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Bounds = tuple[int, ...]
Span = tuple[int, int]

__all__ = [
    "AxisNode",
    "Bounds",
    "Span",
    "Window",
    "check_bounds",
    "draw_bounds",
    "draw_ranges",
    "even_bounds",
    "forward_extents",
    "halo_spans",
    "input_interval",
    "patch_paddings",
    "preferred_boundary",
    "propagate",
    "span_paddings",
]


@dataclass(frozen=True)
class Window:
    """One axis of a window operation (convolution or pooling).

    Args:
        kernel: number of taps, at least 1.
        stride: distance between neighbouring windows, at least 1; may exceed the kernel.
        padding: positions added before the input.
        dilation: distance between neighbouring taps, at least 1.
        ceil_mode: round the output extent up, as in PyTorch's pooling.
        end_padding: positions added after the input; the begin padding where None
            (``padding="same"`` with an even kernel pads the two ends differently).

    Raises:
        ValueError: if kernel, stride or dilation is below 1.

    Example:
        >>> Window(kernel=3, stride=2, padding=1).output_extent(224)
        112
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    ceil_mode: bool = False
    end_padding: int | None = None

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "dilation"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"Window: {name} must be at least 1, got {value}")

    @property
    def effective_kernel(self) -> int:
        """Extent that one window covers, ``d(k-1)+1``."""
        return self.dilation * (self.kernel - 1) + 1

    def output_extent(self, extent: int) -> int:
        """Number of windows over an input of ``extent`` positions, by PyTorch's rule.

        With ``ceil_mode`` a window that would begin in the end padding is dropped.

        Raises:
            ValueError: if not even one window fits.
        """
        end = self.padding if self.end_padding is None else self.end_padding
        slack = extent + self.padding + end - self.effective_kernel
        output = slack // self.stride + 1
        if self.ceil_mode:
            output = -(-slack // self.stride) + 1
            if (output - 1) * self.stride >= extent + self.padding:
                output -= 1
        if output < 1:
            raise ValueError(
                f"Window: the effective kernel {self.effective_kernel} must fit the padded input "
                f"extent {extent + self.padding + end}"
            )
        return output

    def reads(self, begin: int, end: int) -> Span:
        """Half-open span of input positions that outputs ``[begin, end)`` read, not clipped."""
        first = begin * self.stride - self.padding
        last = (end - 1) * self.stride - self.padding + self.effective_kernel
        return first, last


def check_bounds(operator: str, argument: str, bounds: Sequence[int], extent: int, what: str) -> None:
    """Check that ``bounds`` begins at 0, increases strictly and ends at ``extent``.

    Args:
        operator: name that the error begins with, for example ``splitkern::patch_conv2d``.
        argument: name of the checked argument, for example ``in_rows``.
        bounds: boundary list.
        extent: where the list must end.
        what: what the extent is, for example ``input height``.

    Raises:
        ValueError: naming operator, argument, rule and what came.
    """
    if len(bounds) < 2:
        raise ValueError(f"{operator}: {argument} must hold at least 2 boundaries, got {list(bounds)}")
    if bounds[0] != 0:
        raise ValueError(f"{operator}: {argument} must begin at 0, got {list(bounds)}")
    for left, right in itertools.pairwise(bounds):
        if left >= right:
            raise ValueError(f"{operator}: {argument} must increase strictly, got {list(bounds)}")
    if bounds[-1] != extent:
        raise ValueError(f"{operator}: {argument} must end at the {what} {extent}, got {list(bounds)}")


def span_paddings(window: Window, in_span: Span, out_span: Span) -> Span:
    """Begin and end padding of one patch that reads ``in_span`` and writes ``out_span``.

    Either may be negative: then it crops.
    """
    first, last = window.reads(*out_span)
    return in_span[0] - first, last - in_span[1]


def patch_paddings(window: Window, in_bounds: Sequence[int], out_bounds: Sequence[int]) -> tuple[Span, ...]:
    """Begin and end padding of every patch: ``x_i - (y_i·s - p)`` and
    ``((y_{i+1}-1)·s - p + e) - x_{i+1}``.

    Example:
        >>> patch_paddings(Window(3, 2, 1), (0, 4, 8), (0, 2, 4))
        ((1, 0), (1, 0))
    """
    return tuple(
        span_paddings(window, (x0, x1), (y0, y1))
        for x0, x1, y0, y1 in zip(in_bounds[:-1], in_bounds[1:], out_bounds[:-1], out_bounds[1:], strict=True)
    )


def input_interval(window: Window, boundary: int) -> Span:
    """Closed interval of input boundaries that an interior output boundary ``y`` allows:
    between ``y·s - p`` and ``(y-1)·s - p + e``, in whichever order they come.
    """
    one = boundary * window.stride - window.padding
    other = (boundary - 1) * window.stride - window.padding + window.effective_kernel
    return min(one, other), max(one, other)


def preferred_boundary(window: Window, boundary: int) -> int:
    """Input boundary in the middle of :func:`input_interval`: ``y·s - p + ⌊(e - s + 1) / 2⌋``.

    Example:
        >>> preferred_boundary(Window(3, 1, 1), 7)
        7
    """
    middle = (window.effective_kernel - window.stride + 1) // 2
    return boundary * window.stride - window.padding + middle


def even_bounds(extent: int, parts: int) -> Bounds:
    """Boundaries of ``parts`` patches as equal as integers allow: ``⌊i·extent/parts + 1/2⌋``.

    Raises:
        ValueError: if ``parts`` is below 1 or above ``extent``.

    Example:
        >>> even_bounds(7, 3)
        (0, 2, 5, 7)
    """
    _check_parts(extent, parts)
    return tuple((2 * i * extent + parts) // (2 * parts) for i in range(parts + 1))


def draw_bounds(extent: int, parts: int, wiggle: float, generator: torch.Generator | None = None) -> Bounds:
    """Stochastic boundaries (Split-CNN, section 3.3): interior boundary ``i`` is drawn uniformly
    from the integers in ``[(i-w)·extent/parts, (i+w)·extent/parts]``; where that holds no integer,
    it is the nearest one to ``i·extent/parts``.

    Args:
        extent: number of outputs at the join.
        parts: number of patches.
        wiggle: the wiggle room ``w``, at least 0 and below 0.5.
        generator: source of randomness; PyTorch's default CPU generator where None.

    Raises:
        ValueError: if ``wiggle`` or ``parts`` is out of range.
    """
    bounds = [0]
    for low, high in draw_ranges(extent, parts, wiggle):
        bounds.append(int(torch.randint(low, high + 1, (1,), generator=generator).item()))
    bounds.append(extent)
    return tuple(bounds)


def draw_ranges(extent: int, parts: int, wiggle: float) -> tuple[Span, ...]:
    """For every interior boundary the smallest and the largest integer that :func:`draw_bounds` may return.

    Raises:
        ValueError: if ``wiggle`` or ``parts`` is out of range.

    Example:
        >>> draw_ranges(10, 2, 0.2)
        ((4, 6),)
    """
    check_wiggle(wiggle)
    even = even_bounds(extent, parts)
    ranges = []
    for i in range(1, parts):
        low = -int(-((i - wiggle) * extent) // parts)
        high = int(((i + wiggle) * extent) // parts)
        ranges.append((even[i], even[i]) if low > high else (low, high))
    return tuple(ranges)


def check_wiggle(wiggle: float) -> None:
    """Refuse a wiggle room outside [0, 0.5): neighbouring boundaries could meet."""
    if not 0.0 <= wiggle < 0.5:
        raise ValueError(f"wiggle must be at least 0 and below 0.5, got {wiggle}")


def _check_parts(extent: int, parts: int) -> None:
    if parts < 1:
        raise ValueError(f"the number of patches must be at least 1, got {parts}")
    if parts > extent:
        raise ValueError(f"the number of patches must be at most the extent {extent} at the join, got {parts}")


@dataclass(frozen=True)
class AxisNode:
    """One operation of a graph along one axis.

    Args:
        name: name of the tensor that the operation writes.
        inputs: names of the tensors that it reads; all share the operation's window.
        window: the window, or None where output ``o`` reads exactly input ``o``.
    """

    name: str
    inputs: tuple[str, ...]
    window: Window | None = None


def forward_extents(nodes: Sequence[AxisNode], input_extents: Mapping[str, int]) -> dict[str, int]:
    """Extents of every tensor of a graph whose nodes come in execution order.

    Raises:
        ValueError: if a window does not fit, or an operation reads unequal extents.
    """
    extents = dict(input_extents)
    for node in nodes:
        came = [extents[name] for name in node.inputs]
        if len(set(came)) != 1:
            raise ValueError(f"{node.name}: inputs must have equal extents, got {came}")
        try:
            extents[node.name] = node.window.output_extent(came[0]) if node.window else came[0]
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from None
    return extents


def propagate(
    nodes: Sequence[AxisNode],
    extents: Mapping[str, int],
    joins: Mapping[str, Sequence[int]],
) -> dict[str, Bounds]:
    """Carry boundaries from the joins backwards to every tensor of the graph.

    An interior boundary of a tensor with one consumer is :func:`preferred_boundary`; with several
    it is the first consumer's, clipped into the intersection of all their intervals.

    Args:
        nodes: operations in execution order.
        extents: extent of every tensor, from :func:`forward_extents`.
        joins: boundaries of tensors that no operation of the graph reads, and, optionally, of
            tensors that are joined although an operation reads them.

    Returns:
        Boundaries of every tensor that leads to a join, graph inputs included.

    Raises:
        ValueError: where two consumers allow no common boundary (both are named), or a patch
            would be empty.
    """
    bounds: dict[str, Bounds] = {}
    consumers: dict[str, list[AxisNode]] = {}
    for node in nodes:
        for name in dict.fromkeys(node.inputs):
            consumers.setdefault(name, []).append(node)
    names = list(dict.fromkeys([*extents, *(node.name for node in nodes)]))
    for name in _reverse_execution_order(names, nodes):
        readers = [node for node in consumers.get(name, []) if node.name in bounds]
        if name in joins:
            chosen = tuple(joins[name])
            check_bounds(name, "the join's boundaries", chosen, extents[name], "extent")
            for reader in readers:
                _check_inside(name, chosen, reader, bounds[reader.name])
        elif readers:
            chosen = _choose(name, extents[name], readers, bounds)
        else:
            continue
        bounds[name] = chosen
    return bounds


def _reverse_execution_order(names: Sequence[str], nodes: Sequence[AxisNode]) -> list[str]:
    written = [node.name for node in nodes]
    given = [name for name in names if name not in set(written)]
    return [*reversed(written), *given]


def _interval(node: AxisNode, boundary: int) -> Span:
    if node.window is None:
        return boundary, boundary
    return input_interval(node.window, boundary)


def _check_inside(name: str, chosen: Sequence[int], reader: AxisNode, outputs: Sequence[int]) -> None:
    if len(chosen) != len(outputs):
        raise ValueError(
            f"{name}: joined into {len(chosen) - 1} patches, but {reader.name} works on {len(outputs) - 1}"
        )
    for boundary, output in zip(chosen[1:-1], outputs[1:-1], strict=True):
        low, high = _interval(reader, output)
        if not low <= boundary <= high:
            raise ValueError(
                f"{name}: boundary {boundary} must lie in [{low}, {high}], which {reader.name} "
                f"allows for its boundary {output}"
            )


def _choose(name: str, extent: int, readers: Sequence[AxisNode], bounds: Mapping[str, Bounds]) -> Bounds:
    first = readers[0]
    parts = len(bounds[first.name]) - 1
    chosen = [0]
    for i in range(1, parts):
        y = bounds[first.name][i]
        wanted = y if first.window is None else preferred_boundary(first.window, y)
        low, high = _interval(first, y)
        for reader in readers[1:]:
            reader_low, reader_high = _interval(reader, bounds[reader.name][i])
            if max(low, reader_low) > min(high, reader_high):
                raise ValueError(
                    f"the split cannot start at {name}: its consumers {first.name} (boundary "
                    f"{i} in [{low}, {high}]) and {reader.name} (in [{reader_low}, "
                    f"{reader_high}]) allow no common boundary"
                )
            low, high = max(low, reader_low), min(high, reader_high)
        chosen.append(min(max(wanted, low), high))
    chosen.append(extent)
    for left, right in itertools.pairwise(chosen):
        if left >= right:
            raise ValueError(
                f"{name}: a patch would be empty: boundaries {chosen} of an extent of {extent}; "
                f"use fewer patches or join earlier"
            )
    return tuple(chosen)


def halo_spans(
    nodes: Sequence[AxisNode],
    extents: Mapping[str, int],
    owned: Mapping[str, Sequence[int]],
) -> dict[str, tuple[Span, ...]]:
    """Overlapping spans that every patch needs so that its joined outputs are exact.

    A patch computes of each tensor what the next operations read of it, clipped to the tensor, and
    at least what it owns, so that the owned parts tile every tensor.

    Args:
        nodes: operations in execution order.
        extents: extent of every tensor.
        owned: boundaries from :func:`propagate`.

    Returns:
        For every tensor in ``owned`` one half-open span per patch.
    """
    spans: dict[str, tuple[Span, ...]] = {}
    consumers: dict[str, list[AxisNode]] = {}
    for node in nodes:
        if node.name in owned:
            for name in dict.fromkeys(node.inputs):
                consumers.setdefault(name, []).append(node)
    for name in _reverse_execution_order(list(owned), nodes):
        if name not in owned:
            continue
        patches: list[Span] = []
        for i, (begin, end) in enumerate(zip(owned[name][:-1], owned[name][1:], strict=True)):
            for reader in consumers.get(name, []):
                out = spans[reader.name][i]
                first, last = out if reader.window is None else reader.window.reads(*out)
                begin, end = min(begin, max(first, 0)), max(end, min(last, extents[name]))
            patches.append((begin, end))
        spans[name] = tuple(patches)
    return spans
