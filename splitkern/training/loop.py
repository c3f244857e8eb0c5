"""The training loop of `splitkern train`: builds a torchvision model, splits it, trains it, measures it.

A run is a function of its options alone: the same options give the same weights, also across a kill and a resume.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional

from splitkern.memory.compile import uncompile_
from splitkern.memory.live_bytes import LiveBytes
from splitkern.memory.step_bytes import StepBytes
from splitkern.training.budget import BudgetOptions, evaluation_batch, plan_training
from splitkern.training.checkpoint import CheckpointError, describe_difference, load_checkpoint, save_checkpoint
from splitkern.training.data import Batch, ImageData, read

MODEL_NAMES = (
    *(f"vgg{depth}{suffix}" for depth in (11, 13, 16, 19) for suffix in ("", "_bn")),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PARAMETER_GRADIENTS = "parameter gradients"

_LARGEST = 2**31 - 1  # of sizes and counts: more overflows somewhere below
_LARGEST_SEED = 2**63 - 1


class OptionsError(ValueError):
    """Options that don't work, alone or together, or with this model or machine."""


@dataclass(frozen=True)
class SplitOptions:
    """Arguments of `splitkern.split_`; exactly one of `until` and `depth` is given."""

    grid: tuple[int, int] = (2, 2)
    until: str | None = None
    depth: float | None = None
    boundary: str = "zero"
    wiggle: float = 0.2
    norm: str | None = "patch"
    order: str = "patch"
    recompute: bool = True
    evaluation: str = "unsplit"

    def keywords(self) -> dict[str, Any]:
        """As keyword arguments of `split_`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TrainOptions:
    """What determines a run. `split` None trains the unsplit model; `budget` None plans nothing."""

    model: str = "resnet18"
    data: str = "digits"
    image_size: int = 64
    batch: int = 32
    epochs: int = 4
    lr: float = 0.05
    weight_decay: float = 5e-4
    precision: str = "fp32"
    memory_format: str = "contiguous"
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    split: SplitOptions | None = None
    budget: BudgetOptions | None = None

    def identity(self) -> dict[str, Any]:
        """The options on which the weights depend, apart from the split, in types that a checkpoint can hold."""
        values = dataclasses.asdict(self)
        for name in ("split", "workers", "device", "budget"):
            del values[name]
        return values

    def conditions(self) -> dict[str, Any]:
        """What the measured time and bytes depend on beyond that, in types that a checkpoint can hold."""
        budget = (None, None, None) if self.budget is None else dataclasses.astuple(self.budget)
        return {"device": self.device, **dict(zip(("budget", "host_budget", "strategy"), budget, strict=True))}


@dataclass
class RunResult:
    """What a run measured.

    Attributes:
        accuracy: test accuracy after every epoch, 0 to 1, evaluated as `SplitOptions.evaluation` says.
        accuracy_unsplit, accuracy_split: test accuracy at the end, with the network unsplit and with it split (None for
            a model that isn't split).
        loss: mean training loss of every epoch.
        step_ms: duration of every training step but the measured one, in milliseconds.
        peak_bytes: peak live bytes of one training step, activations and their gradients; under a budget with the whole
            arena, which is held all the time.
        total_peak_bytes: the same with the parameters' gradients.
        parameter_bytes, gradient_bytes, input_bytes: the parameters, their gradients and the input batch.
        device_peak_bytes: all device memory of the measured step, scratch inside operators included.
        plan: under a budget, the figures of the plan (`CompiledPlan.summary`), and "text", which says them.
        timeline: (ms since the step's begin, live bytes) over the measured step.
        backward_ms: where in it the backward pass begins.
    """

    accuracy: list[float] = field(default_factory=list)
    accuracy_unsplit: float | None = None
    accuracy_split: float | None = None
    loss: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    total_peak_bytes: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    input_bytes: int = 0
    device_peak_bytes: int = 0
    plan: dict[str, Any] | None = None
    timeline: list[tuple[float, int]] = field(default_factory=list)
    backward_ms: float = 0.0

    @property
    def median_step_ms(self) -> float | None:
        """Median duration of a training step, in milliseconds; None if the measured step was the only one."""
        return median(self.step_ms) if self.step_ms else None

    def summary(self) -> dict[str, Any]:
        """Everything but the timeline, for JSON, which has no infinity and no NaN: None is in their place."""
        values = dataclasses.asdict(self)
        del values["timeline"], values["step_ms"], values["backward_ms"]
        values["loss"] = [loss if math.isfinite(loss) else None for loss in self.loss]
        return {**values, "median_step_ms": self.median_step_ms}

    def unmeasured(self) -> RunResult:
        """The same without what was measured of steps."""
        return RunResult(
            accuracy=self.accuracy,
            accuracy_unsplit=self.accuracy_unsplit,
            accuracy_split=self.accuracy_split,
            loss=self.loss,
            plan=self.plan,
        )


class Progress:
    """What `train` tells while it runs; the base class says nothing."""

    def begin(self, epochs: int, steps: int, first_epoch: int) -> None:
        """A run begins: `steps` per epoch, of which the epochs before `first_epoch` are done."""

    def planning(self) -> None:
        """The steps' memory is being planned, which may take a minute: operations are measured."""

    def planned(self, text: str) -> None:
        """There is a plan; `text` says what it does."""

    def step(self, loss: float) -> None:
        """A step is done."""

    def epoch(self, epoch: int, loss: float, accuracy: float) -> None:
        """An epoch, counted from 1, is done and its checkpoint written."""

    def end(self) -> None:
        """The run is done."""


def default_until(model_name: str) -> str:
    """Where the split region ends unless told: layer2 of a ResNet, the third pooling of a VGG."""
    if model_name.startswith("resnet"):
        return "layer2"
    model = build_model(model_name, class_count=2, device="meta")
    assert isinstance(model.features, nn.Sequential)
    poolings = [name for name, module in model.features.named_children() if isinstance(module, nn.MaxPool2d)]
    return f"features.{poolings[2]}"


def build_model(model_name: str, *, class_count: int, device: str = "cpu") -> nn.Module:
    """A torchvision model with random weights."""
    from torchvision import models

    if model_name not in MODEL_NAMES:
        raise ValueError(f"model must be one of {', '.join(MODEL_NAMES)}, got {model_name!r}")
    with torch.device(device):
        model: nn.Module = models.get_model(model_name, weights=None, num_classes=class_count)
    return model


def check_options(options: TrainOptions) -> None:
    """Raises OptionsError for options that cannot work together on this machine."""
    if options.precision not in PRECISIONS:
        raise OptionsError(f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise OptionsError(f"device must be cpu, cuda or cuda:N, got {options.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionsError(f"device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionsError(f"device {options.device} is asked for, but torch finds no GPU (splitkern doctor says more)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionsError(f"device {options.device} is asked for, but there are {torch.cuda.device_count()} GPUs")
    if options.precision == "fp16" and device.type == "cpu":
        raise OptionsError("precision fp16 needs a GPU (gradients are scaled on the device); on the CPU take bf16")
    for name in ("image_size", "batch", "epochs"):
        if not 1 <= getattr(options, name) <= _LARGEST:
            raise OptionsError(f"{name} must be from 1 to {_LARGEST}, got {getattr(options, name)}")
    if not 0 <= options.seed <= _LARGEST_SEED:
        raise OptionsError(f"seed must be from 0 to {_LARGEST_SEED}, got {options.seed}")
    if not options.lr > 0:
        raise OptionsError(f"lr must be above 0, got {options.lr}")
    if options.model not in MODEL_NAMES:
        raise OptionsError(f"model must be one of {', '.join(MODEL_NAMES)}, got {options.model!r}")
    try:
        images = torch.empty(2, 3, options.image_size, options.image_size, device="meta")
        build_model(options.model, class_count=2, device="meta")(images)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OptionsError(f"{options.model} takes no images of {options.image_size} pixels: {reason}") from error


class _Run:
    """State of one run: everything that a checkpoint carries."""

    def __init__(self, options: TrainOptions, data: ImageData, progress: Progress) -> None:
        self.options = options
        self.data = data
        self.device = torch.device(options.device)
        self.result = RunResult()
        self.epoch = 0
        torch.manual_seed(options.seed)
        random.seed(options.seed)
        model = build_model(options.model, class_count=data.class_count)
        self.model = model.to(self.device, memory_format=MEMORY_FORMATS[options.memory_format])  # type: ignore[call-overload]
        self.split_config: dict[str, Any] | None = None
        if options.split is not None:
            from splitkern import config_of

            try:
                self._split(self.model, options.split)
            except (ValueError, TypeError) as error:
                raise OptionsError(str(error)) from error
            self.split_config = dict(config_of(self.model))
        if options.budget is not None:
            self._plan(options.budget, progress)
        # Splitting and measuring may draw; the runs with and without them shall draw the same from here on.
        torch.manual_seed(options.seed)
        self.steps = len(data.train_batches(options.batch, seed=options.seed, epoch=0))
        # Fused, because the other forms make temporaries of the size of the largest weights.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=options.lr, total_steps=self.steps * options.epochs + 1, pct_start=0.3
        )
        self.scaler = GradScaler(self.device.type, enabled=options.precision == "fp16")

    def state(self) -> dict[str, Any]:
        rng: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "arguments": self.options.identity(),
            "split": self.split_config,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "record": dataclasses.asdict(self.result),
            "conditions": self.options.conditions(),
        }

    def restore(self, path: Path) -> None:
        state = load_checkpoint(path)
        saved, given = state["split"], self.split_config
        if saved is None or given is None:
            difference = None if saved is given else (_describe_split(saved), _describe_split(given))
        else:
            difference = describe_difference(saved, given)
        if difference is not None:
            raise CheckpointError(
                f"checkpoint {path} was trained with {difference[0]}; these arguments ask for {difference[1]}"
            )
        difference = describe_difference(state["arguments"], self.options.identity())
        if difference is not None:
            raise CheckpointError(
                f"checkpoint {path} was trained with {difference[0]}; these arguments ask for {difference[1]}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.result = RunResult(**{**state["record"], "plan": self.result.plan})
            self.epoch = int(state["epoch"])
            torch.set_rng_state(state["rng"]["torch"])
            random.setstate(state["rng"]["python"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).splitlines()[:1]) or type(error).__name__
            raise CheckpointError(f"checkpoint {path} does not fit this model: {reason}") from error
        self._check_conditions(path, state.get("conditions"))

    def _check_conditions(self, path: Path, saved: Any) -> None:
        """Figures of one run are of one device and budget: those of others are forgotten, and measured again."""
        difference = describe_difference(saved if isinstance(saved, dict) else {}, self.options.conditions())
        if difference is None:
            return
        if self.epoch >= self.options.epochs:
            raise CheckpointError(
                f"checkpoint {path} is of a finished run, measured with {difference[0]}; these arguments ask for "
                f"{difference[1]}, but no step is left to measure"
            )
        self.result = self.result.unmeasured()

    def train_epoch(self, progress: Progress) -> float:
        self.model.train()
        options = self.options
        batches = read(
            self.data.train_batches(options.batch, seed=options.seed, epoch=self.epoch, workers=options.workers)
        )
        # The second step: the first one also allocates the optimizer's state.
        measured = min(1, self.steps - 1) if not self.result.timeline else -1
        losses = []
        for index, batch in enumerate(batches):
            images, classes = self._to_device(batch)
            begin = time.perf_counter()
            loss = self._measured_step(images, classes) if index == measured else self._step(images, classes)
            losses.append(loss)
            if index != measured:
                self.result.step_ms.append((time.perf_counter() - begin) * 1e3)
            progress.step(loss)
        return sum(losses) / max(1, len(losses))

    def evaluate(self) -> float:
        """Test accuracy, with the network split or not as the options say."""
        return self._accuracy(self.model)

    def evaluate_at_the_end(self) -> None:
        """Test accuracy of the trained weights in both networks, the split one and the unsplit one."""
        self.result.accuracy_unsplit = self.result.accuracy[-1]
        split = self.options.split
        if split is None:
            return
        from splitkern import unsplit_

        if self.result.plan is not None:
            uncompile_(self.model)
        model = unsplit_(copy.deepcopy(self.model))
        self.result.accuracy_unsplit = self._accuracy(model)
        self._split(model, dataclasses.replace(split, evaluation="split"))
        self.result.accuracy_split = self._accuracy(model)

    def _split(self, model: nn.Module, split: SplitOptions) -> None:
        from splitkern import split_

        split_(model, self._blank(2), **split.keywords())

    def _plan(self, budget: BudgetOptions, progress: Progress) -> None:
        options = self.options
        progress.planning()
        # All batches of training are of one size: the incomplete last one is left out.
        images = min(options.batch, len(self.data.train))  # type: ignore[arg-type]
        try:
            with self._autocast():
                self.result.plan = plan_training(self.model, self._blank(images), budget)
        except (ValueError, TypeError) as error:
            raise OptionsError(str(error)) from error
        progress.planned(self.result.plan["text"])

    def _accuracy(self, model: nn.Module) -> float:
        model.eval()
        right = count = 0
        options = self.options
        images = options.batch
        if options.budget is not None:
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                images = evaluation_batch(model, self.optimizer, self._blank(1), options.budget, images)
        with torch.inference_mode():
            for batch in read(self.data.test_batches(images, workers=options.workers)):
                inputs, classes = self._to_device(batch)
                with self._autocast():
                    scores = model(inputs)
                right += int((scores.argmax(1) == classes).sum())
                count += len(classes)
        return right / max(1, count)

    def _step(self, images: torch.Tensor, classes: torch.Tensor, live: LiveBytes | None = None) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self._autocast():
                loss = functional.cross_entropy(self.model(images), classes)
        except ValueError as error:  # of a BatchNorm that is left with one value per channel
            raise OptionsError(f"batch {len(images)} of image_size {self.options.image_size}: {error}") from error
        if live is not None:
            live.mark("backward")
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if live is not None:
            live.assign(PARAMETER_GRADIENTS, (parameter.grad for parameter in self.model.parameters()))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        value = loss.item()  # also waits for the device, so that a step's time is the step's
        return float(value)

    def _measured_step(self, images: torch.Tensor, classes: torch.Tensor) -> float:
        with StepBytes(self.model, self.optimizer, [images, classes]) as measured, LiveBytes() as live:
            loss = self._step(images, classes, live)
        result = self.result
        result.device_peak_bytes = measured.peak_bytes
        arena_bytes = 0 if result.plan is None else int(result.plan["arena_bytes"])
        result.peak_bytes = live.peak_bytes + arena_bytes
        result.total_peak_bytes = live.peak_of() + arena_bytes
        result.gradient_bytes = live.peak_of(PARAMETER_GRADIENTS)
        result.parameter_bytes = sum(p.untyped_storage().nbytes() for p in self.model.parameters())
        result.input_bytes = images.untyped_storage().nbytes()
        timeline = live.timeline("activations")
        result.timeline = [(sample.offset_ms, sample.live_bytes + arena_bytes) for sample in timeline]
        result.backward_ms = live.marks[0][0]
        return loss

    def _to_device(self, batch: Batch) -> Batch:
        images, classes = batch
        return self._format(images.to(self.device)), classes.to(self.device)

    def _blank(self, images: int) -> torch.Tensor:
        size = self.options.image_size
        return self._format(torch.zeros(images, 3, size, size, device=self.device))

    def _format(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous(memory_format=MEMORY_FORMATS[self.options.memory_format])

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.options.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)


def _describe_split(config: dict[str, Any] | None) -> str:
    if config is None:
        return "no split"
    return ", ".join(f"{name}={value!r}" for name, value in config.items())


def train(
    options: TrainOptions,
    data: ImageData,
    *,
    checkpoint: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Trains a model and writes a checkpoint at the end of every epoch.

    Args:
        options: what to train and how.
        data: the images.
        checkpoint: file of the checkpoint, in a folder that exists.
        resume: go on from `checkpoint` if it exists.
        progress: told of steps and epochs.

    Raises:
        OptionsError: for options that cannot work, for want of memory also; the text of `split_` or `compile` where it
            refuses.
        CheckpointError: for a checkpoint that is damaged, belongs to other options or cannot be written.
        DataError: for an image that cannot be read.
    """
    check_options(options)
    try:
        return _train(options, data, checkpoint, resume, progress or Progress())
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = " ".join(str(error).splitlines()[:1]) or type(error).__name__
        raise OptionsError(
            f"memory does not suffice for batch {options.batch} of image_size {options.image_size}: {reason}"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _train(options: TrainOptions, data: ImageData, checkpoint: Path, resume: bool, progress: Progress) -> RunResult:
    run = _Run(options, data, progress)
    if resume and checkpoint.exists():
        run.restore(checkpoint)
    progress.begin(options.epochs, run.steps, run.epoch)
    while run.epoch < options.epochs:
        loss = run.train_epoch(progress)
        accuracy = run.evaluate()
        run.epoch += 1
        run.result.loss.append(loss)
        run.result.accuracy.append(accuracy)
        if run.epoch == options.epochs:
            run.evaluate_at_the_end()
        save_checkpoint(checkpoint, run.state())
        progress.epoch(run.epoch, loss, accuracy)
    progress.end()
    return run.result
