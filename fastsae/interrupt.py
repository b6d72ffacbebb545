"""Ctrl-C, SIGTERM and SIGHUP: what is under way is finished first."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C between two forwards: no step is under way."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, SIGTERM or SIGHUP sets, so that a step is never cut in half; a second Ctrl-C raises."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        os.write(2, b"\nstopping when what is under way is done and saved; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, ask) for number in numbers if number not in ignored}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until(stop: threading.Event, write: Callable[[], bool]) -> Callable[[], bool]:
    """What brings more rows into a ring, as `write` does: one forward, or one piece of given activations; an interrupt ends it in between."""

    def more() -> bool:
        if stop.is_set():
            raise InterruptedRun
        return write()

    return more
