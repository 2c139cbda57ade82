"""Signals that ask a program to stop, noticed where it suits it."""

import signal
import threading
from types import FrameType


class StopSignals:
    """Within it, SIGTERM and Ctrl-C set `received` instead of ending the process; a second one ends it at once.

    Signals are the main thread's; in another one this does nothing.
    """

    received: int = 0

    def __enter__(self) -> "StopSignals":
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        self._old = {int(number): signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._old[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
