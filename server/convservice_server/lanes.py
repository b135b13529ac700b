"""Calls of one kind that run at the same time: counted, and refused beyond a limit."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from convservice.errors import Reason, ResourceExhausted
from convservice_server.holdings import Holdings

_RETRY_AFTER = 1.0


class Count:
    """How many of something there are now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _now
        self._now = 0

    @property
    def now(self) -> int:
        """The count."""
        with self._lock:
            return self._now

    @contextmanager
    def one(self) -> Generator[None]:
        """Counts one more while the context lasts."""
        with self._lock:
            self._now += 1
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class Lane:
    """One kind of call.

    Args:
        kind: its name, for messages.
        limit: most calls at the same time.
        by_name: counts them by the name of who calls.
    """

    def __init__(self, kind: str, limit: int, by_name: Holdings) -> None:
        self._kind = kind
        self._limit = limit
        self._by_name = by_name
        self._lock = threading.Lock()  # guards _count and _by_name
        self._count = 0

    @property
    def count(self) -> int:
        """Calls that run now."""
        with self._lock:
            return self._count

    @contextmanager
    def enter(self, name: str) -> Generator[None]:
        """Counts a call of that name while the context lasts.

        Raises:
            ResourceExhausted: `TOO_MANY_STREAMS`: as many run as may; `NAME_LIMIT`: as many of this name.
        """
        with self._lock:
            if self._count >= self._limit:
                raise ResourceExhausted(
                    f"at most {self._limit} {self._kind} run at the same time, and as many do",
                    reason=Reason.TOO_MANY_STREAMS,
                    metadata={"limit": str(self._limit)},
                    retry_after=_RETRY_AFTER,
                )
            self._by_name.take(name, 1)
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._by_name.give(name, 1)
                self._count -= 1
