"""What a client remembers of a server: the networks that were sent there."""

from __future__ import annotations

_MOST_KNOWN = 4096


class KnownNetworks:
    """Names of networks that a server is known to have; forgets all when it grows too large.

    Safe in threads without a lock: every step is one operation on a set.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """The server has it."""
        if len(self._names) >= _MOST_KNOWN:
            self._names.clear()
        self._names.add(name)

    def clear(self) -> None:
        """The server may have been restarted."""
        self._names.clear()

    def forget(self, name: str) -> None:
        """The server does not have it, or may not."""
        self._names.discard(name)
