"""Golden outputs of the Hopper convolutions: what a GPU computed for a few small shapes, kept to the bit.

`python -m tests.kernel_checks.golden` records them on a GPU of compute capability 9.0, into ``golden_sm90.json`` here;
`make gpu-evidence` does, and keeps them in its own file too. The kernels that the tests run on the CPU are compared
with them.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitkern._library import forced_path
from tests.kernel_checks.cases import Case
from tests.kernel_checks.comparisons import Operators
from tests.kernel_checks.sm90 import SMALL, WINDOW

RECORDED = Path(__file__).with_name("golden_sm90.json")
FORMAT = "splitkern.golden"

_NAMES = (
    "uneven 2x2",
    "channel tails",
    "stride 2, 3x3",
    "dilation 2",
    "even 2x2",
    "resident, uneven",
    "wide, full rows",
)
CASES = [next(case for case in (*SMALL, *WINDOW) if case.name == name) for name in _NAMES]


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.contiguous(memory_format=torch.channels_last)


def outputs(operators: Operators, case: Case) -> Iterator[tuple[str, Tensor]]:
    """Name and result of every pass of a case, in bf16, inputs drawn on the CPU."""
    g = case.geometry
    input = _random((case.batch, case.in_channels, *g.in_size), 1)
    weight = _random((case.out_channels, case.in_channels // case.groups, *g.kernel), 2)
    grad_output = _random((case.batch, case.out_channels, *g.out_size), 3)
    window = (list(g.stride), list(g.padding), list(g.dilation), case.groups, *map(list, g.bounds))
    passes: dict[str, tuple[Any, ...]] = {
        "patch_conv2d": (input, weight, None, *window, "none"),
        "patch_conv2d_input_grad": (grad_output, weight, list(input.shape), *window),
        "patch_conv2d_weight_grad": (grad_output, input, list(weight.shape), *window),
    }
    for name, arguments in passes.items():
        yield f"{case.name}: {name}", operators(name, *arguments).contiguous()


def record(operators: Operators) -> dict[str, Any]:
    """All outputs as JSON: shape, and bits in base64."""
    found = {}
    for case in CASES:
        for name, value in outputs(operators, case):
            bits = base64.b64encode(value.view(torch.int16).numpy().tobytes()).decode()
            found[name] = {"shape": list(value.shape), "bfloat16": bits}
    return {"format": FORMAT, "outputs": found}


def read(entry: dict[str, Any]) -> Tensor:
    """An output of a record."""
    data = bytearray(base64.b64decode(entry["bfloat16"]))
    return torch.frombuffer(data, dtype=torch.bfloat16).reshape(entry["shape"])


def require_close(kept: dict[str, Any], operators: Operators) -> None:
    """Compares with a record. The hardware adds in an order of its own, so the last bit of bf16 may differ.

    Raises:
        AssertionError: naming the output that differs, or is missing.
    """
    assert kept["format"] == FORMAT, kept["format"]
    for case in CASES:
        for name, value in outputs(operators, case):
            wanted = read(kept["outputs"][name])
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                value, wanted, rtol=2**-7, atol=scale * 2**-9, msg=lambda text, name=name: f"{name}: {text}"
            )


def main(path: Path) -> None:
    """Records on the GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("golden outputs are recorded on a GPU of compute capability 9.0, and there is none")
    with forced_path("sm90"):
        kept = {"device": torch.cuda.get_device_name(), **record(Operators(torch.ops.splitkern, "cuda"))}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{len(kept['outputs'])} outputs in {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED)
