"""Ctrl-C, kept waiting while something must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets a first Ctrl-C wait until the block is over. A second one is passed on at once.

    The signal's handler, whoever set it, is put back afterwards. In other threads than the main one there is nothing to
    do: Python delivers no Ctrl-C there.

    Example:
        >>> steps = []
        >>> try:
        ...     with uninterrupted():
        ...         signal.raise_signal(signal.SIGINT)
        ...         steps.append("whole")
        ... except KeyboardInterrupt:
        ...     steps.append("interrupted")
        >>> steps
        ['whole', 'interrupted']
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    waiting = False

    def wait(number: int, frame: Any) -> None:
        nonlocal waiting
        if waiting and callable(before):
            before(number, frame)
        waiting = True

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    except KeyboardInterrupt:
        waiting = False  # it got through
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
