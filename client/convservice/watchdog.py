"""A thread that watches a due time, for calls that wait without a limit of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `late` once a due time has passed; a thread, only where there is a time-out.

    Whatever becomes due later is due at least `timeout` from now, so the thread need not be woken: it sleeps
    until the due time or, without one, for `timeout`.
    """

    def __init__(
        self, timeout: float | None, due: Callable[[], float | None], late: Callable[[], None]
    ) -> None:
        self._timeout = timeout
        self._due = due
        self._late = late
        self._stop = threading.Event()

    def __enter__(self) -> None:
        if self._timeout is not None:
            name = "convservice-watchdog"
            threading.Thread(target=self._watch, args=(self._timeout,), name=name, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _watch(self, timeout: float) -> None:
        pause = timeout
        while not self._stop.wait(pause):
            due = self._due()
            pause = timeout if due is None else due - time.monotonic()
            if pause <= 0:
                self._late()
                return
