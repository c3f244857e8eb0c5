"""The arguments of the Hopper path's tensor maps against the geometry: what is read and what is written."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

OPERAND_STRIDES = (1 << 20, 1 << 12, 1 << 5)  # batch, row, column: far apart, so that an address tells its position
OUTPUT_STRIDES = (1 << 21, 1 << 13, 1 << 4)
BYTES = 2


@dataclass(frozen=True)
class Map:
    base: int
    channels: int
    columns: int
    rows: int
    images: int
    column_stride: int
    row_stride: int
    image_stride: int
    lower_column: int
    lower_row: int
    upper_column: int
    upper_row: int
    column_step: int
    row_step: int
    box_channels: int
    box_pixels: int

    def walk(self, axis: str) -> list[int]:
        """The base positions of an axis: from the lower corner in steps to the upper one, as the TMA unit goes."""
        last = getattr(self, f"{axis}s") - 1 + getattr(self, f"upper_{axis}")
        return list(range(getattr(self, f"lower_{axis}"), last + 1, getattr(self, f"{axis}_step")))


@dataclass(frozen=True)
class Axis:
    kernel: int
    stride: int
    padding: int
    dilation: int
    in_begin: int
    in_end: int
    out_begin: int
    out_end: int


def draw_axis(draw: random.Random) -> Axis:
    in_begin, out_begin = draw.randint(0, 9), draw.randint(0, 9)
    return Axis(
        draw.randint(1, 4),
        draw.randint(1, 4),
        draw.randint(-3, 5),
        draw.randint(1, 3),
        in_begin,
        in_begin + draw.randint(1, 12),
        out_begin,
        out_begin + draw.randint(1, 9),
    )


def sub_problems(
    library: Path, input_grad: bool, rows: Axis, columns: Axis
) -> list[tuple[Map, Map, list[int], list[int]]]:
    window = [w for axis in (rows, columns) for w in (axis.kernel, axis.stride, axis.padding, axis.dilation)]
    bounds = [b for axis in (rows, columns) for b in (axis.in_begin, axis.in_end, axis.out_begin, axis.out_end)]
    result = (ctypes.c_int64 * (40 * 16))()
    count = ctypes.CDLL(str(library)).splitkern_host_sm90_maps(
        int(input_grad),
        (ctypes.c_int64 * 8)(*window),
        (ctypes.c_int32 * 8)(*bounds),
        (ctypes.c_int64 * 6)(*OPERAND_STRIDES, *OUTPUT_STRIDES),
        result,
    )
    numbers = list(result)
    return [
        (Map(*numbers[i : i + 16]), Map(*numbers[i + 16 : i + 32]), numbers[i + 32 : i + 36], numbers[i + 36 : i + 40])
        for i in range(0, 40 * count, 40)
    ]


def position(base: int, strides: tuple[int, int, int]) -> tuple[int, int]:
    """Row and column of a base address."""
    elements, rest = divmod(base, BYTES)
    assert rest == 0
    row, rest = divmod(elements, strides[1])
    column, rest = divmod(rest, strides[2])
    assert rest == 0
    return row, column


def reads(
    axis: Axis, operand: Map, output: Map, name: str, at: tuple[int, int], taps: list[int], grad: bool, loaded: bool
) -> None:
    """Every output of the walk reads through every tap of the walk what the definition says, and through no other."""
    operand_begin, output_begin = at
    count, first_tap, tap_step, offset_step = taps
    extent = getattr(operand, f"{name}s")
    outputs = getattr(output, f"{name}s")
    output_step = getattr(output, f"{name}_stride") // (
        (OUTPUT_STRIDES[1] if name == "row" else OUTPUT_STRIDES[2]) * BYTES
    )
    walk = operand.walk(name)
    tap_numbers = [first_tap + i * tap_step for i in range(count)]
    assert all(0 <= tap < axis.kernel for tap in tap_numbers) and len(set(tap_numbers)) == count
    if not grad:
        assert (operand_begin, extent) == (axis.in_begin, axis.in_end - axis.in_begin)
        assert count == axis.kernel
    else:
        assert (operand_begin, extent) == (axis.out_begin, axis.out_end - axis.out_begin)
    if loaded:
        assert len(walk) == outputs, "the box holds exactly the outputs"
    elif count > 0:
        return  # the other axis has no taps, so nothing is read
    for j in range(outputs):
        place = output_begin + j * (output_step if outputs > 1 else 1)
        found = {}
        for i in range(count):
            at_operand = walk[j] + i * offset_step
            if 0 <= at_operand < extent:  # else the TMA unit gives zero
                found[first_tap + i * tap_step] = operand_begin + at_operand
        if not grad:
            expected = {
                tap: x
                for tap in range(axis.kernel)
                if axis.in_begin <= (x := place * axis.stride - axis.padding + tap * axis.dilation) < axis.in_end
            }
        else:
            expected = {
                tap: o
                for tap in range(axis.kernel)
                for o in range(axis.out_begin, axis.out_end)
                if o * axis.stride - axis.padding + tap * axis.dilation == place
            }
        assert found == expected


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "input_grad"])
def test_maps_walk_what_the_windows_read(host_library: Path, grad: bool) -> None:
    draw = random.Random(1)
    for _ in range(300):
        rows, columns = draw_axis(draw), draw_axis(draw)
        written = []
        for operand, output, row_taps, column_taps in sub_problems(host_library, grad, rows, columns):
            operand_at = position(operand.base, OPERAND_STRIDES)
            output_at = position(output.base, OUTPUT_STRIDES)
            loaded = row_taps[0] > 0 and column_taps[0] > 0
            reads(rows, operand, output, "row", (operand_at[0], output_at[0]), row_taps, grad, loaded)
            reads(columns, operand, output, "column", (operand_at[1], output_at[1]), column_taps, grad, loaded)
            for map in (operand, output):
                assert (map.channels, map.images, map.box_channels, map.box_pixels) == (8, 2, 64, 64)
                strides = OPERAND_STRIDES if map is operand else OUTPUT_STRIDES
                assert map.image_stride == strides[0] * BYTES
            assert output.walk("row") == list(range(output.rows))
            assert output.walk("column") == list(range(output.columns))
            row_step = output.row_stride // (OUTPUT_STRIDES[1] * BYTES) if output.rows > 1 else 1
            column_step = output.column_stride // (OUTPUT_STRIDES[2] * BYTES) if output.columns > 1 else 1
            written += [
                (output_at[0] + i * row_step, output_at[1] + j * column_step)
                for i in range(output.rows)
                for j in range(output.columns)
            ]
        begin, end = ("in_begin", "in_end") if grad else ("out_begin", "out_end")
        everything = [
            (i, j)
            for i in range(getattr(rows, begin), getattr(rows, end))
            for j in range(getattr(columns, begin), getattr(columns, end))
        ]
        assert sorted(written) == everything, "every element is written once"
