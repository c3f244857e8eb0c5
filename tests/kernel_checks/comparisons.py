"""Runs the operators of one namespace on one device and compares them with the definition in fp64.

A reduction passes when its relative L2 error is at most twice that of PyTorch in the same type plus
sqrt(K) units of the accumulation type, K being the number of terms. Data movement and maxima must be equal.
In fp64 the truth is rounded as well, and a cancellation shows in both: there a unit is 32 times 2^-53.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tests.kernel_checks import first_principles
from tests.kernel_checks.cases import Case

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "view", "channels_last view", "stepped"]


def without_onednn() -> AbstractContextManager[None]:
    """For PyTorch's results in bf16: ATen's own convolutions.

    oneDNN (in torch 2.11) adds memory that nobody wrote, of channels that do not fill its vectors: now and then a NaN.
    """
    manager: AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
    return manager


class Operators:
    """The operators of a namespace, called with tensors of the CPU, run on `device`."""

    def __init__(self, namespace: Any, device: str = "cpu") -> None:
        self.namespace = namespace
        self.device = device

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on the device with the same strides, so that every layout is seen there too."""
        if self.device == "cpu":
            return tensor
        expanded = [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        if any(expanded):  # one element behind many, which a copy must not be written over
            once = tensor[tuple(slice(1) if wide else slice(None) for wide in expanded)]
            return self.move(once).expand(tensor.shape)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.zeros(max(extent, 0) if tensor.numel() else 0, dtype=tensor.dtype, device=self.device)
        moved = flat.as_strided(tensor.shape, tensor.stride())
        moved.copy_(tensor)
        return moved

    def __call__(self, name: str, *arguments: Any) -> Any:
        operator = getattr(self.namespace, name).default
        placed = [self.move(a) if isinstance(a, Tensor) else a for a in arguments]
        results = operator(*placed)
        again = operator(*placed)
        for first, second in zip(_as_tuple(results), _as_tuple(again), strict=True):
            assert torch.equal(_bits(first), _bits(second)), f"{name} gave different bits when run again"
        self._check_out(name, placed, _as_tuple(results))
        return results.cpu() if isinstance(results, Tensor) else tuple(r.cpu() for r in results)

    def _check_out(self, name: str, placed: list[Any], expected: tuple[Tensor, ...]) -> None:
        """`.out` into views of larger tensors: the same bits inside, nothing touched around.

        The parent has the memory format and the alignment of the result, so that the same kernels write it.
        """
        overload = getattr(getattr(self.namespace, name), "out", None)
        if overload is None:
            return
        names = [a.name for a in overload._schema.arguments if a.kwarg_only]
        parents, views = [], []
        for result in expected:
            channels_last = result.dim() == 4 and result.is_contiguous(memory_format=torch.channels_last)
            format = torch.channels_last if channels_last else torch.contiguous_format
            margins = [(1, 2), (8, 8), (1, 2), (1, 2)][: result.dim()]
            shape = [size + sum(margin) for size, margin in zip(result.shape, margins, strict=True)]
            parent = torch.full(shape, 77, dtype=result.dtype, device=result.device).contiguous(memory_format=format)
            parents.append(parent)
            views.append(parent[tuple(slice(a, a + size) for size, (a, _) in zip(result.shape, margins, strict=True))])
        extra = [False] if name == "patch_conv2d_weight_grad" else []
        overload(*placed, *extra, **dict(zip(names, views, strict=True)))
        for parent, view, result in zip(parents, views, expected, strict=True):
            assert torch.equal(_bits(view), _bits(result)), f"{name}.out differs from {name}"
            view.fill_(77)
            assert bool((parent == 77).all()), f"{name}.out wrote outside its output"


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _bits(tensor: Tensor) -> Tensor:
    """NaNs compare equal as bits."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """A 4-D tensor of the layout whose values the dtype holds exactly."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    n, c, h, w = shape
    if layout == "aligned channels_last view":  # what a patch of a joined tensor is
        parent = torch.full((n + 1, c + 16, h + 3, w + 2), 1e3, dtype=dtype)
        view = parent.contiguous(memory_format=torch.channels_last)[1:, 8 : c + 8, 2 : h + 2, 1 : w + 1]
        view.copy_(values)
        return view
    if layout == "channels_last part":  # rows and columns of a larger tensor, all of its channels
        parent = torch.full((n + 1, c, h + 3, w + 2), 1e3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return parent[1:, :, 2 : h + 2, 1 : w + 1].copy_(values)
    if layout in ("view", "channels_last view"):
        parent = torch.full((n + 1, c + 2, h + 3, w + 2), 1e3, dtype=dtype)
        if layout == "channels_last view":
            parent = parent.contiguous(memory_format=torch.channels_last)
        view = parent[1:, 1 : c + 1, 2 : h + 2, 1 : w + 1]
    else:
        view = torch.full((n, 2 * c, 3 * h, 2 * w), 1e3, dtype=dtype)[:, ::2, ::3, 1::2]
    view.copy_(values)
    return view


def relative_error(actual: Tensor, truth: Tensor) -> float:
    difference = (actual.double() - truth).norm().item()
    scale = truth.norm().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def assert_accurate(
    name: str,
    actual: Tensor,
    truth: Tensor,
    same_type: Tensor,
    terms: int,
    summed: Tensor | None = None,
    tf32: bool = False,
) -> None:
    """`summed`: the largest of the terms, where they cancel so far that their rounding outweighs the result.

    `tf32`: both factors of each term may be off by 2^-12; independent errors of the terms leave the sum no worse.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == same_type.dtype, f"{name}: {actual.dtype}, expected {same_type.dtype}"
    if actual.numel() == 0:
        return
    unit = 2.0**-48 if actual.dtype == torch.float64 else 2.0**-24
    cancellation = 1.0 if summed is None else max(1.0, summed.norm().item() / max(truth.norm().item(), 1e-300))
    limit = 2 * relative_error(same_type, truth) + math.sqrt(terms) * unit * cancellation + (2.0**-11 if tf32 else 0)
    error = relative_error(actual, truth)
    largest = (actual.double() - truth).abs().max().item()
    assert error <= limit, f"{name}: relative error {error:.3g} over {limit:.3g}; largest element error {largest:.3g}"


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert torch.equal(actual, expected), f"{name}: {int((actual != expected).sum())} elements differ"


def _run_reference(
    function: Callable[..., Tensor], tensors: list[Tensor], grad_output: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.to(dtype).detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    grads = torch.autograd.grad(output, leaves, grad_output.to(dtype), allow_unused=True)
    return output.detach(), [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)
    ]


def conv2d(
    operators: Operators, case: Case, dtype: torch.dtype, layout: str, activation: str = "none", tf32: bool = False
) -> None:
    g = case.geometry
    generator = torch.Generator().manual_seed(1)
    input = random_tensor((case.batch, case.in_channels, *g.in_size), dtype, layout, generator)
    per_group = case.in_channels // case.groups
    weight = random_tensor((case.out_channels, per_group, *g.kernel), dtype, "contiguous", generator)
    if "channels_last" in layout:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(case.out_channels, generator=generator).to(dtype)
    grad_output = random_tensor((case.batch, case.out_channels, *g.out_size), dtype, layout, generator)
    window = [list(g.stride), list(g.padding), list(g.dilation), case.groups, *g.bounds]

    def reference(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = first_principles.conv2d(input, weight, bias, g, case.groups)
        return output.relu() if activation == "relu" else output

    def linear(input: Tensor, weight: Tensor) -> Tensor:
        return first_principles.conv2d(input, weight, None, g, case.groups)

    truth = reference(input.double(), weight.double(), bias.double())
    same = reference(input, weight, bias)
    taps = g.kernel[0] * g.kernel[1]
    actual = operators("patch_conv2d", input, weight, bias, *window, activation)
    assert_accurate("patch_conv2d", actual, truth, same, per_group * taps + 1, tf32=tf32)
    if activation != "none":
        return
    without_bias = operators("patch_conv2d", input, weight, None, *window, activation)
    truth, truths = _run_reference(linear, [input, weight], grad_output, torch.float64)
    same, sames = _run_reference(linear, [input, weight], grad_output, dtype)
    assert_accurate("patch_conv2d without bias", without_bias, truth, same, per_group * taps, tf32=tf32)
    input_grad = operators("patch_conv2d_input_grad", grad_output, weight, list(input.shape), *window)
    terms = case.out_channels // case.groups * taps
    assert_accurate("patch_conv2d_input_grad", input_grad, truths[0], sames[0], terms, tf32=tf32)
    weight_grad = operators("patch_conv2d_weight_grad", grad_output, input, list(weight.shape), *window)
    terms = max(case.batch * g.out_size[0] * g.out_size[1], 1)
    assert_accurate("patch_conv2d_weight_grad", weight_grad, truths[1], sames[1], terms, tf32=tf32)

    accumulated = operators.move(torch.ones_like(weight))
    moved = [operators.move(grad_output), operators.move(input)]
    overload = operators.namespace.patch_conv2d_weight_grad.out
    overload(*moved, list(weight.shape), *window, True, output=accumulated)
    assert_accurate("accumulated weight gradient", accumulated.cpu(), truths[1] + 1, sames[1] + 1, terms + 1, tf32=tf32)


def _with_ties(tensor: Tensor) -> Tensor:
    """Few distinct values, so that maxima tie, and some -inf; written in place to keep the layout."""
    tensor.copy_((tensor.double() * 1.5).round())
    tensor[tensor < -2] = float("-inf")
    return tensor


def max_pool2d(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    g = case.geometry
    generator = torch.Generator().manual_seed(2)
    input = _with_ties(random_tensor((case.batch, case.in_channels, *g.in_size), dtype, layout, generator))
    grad_output = random_tensor((case.batch, case.in_channels, *g.out_size), dtype, layout, generator)
    window = [list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), *g.bounds]
    values, offsets = operators("patch_max_pool2d", input, *window)
    expected_values, expected_offsets = first_principles.max_pool2d(input, g)
    assert_same("patch_max_pool2d values", values, expected_values)
    assert_same("patch_max_pool2d offsets", offsets, expected_offsets)

    finite = random_tensor(tuple(input.shape), dtype, layout, generator)
    gathered = operators("patch_max_pool2d_gather", finite, offsets, *window)
    assert_same("patch_max_pool2d_gather", gathered, first_principles.max_pool2d_gather(finite, offsets, g))

    def reference(input: Tensor) -> Tensor:
        return first_principles.max_pool2d_gather(input, offsets, g)

    _, truths = _run_reference(reference, [finite], grad_output, torch.float64)
    _, sames = _run_reference(reference, [finite], grad_output, dtype)
    backward = operators("patch_max_pool2d_backward", grad_output, offsets, list(input.shape), *window)
    assert_accurate("patch_max_pool2d_backward", backward, truths[0], sames[0], g.kernel[0] * g.kernel[1])


def max_pool2d_nan(operators: Operators, case: Case, dtype: torch.dtype, layout: str = "contiguous") -> None:
    """As in PyTorch, a NaN in the window wins, and the last one if there are several."""
    g = case.geometry
    generator = torch.Generator().manual_seed(3)
    input = random_tensor((case.batch, case.in_channels, *g.in_size), dtype, layout, generator)
    input[torch.rand(input.shape, generator=generator) < 0.15] = float("nan")
    window = [list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), *g.bounds]
    values, offsets = operators("patch_max_pool2d", input, *window)
    is_nan = first_principles.windows(
        torch.nan_to_num(input, nan=7.0).eq(7.0).to(torch.float32), g
    )  # the case has one patch and no padding, so the windows are those of the whole input
    position = torch.arange(is_nan.shape[-1]) * is_nan
    holds = is_nan.any(-1)
    assert torch.equal(values.isnan(), holds)
    assert torch.equal(offsets[holds].long(), position.amax(-1)[holds].long())
    if g.dilation == (1, 1):  # and PyTorch itself says so
        kernel_w, in_w = g.kernel[1], g.in_size[1]
        _, flat = torch.nn.functional.max_pool2d(input.float(), g.kernel, g.stride, 0, return_indices=True)
        rows = torch.arange(g.out_size[0])[:, None] * g.stride[0]
        columns = torch.arange(g.out_size[1])[None, :] * g.stride[1]
        assert torch.equal(offsets.long(), (flat // in_w - rows) * kernel_w + flat % in_w - columns)


def avg_pool2d(operators: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    g = case.geometry
    generator = torch.Generator().manual_seed(4)
    input = random_tensor((case.batch, case.in_channels, *g.in_size), dtype, layout, generator)
    grad_output = random_tensor((case.batch, case.in_channels, *g.out_size), dtype, layout, generator)
    for count_include_pad, divisor_override in ((True, None), (False, None), (False, 3), (True, -2)):

        def reference(
            input: Tensor, include: bool = count_include_pad, override: int | None = divisor_override
        ) -> Tensor:
            return first_principles.avg_pool2d(input, g, include, override)

        window = [list(g.kernel), list(g.stride), list(g.padding), count_include_pad, divisor_override, *g.bounds]
        truth, truths = _run_reference(reference, [input], grad_output, torch.float64)
        same, sames = _run_reference(reference, [input], grad_output, dtype)
        terms = g.kernel[0] * g.kernel[1]
        actual = operators("patch_avg_pool2d", input, *window)
        assert_accurate("patch_avg_pool2d", actual, truth, same, terms + 1)
        backward = operators("patch_avg_pool2d_backward", grad_output, list(input.shape), *window)
        assert_accurate("patch_avg_pool2d_backward", backward, truths[0], sames[0], terms + 1)


def batch_norm(
    operators: Operators,
    case: Case,
    dtype: torch.dtype,
    layout: str,
    relu: bool,
    affine: torch.dtype | None,
) -> None:
    """All four operators on the case's output bounds; `affine` is the type of weight and bias, None for none."""
    g = case.geometry
    rows, columns = list(g.out_rows), list(g.out_columns)
    eps = 1e-3
    activation = "relu" if relu else "none"
    generator = torch.Generator().manual_seed(5)
    shape = (case.batch, case.out_channels, rows[-1], columns[-1])
    input = random_tensor(shape, dtype, layout, generator)
    input += 3  # a mean far from zero is what a one-pass variance gets wrong
    grad_output = random_tensor(shape, dtype, layout, generator)
    weight = bias = None
    if affine is not None:
        weight = (torch.randn(case.out_channels, generator=generator) + 1).to(affine)
        bias = torch.randn(case.out_channels, generator=generator).to(affine)
    statistic_type = torch.float64 if dtype == torch.float64 else torch.float32
    pixels = max(case.batch * rows[-1] * columns[-1], 1)

    mean, m2 = operators("patch_batch_norm_stats", input, rows, columns)
    truth = first_principles.batch_norm_stats(input.double(), rows, columns)
    same = first_principles.batch_norm_stats(input.to(statistic_type), rows, columns)
    assert_accurate("patch_batch_norm_stats mean", mean, truth[0], same[0], pixels)
    assert_accurate("patch_batch_norm_stats m2", m2, truth[1], same[1], pixels)

    areas = [(y.stop - y.start) * (x.stop - x.start) for y, x in first_principles.each_patch(rows, columns)]
    count = torch.tensor(areas, dtype=statistic_type)[:, None] * max(case.batch, 1)
    invstd = (m2 / count + eps).rsqrt()

    def apply(kind: torch.dtype) -> Tensor:
        return first_principles.batch_norm_apply(
            input.to(kind),
            mean.to(kind),
            invstd.to(kind),
            None if weight is None else weight.to(kind),
            None if bias is None else bias.to(kind),
            rows,
            columns,
            relu,
        )

    output = operators("patch_batch_norm_apply", input, mean, invstd, weight, bias, rows, columns, activation)
    assert_accurate("patch_batch_norm_apply", output, apply(torch.float64), apply(statistic_type).to(dtype), 4)

    def masked_grad(kind: torch.dtype) -> Tensor:
        grad = grad_output.to(kind)
        return torch.where(apply(kind) > 0, grad, torch.zeros_like(grad)) if relu else grad

    def reduce(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        grad = masked_grad(kind)
        centered = input.to(kind) - first_principles.per_pixel(mean.to(kind), rows, columns)
        boxes = first_principles.each_patch(rows, columns)
        sums = torch.stack([grad[:, :, y, x].sum((0, 2, 3)) for y, x in boxes])
        return sums, torch.stack([(grad * centered)[:, :, y, x].sum((0, 2, 3)) for y, x in boxes])

    sums = operators(
        "patch_batch_norm_backward_reduce", grad_output, input, mean, invstd, weight, bias, rows, columns, activation
    )
    for name, actual, true_sum, same_sum in zip(
        ("sum_grad", "sum_grad_centered"), sums, reduce(torch.float64), reduce(statistic_type), strict=True
    ):
        assert_accurate(f"patch_batch_norm_backward_reduce {name}", actual, true_sum, same_sum, pixels)

    def input_grad(kind: torch.dtype, constant: bool) -> Tensor:
        def spread(statistic: Tensor) -> Tensor:
            return first_principles.per_pixel(statistic.to(kind), rows, columns)

        grad = masked_grad(kind)
        if not constant:
            n = count.to(kind)
            centered = input.to(kind) - spread(mean)
            mean_grad, mean_centered = spread(sums[0].to(kind) / n), spread(sums[1].to(kind) / n)
            grad = grad - mean_grad - centered * spread(invstd) ** 2 * mean_centered
        scale = spread(invstd) if weight is None else spread(invstd) * weight.to(kind)[None, :, None, None]
        return grad * scale

    input_grads = {}
    for constant in (False, True):
        given = (None, None) if constant else sums
        input_grads[constant] = operators(
            "patch_batch_norm_backward_apply",
            *(grad_output, input, mean, invstd, weight, bias, *given, rows, columns, activation),
        )
        assert_accurate(
            "patch_batch_norm_backward_apply",
            input_grads[constant],
            input_grad(torch.float64, constant),
            input_grad(statistic_type, constant).to(dtype),
            6,
            input_grad(torch.float64, constant=True),
        )

    together = operators("patch_batch_norm", input, weight, bias, rows, columns, eps, activation)
    assert_same("patch_batch_norm mean", together[1], mean)
    assert_same("patch_batch_norm m2", together[3], m2)
    assert_accurate("patch_batch_norm invstd", together[2], (m2.double() / count + eps).rsqrt(), invstd, 4)
    if case.batch == 0:
        return

    # End to end against PyTorch's own batch norm of each patch, forward and backward.
    def train(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = input.to(kind).detach().requires_grad_()
        result = first_principles.batch_norm_train(
            leaf,
            None if weight is None else weight.to(kind),
            None if bias is None else bias.to(kind),
            rows,
            columns,
            eps,
            relu,
        )
        (grad,) = torch.autograd.grad(result, leaf, grad_output.to(kind))
        return result.detach(), grad

    if min(areas) * case.batch > 1:  # PyTorch refuses one value per channel
        truth_output, truth_grad = train(torch.float64)
        same_output, same_grad = train(statistic_type)
        assert_accurate("patch_batch_norm", together[0], truth_output, same_output.to(dtype), pixels)
        terms = input_grad(torch.float64, constant=True)
        assert_accurate("its input gradient", input_grads[False], truth_grad, same_grad.to(dtype), pixels, terms)


def conv2d_expanded_gradient(operators: Operators, case: Case) -> None:
    g = case.geometry
    generator = torch.Generator().manual_seed(6)
    input = random_tensor((case.batch, case.in_channels, *g.in_size), torch.float32, "contiguous", generator)
    weight = torch.randn((case.out_channels, case.in_channels // case.groups, *g.kernel), generator=generator)
    grad_output = torch.ones(()).expand(case.batch, case.out_channels, *g.out_size)
    window = [list(g.stride), list(g.padding), list(g.dilation), case.groups, *g.bounds]

    def linear(input: Tensor, weight: Tensor) -> Tensor:
        return first_principles.conv2d(input, weight, None, g, case.groups)

    _, truths = _run_reference(linear, [input, weight], grad_output, torch.float64)
    _, sames = _run_reference(linear, [input, weight], grad_output, torch.float32)
    input_grad = operators("patch_conv2d_input_grad", grad_output, weight, list(input.shape), *window)
    assert_accurate("patch_conv2d_input_grad", input_grad, truths[0], sames[0], 9 * case.out_channels)
    weight_grad = operators("patch_conv2d_weight_grad", grad_output, input, list(weight.shape), *window)
    assert_accurate("patch_conv2d_weight_grad", weight_grad, truths[1], sames[1], grad_output.numel())


def max_pool2d_equal(operators: Operators, others: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    """Two implementations of max pooling agree to the bit, NaNs and ties included."""
    g = case.geometry
    generator = torch.Generator().manual_seed(11)
    input = _with_ties(random_tensor((case.batch, case.in_channels, *g.in_size), dtype, layout, generator))
    input[torch.rand(input.shape, generator=generator) < 0.1] = float("nan")
    grad_output = random_tensor((case.batch, case.in_channels, *g.out_size), dtype, layout, generator)
    window = [list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), *g.bounds]
    values, offsets = operators("patch_max_pool2d", input, *window)
    other_values, other_offsets = others("patch_max_pool2d", input, *window)
    assert torch.equal(_bits(values), _bits(other_values)), "values differ"
    assert torch.equal(offsets, other_offsets), "offsets differ"
    gathered = [o("patch_max_pool2d_gather", input, offsets, *window) for o in (operators, others)]
    assert torch.equal(_bits(gathered[0]), _bits(gathered[1])), "gathered values differ"
    grads = [
        o("patch_max_pool2d_backward", grad_output, offsets, list(input.shape), *window) for o in (operators, others)
    ]
    assert torch.equal(grads[0], grads[1]), "gradients differ"


def avg_pool2d_equal(operators: Operators, others: Operators, case: Case, dtype: torch.dtype, layout: str) -> None:
    """Two implementations of average pooling agree to the bit."""
    g = case.geometry
    generator = torch.Generator().manual_seed(13)
    input = random_tensor((case.batch, case.in_channels, *g.in_size), dtype, layout, generator)
    input[torch.rand(input.shape, generator=generator) < 0.1] = -0.0
    grad_output = random_tensor((case.batch, case.in_channels, *g.out_size), dtype, layout, generator)
    for count_include_pad, divisor_override in ((True, None), (False, None), (False, 7), (True, -2)):
        window = [list(g.kernel), list(g.stride), list(g.padding), count_include_pad, divisor_override, *g.bounds]
        outputs = [o("patch_avg_pool2d", input, *window) for o in (operators, others)]
        assert torch.equal(_bits(outputs[0]), _bits(outputs[1])), "averages differ"
        grads = [o("patch_avg_pool2d_backward", grad_output, list(input.shape), *window) for o in (operators, others)]
        assert torch.equal(_bits(grads[0]), _bits(grads[1])), "gradients differ"
