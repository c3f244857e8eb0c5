"""What the whole suite shares: which tests run on this machine.

`gpu` tests need a CUDA device, `torchvision` tests a torchvision that imports (the one on PyPI does not beside a CPU
build of torch), `large` tests `--large`. Without, they are skipped, unless SPLITKERN_REQUIRE_GPU=1 or
SPLITKERN_REQUIRE_TORCHVISION=1 says that this machine is supposed to have it: then they fail.
"""

import functools
import os
from collections.abc import Iterator

import pytest
import torch

# oneDNN reads this at its first use. Its bf16 kernels for AMX let unrelated memory into results where channels do not
# fill a tile (uxlfoundation/oneDNN#5717), so that tests could fail at random on a machine that has AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="also run the tests marked large")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One process alone takes the GPU: two would share its memory, and a failed launch spoils a context."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.xdist_group("gpu"))


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured is kept for the run, by all of its processes, and not in the user's own cache."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


@functools.cache
def torchvision_failure() -> str | None:
    """Returns why torchvision does not import, or None where it does."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: its operators do not fit this torch
        return str(error).splitlines()[0]
    return None


def skip_or_fail(variable: str, reason: str) -> None:
    if os.environ.get(variable) == "1":
        pytest.fail(f"{reason}, and {variable}=1 makes that a failure", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("large") and not item.config.getoption("--large"):
        pytest.skip("large: run with --large")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        skip_or_fail("SPLITKERN_REQUIRE_GPU", "no CUDA device")
    if item.get_closest_marker("torchvision"):
        failure = torchvision_failure()
        if failure is not None:
            skip_or_fail("SPLITKERN_REQUIRE_TORCHVISION", f"torchvision does not import: {failure}")
