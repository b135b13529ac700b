"""What is tried again, where, and when: rules and a book of what has been tried, without I/O or clocks.

Given the error that an attempt ended with, `again` says what helps; `Attempts` remembers the replicas that
one piece of work has been tried on and says how long to pause before the next attempt, or that the error
stands. A round asks every replica once, without pause; when all have failed there is a pause, and another.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from enum import Enum, auto
from typing import Generic, TypeVar

from convservice.errors import ConvServiceError, Reason, ResourceExhausted, ServiceUnavailable

R = TypeVar("R")

BACKOFF = (0.1, 0.4, 1.6)
"""Seconds of the first pauses. After that many rounds an error stands."""

LONGEST_PAUSE = 30.0
"""Seconds; pauses grow no further."""


class Again(Enum):
    """What helps after an error."""

    NOTHING = auto()
    """Asking again gives the same error, or may do twice what is to be done once."""
    ELSEWHERE = auto()
    """Another replica may do it; this one has said that it cannot."""
    LATER = auto()
    """Another replica, or this one in a while: it could not be reached, or is stopping."""


def again(error: ConvServiceError) -> Again:
    """What helps after an error of something that may be done twice."""
    if isinstance(error, ServiceUnavailable):
        return Again.LATER
    if isinstance(error, ResourceExhausted) and error.retry_after is not None:
        return Again.ELSEWHERE
    return Again.ELSEWHERE if is_missing(error) or _unknown(error) else Again.NOTHING


def is_missing(error: ConvServiceError) -> bool:
    """Whether sending the network to the server and trying again helps."""
    return error.reason in {Reason.NETWORK_NOT_REGISTERED, Reason.WEIGHTS_MISSING}


def _unknown(error: ConvServiceError) -> bool:
    """Whether a server does not have what may have been registered at another one."""
    return error.reason == Reason.NETWORK_NOT_FOUND


def pause(failures: int, asked: float | None = None) -> float:
    """Seconds to leave a server alone that has failed so many times in a row, at least once.

    Args:
        failures: how many times.
        asked: seconds that it asked for itself.
    """
    if failures <= len(BACKOFF):
        seconds = BACKOFF[failures - 1]
    else:
        seconds = min(LONGEST_PAUSE, BACKOFF[-1] * 4.0 ** min(failures - len(BACKOFF), 9))
    return max(seconds * random.uniform(0.8, 1.2), asked or 0.0)  # noqa: S311 - spread out in time, no secret


class Attempts(Generic[R]):
    """What one piece of work has been tried on.

    Attributes:
        tried: the replicas that failed in this round.
    """

    def __init__(self) -> None:
        self.tried: set[R] = set()
        self._refused: set[R] = set()
        self._rounds = 0

    def failed(self, replica: R, error: ConvServiceError, replicas: Iterable[R]) -> float | None:
        """An attempt ended with `error`.

        Args:
            replica: where.
            error: how.
            replicas: all that there are now.

        Returns:
            Seconds to pause before the next attempt; None where the error stands.
        """
        kind = again(error)
        if kind is Again.NOTHING:
            return None
        self.tried.add(replica)
        if kind is Again.ELSEWHERE:
            self._refused.add(replica)
        everyone = set(replicas)
        if everyone - self.tried:
            return 0.0
        self._rounds += 1
        if everyone <= self._refused or self._rounds > len(BACKOFF):
            return None
        self.tried = set(self._refused)
        return pause(self._rounds, error.retry_after)

    def forgive(self, replica: R) -> None:
        """What a replica once said of this work holds no more: it was away since, and may be another now."""
        self._refused.discard(replica)
