"""A call as the service sees it, whatever carries it: who asks, and whether anybody still wants the
answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from convservice.errors import Cancelled, ConvServiceError, DeadlineExceeded, Reason
from convservice_server.records import CallRecord

Clock = Callable[[], float]
"""Seconds that never go back, such as `time.monotonic`."""


def allowed() -> None:
    """Returns: whoever nobody asks may go on."""


class WaitEnded(Exception):
    """No message came before `Call.wait_until`; what that means is for those to say who set it."""


class Call:
    """One call.

    Args:
        owner: whose networks and weights it may use; all clients are one owner where nobody is asked who he
            is.
        deadline: by `clock`, when the caller stops waiting; None for never.
        clock: tells the time.
        still_allowed: returns while the owner may begin anything more, else raises `Unauthenticated`.
        record: what is known of it; a new one where not given.

    Attributes:
        wait_until: by `clock`, when a wait for this call's next message ends in `WaitEnded`; None for never.
            Set by the thread that waits.
    """

    def __init__(
        self,
        owner: str = "",
        deadline: float | None = None,
        clock: Clock = time.monotonic,
        still_allowed: Callable[[], None] = allowed,
        *,
        record: CallRecord | None = None,
    ) -> None:
        self.owner = owner
        self.still_allowed = still_allowed
        self.record = CallRecord() if record is None else record
        self.record.owner = owner
        self.wait_until: float | None = None
        self._deadline = deadline
        self._clock = clock
        self._why: ConvServiceError | None = None  # set before the next, and then no more
        self._given_up = threading.Event()

    def give_up(self, error: ConvServiceError | None = None) -> None:
        """Says, from any thread, that the call is to end; the first word counts.

        Args:
            error: why; None where the caller cancelled, disconnected or ran out of time.
        """
        if not self._given_up.is_set():
            self._why = error
            self._given_up.set()

    def check(self) -> None:
        """Returns while the answer is wanted.

        Raises:
            DeadlineExceeded: the caller's deadline has passed.
            Cancelled: the caller gave the call up, or is gone.
            ConvServiceError: what the call was given up with.
        """
        if self._deadline is not None and self._clock() >= self._deadline:
            raise DeadlineExceeded("the call's deadline has passed", reason=Reason.DEADLINE)
        if self._given_up.is_set():
            raise self._why or Cancelled("the caller gave the call up", reason=Reason.CANCELLED)
