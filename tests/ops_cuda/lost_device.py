"""pytest plugin: a worker of pytest-xdist whose device is lost ends, so that a fresh one runs the remaining tests.

After an illegal access every later call of the process fails. `scripts/gpu_evidence.py` loads this; xdist reports the
test that lost the device as the one during which its worker crashed.
"""

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and _is_lost():
        reason = str(call.excinfo.value).strip().splitlines() if call.excinfo else []
        text = f"\nDEVICE LOST {item.nodeid} - {reason[0] if reason else 'no message'}\n"
        os.write((sys.__stderr__ or sys.stderr).fileno(), text.encode())
        os._exit(13)
    return report


def _is_lost() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return True
    return False
