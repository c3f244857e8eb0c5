"""`splitkern bench pool`: pooling and BatchNorm in one pass, ours against PyTorch's unsplit operation.

Candidates: "layer", all patches in one launch; "patch", one call per patch on views of the joined tensors; "torch",
the unsplit operation in channels_last. BatchNorm normalises every patch by its own statistics, with the ReLU fused
where the kind says so (PyTorch: followed by a ReLU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import splitkern.ops  # noqa: F401  (registers the operators)
from splitkern.benchmarks.gpu_timing import Call
from splitkern.benchmarks.layers import Cell, Patches, PoolLayer
from splitkern.benchmarks.patches import Patch, patches_of
from splitkern.benchmarks.record import Row
from splitkern.benchmarks.rows import (
    Check,
    Setting,
    add_ratios,
    exact_arithmetic,
    median_ms,
    poisoned_like,
    random_tensor,
    relative_error,
    release_memory,
    timed,
    truth_dtype,
)

CANDIDATES = ("layer", "patch", "torch")
_EPS = 1e-5

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class PoolProblem:
    """Tensors and geometry of one cell; weight and bias only of BatchNorm, in fp32 beside narrower inputs."""

    layer: PoolLayer
    direction: str
    bounds: Patches
    table: list[list[Patch]]
    input: Tensor
    grad_output: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def all_patches(self) -> list[Patch]:
        """Row by row."""
        return [patch for row in self.table for patch in row]

    @property
    def activation(self) -> str:
        """Of BatchNorm."""
        return "relu" if self.layer.kind == "batch_norm_relu" else "none"


def make_pool_problem(setting: Setting, cell: Cell) -> PoolProblem:
    """Random tensors and geometry of a cell."""
    layer = cell.layer
    assert isinstance(layer, PoolLayer)
    bounds, table = patches_of(layer, cell.grid)
    after = layer.output_size
    wide = torch.float32
    weight, bias = (random_tensor(setting, layer.channels, seed=seed).to(wide) for seed in (2, 3))
    return PoolProblem(
        layer, cell.direction, bounds, table,
        random_tensor(setting, cell.batch, layer.channels, layer.size, layer.size, seed=1),
        random_tensor(setting, cell.batch, layer.channels, after, after, seed=4),
        weight, bias,
    )  # fmt: skip


# --- ours -----------------------------------------------------------------------------------------


def _window(problem: PoolProblem, padding: list[int], bounds: list[list[int]]) -> tuple[Any, ...]:
    layer = problem.layer
    kernel, stride = [layer.kernel] * 2, [layer.stride] * 2
    if layer.kind == "max":
        return (kernel, stride, padding, [1, 1], *bounds)
    return (kernel, stride, padding, True, None, *bounds)


def _layer_call(problem: PoolProblem) -> tuple[Call, Callable[[], Results]]:
    """A call with all patches in one launch, and what gives its results."""
    layer, ops = problem.layer, torch.ops.splitkern
    if layer.kind.startswith("batch_norm"):
        rows, cols = list(problem.bounds.in_rows), list(problem.bounds.in_cols)
        return _norm_call(problem, problem.input, problem.grad_output, rows, cols)
    window = _window(problem, [layer.padding] * 2, problem.bounds.lists())
    return _pool_call(problem, problem.input, problem.grad_output, window, ops)


def _pool_call(
    problem: PoolProblem, input: Tensor, grad_output: Tensor, window: tuple[Any, ...], ops: Any,
    into: Tensor | None = None,
) -> tuple[Call, Callable[[], Results]]:  # fmt: skip
    maximum = problem.layer.kind == "max"
    if problem.direction == "forward":
        values = poisoned_like(grad_output) if into is None else into
        if not maximum:
            return lambda: ops.patch_avg_pool2d.out(input, *window, output=values), lambda: (values,)
        offsets = poisoned_like(grad_output, torch.uint8)
        return (
            lambda: ops.patch_max_pool2d.out(input, *window, values=values, offsets=offsets),
            lambda: (values,),
        )
    output = poisoned_like(input) if into is None else into
    size = list(input.shape)
    if not maximum:
        return (
            lambda: ops.patch_avg_pool2d_backward.out(grad_output, size, *window, output=output),
            lambda: (output,),
        )
    offsets = ops.patch_max_pool2d(input, *window)[1]
    return (
        lambda: ops.patch_max_pool2d_backward.out(grad_output, offsets, size, *window, output=output),
        lambda: (output,),
    )


def _norm_call(
    problem: PoolProblem, input: Tensor, grad_output: Tensor, rows: list[int], cols: list[int]
) -> tuple[Call, Callable[[], Results]]:
    ops, activation = torch.ops.splitkern, problem.activation
    weight, bias = problem.weight, problem.bias
    latest: list[Results] = []
    if problem.direction == "forward":

        def forward() -> None:
            latest[:] = [(ops.patch_batch_norm(input, weight, bias, rows, cols, _EPS, activation)[0],)]

        return forward, lambda: latest[0]
    _, mean, invstd, _ = ops.patch_batch_norm(input, weight, bias, rows, cols, _EPS, activation)

    def backward() -> None:
        common = (grad_output, input, mean, invstd, weight, bias)
        sums = ops.patch_batch_norm_backward_reduce(*common, rows, cols, activation)
        gradient = ops.patch_batch_norm_backward_apply(*common, *sums, rows, cols, activation)
        latest[:] = [(gradient, (invstd * sums[1]).sum(0), sums[0].sum(0))]

    return backward, lambda: latest[0]


def _patch_calls(problem: PoolProblem) -> tuple[Call, Callable[[], Results]]:
    """One call per patch. Pooling writes into views of the joined tensor; BatchNorm allocates its patch."""
    ops = torch.ops.splitkern
    forward = problem.direction == "forward"
    joined = poisoned_like(problem.grad_output if forward else problem.input)
    calls, results = [], []
    for patch in problem.all_patches:
        input, grad_output = patch.of_input(problem.input), patch.of_output(problem.grad_output)
        if problem.layer.kind.startswith("batch_norm"):
            bounds = patch.local_bounds()
            call, result = _norm_call(problem, input, grad_output, bounds[0], bounds[1])
        else:
            window = _window(problem, [patch.row_padding[0], patch.col_padding[0]], patch.local_bounds())
            into = patch.of_output(joined) if forward else patch.of_input(joined)
            call, result = _pool_call(problem, input, grad_output, window, ops, into)
        calls.append(call)
        results.append(result)

    def run() -> None:
        for call in calls:
            call()

    def gather() -> Results:
        if not problem.layer.kind.startswith("batch_norm"):
            return (joined,)
        parts = [result() for result in results]
        columns = len(problem.table[0])
        strips = [torch.cat([part[0] for part in parts[i : i + columns]], 3) for i in range(0, len(parts), columns)]
        sums = [torch.stack(values).sum(0) for values in list(zip(*parts, strict=True))[1:]]
        return (torch.cat(strips, 2), *sums)

    return run, gather


# --- PyTorch --------------------------------------------------------------------------------------


def _torch_forward(layer: PoolLayer, input: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    if layer.kind == "max":
        return F.max_pool2d(input, layer.kernel, layer.stride, padding)
    if layer.kind == "avg":
        return F.avg_pool2d(input, layer.kernel, layer.stride, padding)
    output = F.batch_norm(input, None, None, weight, bias, training=True, eps=_EPS)
    return torch.relu(output) if layer.kind == "batch_norm_relu" else output


def _torch_call(problem: PoolProblem) -> Call:
    layer, input, grad_output = problem.layer, problem.input, problem.grad_output
    weight, bias = problem.weight, problem.bias
    if problem.direction == "forward":
        if layer.kind == "max":
            # With the indices, which training needs.
            return lambda: F.max_pool2d(input, layer.kernel, layer.stride, layer.padding, return_indices=True)
        return lambda: _torch_forward(layer, input, weight, bias, layer.padding)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
        output = _torch_forward(layer, leaves[0], leaves[1], leaves[2], layer.padding)
    wanted = leaves if layer.kind.startswith("batch_norm") else leaves[:1]
    return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)


def _by_patches(problem: PoolProblem, dtype: torch.dtype, params: torch.dtype) -> Results:
    """Slice, pad, operate, concatenate in PyTorch: the results in `dtype`, BatchNorm's parameters in `params`."""
    layer, norm = problem.layer, problem.layer.kind.startswith("batch_norm")
    leaves = [
        problem.input.to(dtype).detach().requires_grad_(),
        *(tensor.to(params).detach().requires_grad_() for tensor in (problem.weight, problem.bias)),
    ]
    value = -torch.inf if layer.kind == "max" else 0.0
    forward = problem.direction == "forward"
    with torch.set_grad_enabled(not forward):
        strips = []
        for row in problem.table:
            parts = [_torch_forward(layer, patch.padded(leaves[0], value), leaves[1], leaves[2], 0) for patch in row]
            strips.append(torch.cat(parts, 3))
        output = torch.cat(strips, 2)
        if forward:
            return (output.detach(),)
        return torch.autograd.grad(output, leaves if norm else leaves[:1], problem.grad_output.to(dtype))


# --- a row ----------------------------------------------------------------------------------------


def _largest_error(results: Results, truths: Results) -> float:
    return max(relative_error(result, truth) for result, truth in zip(results, truths, strict=True))


def measure_pool(setting: Setting, cell: Cell, problem: PoolProblem) -> Row:
    """Checks and times one cell.

    Returns:
        The row: "status", "candidates" (see `Timing`; ours with "error" and "limit"), "bytes", and of ours with one
        launch "gbps", "copy_share" and the ratio to PyTorch's.
    """
    layer = problem.layer
    exact = truth_dtype(setting.dtype)
    with exact_arithmetic():
        truths = _by_patches(problem, exact, exact)
    if layer.kind == "max" and problem.direction == "forward":
        limit = 0.0  # a maximum is one of the inputs
    else:
        terms = layer.kernel**2
        if layer.kind.startswith("batch_norm"):
            terms = problem.input.shape[0] * problem.input.shape[2] * problem.input.shape[3]
        limit = 2 * _largest_error(_by_patches(problem, setting.dtype, torch.float32), truths) + terms**0.5 * 2.0**-24
    calls: dict[str, Call] = {}
    checks: dict[str, Check] = {}
    for name, make in (("layer", _layer_call), ("patch", _patch_calls)):
        if setting.wants(name):
            calls[name], results = make(problem)
            calls[name]()
            checks[name] = Check(_largest_error(results(), truths), limit)
    del truths
    if setting.wants("torch"):
        calls["torch"] = _torch_call(problem)
    row = timed(setting, calls, checks)
    row["bytes"] = layer.byte_count(cell.batch, setting.dtype.itemsize, cell.direction)
    mine = median_ms(row, "layer")
    if mine:
        row["gbps"] = row["bytes"] / mine / 1e6
        row["copy_share"] = row["gbps"] / setting.ceilings.copy_gbps
    add_ratios(row, "layer", {"torch_over_layer": "torch"})
    add_ratios(row, "patch", {"torch_over_patch": "torch"})
    return row


def pool_tasks(setting: Setting, cells: list[Cell]) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    """Key, description and measurement of every cell."""
    for cell in cells:
        layer = cell.layer
        assert isinstance(layer, PoolLayer)

        def task(cell: Cell = cell) -> Row:
            release_memory(setting)
            return measure_pool(setting, cell, make_pool_problem(setting, cell))

        window = f" {layer.kernel}x{layer.kernel} stride {layer.stride}" if layer.kind in ("max", "avg") else ""
        description = {
            "layer": layer.name, "pass": cell.direction, "grid": list(cell.grid), "batch": cell.batch,
            "shape": f"{layer.kind.replace('_', ' ')}{window}, {layer.channels} at {layer.size}",
            "inside": layer.inside,
        }  # fmt: skip
        yield cell.key, description, task
