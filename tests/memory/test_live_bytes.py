"""LiveBytes against numbers computed by hand and against the allocator's own events."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from splitkern.memory import LiveBytes

KIB = 1024


def test_peak_and_current_of_a_chain() -> None:
    x = torch.zeros(256)
    with LiveBytes() as live:
        y = x + 1
        y = y * 2
        y = y * 3
    assert live.peak_bytes == 2 * KIB
    assert live.current_bytes == KIB
    assert [sample.live_bytes for sample in live.timeline()] == [KIB, 2 * KIB, KIB, 2 * KIB, KIB]
    assert live.timeline()[0].operator == "aten.add.Tensor"
    assert y.sum() == 256 * 6


def test_views_and_in_place_results_cost_nothing() -> None:
    x = torch.zeros(256)
    with LiveBytes() as live:
        y = x + 1
        kept = [y.view(16, 16), y[3:], y.t(), y.relu_(), y.add_(1), x.view(-1), x.add_(1), y.detach()]
    assert len(kept) == 8
    assert live.peak_bytes == live.current_bytes == KIB
    assert len(live.timeline()) == 1


def test_a_view_keeps_its_storage_alive() -> None:
    with LiveBytes() as live:
        y = torch.zeros(256)
        tail = y[255:]
        del y
        before = live.current_bytes
        del tail
    assert before == KIB
    assert live.current_bytes == 0


def test_out_argument_that_grows_is_counted_at_its_new_size() -> None:
    a = torch.ones(256)
    with LiveBytes() as live:
        y = torch.empty(0)
        torch.add(a, a, out=y)
    assert live.peak_bytes == live.current_bytes == KIB


def test_storage_from_before_the_block_is_free() -> None:
    x, out = torch.zeros(256), torch.zeros(256)
    with LiveBytes() as live:
        torch.add(x, x, out=out)
        out.copy_(x)
    assert live.peak_bytes == 0
    assert live.timeline() == []


def test_several_outputs_count_each() -> None:
    x = torch.randn(1, 1, 8, 8)
    with LiveBytes() as live:
        values, indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert live.peak_bytes == 16 * 4 + 16 * 8


def test_saved_tensors_live_until_backward_frees_them() -> None:
    x = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        y = (x * 2).exp()  # exp saves its result; x * 2 dies at once
        total = y.sum()
        del y
        saved = live.current_bytes
        total.backward()
        del total
        live.assign("gradients", [x.grad])
    assert saved == KIB + 4
    assert live.current_of("gradients") == KIB
    assert live.current_bytes == 0
    # Largest in exp's backward: y and its product with the gradient, beside total and its gradient (4 bytes each).
    assert live.peak_of() == 2 * KIB + 8


def test_exact_forward_and_backward_of_a_convolution() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    x = torch.randn(2, 3, 8, 8)
    output_bytes = 2 * 4 * 8 * 8 * 4
    weight_bytes = 4 * 3 * 3 * 3 * 4
    with LiveBytes() as live:
        y = torch.relu(conv(x))  # the convolution's result dies: relu saves its own
        assert live.peak_bytes == 2 * output_bytes
        assert live.current_bytes == output_bytes
        grad = torch.ones_like(y)
        y.backward(grad)
        live.assign("parameter gradients", [conv.weight.grad])
    # In backward: y, grad, the gradient before the relu; and beside them the weight's gradient.
    assert live.peak_bytes == 3 * output_bytes
    assert live.peak_of("parameter gradients") == weight_bytes
    assert live.peak_of() == 3 * output_bytes + weight_bytes
    assert live.current_bytes == 2 * output_bytes
    assert live.categories == ["activations", "parameter gradients"]


def test_gradient_assigned_after_the_block_and_dead_storages_ignored() -> None:
    weight = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        (weight * 2).sum().backward()
    events = len(live.timeline())
    live.assign("parameter gradients", [weight.grad, None])
    assert live.current_of("parameter gradients") == KIB
    assert live.current_bytes == 0
    weight.grad = None
    assert len(live.timeline()) == events, "what dies after the block is no part of it"


def test_excluded_tensors_do_not_count() -> None:
    buffer = torch.zeros(256)

    @torch.library.custom_op("live_bytes_test::hidden_buffer", mutates_args=())
    def hidden_buffer(x: torch.Tensor) -> torch.Tensor:
        return buffer

    x = torch.zeros(1)
    with LiveBytes() as counted:
        hidden_buffer(x)
    with LiveBytes(exclude=[buffer]) as excluded:
        hidden_buffer(x)
    assert counted.peak_bytes == KIB
    assert excluded.peak_bytes == 0


def test_checkpointed_region_costs_less() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(8)])
    x = torch.randn(1, 8, 32, 32, requires_grad=True)

    def peak(recompute: bool) -> int:
        with LiveBytes() as live:
            y = x
            for start in (0, 4):
                part = layers[start : start + 4]
                y = checkpoint(part, y, use_reentrant=False) if recompute else part(y)
            y.sum().backward()
        return live.peak_bytes

    tensor_bytes = 8 * 32 * 32 * 4
    assert peak(recompute=False) >= 8 * tensor_bytes
    assert peak(recompute=True) <= 8 * tensor_bytes
    assert peak(recompute=True) < 0.85 * peak(recompute=False)


def test_marks_lie_inside_the_block() -> None:
    with LiveBytes() as live:
        a = torch.zeros(4)
        live.mark("backward")
        b = torch.zeros(4)
    (offset_ms, name) = live.marks[0]
    assert name == "backward"
    samples = live.timeline()
    assert samples[0].offset_ms <= offset_ms <= samples[1].offset_ms
    assert a.shape == b.shape


def test_a_block_that_raises_leaves_no_mode_behind() -> None:
    live = LiveBytes()
    with pytest.raises(ZeroDivisionError), live:
        kept = torch.zeros(256) / (1 // 0)
    events = len(live.timeline())
    kept = torch.zeros(256) + 1
    assert len(live.timeline()) == events
    assert kept.sum() == 256


def test_one_counter_one_block() -> None:
    live = LiveBytes()
    with live:
        pass
    with pytest.raises(RuntimeError, match="one block"), live:
        pass


def test_activations_is_not_a_category_to_assign() -> None:
    with pytest.raises(ValueError, match="activations"):
        LiveBytes().assign("activations", [])


def allocator_peak(step: object) -> int:
    """Largest number of bytes that the CPU allocator handed out at once during `step`, from its own events."""
    assert callable(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    live = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_agrees_with_the_allocator_on_a_convnet() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 8 * 8, 10),
    )  # fmt: skip
    x = torch.randn(8, 3, 32, 32)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).logsumexp(1).sum().backward()

    step()
    with LiveBytes() as live:
        step()
    model.zero_grad(set_to_none=True)
    measured = allocator_peak(step)
    # The allocator also sees scratch inside operators, so it may be a little above, never noticeably below.
    assert 0.98 * measured <= live.peak_of() <= 1.005 * measured
