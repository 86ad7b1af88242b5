"""Signals that end a run wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Stop:
    """Signals that wait for the end of a step: `asked` has the one that came."""

    def __init__(self, handlers: Mapping[int, Callable]):
        self.handlers, self.asked = handlers, []

    def wait(self, signum: int, frame: Any) -> None:
        """Remember a first signal; a second one does not wait."""
        if self.asked:
            self.handlers[signum](signum, frame)
        self.asked.append(signum)

    def let_through(self, asked: list[int]) -> None:
        """Do what the program does on the first of these signals, if any."""
        if asked:
            self.handlers[asked[0]](asked[0], None)


@contextmanager
def undivided() -> Iterator[Stop]:
    """Ctrl-C, and SIGTERM and SIGHUP where the program handles them, wait until they are let through; a second one does
    not."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop({})
        return
    ends = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP
    stop = Stop({s: h for s in ends if callable(h := signal.getsignal(s))})
    for s in stop.handlers:
        signal.signal(s, stop.wait)
    try:
        yield stop
    finally:
        for s, handler in stop.handlers.items():
            signal.signal(s, handler)
