"""Who listens to a split region: told, before each operation runs, which one it is and for which patch.

The memory capture labels what it records this way. One listener per thread; without one, telling costs a look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: Takes the operation's label (module path or function name), None between operations, and the number of the patch in
#: execution order, None where the operation is of all patches.
Listener = Callable[[str | None, int | None], None]

_listener: ContextVar[Listener | None] = ContextVar("splitkern_region_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every operation of a split region that this thread runs inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(label: str | None, patch: int | None) -> None:
    """Called by the region before each operation, and with (None, None) when it is done."""
    listener = _listener.get()
    if listener is not None:
        listener(label, patch)
