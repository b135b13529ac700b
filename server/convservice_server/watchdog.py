"""Ends calls whose peer does not move.

Some waits inside gRPC cannot be given a time-out: for a unary call's request, and for room to send into a
stream that nobody reads. Given the way to end a call, `Watchdog.watch` does so when such a wait has taken too
long, which is sooner for the longest of many that wait at the same time; one thread watches all calls.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Self

log = logging.getLogger(__name__)

_CHECKS = 4
"""Looks per time-out: a stuck call is ended at most a quarter late."""


class Watchdog:
    """Ends waits that take longer than a time-out; a context manager that runs its thread.

    Args:
        timeout: seconds.
        few: waits at the same time that are given the whole time-out.
        patience: seconds for those that have waited longest where more than `few` wait.
    """

    def __init__(self, timeout: float, few: int = sys.maxsize, patience: float = math.inf) -> None:
        self._timeout = timeout
        self._few = few
        self._patience = min(patience, timeout)
        self._lock = threading.Lock()  # guards _waits
        self._waits: dict[object, tuple[float, Callable[[], object]]] = {}  # the longest first
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, end: Callable[[], object]) -> Generator[None]:
        """Calls `end`, once and from another thread, if the context lasts too long."""
        key = object()
        with self._lock:
            self._waits[key] = (time.monotonic(), end)
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(key, None)

    def _run(self) -> None:
        while not self._stopped.wait(self._patience / _CHECKS):
            now = time.monotonic()
            with self._lock:
                crowd = len(self._waits) - self._few
                late = [
                    key
                    for place, (key, (since, _)) in enumerate(self._waits.items())
                    if now - since > (self._patience if place < crowd else self._timeout)
                ]
                ended = [self._waits.pop(key) for key in late]
            for since, end in ended:
                log.warning("a call is ended: its peer has not moved for %.1f s", now - since)
                end()
