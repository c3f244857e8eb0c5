"""The transformation: gives one model instance a forward that runs its early layers in patches.

Nothing of the model is rebuilt: class, parameters, buffers and ``state_dict`` keys stay; the
instance's ``forward`` is replaced, and the class's own stays what evaluation runs.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from splitkern import geometry
from splitkern.geometry import Bounds
from splitkern.split import execute, operator
from splitkern.split.layout import Layout, axis_extents, axis_layout
from splitkern.split.operations import BatchNorm
from splitkern.split.options import Options, check_norm, make_options
from splitkern.split.trace import Program, build

Model = TypeVar("Model", bound=nn.Module)

#: Layouts kept for different input sizes; a drawn layout is used once and not kept.
_LAYOUTS_KEPT = 16
#: Draws of stochastic boundaries before a cut that leaves a patch empty is given up.
_DRAWS = 32


class SplitForward:
    """The ``forward`` of a split model.

    Copies and pickles with its model; programs and layouts are derived again where needed.
    Not thread-safe: one forward pass of a model at a time.
    """

    def __init__(self, model: nn.Module, options: Options, constants: dict[str, Any]) -> None:
        self.model = model
        self.options = options
        self.constants = constants
        self.enabled = True
        #: Whether the model returns one tensor; None where no program has been built yet.
        self.returns_tensor: bool | None = None
        self.name = operator.register(self)
        #: Gives the layout instead of a draw, while a step is captured: see :meth:`choosing`.
        self.chosen: Callable[[Program, tuple[int, int]], Layout] | None = None
        self._programs: dict[bool, Program] = {}
        self._layouts: OrderedDict[Any, Layout] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "options": self.options,
            "constants": self.constants,
            "enabled": self.enabled,
            "returns_tensor": self.returns_tensor,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.returns_tensor = None
        self.__dict__.update(state)
        self.name = operator.register(self)
        self._programs, self._layouts, self.chosen = {}, OrderedDict(), None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and self._is_split():
            if self._is_one_operator(args, kwargs):
                return operator.split_forward(self.name, args, operator.state_of(self.model))
            if operator.is_for_planner:
                args = tuple(operator.mark_untraced(self.name, value) for value in args)
                kwargs = {key: operator.mark_untraced(self.name, value) for key, value in kwargs.items()}
        return self.run(*args, **kwargs)

    def _is_split(self) -> bool:
        return self.enabled and (self.model.training or self.options.evaluation == "split")

    def _is_one_operator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether Dynamo's graph can hold this forward pass as one operator; Dynamo guards all that is read here.

        Not where each step draws boundaries; where backward recomputes, only for the planner, which decides that anew:
        other graphs would lose it.
        """
        options = self.options
        is_training = [module.training for module in self.model.modules()]  # the graph holds only where all stay
        return (
            len(is_training) > 0
            and self.returns_tensor is True
            and (not options.recompute or operator.is_for_planner)
            and options.boundary != "stochastic"
            and not kwargs
            and all(isinstance(value, Tensor) for value in args)
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass: region in patches, then the rest."""
        model = self.model
        if not self._is_split():
            return type(model).forward(model, *args, **kwargs)
        program = self.program(model.training)
        values = self._bind(program, args, kwargs)
        images = [values[name] for name in program.region.inputs]
        _check_image(dict(program.arguments)[program.region.inputs[0]], images[0])
        outputs = self._run_region(program, images)
        values.update(zip(program.region.outputs, outputs, strict=True))
        del outputs, images
        return program.run_tail(model, values)

    def program(self, training: bool) -> Program:
        """The traced model for a training flag, traced again where a module was replaced."""
        program = self._programs.get(training)
        if program is None or not program.is_current(self.model):
            program = build(self.model, self.constants, self.options.extent, training)
            check_norm(self.options, first_batch_norm(program))
            check_no_hooks(program)
            self._programs[training] = program
            self.returns_tensor = isinstance(program.tail[-1].args[0], fx.Node)
            self._layouts.clear()
        return program

    def _bind(self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(type(self.model).forward).bind(self.model, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        for name, value in self.constants.items():
            if given.pop(name, value) is not value:
                raise ValueError(
                    f"{name} must stay at {value!r}, with which the model was split, got {bound.arguments[name]!r}"
                )
        wanted = [argument for _, argument in program.arguments]
        if sorted(given) != sorted(wanted):
            raise TypeError(f"a split model takes the arguments {wanted}, got {list(given)}")
        return {name: given[argument] for name, argument in program.arguments}

    def _run_region(self, program: Program, images: Sequence[Tensor]) -> list[Tensor]:
        options, region = self.options, program.region
        layout = self.layout(program, (int(images[0].shape[2]), int(images[0].shape[3])))
        single = len(layout.patches) == 1
        if options.recompute and torch.is_grad_enabled():
            return execute.run_patches_recomputed(region, layout, options.norm, images)
        if single or (options.boundary == "halo" and options.order == "layer"):
            return execute.run_whole(region, options.norm, images)
        if options.order == "layer":
            return execute.run_layers(region, layout, options.norm, images)
        return execute.run_patches(region, layout, options.norm, images)

    def layout(self, program: Program, extents: tuple[int, int]) -> Layout:
        """The cut for an input size; drawn afresh for stochastic boundaries in training."""
        key = (id(program), extents)
        if self.is_drawing:
            return self.draw(program, extents) if self.chosen is None else self.chosen(program, extents)
        if key not in self._layouts:
            self._layouts[key] = make_layout(program, extents, self.options)
        self._layouts.move_to_end(key)
        if len(self._layouts) > _LAYOUTS_KEPT:
            self._layouts.popitem(last=False)
        return self._layouts[key]

    @property
    def is_drawing(self) -> bool:
        """Whether a forward pass draws its boundaries now."""
        return self.enabled and self.options.boundary == "stochastic" and self.model.training

    def draw(self, program: Program, extents: tuple[int, int], generator: torch.Generator | None = None) -> Layout:
        """A cut with boundaries drawn as a training forward pass draws them, before anything else that it draws.

        Args:
            program: of :meth:`program`.
            extents: height and width of the images.
            generator: source of randomness; PyTorch's default CPU generator where None.

        Raises:
            ValueError: where no draw fits the network.
        """
        refusal: ValueError | None = None
        for _ in range(_DRAWS):
            try:
                return make_layout(program, extents, self.options, draw=True, generator=generator)
            except ValueError as error:
                refusal = error
        raise ValueError(
            f"none of {_DRAWS} draws of stochastic boundaries fits; use fewer patches or a smaller wiggle ({refusal})"
        )

    @contextmanager
    def choosing(self, choose: Callable[[Program, tuple[int, int]], Layout]) -> Iterator[None]:
        """Inside the block nothing is drawn: `choose` gives the layout for a program and an input size."""
        self.chosen = choose
        try:
            yield
        finally:
            self.chosen = None


def first_batch_norm(program: Program) -> str | None:
    """Path of the region's first batch norm."""
    for operation in program.region.operations:
        if isinstance(operation, BatchNorm):
            return operation.label
    return None


def check_no_hooks(program: Program) -> None:
    """Refuse modules whose hooks patches would bypass.

    Raises:
        ValueError: naming the module.
    """
    for path, module in program.modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(
                f"module {path!r} has forward or backward hooks, which patches would bypass; "
                f"remove them or join before it"
            )


def _check_image(name: str, image: object) -> None:
    if not isinstance(image, Tensor) or image.dim() != 4:
        came = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name} must be a batch of images [N, C, H, W], got {came}")


def make_layout(
    program: Program,
    extents: tuple[int, int],
    options: Options,
    *,
    draw: bool = False,
    generator: torch.Generator | None = None,
) -> Layout:
    """Cut a program's region for one input size.

    Args:
        program: of a split model.
        extents: height and width of the images.
        options: of the split.
        draw: draw the boundaries at the joins instead of spacing them evenly.
        generator: what they are drawn from; PyTorch's default CPU generator where None.

    Raises:
        ValueError: where the grid does not fit the join or the boundaries cannot be carried back.
    """
    region = program.region
    read = {name for operation in region.operations for name in operation.inputs}
    axes = []
    for axis in (0, 1):
        sizes = axis_extents(region.operations, axis, dict.fromkeys(region.inputs, extents))
        joins: dict[str, Bounds] = {}
        shares: list[float] | None = None
        for name in region.outputs:
            if name in read:
                continue
            if shares is None:
                joins[name] = _join_bounds(options, axis, name, sizes[name], draw, generator)
                shares = [bound / sizes[name] for bound in joins[name]]
            else:
                joins[name] = tuple(round(share * sizes[name]) for share in shares)
        axes.append(axis_layout(region.operations, axis, sizes, joins, halo=options.boundary == "halo"))
    return Layout(region.operations, axes[0], axes[1], options.boundary == "halo")


def _join_bounds(
    options: Options, axis: int, name: str, extent: int, draw: bool, generator: torch.Generator | None
) -> Bounds:
    cut = options.grid[axis]
    what = ("height", "width")[axis]
    if not isinstance(cut, int):
        geometry.check_bounds("grid", ("rows", "columns")[axis], cut, extent, f"join's {what}")
        return cut
    if cut > extent:
        raise ValueError(
            f"grid: {('rows', 'columns')[axis]} must be at most the {what} {extent} of the join ({name}), got {cut}"
        )
    if draw:
        return geometry.draw_bounds(extent, cut, options.wiggle, generator)
    return geometry.even_bounds(extent, cut)


def split_forward_of(model: nn.Module) -> SplitForward | None:
    """The split forward of a model, or of the model that a wrapper such as DDP holds."""
    for candidate in (model, model._modules.get("module")):
        forward = candidate.__dict__.get("forward") if candidate is not None else None
        if isinstance(forward, SplitForward):
            return forward
    return None


def _require_not_compiled(model: nn.Module) -> None:
    if hasattr(model.__dict__.get("forward"), "replans"):
        raise ValueError(f"this {type(model).__name__} is compiled; call uncompile_ first")


def _require_split(model: nn.Module) -> SplitForward:
    forward = split_forward_of(model)
    if forward is None:
        _require_not_compiled(model)
        raise ValueError(f"this {type(model).__name__} is not split; split it with split_ first")
    return forward


def prepare(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], options: Options
) -> tuple[SplitForward, Program, Layout]:
    """Everything that can fail about a split, on a model that stays as it is."""
    forward = make_forward(model, example_inputs, options)
    program = forward.program(True)
    if options.evaluation == "split":
        forward.program(False)
    argument = dict(program.arguments)[program.region.inputs[0]]
    image = bound_inputs(model, example_inputs)[argument]
    _check_image(argument, image)
    layout = make_layout(program, (int(image.shape[2]), int(image.shape[3])), options)
    return forward, program, layout


def make_forward(model: nn.Module, example_inputs: Tensor | Sequence[Any], options: Options) -> SplitForward:
    """A split forward that is not installed yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    existing = split_forward_of(model)
    if existing is not None:
        raise ValueError(
            f"this {type(model).__name__} is already split (grid={existing.options.grid}, "
            f"{existing.options.extent}); call unsplit_ first"
        )
    _require_not_compiled(model)
    if "forward" in model.__dict__:
        raise ValueError(
            f"this {type(model).__name__} has a forward of its own on the instance, which a split "
            f"would replace; remove it first"
        )
    given = bound_inputs(model, example_inputs)
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    constants = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in given and parameter.default is not inspect.Parameter.empty
    }
    return SplitForward(model, options, constants)


def bound_inputs(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> dict[str, Any]:
    """Example inputs by the name of the forward's argument."""
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence):
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of the model's arguments, got {type(example_inputs).__name__}"
        )
    bound = inspect.signature(type(model).forward).bind(model, *example_inputs)
    return dict(list(bound.arguments.items())[1:])


def split_(
    model: Model,
    example_inputs: Tensor | Sequence[Any],
    *,
    grid: Sequence[int | Sequence[int]],
    until: str | None = None,
    depth: float | None = None,
    boundary: str = "zero",
    wiggle: float = 0.2,
    norm: str | None = None,
    order: str = "patch",
    recompute: bool = False,
    evaluation: str = "unsplit",
) -> Model:
    """Make a CNN a Split-CNN, in place: its early layers run in independent image patches.

    Same parameters, same ``state_dict``, same training loop (Jin and Hong, ASPLOS 2019).
    ``order="patch"`` alone does not lower the memory peak, because autograd keeps every patch's
    activations; ``recompute=True`` does.

    Args:
        model: any traceable module; its class, attributes and parameters stay.
        example_inputs: an image batch [N, C, H, W], or the tuple of the model's arguments; only
            shapes matter. Other sizes work later, and are cut anew.
        grid: patches (rows, columns) at the join; or, per axis, the boundaries themselves, for
            example ``((0, 10, 28), 2)``.
        until: name of the last module inside the region, as in ``named_modules``.
        depth: instead of ``until``: the share of convolutions and poolings, rounded down.
        boundary: "zero" (what lies beyond a patch counts as padding), "stochastic" (the same, with
            boundaries drawn afresh each training step), "halo" (exact: patches overlap and
            recompute their borders).
        wiggle: how far stochastic boundaries move, as a share of a patch: at least 0, below 0.5.
        norm: how batch norm sees patches: "patch" (own statistics), "image" (all patches, only with
            ``order="layer"``), "frozen" (running statistics). Required where the region has one.
        order: "patch" (one patch through all layers, then the next) or "layer" (all patches of a
            layer in one call).
        recompute: keep no activations inside the region and recompute patch by patch in the
            backward pass; only with ``order="patch"``.
        evaluation: what ``model.eval()`` runs: the "unsplit" network, or the "split" one.

    Returns:
        The model that was given.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed; the model is
            left as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
        >>> images = torch.randn(2, 3, 16, 16)
        >>> model = split_(model, images, grid=(2, 2), until="1")
        >>> model(images).shape
        torch.Size([2, 8, 16, 16])
    """
    options = make_options(
        grid=grid,
        until=until,
        depth=depth,
        boundary=boundary,
        wiggle=wiggle,
        norm=norm,
        order=order,
        recompute=recompute,
        evaluation=evaluation,
    )
    forward, _, _ = prepare(model, example_inputs, options)
    # The one change to the model, after everything that can fail. nn.Module would register only
    # modules and parameters specially, and this is neither.
    model.__dict__["forward"] = forward
    return model


def unsplit_(model: Model) -> Model:
    """Undo :func:`split_`, in place: the model is bit for bit what it was, weights aside.

    Raises:
        ValueError: if the model is not split.
    """
    forward = _require_split(model)
    del forward.model.__dict__["forward"]
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run a split model unsplit inside a ``with`` block: same weights, also in training mode.

    Raises:
        ValueError: if the model is not split.
    """
    forward = _require_split(model)
    before, forward.enabled = forward.enabled, False
    try:
        yield
    finally:
        forward.enabled = before


def config_of(model: nn.Module) -> dict[str, Any]:
    """The options a model was split with, of JSON types: keep them next to the checkpoint.

    ``split_(model, images, **config)`` splits the same way again.

    Raises:
        ValueError: if the model is not split.
    """
    return _require_split(model).options.to_config()
