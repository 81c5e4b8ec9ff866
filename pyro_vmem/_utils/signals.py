"""Ctrl-C as a request to stop, which is granted between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["on_interrupt"]


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Calls a function at the first Ctrl-C in the block; the second goes to the previous handler.

    It does nothing outside the main thread, where Python delivers no Ctrl-C.

    Example:
        >>> asked = []
        >>> with on_interrupt(lambda: asked.append("stop")):
        ...     signal.raise_signal(signal.SIGINT)
        ...     asked.append("whole")
        >>> asked
        ['stop', 'whole']
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    pressed = False

    def handle(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed and callable(before):
            before(number, frame)
        pressed = True
        stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
