"""What `splitkern bench conv|pool` measures: the window layers of VGG-19 and ResNet-50, fixed before any measurement.

Every distinct layer of both networks at 224x224 is here, none is left out. "Inside the region" means: before the
join that `splitkern train` uses, which for VGG-19 is the third pooling (half of its 16 convolutions) and for
ResNet-50 the end of layer2. The layers inside are the core set: batch 32, grids 2x2 and 4x4. The full set is every
layer at batch 32 and 128 on grids 1x1, 2x2, 4x4 and the uneven 3x2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from splitkern.geometry import AxisNode, Bounds, Window, even_bounds, propagate

CONV_PASSES = ("forward", "input_grad", "weight_grad")
POOL_PASSES = ("forward", "backward")

CORE_GRIDS = ((2, 2), (4, 4))
FULL_GRIDS = ((1, 1), (2, 2), (4, 4), (3, 2))
CORE_BATCHES = (32,)
FULL_BATCHES = (32, 128)


@dataclass(frozen=True)
class ConvLayer:
    """One distinct square convolution without dilation and groups.

    Attributes:
        name: network and first module of this shape.
        channels, outputs: input and output channels.
        size: input rows and columns.
        count: how many of the network's convolutions have this shape.
        inside: whether it lies in the split region.
    """

    name: str
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int
    padding: int
    count: int
    inside: bool

    @property
    def window(self) -> Window:
        """The window of either axis."""
        return Window(self.kernel, self.stride, self.padding)

    @property
    def output_size(self) -> int:
        """Output rows and columns."""
        return self.window.output_extent(self.size)

    @property
    def passes(self) -> tuple[str, ...]:
        """What a training step computes: the images, which the first layer reads, need no gradient."""
        return CONV_PASSES if self.channels > 3 else ("forward", "weight_grad")

    def flop(self, batch: int) -> int:
        """Floating-point operations of each pass: 2·N·O·P·Q·C·R·S, a multiplication and an addition per term.

        N images, O output channels of P·Q positions, C input channels, R·S kernel. The terms that meet padding are
        counted, also those that a patch border turns into padding: the count of the unsplit layer, for all candidates.

        Example:
            >>> ConvLayer("example", 2, 3, 4, kernel=1, stride=1, padding=0, count=1, inside=True).flop(1)
            192
        """
        positions = self.output_size**2
        return 2 * batch * self.outputs * positions * self.channels * self.kernel**2

    def byte_count(self, batch: int, element_size: int, direction: str) -> int:
        """Least bytes that a pass moves: input, weight and output, each once (the gradients are as large).

        Where the stride exceeds the kernel, inputs between the windows need not be read; their gradient is written.

        Example:
            >>> layer = ConvLayer("example", 2, 3, 4, kernel=1, stride=1, padding=0, count=1, inside=True)
            >>> layer.byte_count(1, 2, "forward")
            172
        """
        read = self.size if self.kernel >= self.stride or direction == "input_grad" else self.output_size * self.kernel
        inputs = batch * self.channels * read**2
        outputs = batch * self.outputs * self.output_size**2
        return element_size * (inputs + outputs + self.outputs * self.channels * self.kernel**2)


@dataclass(frozen=True)
class PoolLayer:
    """One pooling or BatchNorm shape; `kind` is "max", "avg", "batch_norm" or "batch_norm_relu"."""

    name: str
    kind: str
    channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    inside: bool = True

    @property
    def window(self) -> Window:
        """The window of either axis; of BatchNorm, each position by itself."""
        return Window(self.kernel, self.stride, self.padding)

    @property
    def output_size(self) -> int:
        """Output rows and columns."""
        return self.window.output_extent(self.size)

    @property
    def passes(self) -> tuple[str, ...]:
        """What a training step computes."""
        return POOL_PASSES

    def byte_count(self, batch: int, element_size: int, direction: str) -> int:
        """Least bytes that a pass moves, each tensor once.

        Max pooling reads the input and writes values and one byte of offset each (backward: reads gradient and
        offsets, writes the input's gradient); average pooling the same without offsets. BatchNorm must read its input
        twice, for the statistics and to apply them, and write once; backward reads gradient and input twice each and
        writes once. A tensor that stays in the cache between its two reads makes a share above 1 possible.
        """
        inputs = batch * self.channels * self.size**2 * element_size
        outputs = batch * self.channels * self.output_size**2
        if self.kind == "max":
            return inputs + outputs * (element_size + 1)
        if self.kind == "avg":
            return inputs + outputs * element_size
        return inputs * (3 if direction == "forward" else 5)


def _vgg19() -> Iterator[ConvLayer]:
    shapes = [
        ("conv1_1", 3, 64, 224, 1, True),
        ("conv1_2", 64, 64, 224, 1, True),
        ("conv2_1", 64, 128, 112, 1, True),
        ("conv2_2", 128, 128, 112, 1, True),
        ("conv3_1", 128, 256, 56, 1, True),
        ("conv3_2", 256, 256, 56, 3, True),
        ("conv4_1", 256, 512, 28, 1, False),
        ("conv4_2", 512, 512, 28, 3, False),
        ("conv5_1", 512, 512, 14, 4, False),
    ]
    for name, channels, outputs, size, count, inside in shapes:
        yield ConvLayer(f"vgg19.{name}", channels, outputs, size, 3, 1, 1, count, inside)


def _resnet50() -> Iterator[ConvLayer]:
    yield ConvLayer("resnet50.conv1", 3, 64, 224, 7, 2, 3, 1, True)
    # The middle channels, the input's channels and size, and the blocks of each stage; the stride is the 3x3's.
    for stage, (middle, channels, size, blocks, stride) in enumerate(
        [(64, 64, 56, 3, 1), (128, 256, 56, 4, 2), (256, 512, 28, 6, 2), (512, 1024, 14, 3, 2)], start=1
    ):
        inside, after, outputs = stage <= 2, size // stride, 4 * middle
        block = f"resnet50.layer{stage}"
        shapes = [
            (f"{block}.0.conv1", channels, middle, size, 1, 1, 0, 1),
            (f"{block}.0.conv2", middle, middle, size, 3, stride, 1, 1),
            (f"{block}.0.conv3", middle, outputs, after, 1, 1, 0, blocks),
            (f"{block}.0.downsample", channels, outputs, size, 1, stride, 0, 1),
            (f"{block}.1.conv1", outputs, middle, after, 1, 1, 0, blocks - 1),
            (f"{block}.1.conv2", middle, middle, after, 3, 1, 1, blocks - 1),
        ]
        merged: dict[tuple[int, ...], ConvLayer] = {}
        for name, ins, outs, extent, kernel, step, padding, count in shapes:
            # In layer1 the projection has the shape of conv3, and no 3x3 has a stride: equal shapes are one layer.
            shape = (ins, outs, extent, kernel, step, padding)
            if shape in merged:
                merged[shape] = replace(merged[shape], count=merged[shape].count + count)
            else:
                merged[shape] = ConvLayer(name, ins, outs, extent, kernel, step, padding, count, inside)
        yield from merged.values()


CONV_LAYERS = (*_vgg19(), *_resnet50())

POOL_LAYERS = (
    PoolLayer("vgg19.pool1", "max", 64, 224, 2, 2),
    PoolLayer("vgg19.pool2", "max", 128, 112, 2, 2),
    PoolLayer("vgg19.pool3", "max", 256, 56, 2, 2),
    PoolLayer("vgg19.pool4", "max", 512, 28, 2, 2, inside=False),
    PoolLayer("vgg19.pool5", "max", 512, 14, 2, 2, inside=False),
    PoolLayer("resnet50.maxpool", "max", 64, 112, 3, 2, 1),
    # Neither network has an average pooling in its region; these are the two common kinds, at the size of layer2.
    PoolLayer("avg2x2", "avg", 256, 56, 2, 2),
    PoolLayer("avg3x3", "avg", 256, 56, 3, 2, 1),
    PoolLayer("resnet50.bn1", "batch_norm_relu", 64, 112),
    PoolLayer("resnet50.layer1.0.bn1", "batch_norm_relu", 64, 56),
    PoolLayer("resnet50.layer1.0.bn3", "batch_norm", 256, 56),
    PoolLayer("resnet50.layer2.0.bn1", "batch_norm_relu", 128, 56),
    PoolLayer("resnet50.layer2.0.bn2", "batch_norm_relu", 128, 28),
    PoolLayer("resnet50.layer2.0.bn3", "batch_norm", 512, 28),
    PoolLayer("resnet50.layer3.0.bn3", "batch_norm", 1024, 14, inside=False),
    PoolLayer("resnet50.layer4.0.bn3", "batch_norm", 2048, 7, inside=False),
)


@dataclass(frozen=True)
class Patches:
    """The patches of a square layer: input and output boundaries of rows and columns."""

    in_rows: Bounds
    in_cols: Bounds
    out_rows: Bounds
    out_cols: Bounds

    def lists(self) -> list[list[int]]:
        """As the operators take them."""
        return [list(bounds) for bounds in (self.in_rows, self.in_cols, self.out_rows, self.out_cols)]


def patches(window: Window, size: int, grid: Sequence[int]) -> Patches:
    """The patches of a layer whose output is cut as evenly as integers allow.

    Args:
        window: of both axes.
        size: input rows and columns.
        grid: patches in rows and columns.

    Raises:
        ValueError: where a patch would be empty.

    Example:
        >>> patches(Window(3, 2, 1), 8, (2, 1))
        Patches(in_rows=(0, 4, 8), in_cols=(0, 8), out_rows=(0, 2, 4), out_cols=(0, 4))
    """
    extents = {"input": size, "output": window.output_extent(size)}
    axes = []
    for parts in grid:
        joins = {"output": even_bounds(extents["output"], parts)}
        axes.append(propagate([AxisNode("output", ("input",), window)], extents, joins))
    rows, cols = axes
    return Patches(rows["input"], cols["input"], rows["output"], cols["output"])


@dataclass(frozen=True)
class Cell:
    """One row of a table: a layer in one pass, grid and batch size."""

    layer: ConvLayer | PoolLayer
    direction: str
    grid: tuple[int, int]
    batch: int

    @property
    def key(self) -> str:
        """Identifies the cell in a record."""
        return f"{self.layer.name} {self.direction} {self.grid[0]}x{self.grid[1]} batch {self.batch}"


def cells(
    layers: Sequence[ConvLayer | PoolLayer],
    *,
    full: bool = False,
    pattern: str = "*",
    passes: Sequence[str] | None = None,
    grids: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
) -> list[Cell]:
    """The cells to measure, the core set's first; a layer's cells of one batch size are neighbours.

    Args:
        layers: the list to take from.
        full: every layer, batch size and grid, instead of the core set.
        pattern: shell pattern of layer names; it picks from all layers, inside the region or not.
        passes, grids, batches: only these, instead of the set's.

    Raises:
        ValueError: if no layer has such a name, or no layer such a pass.
    """
    wanted_grids = grids or (FULL_GRIDS if full else CORE_GRIDS)
    wanted_batches = batches or (FULL_BATCHES if full else CORE_BATCHES)
    chosen = [layer for layer in layers if fnmatchcase(layer.name, pattern)]
    if pattern == "*" and not full:
        chosen = [layer for layer in chosen if layer.inside]
    if not chosen:
        raise ValueError(f"no layer matches {pattern!r}; there are {', '.join(layer.name for layer in layers)}")
    found = [
        Cell(layer, direction, grid, batch)
        for batch in wanted_batches
        for layer in chosen
        for grid in wanted_grids
        for direction in (layer.passes if passes is None else [name for name in layer.passes if name in passes])
        if max(grid) <= layer.output_size
    ]
    if not found:
        raise ValueError(f"none of these layers has a pass in {', '.join(passes or ())} on such a grid")

    def is_core(cell: Cell) -> bool:
        return cell.layer.inside and cell.grid in CORE_GRIDS and cell.batch in CORE_BATCHES

    return sorted(found, key=lambda cell: not is_core(cell))
