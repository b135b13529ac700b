"""What each name holds of something that all share: streams, uploads, memory of running tensors.

Given a limit for every name, `Holdings` counts what each holds and refuses what would be more. It knows no
threads: who counts the whole calls it with a lock held.
"""

from __future__ import annotations

import sys

from convservice.errors import Reason, ResourceExhausted

RETRY_AFTER = 1.0
"""Seconds after which what a name wants may fit beside what it still holds."""


class Holdings:
    """Counts by name.

    Args:
        setting: the setting that holds the limit.
        what: what is counted, for messages.
        limit: the most that one name may hold.
    """

    def __init__(self, setting: str, what: str, limit: int = sys.maxsize) -> None:
        self._setting = setting
        self._what = what
        self._limit = limit
        self._held: dict[str, int] = {}

    def take(self, name: str, amount: int) -> None:
        """Counts `amount` more for a name.

        Raises:
            ResourceExhausted: `NAME_LIMIT`: the name would hold more than it may; with `retry_after` if it
                could have so much holding nothing else.
        """
        held = self._held.get(name, 0)
        if held + amount > self._limit:
            raise over_limit(name, self._setting, self._what, limit=self._limit, held=held, wanted=amount)
        self._held[name] = held + amount

    def give(self, name: str, amount: int) -> None:
        """Counts `amount` less for a name."""
        self._held[name] -= amount
        if not self._held[name]:
            del self._held[name]


def over_limit(
    name: str, setting: str, what: str, *, limit: int, held: int, wanted: int
) -> ResourceExhausted:
    """The refusal of what would be more than one name may hold.

    Args:
        name: who wants it; empty where nobody is asked who he is.
        setting: the setting that holds the limit.
        what: what is held, in words.
        limit: the most that one name may hold.
        held: what it holds.
        wanted: how much more it wants.
    """
    who = f"the name {name!r}" if name else "all callers together"
    return ResourceExhausted(
        f"{who} may hold at most {limit} {what} ({setting}); it holds {held}, this would be {wanted} more",
        reason=Reason.NAME_LIMIT,
        metadata={"setting": setting, "limit": str(limit), "held": str(held), "wanted": str(wanted)},
        retry_after=RETRY_AFTER if wanted <= limit else None,
    )
