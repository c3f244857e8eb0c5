"""Every operator on small shapes, compared with the CPU's: what compute-sanitizer watches in `make gpu-evidence`.

A program, not a test file: `python -m tests.ops_cuda.sanitizer_subset [DEVICE]`. Under the sanitizer a kernel runs a
hundred times slower, so there are few calls, chosen to touch every path, tail and border.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import splitkern.ops
from splitkern import _library
from splitkern.benchmarks.layers import ConvLayer, patches
from splitkern.benchmarks.patches import patches_of
from tests.kernel_checks.comparisons import Operators

PATHS = ("plain", "depthwise", "first_layer", "sm80", "sm90")

# channels, outputs, size, kernel, stride, padding, groups, grid
CONVOLUTIONS = (
    (64, 64, 14, 3, 1, 1, 1, (2, 2)),
    (64, 128, 15, 3, 2, 1, 1, (2, 3)),
    (128, 64, 14, 1, 1, 0, 1, (2, 2)),
    (64, 64, 14, 1, 2, 0, 1, (2, 2)),
    (40, 72, 9, 3, 1, 1, 1, (3, 2)),
    (3, 64, 22, 7, 2, 3, 1, (2, 2)),
    (3, 64, 14, 3, 1, 1, 1, (2, 2)),
    (32, 32, 12, 3, 1, 1, 32, (2, 2)),
    (5, 6, 9, 3, 1, 1, 1, (2, 2)),
)


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def _forced(path: str | None) -> AbstractContextManager[Any]:
    return nullcontext() if path is None else _library.forced_path(path)


def _calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Text, operator and arguments on the CPU; whole layers, and one inner patch as a view."""
    for channels, outputs, size, kernel, stride, padding, groups, grid in CONVOLUTIONS:
        layer = ConvLayer("layer", channels, outputs, size, kernel, stride, padding, 1, True)
        after = layer.output_size
        input, weight = _random((2, channels, size, size), 1), _random((outputs, channels // groups, kernel, kernel), 2)
        grad_output, bias = _random((2, outputs, after, after), 3), _random((outputs,), 4)
        window = ([stride] * 2, [padding] * 2, [1, 1], groups)
        bounds = patches(layer.window, size, grid).lists()
        patch = patches_of(layer, grid)[1][-1][-1]
        local = ([stride] * 2, [patch.row_padding[0], patch.col_padding[0]], [1, 1], groups, *patch.local_bounds())
        x, dy = patch.of_input(input), patch.of_output(grad_output)
        text = f"{channels}->{outputs} {kernel}x{kernel} stride {stride} groups {groups} at {size}"
        for what, geometry, ins, grads in (
            ("layer", (*window, *bounds), input, grad_output),
            ("patch", local, x, dy),
        ):
            yield f"{text} {what}", "patch_conv2d", (ins, weight, bias, *geometry, "relu")
            yield f"{text} {what}", "patch_conv2d_input_grad", (grads, weight, list(ins.shape), *geometry)
            yield f"{text} {what}", "patch_conv2d_weight_grad", (grads, ins, list(weight.shape), *geometry)
    for channels in (64, 5):
        input = _random((2, channels, 13, 13), 5)
        bounds = [[0, 6, 13], [0, 13], [0, 3, 7], [0, 7]]
        text = f"{channels} channels"
        pool = ([3, 3], [2, 2], [1, 1], [1, 1], *bounds)
        yield text, "patch_max_pool2d", (input, *pool)
        values, offsets = torch.ops.splitkern.patch_max_pool2d(input, *pool)
        yield text, "patch_max_pool2d_backward", (values, offsets, list(input.shape), *pool)
        average = ([3, 3], [2, 2], [1, 1], True, None, *bounds)
        yield text, "patch_avg_pool2d", (input, *average)
        yield text, "patch_avg_pool2d_backward", (values, list(input.shape), *average)
        weight, bias, rows, cols = torch.ones(channels), torch.zeros(channels), [0, 6, 13], [0, 5, 13]
        yield text, "patch_batch_norm", (input, weight, bias, rows, cols, 1e-5, "relu")
        _, mean, invstd, _ = torch.ops.splitkern.patch_batch_norm(input, weight, bias, rows, cols, 1e-5, "relu")
        common = (_random((2, channels, 13, 13), 6), input, mean, invstd, weight, bias)
        yield text, "patch_batch_norm_backward_reduce", (*common, rows, cols, "relu")
        sums = torch.ops.splitkern.patch_batch_norm_backward_reduce(*common, rows, cols, "relu")
        yield text, "patch_batch_norm_backward_apply", (*common, *sums, rows, cols, "relu")


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double().cpu() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def _copies(device: str) -> Iterator[tuple[str, bool]]:
    """The copy operators, where the library has them: whether the bytes come back as they went."""
    ops = torch.ops.splitkern
    if not hasattr(ops, "offload"):
        return
    pin = device.startswith("cuda")
    parent = _random((3, 24, 13, 11), 7).relu().to(device)
    for text, view in (("whole", parent), ("view", parent[:, :, 2:9, 3:10]), ("narrow", parent[:, 1:8, :, 4:5])):
        host = torch.empty(view.shape, dtype=view.dtype, pin_memory=pin)
        back = torch.zeros_like(parent).as_strided(view.shape, view.stride())
        ops.offload(view, host)
        ops.prefetch(host, back)
        if pin:
            torch.cuda.synchronize()
        yield f"offload and prefetch, {text}", torch.equal(back, view)
        packed = torch.empty(splitkern.ops.compressed_bytes(view), dtype=torch.uint8, pin_memory=pin)  # type: ignore[attr-defined]
        back.zero_()
        ops.offload_compressed(view, packed)
        ops.prefetch_compressed(packed, back)
        if pin:
            torch.cuda.synchronize()
        yield f"compressed, {text}", torch.equal(back, view)


def main(device: str) -> int:
    """Runs everything; returns 1 if a result is off."""
    wrong = run = refused = 0
    move = Operators(torch.ops.splitkern, device).move  # keeps the strides of views
    paths = [None, *PATHS] if device.startswith("cuda") and hasattr(_library, "forced_path") else [None]
    for text, name, arguments in _calls():
        operator = getattr(torch.ops.splitkern, name)
        expected = operator(*arguments)
        placed = [move(value) if isinstance(value, Tensor) else value for value in arguments]
        for path in paths if name.startswith("patch_conv2d") else [None]:
            try:
                with _forced(path):
                    actual = operator(*placed)
            except RuntimeError as error:
                if path is None:
                    raise
                if "CUDA" in str(error):
                    raise
                refused += 1
                continue
            run += 1
            pairs = zip(*([v] if isinstance(v, Tensor) else v for v in (actual, expected)), strict=True)
            error_size = max(_error(one, other) for one, other in pairs)
            if not error_size <= 0.02:
                wrong += 1
                print(f"WRONG {name}, {text}, path {path or 'automatic'}: relative error {error_size:.2g}")
    for text, same in _copies(device):
        run += 1
        if not same:
            wrong += 1
            print(f"WRONG {text}: other bytes came back")
    print(f"{run} calls on {device}, {wrong} wrong; {refused} refused by a path that does not take them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
