"""What a capture says of a step, case by case, and what it refuses; each step is also run from its graph, bit for bit
against eager execution.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import splitkern as sk
from splitkern.memory.capture import CapturedStep, CaptureError, capture
from splitkern.memory.interpret import interpret
from splitkern.memory.record import Recorder, Write
from tests.memory.graph_rules import require_valid
from tests.split.models import ResNet, vgg

LABELS = torch.tensor([1, 3])
#: For autograd and operators on tensors that claim to lie on a GPU; there need be none.
with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch was built without CUDA")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _images(pixels: int = 24) -> Tensor:
    return torch.randn(2, 3, pixels, pixels)


def _checked(
    model: nn.Module,
    images: Tensor,
    targets: Any = LABELS,
    loss: Callable[..., Tensor] | None = F.cross_entropy,
) -> CapturedStep:
    """Capture, check the graph's rules, run it both ways, and compare with eager execution."""
    step = capture(model, images, loss=loss, targets=targets)
    require_valid(step.graph_dict())
    results = []
    for out_calls in (False, True):
        torch.manual_seed(7)
        results.append(interpret(step, model, images, targets, out_calls=out_calls))
    torch.manual_seed(7)
    given = (targets,) if isinstance(targets, Tensor) else targets
    value = model(images) if loss is None else loss(model(images), *given)
    value.backward()
    for result in results:
        assert torch.equal(result.loss, value)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert (name in result.gradients) == (parameter.grad is not None), name
            if parameter.grad is not None:
                assert torch.equal(result.gradients[name], parameter.grad), name
        for name, buffer in model.named_buffers():
            assert torch.equal(result.parameters[name], buffer), name
        if images.grad is not None:
            assert torch.equal(result.gradients["input.0"], images.grad)
    return step


def _targets(step: CapturedStep) -> Counter[str]:
    return Counter(operation.target for operation in step.operations)


# --- models and modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels_last", "options"),
    [
        (False, {"order": "patch", "norm": "patch"}),
        (True, {"order": "patch", "norm": "patch"}),
        (True, {"order": "layer", "norm": "patch"}),
        (False, {"order": "layer", "norm": "image"}),
        (False, {"order": "patch", "norm": "frozen", "boundary": "halo"}),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "nhwc" if value else "nchw",
)
def test_split_modes(options: dict[str, str], channels_last: bool) -> None:
    model, images = ResNet(), _images(32)
    if channels_last:
        model, images = (one.to(memory_format=torch.channels_last) for one in (model, images))
    # Of few channels, ATen's own strided 1x1 convolutions in layer3 would add unwritten memory in this format.
    sk.split_(model, images, grid=(2, 2), until="layer3" if channels_last else "layer2", **options)
    step = _checked(model, images)
    if channels_last:
        convolutions = [o for o in step.operations if o.target == "conv2d"]
        assert all(step.tensors[o.writes[0]].strides[1] == 1 for o in convolutions)


def test_batch_norm_in_the_tail_and_dropout() -> None:
    model = vgg(batch_norm=True)
    model[0].append(nn.Dropout2d(0.4))
    model.insert(3, nn.Dropout(0.5))
    step = _checked(sk.split_(model, _images(), grid=(2, 3), until="0.6", norm="patch"), _images())
    random = [operation for operation in step.operations if operation.is_random]
    assert len(random) == 2 and not any(operation.is_backward for operation in random)
    assert _targets(step)["batch_norm"] > 0 and _targets(step)["batch_norm_backward"] > 0


def test_dropout_inside_the_region_draws_per_patch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 64, 5))
    step = _checked(sk.split_(model, _images(8), grid=(2, 2), until="1"), _images(8))
    assert [o.patch for o in step.operations if o.is_random] == [0, 1, 2, 3]


@pytest.mark.parametrize("split", [False, True])
def test_autocast(split: bool) -> None:
    model, images = ResNet(), _images(32)
    if split:
        sk.split_(model, images, grid=(2, 2), until="layer1", norm="patch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = _checked(model, images)
    assert any(step.tensors[o.writes[0]].dtype == torch.bfloat16 for o in step.operations if o.target == "conv2d")
    assert step.tensors[step.gradients["conv1.weight"]].dtype == torch.float32


def test_a_module_used_twice_under_autocast_is_cast_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = _checked(Twice(), _images(8), (), None)
    weight = step.parameters["conv.weight"]
    assert sum(weight in operation.reads for operation in step.operations) == 1


def test_tied_weights_have_one_storage_and_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()).square().mean()

    step = _checked(Tied(), _images(8), (), None)
    assert step.parameters["first.weight"] == step.parameters["second.weight"]
    assert step.gradients["first.weight"] == step.gradients["second.weight"]


class _InPlace(nn.Module):
    """In-place writes through views, on whole tensors and on parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        flat = y.flatten(1)
        flat.mul_(1.5)
        part = y[:, 2:4]
        part.add_(0.25)
        y.view(-1).clamp_(min=-0.5)
        z = y.transpose(1, 3)
        z += y.mean() + part.sum() * 0.01
        return F.leaky_relu(F.hardtanh_(z * 2), 0.1, inplace=True).sin().mean()


def test_in_place_writes_and_views() -> None:
    step = _checked(_InPlace(), _images(8), (), None)
    updated = [step.storages[step.tensors[o.writes[m]].storage].kind for o in step.operations for m in o.mutates]
    assert updated == ["parameter"] * 3 + ["activation"]  # buffers, and a part of an activation


@pytest.mark.parametrize(
    "activation",
    [nn.SiLU(inplace=True), nn.GELU(), nn.Hardswish(), nn.ELU(), nn.ReLU6(), nn.Sigmoid(), nn.RReLU(), nn.PReLU(4)],
    ids=lambda activation: type(activation).__name__,
)
def test_activations(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.AvgPool2d(2), nn.GroupNorm(2, 4), nn.Flatten())
    _checked(model.append(nn.Linear(4 * 9, 5)), _images(8))


def test_convolutions_of_all_kinds() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=(2, 1), dilation=2, groups=3),
        nn.ConvTranspose2d(6, 4, 3, stride=2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Unflatten(1, (4, 4)),
        nn.Conv1d(4, 2, 3, bias=False),
        nn.Flatten(),
        nn.LazyLinear(5),
    )
    model(_images(16))
    targets = _targets(_checked(model, _images(16)))
    assert targets["conv2d"] == 2
    assert targets["aten.convolution.default"] == 2  # transposed and one-dimensional: not the package's


def test_dense_block_with_concatenation() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1)
            self.last = nn.Conv2d(11, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, self.one(x).relu()], 1)
            z = torch.cat([y, self.two(y).relu()], 1)
            return self.last(z).mean((2, 3))

    model = Dense()
    _checked(model, _images(16))
    model.zero_grad()
    _checked(sk.split_(model, _images(16), grid=(2, 2), until="two"), _images(16))


def test_frozen_parameters_and_evaluation_mode() -> None:
    model = ResNet()
    model.layer1.requires_grad_(False).eval()
    step = _checked(model, _images(32))
    assert not any(name.startswith("layer1") for name in step.gradients)
    assert "layer2.0.conv1.weight" in step.gradients


def test_gradient_of_the_images() -> None:
    images = _images().requires_grad_()
    step = _checked(sk.split_(vgg(), images, grid=(2, 2), until="0.5"), images)
    assert step.storages[step.tensors[step.gradients["input.0"]].storage].kind == "gradient"


def test_one_gradient_of_two_parameters_is_two_storages() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :, 0, 0] * (self.one + self.two)).sum() + self.two.sum()

    step = _checked(Sum(), _images(4), (), None)
    places = {step.tensors[place].storage for place in step.gradients.values()}
    assert len(places) == 2


def test_constants_and_unregistered_tensors() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)
            self.mean = torch.tensor([0.1, 0.2, 0.3])

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean((2, 3)) - self.mean + torch.tensor([1.0, 2.0, 3.0]))

    step = _checked(Constant(), _images(4))
    assert len(step.constants) == 2


def test_outputs_and_loss_module() -> None:
    model, images = vgg(), _images()
    step = capture(model, images, loss=nn.CrossEntropyLoss(), targets=LABELS, outputs=True)
    result = interpret(step, model, images, LABELS)
    assert torch.equal(result.outputs[0], model(images))
    assert {operation.module for operation in step.operations} >= {"loss", "0.0", "3"}
    assert step.storages[step.tensors[step.outputs[0]].storage].is_output


# --- what the graph says ------------------------------------------------------------------------------------------


@functools.cache
def _split_resnet(**options: Any) -> tuple[CapturedStep, nn.Module]:
    model, images = ResNet(), _images(32)
    sk.split_(model, images, grid=(2, 2), until="layer2", norm="patch", **options)
    return capture(model, images, loss=F.cross_entropy, targets=LABELS), model


def test_labels_of_modules_and_patches() -> None:
    step, model = _split_resnet()
    paths = {path for path, _ in model.named_modules()}
    forward = [o for o in step.operations if o.target == "conv2d"]
    inside = [o for o in forward if o.segment == "region"]
    assert {o.module for o in inside} == {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not path.startswith("layer3")
    }
    # Patch after patch in forward, and the reverse in backward.
    assert [o.patch for o in inside] == sorted(o.patch for o in inside)
    assert Counter(o.patch for o in inside) == dict.fromkeys(range(4), len(inside) // 4)
    backward = [o for o in step.operations if o.target == "conv2d_weight_grad"]
    assert {o.module for o in backward} == {o.module for o in forward}
    assert [o.patch for o in backward if o.segment == "region"] == [o.patch for o in reversed(inside)]
    assert all(o.patch == -1 and o.segment == "layer3" for o in step.operations if o.module.startswith("layer3"))
    windows = [o for o in step.operations if o.target.startswith(("conv2d", "max_pool2d", "batch_norm"))]
    assert {o.module for o in windows} <= paths
    assert [o.is_backward for o in step.operations] == sorted(o.is_backward for o in step.operations)


def test_joins_are_written_by_the_patches() -> None:
    step, _ = _split_resnet()
    writers = Counter(step.tensors[place].storage for o in step.operations for place in set(o.writes))
    joined = [
        storage for storage, count in writers.items() if count > 1 and step.storages[storage].kind == "activation"
    ]
    assert len(joined) == 1  # the join; the image needs no gradient
    makers = [o for o in step.operations if any(step.tensors[place].storage == joined[0] for place in o.writes)]
    assert [o.target for o in makers] == ["relu"] * 4 and [o.patch for o in makers] == [0, 1, 2, 3]
    copies = [o for o in step.operations if o.target == "aten.copy_.default"]
    assert all(o.mutates for o in copies)  # only running statistics are copied


def test_a_copy_is_kept_where_a_reduction_reads_its_source() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.conv(x[:, :, :, :4]).relu(), self.conv(x[:, :, :, 4:])
            with torch.no_grad():
                joined = torch.empty(2, 4, 8, 8)
                joined[:, :, :, :4].copy_(left)
                joined[:, :, :, 4:].copy_(right)
            return (left.sum() + right.square().mean()) * joined.mean()

    step = _checked(Join(), _images(8), (), None)
    copies = [o for o in step.operations if o.target == "aten.copy_.default"]
    assert len(copies) == 1  # left's; square is element-wise, so right is written at once


def test_recompute_is_a_hint() -> None:
    plain, _ = _split_resnet()
    hinted, model = _split_resnet(recompute=True)
    assert hinted.graph_dict() == plain.graph_dict()
    assert sk.config_of(model)["recompute"] is True


def test_what_the_planner_may_do() -> None:
    step, _ = _split_resnet()
    for operation in step.operations:
        if operation.target == "relu" and operation.segment != "region":
            assert operation.inplace == ((0, 0),)
        if operation.target == "relu_backward" and operation.segment != "region":
            assert set(operation.inplace) == {(0, 0), (1, 0)}
        if operation.target == "conv2d_weight_grad":
            assert operation.accumulates == (0,)
        elif operation.target != "add":
            assert not operation.is_sum
        assert not operation.mutates or all(
            step.storages[step.tensors[operation.writes[position]].storage].kind == "parameter"
            for position in operation.mutates
        )
    sums = [o for o in step.operations if o.is_sum and o.is_backward]
    region = [o for o in step.operations if o.segment == "region"]
    weights = len({o.module for o in region if o.target == "conv2d_weight_grad"})
    # Each weight's gradients of four patches, and each fork's two errors.
    assert len(sums) >= 3 * weights
    written = {place for o in step.operations for position in o.mutates for place in [o.writes[position]]}
    assert written == {place for name, place in step.parameters.items() if "running" in name or "tracked" in name}


def test_a_tensor_and_its_transpose_are_not_overwritten_in_place() -> None:
    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.weight * x[0, 0]
            return (y + y.t()).exp().mean()

    step = _checked(Symmetric(), _images(4), (), None)
    addition = next(o for o in step.operations if o.target == "add")
    assert addition.inplace == () and len(addition.reads) == 2


def test_gradients_read_only_what_they_need() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1))
    step = capture(model, _images(16), loss=lambda y: y.square().mean())
    made = {place: o for o in step.operations for place in o.writes}
    for operation in step.operations:
        sources = {made[place].target if place in made else "given" for place in operation.reads}
        if operation.target == "conv2d_input_grad":
            assert operation.reads[1] == step.parameters["2.weight"] and len(operation.reads) == 2
        if operation.target == "max_pool2d_backward":
            assert sources == {"conv2d_input_grad", "max_pool2d"} and len(operation.reads) == 2
    pool = next(o for o in step.operations if o.target == "max_pool2d")
    values, offsets = (step.tensors[place] for place in pool.writes)
    assert offsets.element_bytes == 1 and step.storages[offsets.storage].size_bytes == 2 * 4 * 7 * 7
    assert step.storages[values.storage].size_bytes == 4 * 2 * 4 * 7 * 7


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(16)], ids=lambda pool: type(pool).__name__)
def test_gradients_of_poolings_are_laid_out_as_their_memory(pool: nn.Module) -> None:
    """On CUDA they take their layout from the images, which are gone: the one element in their place gave another."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pool, nn.Flatten(), nn.LazyLinear(5))
    model(_images(16))
    step = capture(model, _images(16), loss=F.cross_entropy, targets=LABELS, device_type="cuda")
    (gradient,) = (o for o in step.operations if o.is_backward and "pool2d" in o.target)
    assert gradient.out_call is not None
    assert gradient.out_call.args[1] == gradient.out_call.kwargs["grad_input"] == Write(0)


@with_cuda
def test_what_cudnn_keeps_for_the_backward_pass_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake operator returns an empty reserve, for which no memory was planned."""
    device = torch.device("cuda", 0)
    asked: list[tuple[torch.Size, bool]] = []

    def reserve_bytes(images: Tensor, training: bool) -> int:
        asked.append((images.shape, training))
        return 96

    monkeypatch.setattr(torch._C, "_get_cudnn_batch_norm_reserve_space_size", reserve_bytes, raising=False)
    fake_mode = FakeTensorMode(static_shapes=True)
    recorder = Recorder(fake_mode, device)
    with fake_mode:
        images, *vectors = (torch.empty(shape, device=device) for shape in ((2, 4, 8, 8), *[(4,)] * 4))
    for number, tensor in enumerate((images, *vectors)):
        recorder.declare(tensor, "input", f"input.{number}")
    for is_training, size_bytes in ((True, 96), (False, 0)):
        with fake_mode, recorder:
            torch.ops.aten.cudnn_batch_norm(images, *vectors, is_training, 0.1, 1e-5)
        assert recorder.storages[recorder.operations[-1].writes[-1].storage].size_bytes == size_bytes
    assert asked == [(images.shape, True)]


class _Noting(torch.autograd.Function):
    """Notes whether autograd may run the backward pass on threads of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noted: list[bool]) -> Tensor:
        ctx.noted = noted
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.noted.append(torch._C._is_multithreading_enabled())
        return grad, None


def test_the_backward_pass_is_captured_on_this_thread() -> None:
    """Autograd has a thread of its own for a GPU, which knows nothing of what the region tells this one."""
    noted: list[bool] = []
    model = _Around(lambda _, x: _Noting.apply(x, noted))  # type: ignore[no-untyped-call]
    capture(model, _images(8), loss=F.cross_entropy, targets=LABELS)
    assert noted == [False] and torch._C._is_multithreading_enabled()


def test_flop_and_bytes() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), stride=2, groups=2, bias=False), nn.Flatten(), nn.Linear(6 * 7 * 6, 5)
    )
    images = torch.randn(2, 4, 16, 16, requires_grad=True)
    step = capture(model, images, loss=F.cross_entropy, targets=LABELS)
    flop = {o.target: o.flop for o in step.operations}
    expected = 2 * (2 * 6 * 7 * 6) * (4 // 2 * 3 * 5)
    assert flop["conv2d"] == flop["conv2d_input_grad"] == flop["conv2d_weight_grad"] == expected
    assert flop["addmm"] == 2 * 2 * 5 * 252
    conv = next(o for o in step.operations if o.target == "conv2d")
    assert conv.bytes == 4 * (2 * 4 * 16 * 16 + 6 * 2 * 15 + 2 * 6 * 7 * 6)


def test_graph_json_and_durations() -> None:
    step, _ = _split_resnet()
    assert json.loads(step.graph_json()) == step.graph_dict()
    timed = step.with_durations([float(i) for i in range(len(step.operations))], "estimate: test")
    graph = timed.graph_dict()
    assert graph["durations_from"] == "estimate: test" and graph["operations"][3]["duration_us"] == 3.0
    with pytest.raises(ValueError, match="durations_us must have one value for each of"):
        step.with_durations([1.0], "estimate: test")


def test_capture_is_deterministic_and_copies_of_a_split_model_can_be_captured() -> None:
    step, model = _split_resnet()
    again = capture(copy.deepcopy(model), _images(32), loss=F.cross_entropy, targets=LABELS)
    assert again.graph_dict() == step.graph_dict()


def test_operations_run_alone() -> None:
    step, _ = _split_resnet()
    state = torch.get_rng_state()
    random = [o.is_random for o in step.operations]
    assert not any(random)
    for index in range(len(step.operations)):
        step.runnable(index)()
    assert torch.equal(torch.get_rng_state(), state)


def test_interpretation_notices_a_wrong_order() -> None:
    model, images = vgg(), _images()
    step = capture(model, images, loss=F.cross_entropy, targets=LABELS)
    operations = list(step.operations)
    operations[2], operations[3] = operations[3], operations[2]
    assert interpret(dataclasses.replace(step, operations=tuple(operations)), model, images, LABELS).loss.isnan()


def test_interpretation_names_what_does_not_fit() -> None:
    model, images = vgg(), _images()
    step = capture(model, images, loss=F.cross_entropy, targets=LABELS)
    with pytest.raises(ValueError, match=r"input.0 must be of shape \(2, 3, 24, 24\)"):
        interpret(step, model, _images(16), LABELS)
    with pytest.raises(ValueError, match=r"parameters must have '0\.0\.weight'"):
        interpret(step, {}, images, LABELS)


# --- what is refused ----------------------------------------------------------------------------------------------


class _Around(nn.Module):
    """A model whose second module does ``action``."""

    def __init__(self, action: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()

        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return action(self, x)

        self.conv, self.odd, self.last = nn.Conv2d(3, 4, 3), Odd(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.conv(x)).mean((2, 3)))


def _branch(_: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def _keep(module: nn.Module, x: Tensor) -> Tensor:
    module.last_input = x
    return x


def _select(_: nn.Module, x: Tensor) -> Tensor:
    return x * 1 + x[x > 0].sum()


def _resize(_: nn.Module, x: Tensor) -> Tensor:
    return x * torch.empty(1).resize_(x.shape).fill_(1.0)


def _complex(_: nn.Module, x: Tensor) -> Tensor:
    return torch.fft.fft2(x).abs()


def _checkpoint(_: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda y: F.dropout(y, 0.5), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (_branch, r"module 'odd' \(Odd\) \(forward\): what follows depends on the values of tensors"),
        (_select, r"module 'odd' \(Odd\) \(forward\): what follows depends on the values of tensors"),
        (_keep, r"module 'odd' \(Odd\) keeps a tensor of the step in 'last_input'"),
        (_resize, r"aten.resize_.default in module 'odd' \(Odd\) \(forward\)"),
        (_complex, r"module 'odd' \(Odd\) \(forward\): a tensor is of type torch.complex64"),
        (_checkpoint, r"module 'odd' \(Odd\)"),
    ],
)
def test_refused_and_the_model_stays_usable(action: Callable[..., Tensor], text: str) -> None:
    model, images = _Around(action), _images(8)
    before = dict(model.named_parameters())
    with pytest.raises(CaptureError, match=text):
        capture(model, images, loss=F.cross_entropy, targets=LABELS)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not hasattr(model.odd, "last_input")
    F.cross_entropy(model(images), LABELS).backward()


@pytest.mark.parametrize(
    ("action", "operator"),
    [
        (lambda _, x: x.to("cuda:0").to("cpu"), r"aten\._to_copy\.default"),
        (lambda _, x: x + torch.ones(4, 1, 1, device="cuda:0").to("cpu"), r"aten\.ones\.default"),
    ],
    ids=["moved", "made"],
)
def test_a_tensor_on_another_device_is_refused(action: Callable[..., Tensor], operator: str) -> None:
    """A plan has one device: the memory of such a tensor was planned on that of the step."""
    text = rf"{operator} in module 'odd' \(Odd\) \(forward\): {operator} makes a tensor on cuda:0; .* here cpu"
    with pytest.raises(CaptureError, match=text):
        capture(_Around(action), _images(8), loss=F.cross_entropy, targets=LABELS)


@with_cuda
@pytest.mark.parametrize(
    "output",
    [lambda y: y.mean().to("cuda:0"), lambda y: (y, y.detach().mean().to("cuda:0"))],
    ids=["differentiable", "beside"],
)
def test_a_scalar_returned_on_another_device_is_refused(output: Callable[[Tensor], Any]) -> None:
    """Scalars may come from elsewhere, but what is returned lies in the step's memory, so on its device."""

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            return output(self.conv(x))

    with pytest.raises(CaptureError, match="the model returns a tensor on cuda:0; its step lies on cpu"):
        capture(Returning(), _images(8), given_gradients=True)


def test_hooks_are_refused() -> None:
    for register in (
        lambda m: m[0][0].register_forward_hook(lambda *_: None),
        lambda m: m[0][0].register_full_backward_hook(lambda *_: None),
    ):
        model = vgg()
        register(model)
        with pytest.raises(CaptureError, match=r"module '0.0' \(Conv2d\) has forward or backward hooks"):
            capture(model, _images(), loss=F.cross_entropy, targets=LABELS)
    model = vgg()
    model[3].weight.register_hook(lambda g: g)
    with pytest.raises(CaptureError, match=r"3\.weight has gradient hooks"):
        capture(model, _images(), loss=F.cross_entropy, targets=LABELS)
    model = vgg()
    model[3].bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(CaptureError, match=r"3\.bias has gradient hooks"):
        capture(model, _images(), loss=F.cross_entropy, targets=LABELS)


def test_stochastic_boundaries_are_refused() -> None:
    model = sk.split_(vgg(), _images(), grid=(2, 2), until="0.5", boundary="stochastic")
    with pytest.raises(CaptureError, match='boundary="stochastic"'):
        capture(model, _images(), loss=F.cross_entropy, targets=LABELS)


def test_bad_arguments() -> None:
    images = _images()
    with pytest.raises(CaptureError, match=r"the loss must be a scalar, got shape \[2, 5\]"):
        capture(vgg(), images)
    with pytest.raises(CaptureError, match="does not depend on anything that requires a gradient"):
        capture(vgg().requires_grad_(False), images, loss=F.cross_entropy, targets=LABELS)
    with pytest.raises(CaptureError, match="the loss must be a scalar tensor, got a float"):
        capture(vgg(), images, loss=lambda y: 1.0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        capture(_images, images)
    with pytest.raises(TypeError, match="example_inputs must be a tensor or a tuple of arguments, got int"):
        capture(vgg(), 3)
    with pytest.raises(TypeError, match="loss must be a function"):
        capture(vgg(), images, loss=3)
    with pytest.raises(CaptureError, match=r"0\.weight of module '0' \(LazyConv2d\) has no shape yet"):
        capture(nn.Sequential(nn.LazyConv2d(4, 3)), images, loss=lambda y: y.sum())
    with pytest.raises(CaptureError, match=r"aten.convolution.default|aten.conv2d"):
        capture(nn.Sequential(nn.Conv2d(4, 4, 3)), images, loss=lambda y: y.sum())


def test_shape_errors_name_the_module() -> None:
    with pytest.raises(CaptureError, match=r"module '0\.0' \(Conv2d\) \(forward\)"):
        capture(vgg(), torch.randn(2, 3, 24, 24).double(), loss=F.cross_entropy, targets=LABELS)


def _twice() -> Any:
    @torch.library.custom_op("splitkern_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_autograd(lambda _, grad: grad * 2)
    return twice


def _thrice() -> Any:
    library = torch.library.Library("splitkern_tests", "FRAGMENT")
    library.define("thrice(Tensor x) -> Tensor")
    library.impl("thrice", lambda x: x * 3, "CPU")
    return library, torch.ops.splitkern_tests.thrice


@pytest.mark.parametrize(("name", "make"), [("twice", _twice), ("thrice", _thrice)])
def test_operators_without_a_fake_implementation_are_named(name: str, make: Callable[[], Any]) -> None:
    made = make()
    function = made[1] if isinstance(made, tuple) else made

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = function(x)
            return result

    model = nn.Sequential(nn.Linear(4, 4), Custom())
    wanted = rf"splitkern_tests\.{name}\.default in module '1' \(Custom\).*register_fake\(\"splitkern_tests::{name}\""
    with pytest.raises(CaptureError, match=wanted):
        capture(model, torch.ones(2, 4), given_gradients=True)
    with pytest.raises(CaptureError, match=wanted):
        sk.compile(model, torch.ones(2, 4), budget=None, costs="paper")
    assert "forward" not in model.__dict__
