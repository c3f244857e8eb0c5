"""The ways to save memory in training that `splitkern bench training` compares, each as an ordinary user applies it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from splitkern.benchmarks.networks import CLASS_COUNT
from splitkern.memory.compile import compile, compiled_forward_of
from splitkern.memory.planned_step import CompiledPlan
from splitkern.memory.report import bytes_text
from splitkern.training.loop import MEMORY_FORMATS, PRECISIONS

PLAIN, SPLIT = "plain", "splitkern-split"
ACTIVATION_BUDGETS = (0.5, 0.1)


@dataclass(frozen=True)
class TrainingCase:
    """What is trained: cross entropy over 1,000 classes, SGD with momentum.

    Attributes:
        network: "vgg11" to "vgg19_bn", "resnet18" to "resnet152".
        image_size: height and width in pixels.
        budget: device bytes of a step, the same for every method.
        precision: "fp32", or "bf16" for autocast.
        memory_format: "contiguous" or "channels_last".
        device: "cpu", "cuda" or "cuda:N".
        grid: patches per axis of the split network.
        until: last module of its split region; None as `splitkern train` chooses it.
    """

    network: str
    image_size: int
    budget: int
    precision: str = "fp32"
    memory_format: str = "contiguous"
    device: str = "cpu"
    grid: tuple[int, int] = (2, 2)
    until: str | None = None

    @property
    def text(self) -> str:
        """For people."""
        size = self.image_size
        return f"{self.network}, {size}x{size}, {self.precision}, {self.memory_format}, {bytes_text(self.budget)}"


@dataclass(frozen=True)
class Prepared:
    """A network as a method has made it.

    Attributes:
        forward: scores of a batch of images.
        around_forward: context of the forward pass.
    """

    forward: Callable[[Tensor], Tensor]
    around_forward: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Method:
    """A way to save memory.

    Attributes:
        name: as `--methods` takes it.
        text: what it is, for the legend.
        prepare: applies it to (network in training mode, a batch, the case, bytes to plan for), in place.
        is_planned: whether it takes a budget, and refuses one that is too small.
        cpu_note: what is to be said of it on the CPU.
    """

    name: str
    text: str
    prepare: Callable[[nn.Module, Tensor, TrainingCase, int], Prepared]
    is_planned: bool = False
    cpu_note: str = ""


def methods(activation_budgets: tuple[float, ...] = ACTIVATION_BUDGETS) -> dict[str, Method]:
    """All methods by name; plain PyTorch is the first.

    Args:
        activation_budgets: shares of `activation_memory_budget`, each a method of its own.
    """
    planned = partial(Method, is_planned=True)
    found = [
        Method(PLAIN, "plain PyTorch", _plain),
        planned("splitkern", "splitkern, not split", partial(_splitkern, is_split=False)),
        planned(SPLIT, "splitkern, split", partial(_splitkern, is_split=True)),
        planned("layerwise", "layer-wise offload", partial(_splitkern, is_split=False, strategy="layerwise")),
        Method(
            "save_on_cpu",
            "save_on_cpu",
            _save_on_cpu,
            cpu_note="on the CPU it keeps the saved tensors themselves and copies nothing",
        ),
        Method("checkpoint", "checkpoint", _checkpoint),
        *(
            Method(
                f"torch.compile-{share:g}",
                f"torch.compile, activation_memory_budget={share:g}",
                partial(_torch_compile, share=share),
            )
            for share in activation_budgets
        ),
    ]
    return {method.name: method for method in found}


def _plain(model: nn.Module, images: Tensor, case: TrainingCase, budget: int) -> Prepared:
    return Prepared(model)


def _splitkern(
    model: nn.Module, images: Tensor, case: TrainingCase, budget: int, *, is_split: bool, strategy: str = "default"
) -> Prepared:
    if is_split:
        _split(model, images[:1], case)
    momentum_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Prepared(compile(model, images, budget=budget, strategy=strategy, optimizer_bytes=momentum_bytes))


def check_split(case: TrainingCase) -> None:
    """Splits a network without memory as the method `SPLIT` will.

    Raises:
        ValueError: for a grid or an end of the region with which that is not possible.
    """
    from splitkern.training.loop import build_model

    images = torch.empty(1, 3, case.image_size, case.image_size, device="meta")
    _split(build_model(case.network, class_count=CLASS_COUNT, device="meta").train(), images, case)


def _split(model: nn.Module, images: Tensor, case: TrainingCase) -> None:
    from splitkern import split_
    from splitkern.training import default_until

    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    until = case.until or default_until(case.network)
    split_(model, images, grid=case.grid, until=until, order="patch", norm="patch" if has_norm else None)


def _save_on_cpu(model: nn.Module, images: Tensor, case: TrainingCase, budget: int) -> Prepared:
    pinned = images.device.type == "cuda"
    return Prepared(model, around_forward=lambda: torch.autograd.graph.save_on_cpu(pin_memory=pinned))


def _checkpoint(model: nn.Module, images: Tensor, case: TrainingCase, budget: int) -> Prepared:
    """A VGG's features in as many segments as the square root of its layers; every block of a ResNet.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential):
        # A layer with what follows it: a segment that begins with an in-place ReLU would overwrite its own input.
        layers: list[nn.Sequential] = []
        for module in features:
            if not layers or isinstance(module, nn.Conv2d | nn.MaxPool2d):
                layers.append(nn.Sequential())
            layers[-1].append(module)
        run = partial(checkpoint_sequential, layers, round(len(layers) ** 0.5), use_reentrant=False)
        features.forward = run  # type: ignore[method-assign]
        return Prepared(model)
    stages = (getattr(model, f"layer{number}") for number in range(1, 5))
    for block in [block for stage in stages for block in stage]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return Prepared(model)


def _torch_compile(model: nn.Module, images: Tensor, case: TrainingCase, budget: int, *, share: float) -> Prepared:
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    # A backend of its own, so that no graph compiled with another share is taken for this one.
    def backend(graph: Any, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=share):
            return compile_fx(graph, inputs)

    return Prepared(torch.compile(model, backend=backend, dynamic=False))


class TrainingStep:
    """A network, a method and a batch: a training step to call.

    Attributes:
        model, optimizer: of the step.
        images, classes: its batch.

    Args:
        case: what is trained.
        network: on the CPU; it is copied.
        method: how.
        batch: images.
        budget: what a planned method plans for, in bytes.

    Raises:
        BudgetError: a planned method cannot do with the budget.
    """

    def __init__(self, case: TrainingCase, network: nn.Module, method: Method, batch: int, budget: int) -> None:
        device = torch.device(case.device)
        memory_format = MEMORY_FORMATS[case.memory_format]
        self._dtype = PRECISIONS[case.precision]
        self._device_type = device.type
        self.model = copy.deepcopy(network).to(device, memory_format=memory_format).train()  # type: ignore[call-overload]
        images = torch.randn(batch, 3, case.image_size, case.image_size, device=device)
        self.images = images.contiguous(memory_format=memory_format)
        self.classes = torch.randint(CLASS_COUNT, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        with self._autocast():
            self._prepared = method.prepare(self.model, self.images, case, budget)

    @property
    def plan(self) -> CompiledPlan | None:
        """Of a planned method."""
        plan = None if compiled_forward_of(self.model) is None else self.model.plan
        return plan if isinstance(plan, CompiledPlan) else None

    def __call__(self) -> None:
        """Forward, loss, backward, optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast(), self._prepared.around_forward():
            loss = functional.cross_entropy(self._prepared.forward(self.images), self.classes)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast(self._device_type, dtype=self._dtype)


@contextmanager
def cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """cuDNN's benchmark mode on a GPU: PyTorch's convolutions at their fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
