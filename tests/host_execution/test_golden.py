"""The Hopper convolutions, executed by the CPU, against what a GPU computed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitkern._library import forced_path
from tests.kernel_checks import golden
from tests.kernel_checks.comparisons import Operators


@pytest.fixture(autouse=True)
def forced(host_library: Path) -> Iterator[None]:
    with forced_path("sm90", host_library):
        yield


def test_as_recorded_on_a_gpu(operators: Operators) -> None:
    if not golden.RECORDED.exists():
        pytest.skip("nothing has been recorded yet: python -m tests.kernel_checks.golden, on a GPU")
    golden.require_close(json.loads(golden.RECORDED.read_text()), operators)


def test_a_record_is_read_back_and_a_difference_is_seen(operators: Operators) -> None:
    kept = json.loads(json.dumps(golden.record(operators)))
    golden.require_close(kept, operators)
    entry = kept["outputs"]["channel tails: patch_conv2d_weight_grad"]
    value = golden.read(entry)
    value.view(-1)[17] += 1
    entry["bfloat16"] = base64.b64encode(bytes(value.view(-1).view(dtype=golden.torch.uint8).numpy())).decode()
    with pytest.raises(AssertionError, match="channel tails: patch_conv2d_weight_grad"):
        golden.require_close(kept, operators)
