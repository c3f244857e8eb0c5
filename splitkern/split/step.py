"""What one execution of the split region shares between its patches: parameters, autocast, noise,
running statistics. One object per forward pass; recomputation makes its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from splitkern.geometry import Bounds
from splitkern.split import labels

if TYPE_CHECKING:
    from splitkern.split.operations import BatchNorm, Operation

Norm = Literal["patch", "image", "frozen"]


def parameters_of(operations: Iterable[Operation]) -> dict[str, Tensor]:
    """Every tensor that the operations' modules hold, keyed ``operation.parameter``."""
    return {
        f"{operation.name}.{name}": tensor
        for operation in operations
        for name, tensor in operation.parameters.items()
        if tensor is not None
    }


class Step:
    """Shared state of one execution.

    Args:
        parameters: from :func:`parameters_of`, or stand-ins under the same keys.
        norm: how batch norm sees patches; None where the region has none.
        device_type: device of the images, which decides the autocast state.
        first_execution: False under recomputation: no buffer is touched, no module's own forward
            is called that would touch one.
        noise: draws that a recomputation shares with the first execution.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        norm: Norm | None,
        device_type: str,
        *,
        first_execution: bool = True,
        noise: dict[str, Tensor] | None = None,
    ) -> None:
        self.norm = norm
        self.first_execution = first_execution
        self.shared_noise: dict[str, Tensor] = {} if noise is None else noise
        self._parameters = parameters
        self._cast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        self._cast_parameters: dict[str, Tensor] = {}
        self._running: dict[str, tuple[Tensor, Tensor]] = {}
        self._collected: dict[str, tuple[BatchNorm, list[_Statistics]]] = {}

    def optional(self, operation: Operation, name: str) -> Tensor | None:
        """A parameter of the operation's module, None where the module has none."""
        return self._parameters.get(f"{operation.name}.{name}")

    def required(self, operation: Operation, name: str) -> Tensor:
        """A parameter that the operation's module always has."""
        return self._parameters[f"{operation.name}.{name}"]

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor as autocast hands it to a convolution."""
        if self._cast_dtype is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(self._cast_dtype)

    def cast_parameter(self, operation: Operation, name: str) -> Tensor | None:
        """:meth:`optional` under :meth:`cast`, cast once for all patches."""
        key = f"{operation.name}.{name}"
        if key not in self._parameters:
            return None
        if key not in self._cast_parameters:
            self._cast_parameters[key] = self.cast(self._parameters[key])
        return self._cast_parameters[key]

    def noise(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """The noise of operation ``name``, drawn by the first patch that asks."""
        if name not in self.shared_noise:
            self.shared_noise[name] = draw()
        return self.shared_noise[name]

    def running(self, operation: BatchNorm) -> tuple[Tensor, Tensor]:
        """Running mean and inverse standard deviation [1, C] of a batch norm, as constants."""
        if operation.name not in self._running:
            module = operation.module
            assert module.running_mean is not None and module.running_var is not None
            with torch.no_grad():
                invstd = (module.running_var + module.eps).rsqrt()
            self._running[operation.name] = (module.running_mean[None].clone(), invstd[None])
        return self._running[operation.name]

    def collect(
        self,
        operation: BatchNorm,
        batch: int,
        rows: Bounds,
        cols: Bounds,
        mean: Tensor,
        m2: Tensor,
    ) -> None:
        """Note the statistics [P, C] of patches whose owned outputs have these boundaries."""
        counts = [
            batch * (bottom - top) * (right - left)
            for top, bottom in itertools.pairwise(rows)
            for left, right in itertools.pairwise(cols)
        ]
        entry = self._collected.setdefault(operation.name, (operation, []))
        entry[1].append((counts, mean.detach(), m2.detach()))

    @torch.no_grad()
    def update_running_buffers(self) -> None:
        """One update of every batch norm's running buffers from all collected patches.

        Pools by Chan, Golub and LeVeque (1979): ``n = Σn_p``, ``mean = Σn_p·m_p/n``,
        ``M2 = Σ(M2_p + n_p(m_p - mean)²)``, ``var = M2/(n-1)``; then PyTorch's momentum step.
        """
        for operation, statistics in self._collected.values():
            labels.tell(operation.label, None)
            _update(operation, statistics)
        labels.tell(None, None)
        self._collected.clear()


_Statistics = tuple[list[int], Tensor, Tensor]


def _update(operation: BatchNorm, statistics: list[_Statistics]) -> None:
    module = operation.module
    if module.running_mean is None or module.running_var is None:
        return
    means = torch.cat([mean for _, mean, _ in statistics]).double()
    m2s = torch.cat([m2 for _, _, m2 in statistics]).double()
    counts = [count for patches, _, _ in statistics for count in patches]
    weights = torch.tensor(counts, dtype=torch.float64, device=means.device)[:, None]
    total = sum(counts)
    if total == 0:
        return
    mean = (weights * means).sum(0) / total
    m2 = (m2s + weights * (means - mean).square()).sum(0)
    variance = m2 / (total - 1)
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    momentum = module.momentum
    if momentum is None:
        momentum = 1.0 / float(module.num_batches_tracked or 1)
    for buffer, value in ((module.running_mean, mean), (module.running_var, variance)):
        buffer.copy_(buffer.double() * (1 - momentum) + value * momentum)
