"""`splitkern bench conv`: one layer in one pass, ours against cuDNN's unsplit convolution and the slice loop.

Candidates: "layer", all patches in one launch; "patch", one launch per patch on views of the joined tensors, as
order="patch" runs them; "cudnn", the unsplit convolution in channels_last with cuDNN's benchmark mode; "loop", what
one writes in PyTorch: slice, pad, convolve, concatenate. All take and give channels_last tensors of random data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import splitkern.ops  # noqa: F401  (registers the operators)
from splitkern import _library
from splitkern.benchmarks.gpu_timing import Call
from splitkern.benchmarks.layers import Cell, ConvLayer, Patches
from splitkern.benchmarks.patches import Patch, patches_of
from splitkern.benchmarks.record import Row
from splitkern.benchmarks.rows import (
    Check,
    Setting,
    add_ratios,
    cudnn_benchmark,
    exact_arithmetic,
    median_ms,
    poisoned_like,
    random_tensor,
    relative_error,
    release_memory,
    timed,
    truth_dtype,
)

CANDIDATES = ("layer", "patch", "cudnn", "loop")


@dataclass(frozen=True)
class Problem:
    """Tensors and geometry of one cell."""

    layer: ConvLayer
    direction: str
    bounds: Patches
    table: list[list[Patch]]
    input: Tensor
    weight: Tensor
    grad_output: Tensor

    @property
    def all_patches(self) -> Iterator[Patch]:
        """Row by row."""
        return (patch for row in self.table for patch in row)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation, groups of the whole layer."""
        layer = self.layer
        return [layer.stride] * 2, [layer.padding] * 2, [1, 1], 1

    def result_like(self) -> Tensor:
        """The tensor whose shape and strides the pass's result has."""
        return {"forward": self.grad_output, "input_grad": self.input, "weight_grad": self.weight}[self.direction]

    def terms(self) -> int:
        """Length of the pass's reduction."""
        layer = self.layer
        if self.direction == "weight_grad":
            return self.grad_output.shape[0] * layer.output_size**2
        return (layer.channels if self.direction == "forward" else layer.outputs) * layer.kernel**2


def make_problem(setting: Setting, cell: Cell, source: tuple[Tensor, Tensor, Tensor]) -> Problem:
    """The problem of a cell over the layer's tensors."""
    assert isinstance(cell.layer, ConvLayer)
    bounds, table = patches_of(cell.layer, cell.grid)
    return Problem(cell.layer, cell.direction, bounds, table, *source)


def make_tensors(setting: Setting, layer: ConvLayer, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """input, weight and grad_output of a layer; the weight is scaled so that outputs are about as large as inputs."""
    size, after, kernel = layer.size, layer.output_size, layer.kernel
    scale = 1 / math.sqrt(layer.channels * kernel**2)
    return (
        random_tensor(setting, batch, layer.channels, size, size, seed=1),
        random_tensor(setting, layer.outputs, layer.channels, kernel, kernel, seed=2, scale=scale),
        random_tensor(setting, batch, layer.outputs, after, after, seed=3),
    )


# --- candidates -----------------------------------------------------------------------------------


def _layer_call(problem: Problem, output: Tensor) -> Call:
    ops = torch.ops.splitkern
    geometry = (*problem.arguments, *problem.bounds.lists())
    input, weight, grad_output = problem.input, problem.weight, problem.grad_output
    if problem.direction == "forward":
        return lambda: ops.patch_conv2d.out(input, weight, None, *geometry, "none", output=output)
    if problem.direction == "input_grad":
        size = list(input.shape)
        return lambda: ops.patch_conv2d_input_grad.out(grad_output, weight, size, *geometry, output=output)
    size = list(weight.shape)
    return lambda: ops.patch_conv2d_weight_grad.out(grad_output, input, size, *geometry, False, output=output)


def _patch_calls(problem: Problem, output: Tensor) -> Call:
    ops = torch.ops.splitkern
    weight = problem.weight
    stride, _, dilation, groups = problem.arguments
    calls: list[Callable[[], Any]] = []
    for index, patch in enumerate(problem.all_patches):
        padding = [patch.row_padding[0], patch.col_padding[0]]
        geometry = (stride, padding, dilation, groups, *patch.local_bounds())
        x, dy = patch.of_input(problem.input), patch.of_output(problem.grad_output)
        # Each lambda keeps its own values: they are its default arguments.
        if problem.direction == "forward":
            y = patch.of_output(output)
            calls.append(
                lambda x=x, g=geometry, y=y: ops.patch_conv2d.out(x, weight, None, *g, "none", output=y)  # type: ignore[misc]
            )
        elif problem.direction == "input_grad":
            dx, size = patch.of_input(output), list(x.shape)
            calls.append(
                lambda dy=dy, s=size, g=geometry, dx=dx: ops.patch_conv2d_input_grad.out(dy, weight, s, *g, output=dx)  # type: ignore[misc]
            )
        else:
            size, add = list(weight.shape), index > 0
            calls.append(
                lambda dy=dy, x=x, s=size, g=geometry, a=add: ops.patch_conv2d_weight_grad.out(  # type: ignore[misc]
                    dy, x, s, *g, a, output=output
                )
            )

    def run() -> None:
        for call in calls:
            call()

    return run


def _convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: int, padding: int, direction: str
) -> Tensor:
    """One gradient alone of a convolution, from ATen (cuDNN on CUDA)."""
    mask = [direction == "input_grad", direction == "weight_grad", False]
    results = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )
    result: Tensor = results[mask.index(True)]
    return result


def _cudnn_call(problem: Problem) -> Call:
    layer, input, weight, grad_output = problem.layer, problem.input, problem.weight, problem.grad_output
    if problem.direction == "forward":
        return lambda: F.conv2d(input, weight, None, layer.stride, layer.padding)
    return lambda: _convolution_backward(grad_output, input, weight, layer.stride, layer.padding, problem.direction)


def slice_loop(problem: Problem, input: Tensor, weight: Tensor, grad_output: Tensor) -> Tensor:
    """Slice, pad, convolve, concatenate: the pass over patches in plain PyTorch.

    Padding is the convolution's own where the four sides allow it, a padded copy elsewhere. A weight gradient sums
    the patches' in the tensors' type.
    """
    direction, stride = problem.direction, problem.layer.stride
    if direction == "forward":
        rows = [torch.cat([_loop_forward(patch, input, weight, stride) for patch in row], 3) for row in problem.table]
        return torch.cat(rows, 2)
    if direction == "input_grad":
        rows = [
            torch.cat([_loop_input_grad(patch, input, weight, grad_output, stride) for patch in row], 3)
            for row in problem.table
        ]
        return torch.cat(rows, 2)
    total: Tensor | None = None
    for gradient in loop_weight_grads(problem, input, weight, grad_output):
        total = gradient if total is None else total.add_(gradient)
    assert total is not None
    return total


def _common_padding(patch: Patch) -> int | None:
    """The padding of all four sides, None where they differ or crop."""
    sides = {*patch.row_padding, *patch.col_padding}
    return sides.pop() if len(sides) == 1 and min(sides) >= 0 else None


def _loop_forward(patch: Patch, input: Tensor, weight: Tensor, stride: int) -> Tensor:
    padding = _common_padding(patch)
    if padding is None:
        return F.conv2d(patch.padded(input), weight, None, stride)
    return F.conv2d(patch.of_input(input), weight, None, stride, padding)


def _loop_input_grad(patch: Patch, input: Tensor, weight: Tensor, grad_output: Tensor, stride: int) -> Tensor:
    padding = _common_padding(patch)
    dy = patch.of_output(grad_output)
    if padding is not None:
        return _convolution_backward(dy, patch.of_input(input), weight, stride, padding, "input_grad")
    (top, bottom), (left, right) = patch.row_padding, patch.col_padding
    rows, cols = patch.rows[1] - patch.rows[0], patch.cols[1] - patch.cols[0]
    # Only the shape of the padded input matters to its gradient.
    size = (dy.shape[0], weight.shape[1], top + rows + bottom, left + cols + right)
    shape = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    padded = _convolution_backward(dy, shape, weight, stride, 0, "input_grad")
    return patch.unpadded(padded)


def loop_weight_grads(problem: Problem, input: Tensor, weight: Tensor, grad_output: Tensor) -> Iterator[Tensor]:
    """The weight gradient of each patch."""
    stride = problem.layer.stride
    for patch in problem.all_patches:
        padding = _common_padding(patch)
        x = patch.padded(input) if padding is None else patch.of_input(input)
        dy = patch.of_output(grad_output)
        yield _convolution_backward(dy, x, weight, stride, padding or 0, "weight_grad")


# --- correctness ----------------------------------------------------------------------------------


def _truths(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """The exact result of every patch, and PyTorch's error in the tensors' type: summed exactly, and in that type."""
    exact = truth_dtype(dtype)
    tensors = (problem.input, problem.weight, problem.grad_output)
    with exact_arithmetic():
        truth = slice_loop(problem, *(tensor.to(exact) for tensor in tensors))
    # In the tensors' type PyTorch may round fp32 to tf32 if the user's setting allows it, as ours may.
    with cudnn_benchmark(False):
        if problem.direction != "weight_grad":
            error = relative_error(slice_loop(problem, *tensors), truth)
            return truth, error, error
        parts = list(loop_weight_grads(problem, *tensors))
    in_type = torch.stack(parts).to(exact).sum(0).to(dtype)
    summed = parts[0].clone()
    for part in parts[1:]:
        summed += part
    return truth, relative_error(in_type, truth), relative_error(summed, truth)


def _forced(path: str | None) -> AbstractContextManager[Any]:
    if path is None:
        return nullcontext()
    return _library.forced_path(path)


def measure_conv(setting: Setting, cell: Cell, problem: Problem, *, path: str | None = None) -> Row:
    """Checks and times one cell.

    Args:
        setting: how.
        cell: of which `problem` is.
        problem: tensors and geometry.
        path: the path that ours must take; None for the automatic choice.

    Returns:
        The row: "status", "candidates" (see `Timing`; ours with "error" and "limit"), "flop", "bytes", and of ours
        with one launch: "tflops", "gbps", "matmul_share", "copy_share", "bound" and the ratios to the others.
    """
    layer = problem.layer
    truth, error, summed_error = _truths(problem, setting.dtype)
    slack = math.sqrt(problem.terms()) * 2.0**-24
    calls: dict[str, Call] = {}
    checks: dict[str, Check] = {}
    with _forced(path):
        for name, make, allowed in (("layer", _layer_call, error), ("patch", _patch_calls, summed_error)):
            if setting.wants(name):
                output = poisoned_like(problem.result_like())
                calls[name] = make(problem, output)
                calls[name]()
                checks[name] = Check(relative_error(output, truth), 2 * allowed + slack)
        del truth
        if setting.wants("cudnn"):
            calls["cudnn"] = _cudnn_call(problem)
        # Against the loop the target is at 4x4; on other grids it is measured only where it is asked for.
        if setting.wants("loop") and (setting.candidates is not None or cell.grid == (4, 4)):
            tensors = (problem.input, problem.weight, problem.grad_output)
            calls["loop"] = lambda: slice_loop(problem, *tensors)
        with cudnn_benchmark(True):
            row = timed(setting, calls, checks, fewer=("loop",))
    flop = layer.flop(cell.batch)
    size_bytes = layer.byte_count(cell.batch, setting.dtype.itemsize, cell.direction)
    row |= {"flop": flop, "bytes": size_bytes}
    row["bound"] = "matmul" if flop / size_bytes >= setting.ceilings.flop_per_byte else "copy"
    mine = median_ms(row, "layer")
    if mine:
        row["tflops"] = flop / mine / 1e9
        row["gbps"] = size_bytes / mine / 1e6
        row["matmul_share"] = row["tflops"] / setting.ceilings.matmul_tflops
        row["copy_share"] = row["gbps"] / setting.ceilings.copy_gbps
    add_ratios(row, "layer", {"cudnn_over_layer": "cudnn", "loop_over_layer": "loop"})
    add_ratios(row, "patch", {"cudnn_over_patch": "cudnn", "loop_over_patch": "loop"})
    return row


def conv_tasks(
    setting: Setting,
    cells: list[Cell],
    *,
    path: str | None = None,
    explain: Callable[[Cell], dict[str, str]] = lambda cell: {},
) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    """Key, description and measurement of every cell; neighbours of one layer share their tensors.

    Args:
        setting: how to measure.
        cells: what.
        path: the path that ours must take; None for the automatic choice.
        explain: entries that say which path one launch for all patches takes.
    """
    shared: tuple[tuple[ConvLayer, int] | None, tuple[Tensor, Tensor, Tensor] | None] = (None, None)
    for cell in cells:
        layer = cell.layer
        assert isinstance(layer, ConvLayer)

        def task(cell: Cell = cell, layer: ConvLayer = layer) -> Row:
            nonlocal shared
            if shared[0] != (layer, cell.batch):
                shared = (None, None)
                release_memory(setting)
                shared = ((layer, cell.batch), make_tensors(setting, layer, cell.batch))
            assert shared[1] is not None
            problem = make_problem(setting, cell, shared[1])
            chosen = {"path": path} if path else explain(cell)
            return measure_conv(setting, cell, problem, path=path) | chosen

        description = {
            "layer": layer.name, "pass": cell.direction, "grid": list(cell.grid), "batch": cell.batch,
            "shape": f"{layer.channels}->{layer.outputs} {layer.kernel}x{layer.kernel}"
            f"{f' stride {layer.stride}' if layer.stride > 1 else ''} at {layer.size}",
            "count": layer.count, "inside": layer.inside,
        }  # fmt: skip
        yield cell.key, description, task
