"""`splitkern doctor`: what it reports, and that it never fails on a machine that lacks something."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

import splitkern as sk
from splitkern.cli import doctor, link, main
from splitkern.cli.explain import conv_paths

AS_BUILT_WITH_NVCC = dataclasses.replace(
    sk.build_info(), cuda_compiler="nvcc 13.0.88", cuda_architectures=("sm_80", "sm_90a", "compute_80")
)
GPU = doctor.Gpu("A GPU", "8.6", 24 * 2**30, "sm_80")


def test_text_names_versions_and_every_path(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"splitkern   {sk.__version__}" in text
    assert sk.build_info().library in text
    assert f"torch       {torch.__version__}" in text
    assert "cpu               available: a trial convolution equals PyTorch's" in text
    assert "cuda plain" in text
    assert text.endswith("splitkern is usable here.\n")


def test_json_is_one_object_with_the_same_findings(capsys: pytest.CaptureFixture[str]):
    assert doctor.run(argparse.Namespace(json=True, explain=None, architecture=None)) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["usable"] is True
    assert findings["torch"] == torch.__version__
    assert findings["build"]["version"] == sk.__version__
    others = [f"cuda {name}" for name in conv_paths() if name != "plain"]
    assert [path["name"] for path in findings["paths"]] == ["cpu", "cuda plain", *others]
    assert len(findings["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "compute_80"),
        ((12, 0), "sm_120"),
        ((7, 5), None),
    ],
)
def test_which_code_a_gpu_runs(capability: tuple[int, int], code: str | None):
    architectures = ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")
    assert doctor.code_for_device(architectures, *capability) == code


def test_machine_code_with_the_a_suffix_runs_on_that_gpu_alone():
    assert doctor.code_for_device(("sm_90a",), 9, 1) is None
    assert doctor.code_for_device((), 9, 0) is None


def test_a_cpu_only_build_says_how_to_get_cuda():
    build = dataclasses.replace(sk.build_info(), cuda_compiler=None, cuda_architectures=())
    assert doctor._why_no_cuda(build, ()) == (
        "splitkern was built without nvcc; set CUDA_HOME to a CUDA 13 toolkit and rebuild"
    )


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._why_no_cuda(AS_BUILT_WITH_NVCC, ()) == f"torch {torch.__version__} is a build without CUDA"


def test_no_visible_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reason = doctor._why_no_cuda(AS_BUILT_WITH_NVCC, ())
    assert reason is not None and reason.startswith("PyTorch sees no CUDA device")


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    old = dataclasses.replace(GPU, compute_capability="7.5", code="none of sm_80 runs on it")
    reason = doctor._why_no_cuda(AS_BUILT_WITH_NVCC, (old,))
    assert reason == "A GPU has compute capability 7.5: none of sm_80 runs on it"
    assert doctor._why_no_cuda(AS_BUILT_WITH_NVCC, (GPU,)) is None


def test_driver_version_is_read_from_the_kernel_module(tmp_path: Path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    assert doctor._driver_version(file) == "580.65.06"
    assert doctor._driver_version(tmp_path / "absent") is None
    file.write_text("unexpected")
    assert doctor._driver_version(file) is None


def test_a_wrong_result_makes_the_path_unavailable_and_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args, **options: 1.5 * right(*args, **options))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "cpu               not available: a trial convolution is off by" in text
    assert text.endswith("splitkern is not usable here.\n")


@pytest.mark.gpu
def test_the_cuda_paths_of_this_gpu_are_available():
    findings = doctor.examine()
    elsewhere = () if torch.cuda.get_device_capability() == (9, 0) else ("cuda sm90",)
    for path in findings.paths:
        assert path.available == (path.name not in elsewhere), path
    assert findings.driver is not None
    assert findings.gpus[0].code.startswith(("sm_", "compute_"))
    assert isinstance(findings.link, link.Link), findings.link
    assert findings.link.from_device_gbps > 0.1


class HostClock:
    """Stands in for a CUDA event."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, end: HostClock) -> float:
        return max(end.seconds - self.seconds, 1e-9) * 1e3


def test_the_link_is_measured_with_the_package_s_own_copies():
    found = link.measure(torch.device("cpu"), size_bytes=1 << 16, clock=HostClock)
    assert found.from_device_gbps > 0
    assert found.to_device_gbps > 0
    text = dataclasses.replace(found, from_device_gbps=55.04, to_device_gbps=54.96, size_bytes=2 << 20).text
    assert text == "55.0 GB/s from the GPU, 55.0 GB/s to it (pinned memory, 2 MiB, contiguous)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_link_says_why_it_was_not_measured(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("copies"))
    assert line.startswith("copies      not measured: ")
    findings = doctor.examine()
    assert findings.link == doctor._why_no_cuda(findings.build, findings.gpus)
