"""Properties of the integer geometry, and hand-computed cases."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from splitkern import geometry
from splitkern.geometry import AxisNode, Window


@st.composite
def windows(draw: st.DrawFn) -> Window:
    kernel = draw(st.integers(1, 7))
    return Window(
        kernel=kernel,
        stride=draw(st.integers(1, 5)),
        padding=draw(st.integers(0, kernel)),
        dilation=draw(st.integers(1, 3)),
        ceil_mode=draw(st.booleans()),
    )


@st.composite
def splits(draw: st.DrawFn) -> tuple[Window, int, tuple[int, ...], tuple[int, ...]]:
    """A window, an extent and boundaries that were carried back through it."""
    window = draw(windows())
    extent = draw(st.integers(max(1, window.effective_kernel - 2 * window.padding), 60))
    outputs = window.output_extent(extent)
    parts = draw(st.integers(1, min(outputs, 5)))
    cuts = draw(st.lists(st.integers(1, max(1, outputs - 1)), min_size=parts - 1, max_size=parts - 1, unique=True))
    assume(all(0 < cut < outputs for cut in cuts))
    out_bounds = (0, *sorted(cuts), outputs)
    try:
        bounds = geometry.propagate([AxisNode("y", ("x",), window)], {"x": extent, "y": outputs}, {"y": out_bounds})
    except ValueError:
        assume(False)
    return window, extent, bounds["x"], out_bounds


@given(splits())
def test_paddings_add_up_to_what_each_patch_writes(split: tuple) -> None:
    window, _, x, y = split
    for i, (begin, end) in enumerate(geometry.patch_paddings(window, x, y)):
        padded = begin + (x[i + 1] - x[i]) + end
        assert padded == (y[i + 1] - y[i] - 1) * window.stride + window.effective_kernel


@given(splits())
def test_patches_tile_input_and_output(split: tuple) -> None:
    window, extent, x, y = split
    for bounds, whole in ((x, extent), (y, window.output_extent(extent))):
        covered = [p for a, b in itertools.pairwise(bounds) for p in range(a, b)]
        assert covered == list(range(whole))


@given(splits())
def test_boundaries_lie_in_their_intervals(split: tuple) -> None:
    window, _, x, y = split
    for boundary, output in zip(x[1:-1], y[1:-1], strict=True):
        low, high = geometry.input_interval(window, output)
        assert low <= boundary <= high


def _patchwise(values: torch.Tensor, window: Window, x: tuple, y: tuple) -> torch.Tensor:
    weight = torch.arange(1, window.kernel + 1, dtype=torch.float64)[None, None]
    pieces = []
    for i, padding in enumerate(geometry.patch_paddings(window, x, y)):
        patch = F.pad(values[x[i] : x[i + 1]], padding)[None, None]
        pieces.append(F.conv1d(patch, weight, stride=window.stride, dilation=window.dilation)[0, 0])
    return torch.cat(pieces)


def _unsplit(values: torch.Tensor, window: Window, outputs: int) -> torch.Tensor:
    _first, _last = window.reads(0, outputs)
    return _patchwise(values, window, (0, len(values)), (0, outputs))


@given(splits())
@settings(max_examples=60)
def test_a_window_inside_its_patch_equals_unsplit_and_e_equal_s_is_exact(split: tuple) -> None:
    window, extent, x, y = split
    values = torch.arange(1, extent + 1, dtype=torch.float64)
    split_values = _patchwise(values, window, x, y)
    whole = _unsplit(values, window, y[-1])
    for i in range(len(x) - 1):
        for output in range(y[i], y[i + 1]):
            first, last = window.reads(output, output + 1)
            # What the whole image pads is padding for the patch as well.
            inside = max(first, 0) >= x[i] and min(last, extent) <= x[i + 1]
            if inside or window.effective_kernel <= window.stride:
                assert split_values[output] == whole[output]


@given(windows(), st.integers(1, 60))
def test_output_extent_is_pytorchs(window: Window, extent: int) -> None:
    assume(window.padding <= window.kernel // 2)
    assume(extent + 2 * window.padding >= window.effective_kernel)
    pooled = F.max_pool1d(
        torch.zeros(1, 1, extent),
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        window.ceil_mode,
    )
    assert window.output_extent(extent) == pooled.shape[-1]


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 0.49), st.integers(0, 2**31))
def test_draws_increase_and_stay_in_their_room(extent: int, parts: int, wiggle: float, seed: int) -> None:
    assume(parts <= extent)
    generator = torch.Generator().manual_seed(seed)
    bounds = geometry.draw_bounds(extent, parts, wiggle, generator)
    geometry.check_bounds("draw", "bounds", bounds, extent, "extent")
    for i in range(1, parts):
        low, high = (i - wiggle) * extent / parts, (i + wiggle) * extent / parts
        nearest = abs(bounds[i] - i * extent / parts) <= 0.5
        assert low - 1e-9 <= bounds[i] <= high + 1e-9 or nearest


def test_draws_are_uniform_over_the_room() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [geometry.draw_bounds(100, 2, 0.05, generator)[1] for _ in range(3000)]
    counts = {value: draws.count(value) for value in range(45, 56)}
    # 45 lies outside [(1-w)·50, (1+w)·50] = [47.5, 52.5].
    assert set(draws) == {48, 49, 50, 51, 52}
    assert all(500 < counts[value] < 700 for value in (48, 49, 50, 51, 52))


def test_draws_repeat_with_the_generator() -> None:
    one, other = (geometry.draw_bounds(56, 4, 0.2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("window", "boundary", "expected"),
    [
        (Window(3, 1, 1), 7, 7),
        (Window(3, 2, 1), 7, 14),
        (Window(7, 2, 3), 7, 14),
        (Window(1, 2, 0), 7, 14),
        (Window(2, 2, 0), 7, 14),
        (Window(1, 4, 0), 7, 27),
        (Window(3, 1, 2, 2), 7, 7),
    ],
)
def test_preferred_boundary(window: Window, boundary: int, expected: int) -> None:
    assert geometry.preferred_boundary(window, boundary) == expected


def test_stride_above_the_kernel_swaps_the_interval() -> None:
    assert geometry.input_interval(Window(1, 4, 0), 7) == (25, 28)


def test_same_padding_with_an_even_kernel() -> None:
    window = Window(4, 1, 1, end_padding=2)
    assert window.output_extent(10) == 10
    assert geometry.patch_paddings(window, (0, 5, 10), (0, 5, 10)) == ((1, 2), (1, 2))


RESIDUAL = [
    AxisNode("conv", ("x",), Window(7, 2, 3)),
    AxisNode("pool", ("conv",), Window(3, 2, 1)),
    AxisNode("one", ("pool",), Window(3, 2, 1)),
    AxisNode("two", ("one",), Window(3, 1, 1)),
    AxisNode("down", ("pool",), Window(1, 2, 0)),
    AxisNode("sum", ("two", "down")),
]


def test_a_residual_fork_takes_a_boundary_that_both_allow() -> None:
    extents = geometry.forward_extents(RESIDUAL, {"x": 64})
    bounds = geometry.propagate(RESIDUAL, extents, {"sum": (0, 3, 8)})
    assert extents["sum"] == 8
    assert bounds["pool"] == (0, 6, 16)
    assert bounds["x"] == (0, 24, 64)


def test_an_empty_intersection_names_both_consumers() -> None:
    nodes = [
        AxisNode("left", ("x",), Window(1, 1, 0)),
        AxisNode("moved", ("left",), Window(5, 1, 2)),
        AxisNode("right", ("x",), Window(2, 2, 0)),
        AxisNode("other", ("right",), Window(2, 2, 0)),
    ]
    extents = geometry.forward_extents(nodes, {"x": 16})
    with pytest.raises(ValueError, match=r"its consumers left .* and right .*no common boundary"):
        geometry.propagate(nodes, extents, {"moved": (0, 5, 16), "other": (0, 2, 4)})


def test_an_empty_patch_is_refused() -> None:
    nodes = [AxisNode("y", ("x",), Window(5, 1, 4))]
    extents = geometry.forward_extents(nodes, {"x": 4})
    with pytest.raises(ValueError, match=r"a patch would be empty"):
        geometry.propagate(nodes, extents, {"y": (0, 1, extents["y"])})


def test_an_inner_join_must_lie_where_its_readers_allow() -> None:
    nodes = [AxisNode("a", ("x",), Window(3, 1, 1)), AxisNode("b", ("a",), Window(1))]
    extents = geometry.forward_extents(nodes, {"x": 8})
    with pytest.raises(ValueError, match="boundary 3 must lie in"):
        geometry.propagate(nodes, extents, {"a": (0, 3, 8), "b": (0, 4, 8)})
    with pytest.raises(ValueError, match="joined into 1 patches"):
        geometry.propagate(nodes, extents, {"a": (0, 8), "b": (0, 4, 8)})


@given(st.integers(8, 80), st.integers(1, 4))
def test_halo_spans_hold_all_that_the_next_operation_reads(extent: int, parts: int) -> None:
    extents = geometry.forward_extents(RESIDUAL, {"x": extent})
    assume(parts <= extents["sum"])
    try:
        owned = geometry.propagate(RESIDUAL, extents, {"sum": geometry.even_bounds(extents["sum"], parts)})
    except ValueError:
        assume(False)
    spans = geometry.halo_spans(RESIDUAL, extents, owned)
    for node in RESIDUAL:
        for patch, span in enumerate(spans[node.name]):
            for source in node.inputs:
                first, last = node.window.reads(*span) if node.window else span
                begin, end = spans[source][patch]
                assert begin <= max(first, 0) and end >= min(last, extents[source])
                assert begin <= owned[source][patch] and end >= owned[source][patch + 1]


@pytest.mark.parametrize(
    ("bounds", "rule"),
    [
        ([0, 28, 55], "must end at the input height 56, got \\[0, 28, 55\\]"),
        ([1, 56], "must begin at 0"),
        ([0, 30, 30, 56], "must increase strictly"),
        ([0], "must hold at least 2 boundaries"),
    ],
)
def test_check_bounds_names_argument_rule_and_value(bounds: list[int], rule: str) -> None:
    with pytest.raises(ValueError, match=f"splitkern::patch_conv2d: in_rows {rule}"):
        geometry.check_bounds("splitkern::patch_conv2d", "in_rows", bounds, 56, "input height")


@pytest.mark.parametrize("wiggle", [-0.1, 0.5, 1.0])
def test_wiggle_room_is_below_a_half(wiggle: float) -> None:
    with pytest.raises(ValueError, match=r"wiggle must be at least 0 and below 0.5"):
        geometry.draw_bounds(10, 2, wiggle)


@pytest.mark.parametrize("parts", [0, 11])
def test_more_patches_than_outputs_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match="number of patches must be at"):
        geometry.even_bounds(10, parts)


@pytest.mark.parametrize("name", ["kernel", "stride", "dilation"])
def test_a_window_refuses_what_is_no_window(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Window(**{"kernel": 3, name: 0})


def test_a_window_that_does_not_fit_is_refused_by_name() -> None:
    nodes = [AxisNode("big", ("x",), Window(7))]
    with pytest.raises(ValueError, match=r"big: .*effective kernel 7 must fit"):
        geometry.forward_extents(nodes, {"x": 5})
    with pytest.raises(ValueError, match=r"sum: inputs must have equal extents, got \[4, 5\]"):
        geometry.forward_extents([AxisNode("sum", ("a", "b"))], {"a": 4, "b": 5})
