"""The options of ``split_``: checked once, JSON-able, the same for every module that reads them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from splitkern.geometry import Bounds, check_wiggle
from splitkern.split.step import Norm
from splitkern.split.trace import Extent

Boundary = Literal["zero", "stochastic", "halo"]
Order = Literal["patch", "layer"]
Evaluation = Literal["unsplit", "split"]
#: One axis of the grid: a number of patches, or their boundaries at the join.
Cut = int | Bounds


@dataclass(frozen=True)
class Options:
    """See :func:`splitkern.split_`."""

    grid: tuple[Cut, Cut]
    until: str | None
    depth: float | None
    boundary: Boundary
    wiggle: float
    norm: Norm | None
    order: Order
    recompute: bool
    evaluation: Evaluation

    @property
    def extent(self) -> Extent:
        """How far the region reaches."""
        return Extent(self.until, self.depth)

    def parts(self) -> tuple[int, int]:
        """Patches along rows and columns."""
        rows, cols = (cut if isinstance(cut, int) else len(cut) - 1 for cut in self.grid)
        return rows, cols

    def to_config(self) -> dict[str, Any]:
        """Keyword arguments for ``split_``, of JSON types only."""
        config = asdict(self)
        config["grid"] = [cut if isinstance(cut, int) else list(cut) for cut in self.grid]
        return config


def _one_of(name: str, value: object, allowed: object) -> None:
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _cut(axis: str, value: Any) -> Cut:
    if isinstance(value, bool) or not isinstance(value, int | Sequence) or isinstance(value, str):
        raise TypeError(f"grid: {axis} must be a number of patches or a list of boundaries, got {value!r}")
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"grid: {axis} must be at least 1, got {value}")
        return value
    bounds = tuple(int(v) for v in value)
    increasing = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or not increasing:
        raise ValueError(f"grid: boundaries of {axis} must begin at 0 and increase strictly, got {list(value)}")
    return bounds


def make_options(
    *,
    grid: Any,
    until: str | None,
    depth: float | None,
    boundary: str,
    wiggle: float,
    norm: str | None,
    order: str,
    recompute: bool,
    evaluation: str,
) -> Options:
    """Check every option and their combination; see :func:`splitkern.split_` for both.

    Raises:
        ValueError, TypeError: naming the option, what came and what is allowed.
    """
    if isinstance(grid, str) or not isinstance(grid, Sequence) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (rows, columns), got {grid!r}")
    if (until is None) == (depth is None):
        raise ValueError(f"give either until or depth, got until={until!r} and depth={depth!r}")
    if until is not None and (not isinstance(until, str) or not until):
        raise ValueError(f"until must be the name of a module, got {until!r}")
    if depth is not None and not 0.0 < depth <= 1.0:
        raise ValueError(f"depth must be above 0 and at most 1, got {depth!r}")
    _one_of("boundary", boundary, Boundary)
    _one_of("order", order, Order)
    _one_of("evaluation", evaluation, Evaluation)
    if norm is not None:
        _one_of("norm", norm, Norm)
    check_wiggle(wiggle)
    options = Options(
        grid=(_cut("rows", grid[0]), _cut("columns", grid[1])),
        until=until,
        depth=None if depth is None else float(depth),
        boundary=boundary,  # type: ignore[arg-type]
        wiggle=float(wiggle),
        norm=norm,  # type: ignore[arg-type]
        order=order,  # type: ignore[arg-type]
        recompute=bool(recompute),
        evaluation=evaluation,  # type: ignore[arg-type]
    )
    if options.recompute and order == "layer":
        raise ValueError(
            "recompute=True with order='layer' is not possible: recomputation goes patch by "
            "patch; use order='patch', or recompute=False"
        )
    if boundary == "stochastic" and not all(isinstance(cut, int) for cut in options.grid):
        raise ValueError(
            f"boundary='stochastic' draws the boundaries itself: grid must be two numbers of "
            f"patches, got {grid!r}; use boundary='zero' for boundaries of your own"
        )
    return options


def check_norm(options: Options, first_norm: str | None) -> None:
    """Check ``norm`` against a region whose first batch norm is ``first_norm`` (None: no batch
    norm, then every ``norm`` is fine).

    Raises:
        ValueError: naming the combinations that would work.
    """
    if first_norm is None:
        return
    norm, order = options.norm, options.order
    if norm is None:
        raise ValueError(
            f"norm must be given, because the region has batch norm (first: {first_norm}): 'patch' "
            f"(each patch by its own statistics), 'image' (all patches, order='layer' only) or "
            f"'frozen' (running statistics)"
        )
    if norm == "image" and order == "patch":
        raise ValueError(
            f"norm='image' with order='patch' is not possible: {first_norm} would need every patch "
            f"at once; use order='layer', or norm='patch', or norm='frozen'"
        )
    if options.boundary == "halo" and order == "layer" and norm == "patch":
        raise ValueError(
            "norm='patch' with boundary='halo' and order='layer' is not possible: that is the "
            "unsplit network, which has no patches; use norm='image' or 'frozen', or order='patch'"
        )
