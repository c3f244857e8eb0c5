"""Keeps a capture and what is around it apart: it leaves no trace in the model and in the process, and what the caller
has set up for real steps takes no part in it. Called by :mod:`splitkern.memory.capture`.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from splitkern.memory.record import CaptureError

#: What `nn.Module` itself keeps by name.
_STORES = ("_parameters", "_buffers", "_modules")
_OF_MODULES = frozenset(nn.Module().__dict__)
_PLAIN = (int, float, str, tuple, type(None))


def where(path: str, module: nn.Module) -> str:
    """A module, for the text of an error."""
    return f"module {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"


@contextmanager
def isolated(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A block in which a step of these modules is captured.

    Raises:
        CaptureError: at its end, where the forward pass changed what a captured step would not change.
    """
    with ExitStack() as stack:
        stack.enter_context(_without_interrupts())
        stack.enter_context(_unchanged(modules))
        stack.enter_context(_fresh_autocast_cache())
        stack.enter_context(_fresh_parametrizations())
        stack.enter_context(_plain_saved_tensors())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # there are no values to check
        stack.enter_context(_same_draws())
        yield


class Holdings:
    """The parameters, buffers and modules that modules have.

    Args:
        modules: by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._held = [
            (path, module, store, dict(module.__dict__[store])) for path, module in modules.items() for store in _STORES
        ]

    def require_kept(self) -> None:
        """Refuse a module that has got others.

        Raises:
            CaptureError: naming it.
        """
        for path, module, store, before in self._held:
            now = module.__dict__[store]
            key = next((one for one in {**before, **now} if before.get(one) is not now.get(one)), None)
            if key is not None:
                raise CaptureError(
                    f"{where(path, module)} puts something else in the place of its {key!r}, which a captured step "
                    "would not do; update it in place (copy_)"
                )


def _entries(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


@contextmanager
def _unchanged(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Give every module back what it held; a tensor of the step that it keeps is an error."""
    before = [
        (path, module, dict(module.__dict__), {key: dict(module.__dict__[key]) for key in _STORES})
        for path, module in modules.items()
    ]
    containers: list[tuple[str, nn.Module, str, Any, Any]] = [
        (path, module, key, value, value.copy())
        for path, module, attributes, _ in before
        for key, value in attributes.items()
        if key not in _OF_MODULES and isinstance(value, list | dict | set)
    ]
    kept: list[str] = []
    changed: list[str] = []
    try:
        yield
    finally:
        for path, module, key, value, content in containers:
            now, then = _entries(value), _entries(content)
            if len(now) == len(then) and all(one is other for one, other in zip(now, then, strict=True)):
                continue
            changed.append(f"{where(path, module)} changes its {key!r} in the forward pass")
            value.clear()
            if isinstance(value, list):
                value.extend(content)
            else:
                value.update(content)
        for path, module, attributes, dictionaries in before:
            for key, value in list(module.__dict__.items()):
                if attributes.get(key, _unchanged) is value:
                    continue
                if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(value)):
                    kept.append(f"{where(path, module)} keeps a tensor of the step in {key!r}")
                elif key not in attributes or (isinstance(value, _PLAIN) and value != attributes[key]):
                    changed.append(f"{where(path, module)} changes its {key!r} in the forward pass")
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, values in dictionaries.items():
                module.__dict__[key].clear()
                module.__dict__[key].update(values)
    if kept:
        raise CaptureError(f"{kept[0]}, which a captured step would not set; return it instead")
    if changed:
        raise CaptureError(f"{changed[0]}, which a captured step would not do; change it in the training loop")


@contextmanager
def _fresh_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of parameters: neither may the capture see real ones nor may fake ones stay."""
    enabled = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    if enabled:
        torch.clear_autocast_cache()
    try:
        yield
    finally:
        if enabled:
            torch.clear_autocast_cache()


@contextmanager
def _fresh_parametrizations() -> Iterator[None]:
    """So does `torch.nn.utils.parametrize.cached`, of what it has computed."""
    module: Any = parametrize
    before = module._cache_enabled, module._cache
    module._cache_enabled, module._cache = 0, {}
    try:
        yield
    finally:
        module._cache_enabled, module._cache = before


@contextmanager
def _plain_saved_tensors() -> Iterator[None]:
    """The caller's hooks on saved tensors (a checkpoint around the model) run on real ones, in the middle of a step."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return

    def itself(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(itself, itself):
        yield


@contextmanager
def _same_draws() -> Iterator[None]:
    """Python's and NumPy's generators stay as they were. What they decide would hold for every step."""
    numpy: Any = sys.modules.get("numpy")
    before = random.getstate()
    before_numpy: Any = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        has_drawn = random.getstate() != before
        random.setstate(before)
        if numpy is not None:
            _, keys, position, *_ = numpy.random.get_state()
            has_drawn = has_drawn or position != before_numpy[2] or bool((keys != before_numpy[1]).any())
            numpy.random.set_state(before_numpy)
        if has_drawn:
            # Another thread may have drawn, so that this is no error.
            warnings.warn(
                "random numbers of Python's or NumPy's generators were drawn while a step was captured: what the "
                "forward pass decides by them is decided once, for every step; draw with torch and compute with the "
                "tensor",
                stacklevel=2,
            )


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C comes at the end: in the middle, an exception out of PyTorch's tracing can end the whole process. The
    second one comes at once.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    handle: Callable[..., Any] = before
    came: list[tuple[Any, ...]] = []

    def note(*args: Any) -> None:
        came.append(args)
        if len(came) > 1:
            signal.signal(signal.SIGINT, handle)
            handle(*args)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handle)
        if len(came) == 1:
            handle(*came[0])
