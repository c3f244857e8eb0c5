"""The training loop: it learns, measures, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

pytest.importorskip("sklearn")

from splitkern.memory.compile import BudgetError
from splitkern.memory.step_bytes import resident_bytes
from splitkern.training import (
    BudgetOptions,
    CheckpointError,
    OptionsError,
    Progress,
    SplitOptions,
    TrainOptions,
    default_until,
    load_checkpoint,
    train,
)
from splitkern.training.budget import evaluation_batch
from tests.training.small import SPLIT, small_data, small_options

pytestmark = pytest.mark.torchvision

STOCHASTIC = dataclasses.replace(SPLIT, boundary="stochastic")

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from splitkern.training import Progress, SplitOptions, train
from tests.training.small import small_data, small_options

class KillInSecondEpoch(Progress):
    steps = 0
    def step(self, loss):
        self.steps += 1
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)

split = {split!r}
train(small_options(split), small_data(), checkpoint=Path({path!r}), progress=KillInSecondEpoch())
"""


@pytest.mark.parametrize("split", [None, SPLIT, STOCHASTIC], ids=["unsplit", "split", "stochastic"])
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, split: SplitOptions | None) -> None:
    killed, whole = tmp_path / "killed.pt", tmp_path / "whole.pt"
    code = KILLED_RUN.format(split=split, path=str(killed))
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert load_checkpoint(killed)["epoch"] == 1, "at most the running epoch is lost"

    # The numbers of threads must agree, because the CPU's sums depend on it.
    resumed = train(small_options(split), small_data(), checkpoint=killed, resume=True)
    straight = train(small_options(split), small_data(), checkpoint=whole)
    first, second = load_checkpoint(killed), load_checkpoint(whole)
    assert first["epoch"] == second["epoch"] == 3
    assert resumed.accuracy == straight.accuracy
    assert resumed.loss == straight.loss
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert torch.equal(first["rng"]["torch"], second["rng"]["torch"])


class Interrupted(Progress):
    """Stops in the second epoch, and keeps what it was told of the plan."""

    steps = 0
    told = ""

    def planned(self, text: str) -> None:
        self.told = text

    def step(self, loss: float) -> None:
        self.steps += 1
        if self.steps == 5:
            raise KeyboardInterrupt


def test_under_a_budget_interrupted_and_resumed_the_weights_are_the_same(tmp_path: Path) -> None:
    """fp32 on the CPU: to the bit those of training without a budget."""
    planned, plain, data = tmp_path / "planned.pt", tmp_path / "plain.pt", small_data()
    options = small_options(epochs=2)
    with pytest.raises(OptionsError, match=r"smallest that would do is \d") as caught:
        train(small_options(epochs=2, budget=BudgetOptions(1 << 20)), data, checkpoint=planned)
    assert not planned.exists()
    assert isinstance(caught.value.__cause__, BudgetError)
    smallest = caught.value.__cause__.smallest_bytes

    progress = Interrupted()
    tight = dataclasses.replace(options, budget=BudgetOptions(smallest + (1 << 18)))
    with pytest.raises(KeyboardInterrupt):
        train(tight, data, checkpoint=planned, progress=progress)
    assert "recomputed" in progress.told
    # Another budget may go on: weights do not depend on it, and figures are measured again.
    result = train(dataclasses.replace(options, budget=BudgetOptions(1 << 30)), data, checkpoint=planned, resume=True)
    expected = train(options, data, checkpoint=plain)
    assert result.loss == expected.loss
    assert result.accuracy == pytest.approx(expected.accuracy)  # evaluated in batches of another size
    for name, value in load_checkpoint(planned)["model"].items():
        assert torch.equal(value, load_checkpoint(plain)["model"][name]), name
    assert result.plan is not None
    assert result.plan["is_left_alone"], "the plan of the run that went on"
    assert smallest + (1 << 18) < result.device_peak_bytes <= 1 << 30, "measured in the epoch under the second budget"
    assert result.plan["arena_bytes"] <= result.peak_bytes == max(live for _, live in result.timeline)
    assert len(result.step_ms) == 2, "the unmeasured steps of that epoch"
    assert len(result.loss) == 2
    assert expected.plan is None
    message = (
        r"finished run, measured with budget=1073741824, strategy='default'; .* for budget=None, strategy=None, but"
    )
    with pytest.raises(CheckpointError, match=message):
        train(options, data, checkpoint=planned, resume=True)


def test_evaluation_under_a_budget_takes_what_fits_beside_the_arena() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    image = torch.zeros(1, 3, 34, 34)
    held = resident_bytes(model, optimizer, [])
    # Beside the image, its convolution and the ReLU of it: 8 channels of 32x32, twice.
    one = 3 * 34 * 34 * 4 + 2 * 8 * 32 * 32 * 4
    for room, expected in ((0, 1), (one - 1, 1), (5 * one, 5), (6 * one - 1, 5), (100 * one, 32)):
        found = evaluation_batch(model, optimizer, image, BudgetOptions(held + room), 32)
        assert found == expected


def test_resume_of_a_finished_run_trains_no_more(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    options = small_options(epochs=1)
    first = train(options, small_data(), checkpoint=path)
    written = path.stat().st_mtime_ns
    second = train(options, small_data(), checkpoint=path, resume=True)
    assert path.stat().st_mtime_ns == written
    assert second == first


def test_one_step_and_a_loss_that_diverges_have_no_nan_in_json(tmp_path: Path) -> None:
    data = dataclasses.replace(small_data(), train=Subset(small_data().train, range(16)))
    options = small_options(epochs=1, lr=1e300)
    summary = train(options, data, checkpoint=tmp_path / "one.pt").summary()
    assert summary["median_step_ms"] is None
    json.dumps(summary, allow_nan=False)
    summary = train(options, small_data(), checkpoint=tmp_path / "three.pt").summary()
    assert summary["loss"] == [None]
    json.dumps(summary, allow_nan=False)


def test_measures_a_step(tmp_path: Path) -> None:
    result = train(small_options(epochs=1), small_data(), checkpoint=tmp_path / "checkpoint.pt")
    assert len(result.step_ms) == 2, "the measured step's time is no step time"
    assert result.input_bytes == 16 * 3 * 32 * 32 * 4
    assert result.parameter_bytes == result.gradient_bytes
    assert result.peak_bytes == max(live for _, live in result.timeline)
    assert result.peak_bytes < result.total_peak_bytes <= result.peak_bytes + result.gradient_bytes
    # conv1's and layer1's outputs alone: 64 channels of 16×16, and of 8×8 four times over.
    assert result.peak_bytes > 16 * 64 * (16 * 16 + 4 * 8 * 8) * 4
    offsets = [offset for offset, _ in result.timeline]
    assert offsets == sorted(offsets)
    assert 0 < result.backward_ms < offsets[-1]


def test_split_run_starts_from_the_same_weights_and_needs_less(tmp_path: Path) -> None:
    split = dataclasses.replace(SPLIT, until="layer2")
    options = small_options(split, epochs=1, image_size=64)
    data = small_data(64)
    path, baseline = tmp_path / "checkpoint.pt", tmp_path / "baseline.pt"
    split_result = train(options, data, checkpoint=path)
    unsplit_result = train(dataclasses.replace(options, split=None), data, checkpoint=baseline)
    assert split_result.peak_bytes < 0.6 * unsplit_result.peak_bytes
    assert split_result.parameter_bytes == unsplit_result.parameter_bytes
    assert load_checkpoint(path)["model"].keys() == load_checkpoint(baseline)["model"].keys()
    assert load_checkpoint(path)["split"]["grid"] == [2, 2]
    assert load_checkpoint(baseline)["split"] is None


def test_checkpoint_with_another_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    train(small_options(SPLIT, epochs=1), small_data(), checkpoint=path)
    other = small_options(dataclasses.replace(SPLIT, grid=(1, 2)), epochs=1)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt was trained with .*grid=\[2, 2\].*grid=\[1, 2\]"):
        train(other, small_data(), checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match=r"with .*grid=\[2, 2\].*; these arguments ask for no split"):
        train(small_options(epochs=1), small_data(), checkpoint=path, resume=True)


def test_checkpoint_of_other_arguments_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    train(small_options(epochs=1), small_data(), checkpoint=path)
    with pytest.raises(
        CheckpointError, match=r"trained with epochs=1, lr=0\.02; these arguments ask for epochs=2, lr=0\.5"
    ):
        train(small_options(epochs=2, lr=0.5), small_data(), checkpoint=path, resume=True)


def test_truncated_checkpoint_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    train(small_options(epochs=1), small_data(), checkpoint=path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged"):
        train(small_options(epochs=1), small_data(), checkpoint=path, resume=True)


def test_checkpoint_that_does_not_fit_the_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    train(small_options(epochs=1), small_data(), checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["model"]["fc.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt does not fit this model"):
        train(small_options(epochs=1), small_data(), checkpoint=path, resume=True)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_bf16_trains(tmp_path: Path, memory_format: str) -> None:
    options = small_options(SPLIT, epochs=1, precision="bf16", memory_format=memory_format)
    result = train(options, small_data(), checkpoint=tmp_path / "checkpoint.pt")
    assert result.loss[0] == pytest.approx(2.3, abs=1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"precision": "fp8"}, "fp32, bf16, fp16, got 'fp8'"),
        ({"device": "tpu"}, "cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "meta"}, "cpu, cuda or cuda:N, got 'meta'"),
        ({"epochs": 0}, "epochs must be from 1 to 2147483647, got 0"),
        ({"batch": 10**22}, "batch must be from 1 to 2147483647, got 1000"),
        ({"image_size": 10**30}, "image_size must be from 1 to 2147483647, got 1000"),
        ({"image_size": 2**31 - 1}, "resnet18 takes no images of 2147483647 pixels"),
        ({"image_size": 10**7, "split": SPLIT}, "memory does not suffice for batch 16 of image_size 10000000: "),
        ({"seed": 2**63}, f"seed must be from 0 to {2**63 - 1}, got {2**63}"),
        ({"seed": -1}, "seed must be from 0"),
        ({"batch": 1}, "batch 1 of image_size 32: Expected more than 1 value per channel"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"model": "alexnet"}, "resnet152, got 'alexnet'"),
        ({"model": "vgg11", "image_size": 16}, "vgg11 takes no images of 16 pixels"),
        ({"split": dataclasses.replace(SPLIT, until="layer9")}, "layer9"),
        ({"split": dataclasses.replace(SPLIT, grid=(99, 1))}, "99"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(OptionsError, match=message):
        train(small_options(**changes), small_data(), checkpoint=path)
    assert not path.exists()


def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(OptionsError, match="cuda is asked for, but torch finds no GPU"):
        train(small_options(device="cuda"), small_data(), checkpoint=tmp_path / "checkpoint.pt")


def test_default_until() -> None:
    assert default_until("resnet50") == "layer2"
    assert default_until("vgg16") == "features.16"
    assert default_until("vgg11") == "features.10"
    assert default_until("vgg16_bn") == "features.23"


def test_unsplit_training_learns(tmp_path: Path) -> None:
    options = TrainOptions(image_size=32, batch=16, epochs=8, lr=0.02)
    result = train(options, small_data(), checkpoint=tmp_path / "checkpoint.pt")
    assert result.loss[-1] < 0.3 * result.loss[0]
