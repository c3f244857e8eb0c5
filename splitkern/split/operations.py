"""Operations that a split region may hold: what each computes on a patch, on all patches of a
layer, and on the whole image. Built by :mod:`splitkern.split.rules`, run by
:mod:`splitkern.split.execute`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from splitkern import ops
from splitkern.geometry import Bounds, Span, Window
from splitkern.split.dropout import NoiseKind, draw_noise

if TYPE_CHECKING:
    from splitkern.split.step import Step

Activation = Literal["none", "relu"]


@dataclass(frozen=True)
class CallGeometry:
    """Bounds of one operator call: of one patch in local coordinates, or of a whole layer.

    Args:
        padding: begin padding (rows, columns) of the call's coordinates, possibly negative.
        in_rows, in_cols, out_rows, out_cols: boundaries, see :mod:`splitkern.geometry`.
        counted: per axis the half-open span of positions that an average with
            ``count_include_pad`` counts, in the call's coordinates.
        owned: the part of the output that this patch owns, per axis; None where it owns all.
    """

    padding: tuple[int, int]
    in_rows: Bounds
    in_cols: Bounds
    out_rows: Bounds
    out_cols: Bounds
    counted: tuple[Span, Span]
    owned: tuple[Span, Span] | None = None


@dataclass(frozen=True)
class Operation:
    """One node of the region.

    Args:
        name: name of the value that it writes.
        label: module path, or function name, for messages.
        inputs: names of the values that it reads.
    """

    name: str
    label: str
    inputs: tuple[str, ...]

    #: Whether the operation writes its view of a joined tensor itself, see :meth:`write`.
    writes_joined: ClassVar[bool] = False

    @property
    def windows(self) -> tuple[Window, Window] | None:
        """Row and column window; None where output position o reads input position o."""
        return None

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        """Tensors of the module that the operation reads and that may need gradients."""
        return {}

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        """The operation as the model itself runs it, on whole images."""
        raise TypeError(f"{type(self).__name__} has no whole-image form")

    def run(self, step: Step, inputs: Sequence[Tensor], geometry: CallGeometry) -> Tensor:
        """The operation on one patch, or on all patches of a joined tensor."""
        return self.whole(step, inputs)

    def differentiable(self, step: Step, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The tensors that :meth:`write` reads and :meth:`gradients` returns gradients for."""
        return tuple(inputs)

    def write(self, tensors: Sequence[Tensor | None], geometry: CallGeometry, output: Tensor) -> tuple[Tensor, ...]:
        """Write the result into ``output``, a view of the joined tensor, outside autograd.

        Returns what :meth:`gradients` needs besides ``tensors`` and ``output``.
        """
        raise TypeError(f"{type(self).__name__} does not write joined tensors")

    @property
    def saved_for_gradients(self) -> tuple[bool, ...]:
        """Which of :meth:`differentiable`'s tensors :meth:`gradients` reads, beyond their shape."""
        return ()

    @property
    def reads_output(self) -> bool:
        """Whether :meth:`gradients` reads the output."""
        return False

    def output_like(self, step: Step, inputs: Sequence[Tensor]) -> tuple[int, torch.dtype]:
        """Channels and dtype of the output."""
        return inputs[0].shape[1], inputs[0].dtype

    def gradients(
        self,
        grad_output: Tensor,
        saved: SavedForGradients,
        geometry: CallGeometry,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of :meth:`differentiable`'s tensors, None where ``needs`` is False."""
        raise TypeError(f"{type(self).__name__} does not write joined tensors")


@dataclass(frozen=True)
class SavedForGradients:
    """What a join kept of one operation that wrote into it.

    Args:
        shapes: of the differentiable tensors, None where there is none.
        tensors: the differentiable tensors themselves, None where not saved.
        extra: what :meth:`Operation.write` returned.
        output: the patch's view of the joined tensor, where the operation reads it.
    """

    shapes: tuple[torch.Size | None, ...]
    tensors: tuple[Tensor | None, ...]
    extra: tuple[Tensor, ...]
    output: Tensor | None

    def shape(self, index: int) -> torch.Size:
        """Shape of a tensor that is there."""
        shape = self.shapes[index]
        assert shape is not None
        return shape

    def tensor(self, index: int) -> Tensor:
        """A tensor that was saved."""
        tensor = self.tensors[index]
        assert tensor is not None
        return tensor


def _relu_mask(grad_output: Tensor, output: Tensor) -> Tensor:
    return torch.where(output > 0, grad_output, torch.zeros((), dtype=grad_output.dtype, device=grad_output.device))


@dataclass(frozen=True)
class Convolution(Operation):
    """``nn.Conv2d``, with the ReLU that follows it where nothing else reads it in between."""

    module: nn.Conv2d = field(kw_only=True)
    activation: Activation = "none"

    writes_joined: ClassVar[bool] = True

    @property
    def windows(self) -> tuple[Window, Window]:
        module = self.module
        ends: Sequence[int | None] = (None, None)
        if module.padding == "valid":
            begins: Sequence[int] = (0, 0)
        elif module.padding == "same":
            totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            begins = [total // 2 for total in totals]
            ends = [total - begin for total, begin in zip(totals, begins, strict=True)]
        else:
            begins = [int(p) for p in module.padding]
        rows, cols = (
            Window(
                kernel=module.kernel_size[axis],
                stride=module.stride[axis],
                padding=begins[axis],
                dilation=module.dilation[axis],
                end_padding=ends[axis],
            )
            for axis in (0, 1)
        )
        return rows, cols

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        return {"weight": self.module.weight, "bias": self.module.bias}

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        module = self.module
        output = F.conv2d(
            inputs[0],
            step.required(self, "weight"),
            step.optional(self, "bias"),
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )
        return F.relu_(output) if self.activation == "relu" else output

    def _call(self, tensors: Sequence[Tensor | None], geometry: CallGeometry, output: Tensor | None) -> Tensor:
        x, weight, bias = tensors
        assert x is not None and weight is not None
        return ops.patch_conv2d(
            x,
            weight,
            bias,
            stride=self.module.stride,
            padding=geometry.padding,
            dilation=self.module.dilation,
            groups=self.module.groups,
            in_rows=geometry.in_rows,
            in_cols=geometry.in_cols,
            out_rows=geometry.out_rows,
            out_cols=geometry.out_cols,
            activation=self.activation,
            output=output,
        )

    def differentiable(self, step: Step, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return (
            step.cast(inputs[0]),
            step.cast_parameter(self, "weight"),
            step.cast_parameter(self, "bias"),
        )

    def run(self, step: Step, inputs: Sequence[Tensor], geometry: CallGeometry) -> Tensor:
        return self._call(self.differentiable(step, inputs), geometry, None)

    def write(self, tensors: Sequence[Tensor | None], geometry: CallGeometry, output: Tensor) -> tuple[Tensor, ...]:
        self._call(tensors, geometry, output)
        return ()

    @property
    def saved_for_gradients(self) -> tuple[bool, ...]:
        return (True, True, False)

    @property
    def reads_output(self) -> bool:
        return self.activation == "relu"

    def output_like(self, step: Step, inputs: Sequence[Tensor]) -> tuple[int, torch.dtype]:
        weight = step.cast_parameter(self, "weight")
        assert weight is not None
        return weight.shape[0], weight.dtype

    def gradients(
        self,
        grad_output: Tensor,
        saved: SavedForGradients,
        geometry: CallGeometry,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        if saved.output is not None:
            grad_output = _relu_mask(grad_output, saved.output)
        window: dict[str, Any] = {
            "stride": self.module.stride,
            "padding": geometry.padding,
            "dilation": self.module.dilation,
            "groups": self.module.groups,
            "in_rows": geometry.in_rows,
            "in_cols": geometry.in_cols,
            "out_rows": geometry.out_rows,
            "out_cols": geometry.out_cols,
        }
        return (
            ops.patch_conv2d_input_grad(grad_output, saved.tensor(1), saved.shape(0), **window) if needs[0] else None,
            ops.patch_conv2d_weight_grad(grad_output, saved.tensor(0), saved.shape(1), **window) if needs[1] else None,
            grad_output.sum((0, 2, 3)) if needs[2] else None,
        )


@dataclass(frozen=True)
class MaxPool(Operation):
    """``nn.MaxPool2d`` or ``F.max_pool2d``; keeps one byte per output for the backward pass."""

    rows: Window = field(kw_only=True)
    cols: Window = field(kw_only=True)

    writes_joined: ClassVar[bool] = True

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.rows, self.cols

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        rows, cols = self.rows, self.cols
        return F.max_pool2d(
            inputs[0],
            (rows.kernel, cols.kernel),
            (rows.stride, cols.stride),
            (rows.padding, cols.padding),
            (rows.dilation, cols.dilation),
            rows.ceil_mode,
        )

    def _window(self, geometry: CallGeometry) -> dict[str, Any]:
        return {
            "kernel_size": (self.rows.kernel, self.cols.kernel),
            "stride": (self.rows.stride, self.cols.stride),
            "padding": geometry.padding,
            "dilation": (self.rows.dilation, self.cols.dilation),
            "in_rows": geometry.in_rows,
            "in_cols": geometry.in_cols,
            "out_rows": geometry.out_rows,
            "out_cols": geometry.out_cols,
        }

    def run(self, step: Step, inputs: Sequence[Tensor], geometry: CallGeometry) -> Tensor:
        return ops.patch_max_pool2d(inputs[0], **self._window(geometry))[0]

    def write(self, tensors: Sequence[Tensor | None], geometry: CallGeometry, output: Tensor) -> tuple[Tensor, ...]:
        assert tensors[0] is not None
        offsets = torch.empty_like(output, dtype=torch.uint8)
        ops.patch_max_pool2d(tensors[0], **self._window(geometry), output=(output, offsets))
        return (offsets,)

    @property
    def saved_for_gradients(self) -> tuple[bool, ...]:
        return (False,)

    def gradients(
        self,
        grad_output: Tensor,
        saved: SavedForGradients,
        geometry: CallGeometry,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        return (ops.patch_max_pool2d_backward(grad_output, saved.extra[0], saved.shape(0), **self._window(geometry)),)


@dataclass(frozen=True)
class AvgPool(Operation):
    """``nn.AvgPool2d`` or ``F.avg_pool2d``."""

    rows: Window = field(kw_only=True)
    cols: Window = field(kw_only=True)
    count_include_pad: bool = True
    divisor_override: int | None = None

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.rows, self.cols

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        rows, cols = self.rows, self.cols
        return F.avg_pool2d(
            inputs[0],
            (rows.kernel, cols.kernel),
            (rows.stride, cols.stride),
            (rows.padding, cols.padding),
            rows.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def run(self, step: Step, inputs: Sequence[Tensor], geometry: CallGeometry) -> Tensor:
        divisor = self.divisor_override
        counts: tuple[list[int], list[int]] | None = None
        if self.count_include_pad and divisor is None:
            # A patch's own call cannot know which padding lies inside the whole image's, so the
            # divisor is counted here, in the whole image's positions.
            counts = (
                self._counts(self.rows, geometry.padding[0], geometry.out_rows, geometry.counted[0]),
                self._counts(self.cols, geometry.padding[1], geometry.out_cols, geometry.counted[1]),
            )
            full = min(counts[0]) == self.rows.kernel and min(counts[1]) == self.cols.kernel
            divisor = self.rows.kernel * self.cols.kernel if full else 1
            counts = None if full else counts
        output = ops.patch_avg_pool2d(
            inputs[0],
            kernel_size=(self.rows.kernel, self.cols.kernel),
            stride=(self.rows.stride, self.cols.stride),
            padding=geometry.padding,
            count_include_pad=self.count_include_pad,
            divisor_override=divisor,
            in_rows=geometry.in_rows,
            in_cols=geometry.in_cols,
            out_rows=geometry.out_rows,
            out_cols=geometry.out_cols,
        )
        if counts is not None:
            by_row, by_col = (torch.tensor(axis, dtype=output.dtype, device=output.device) for axis in counts)
            output = output / (by_row[:, None] * by_col)
        return output

    @staticmethod
    def _counts(window: Window, padding: int, bounds: Bounds, counted: Span) -> list[int]:
        begins = (o * window.stride - padding for o in range(bounds[-1]))
        return [min(b + window.kernel, counted[1]) - max(b, counted[0]) for b in begins]


@dataclass(frozen=True)
class BatchNorm(Operation):
    """``nn.BatchNorm2d``, with the ReLU that follows it where nothing else reads it in between."""

    module: nn.BatchNorm2d = field(kw_only=True)
    activation: Activation = "none"

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        return {"weight": self.module.weight, "bias": self.module.bias}

    def _uses_running(self, step: Step) -> bool:
        tracked = self.module.running_mean is not None
        return tracked and (step.norm == "frozen" or not self.module.training)

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        module = self.module
        if step.first_execution and not (module.training and self._uses_running(step)):
            output = module(inputs[0])
        else:
            running = self._uses_running(step)
            output = F.batch_norm(
                inputs[0],
                module.running_mean if running else None,
                module.running_var if running else None,
                step.optional(self, "weight"),
                step.optional(self, "bias"),
                not running,
                0.0,
                module.eps,
            )
        return F.relu_(output) if self.activation == "relu" else output

    def run(self, step: Step, inputs: Sequence[Tensor], geometry: CallGeometry) -> Tensor:
        x = inputs[0]
        weight, bias = step.optional(self, "weight"), step.optional(self, "bias")
        if self._uses_running(step):
            mean, invstd = step.running(self)
            return ops.patch_batch_norm_apply(x, mean, invstd, weight, bias, activation=self.activation)
        rows, cols = geometry.out_rows, geometry.out_cols
        if step.norm != "patch":
            rows, cols = (0, rows[-1]), (0, cols[-1])
        smallest = x.shape[0] * _smallest(rows) * _smallest(cols)
        if smallest == 1:
            raise ValueError(
                f"{self.label}: batch norm in training needs more than 1 value per channel and "
                f"patch, got input size {list(x.shape)} in {len(rows) - 1}×{len(cols) - 1} "
                f"patches; use a larger batch, fewer patches, norm='image' or norm='frozen'"
            )
        result = ops.patch_batch_norm(
            x, weight, bias, rows=rows, cols=cols, eps=self.module.eps, activation=self.activation
        )
        if step.first_execution and self.module.training and self.module.track_running_stats:
            if geometry.owned is None:
                step.collect(self, x.shape[0], rows, cols, result.mean, result.m2)
            else:
                (top, bottom), (left, right) = geometry.owned
                rows, cols = (0, bottom - top), (0, right - left)
                with torch.no_grad():
                    mean, m2 = ops.patch_batch_norm_stats(x[:, :, top:bottom, left:right], rows=rows, cols=cols)
                step.collect(self, x.shape[0], rows, cols, mean, m2)
        return result.output


def _smallest(bounds: Bounds) -> int:
    return min(right - left for left, right in itertools.pairwise(bounds))


#: Functions that write their first argument, and what to call where it must be kept.
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
}
IN_PLACE = {operator.iadd, "add_"}


@dataclass(frozen=True)
class Pointwise(Operation):
    """An element-wise operation of one or more values, or a concatenation of channels."""

    node: fx.Node = field(kw_only=True)
    module: nn.Module | None = None
    #: "relu" and "add" may write their first input where that is no longer needed.
    kind: Literal["relu", "add", "other"] = "other"
    reuse_input: bool = False

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        return dict(self.module.named_parameters()) if self.module is not None else {}

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        if self.kind == "relu":
            return F.relu_(inputs[0]) if self.reuse_input else F.relu(inputs[0])
        if self.kind == "add":
            one, other = inputs
            if self.reuse_input and one.dtype == other.dtype:
                return one.add_(other)
            return (one + other).to(one.dtype) if self.node.target in IN_PLACE else one + other
        values = dict(zip(self.inputs, inputs, strict=True))

        def value(node: fx.Node) -> Tensor:
            return values[node.name]

        args = fx.node.map_arg(self.node.args, value)
        kwargs: dict[str, Any] = dict(fx.node.map_arg(self.node.kwargs, value))
        result: Tensor
        if self.module is not None:
            parameters = {name: step.required(self, name) for name in self.parameters}
            if parameters:
                result = torch.func.functional_call(self.module, parameters, args, kwargs)
            else:
                result = self.module(*args, **kwargs)
        elif self.node.op == "call_method":
            name = str(self.node.target).removesuffix("_")
            result = getattr(args[0], name)(*args[1:], **kwargs)
        else:
            if "inplace" in kwargs:
                kwargs["inplace"] = False
            function: Callable[..., Tensor] = OUT_OF_PLACE.get(self.node.target, self.node.target)
            result = function(*args, **kwargs)
        return result


@dataclass(frozen=True)
class Dropout(Operation):
    """Dropout of elements, of channels (``nn.Dropout2d``) or of samples (``StochasticDepth``).

    Channels and samples draw once per image and step, as unsplit, and share the draw among the
    patches; elements draw per patch: the same distribution from another stream.
    """

    module: nn.Module = field(kw_only=True)
    probability: float
    noise: NoiseKind

    @property
    def draws_per_patch(self) -> bool:
        return self.noise == "element" and self.module.training and self.probability > 0

    def whole(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        if not self.module.training or self.probability == 0:
            return inputs[0]
        if self.noise == "element":
            return F.dropout(inputs[0], self.probability, True)
        noise = step.noise(self.name, lambda: draw_noise(inputs[0], self.probability, self.noise))
        return inputs[0] * noise
