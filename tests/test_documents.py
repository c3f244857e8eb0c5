"""The Python of the documents runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import splitkern as sk

ROOT = Path(__file__).resolve().parents[1]


def _blocks(document: str) -> list[tuple[int, str]]:
    """Line and text of every block of Python."""
    text = (ROOT / document).read_text()
    return [
        (text.count("\n", 0, found.start()) + 2, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def _surroundings() -> dict[str, Any]:
    """What a reader has before the first line."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(1000, (4,))
    return {
        "torch": torch,
        "torchvision": torchvision,
        "sk": sk,
        "model": model,
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "criterion": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "x": torch.randn(2, 3, 56, 56),
        "weight": torch.randn(4, 3, 3, 3),
    }


@pytest.mark.torchvision
@pytest.mark.parametrize(
    ("document", "goes_on"),
    [("README.md", False), ("docs/training.md", True)],
)
def test_python_in_documents(
    document: str, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`goes_on`: a block begins where the one before has ended."""
    monkeypatch.chdir(tmp_path)
    names, blocks = _surroundings(), _blocks(document)
    assert blocks
    for line, text in blocks:
        if not goes_on:
            names = _surroundings()
        exec(compile("\n" * (line - 1) + text, document, "exec"), names)
