"""Ends calls whose peer does not move.

Some waits inside gRPC cannot be given a time-out: for a unary call's request, and for room to send into a
stream that nobody reads. Given the way to end a call, `Watchdog.watch` does so when such a wait has taken too
long; one thread watches all calls.
"""

from __future__ import annotations

import logging
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
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()  # guards _waits
        self._waits: dict[object, tuple[float, Callable[[], object]]] = {}
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
        """Calls `end`, once and from another thread, if the context lasts longer than the time-out."""
        key = object()
        with self._lock:
            self._waits[key] = (time.monotonic(), end)
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(key, None)

    def _run(self) -> None:
        while not self._stopped.wait(self._timeout / _CHECKS):
            now = time.monotonic()
            with self._lock:
                late = [key for key, (since, _) in self._waits.items() if now - since > self._timeout]
                ends = [self._waits.pop(key)[1] for key in late]
            for end in ends:
                log.warning("a call is ended: its peer has not moved for %g s", self._timeout)
                end()
