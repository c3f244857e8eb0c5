"""`splitkern doctor --explain`: what it reads, what it refuses, what it prints."""

from __future__ import annotations

import json

import pytest
import torch

import splitkern as sk
from splitkern.cli import explain, main
from splitkern.cli.common import UserError

built_with_cuda = pytest.mark.skipif(sk.build_info().cuda_compiler is None, reason="this is a CPU-only build")
TEXT = "conv2d 32x64x56x56 128x64x3x3 stride 2 padding 1 bf16 channels_last grid 2x2"


def test_reads_every_word() -> None:
    text = "conv2d 2x64x56x40 128x16x3x5 stride 2x1 padding 1x0 dilation 3 groups 4 fp16 contiguous grid 4x2"
    assert explain.parse(f"{text} pass input_grad") == explain.ConvShape(
        input_size=(2, 64, 56, 40),
        weight_size=(128, 16, 3, 5),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(3, 3),
        groups=4,
        dtype="fp16",
        layout="contiguous",
        grid=(4, 2),
        passes=("input_grad",),
    )


def test_defaults() -> None:
    assert explain.parse("conv2d 1x8x9x9 8x8x3x3") == explain.ConvShape((1, 8, 9, 9), (8, 8, 3, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with one of conv2d, max_pool2d, avg_pool2d, batch_norm, copy, got ''"),
        ("conv3d 1x8x9x9 8x8x3x3", "must begin with one of conv2d, "),
        ("conv2d 1x8x9x9", "needs the size of input and weight"),
        ("conv2d 1x8x9 8x8x3x3", "the input size must be four whole numbers such as 32x64x56x56, each at least 1"),
        ("conv2d 1x8x9x9 8x8x3xthree", "the weight size must be four whole numbers"),
        ("conv2d 1x8x9x0 8x8x3x3", "the input size must be .* got '1x8x9x0'"),
        (
            "conv2d 1x8x9x9 8x8x3x3 stride 0",
            "stride must be one or two whole numbers such as 2 or 2x1, each at least 1",
        ),
        ("conv2d 1x8x9x9 8x8x3x3 padding -1", "padding must be .*, each at least 0 and below 10\\^9, got '-1'"),
        ("conv2d 1x8x9x1000000000 8x8x3x3", "each at least 1 and below 10\\^9, got '1x8x9x1000000000'"),
        ("conv2d 1x8x9x9 8x8x3x3 grid 2", "grid must be two whole numbers such as 2x2"),
        ("conv2d 1x8x9x9 8x8x3x3 groups 2x2", "groups must be one whole number"),
        ("conv2d 1x8x9x9 8x8x3x3 stride", "stride needs a value"),
        (
            "conv2d 1x8x9x9 8x8x3x3 pass backward",
            "pass must be one of forward, input_grad, weight_grad, got 'backward'",
        ),
        ("conv2d 1x8x9x9 8x8x3x3 int8", "'int8' means nothing here"),
        ("conv2d 1x8x9x9 8x8x3x3 fp16 bf16", "dtype is given twice"),
        ("conv2d 1x999999999x999999999x9 8x8x3x3", "the input must hold fewer than 2\\^62 elements"),
        ("max_pool2d 1x8x9x9 stride 2", "max_pool2d needs a kernel"),
        ("max_pool2d 1x8x9x9 kernel 2 groups 2", "'groups' means nothing here"),
        ("avg_pool2d 1x8x9x9 kernel 2 pass input_grad", "pass must be one of forward, backward, got 'input_grad'"),
        ("batch_norm 1x8x9x9 kernel 2", "'kernel' means nothing here"),
        ("conv2d 1x8x9x9 8x8x3x3 kernel 3", "'kernel' means nothing here"),
        ("conv2d 1x8x9x9 8x4x3x3", "C = 8, groups = 1 and K a multiple of the groups, got 8x4x3x3"),
        ("conv2d 1x8x9x9 9x4x3x3 groups 2", "groups = 2 and K a multiple of the groups, got 9x4x3x3"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain.parse(text)


def test_reads_poolings() -> None:
    assert explain.parse("max_pool2d 2x64x56x40 kernel 3x2") == explain.LayerShape(
        operator="max_pool2d", input_size=(2, 64, 56, 40), kernel=(3, 2), stride=(3, 2), passes=("forward", "backward")
    )
    assert explain.parse("avg_pool2d 2x64x56x40 kernel 2 stride 1 padding 1 fp32 pass backward") == explain.LayerShape(
        operator="avg_pool2d",
        input_size=(2, 64, 56, 40),
        kernel=(2, 2),
        stride=(1, 1),
        padding=(1, 1),
        dtype="fp32",
        passes=("backward",),
    )


def test_reads_batch_norm_and_copies() -> None:
    assert explain.parse("batch_norm 2x64x56x40 fp32 grid 2x2 pass apply") == explain.LayerShape(
        operator="batch_norm", input_size=(2, 64, 56, 40), dtype="fp32", grid=(2, 2), passes=("apply",)
    )
    assert explain.parse("copy 2x64x56x40").passes == ("offload", "prefetch")


def test_without_a_gpu_the_architecture_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU here: name one by --architecture, one of sm_80, "):
        explain.device_for(None)
    with pytest.raises(UserError, match=r"--architecture must be one of sm_80, .*, got 'sm_70'"):
        explain.device_for("sm_70")
    assert explain.device_for("sm_90").compute_capability == 90


def test_an_architecture_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--architecture", "sm_90"]) == 2
    assert "--architecture needs --explain" in capsys.readouterr().err


@built_with_cuda
def test_prints_each_pass_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--architecture", "sm_90", "--explain", TEXT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "on sm_90, as the H100 and H200 SXM, 132 multiprocessors"
    firsts = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert firsts == ["forward", "input_grad", "weight_grad"]


@built_with_cuda
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["doctor", "--json", "--architecture", "sm_80", "--explain", TEXT.replace("bf16", "fp64")]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["shape"]["input_size"] == [32, 64, 56, 56]
    assert answer["device"]["compute_capability"] == 80
    assert [one["operation"] for one in answer["passes"]] == ["forward", "input_grad", "weight_grad"]
    assert {one["path"] for one in answer["passes"]} == {"plain"}
    assert all(one["reason"].startswith("plain: any shape, type and strides") for one in answer["passes"])
    assert answer["passes"][2]["workspace_bytes"] > 0


@built_with_cuda
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv2d 1x8x2x9 8x8x3x3", "rows: Window: the effective kernel 3 must fit the padded input extent 2"),
        ("conv2d 1x8x9x9 8x8x3x3 grid 2x8", "columns: the number of patches must be at most the extent 7"),
    ],
)
def test_geometry_that_does_not_fit_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--architecture", "sm_80", "--explain", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith("splitkern doctor: error: --explain: ") and message in error
    assert error.count("\n") == 1
