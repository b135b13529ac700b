"""The servers that a client spreads its work over, and how each of them fares.

Given an `Endpoint` and the `Address`es behind it, `Replicas` keeps one `Replica` per server, each with a
connection and a memory of its own of what was sent there, and hands on the one that the next call goes to:
of those that are well the one with the least in flight, in turn where several are even. A server that failed
is left alone for a while, longer each time, and then tried with one call; the last one is never left alone.
`Route` is one piece of work's way from replica to replica until it is done.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from convservice.addresses import Address, Directory
from convservice.attempts import Again, Attempts, again, pause
from convservice.channel import closed_error
from convservice.endpoint import Endpoint
from convservice.errors import (
    ConvServiceError,
    DeadlineExceeded,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.known import KnownNetworks

C = TypeVar("C")


class Replica(Generic[C]):
    """One server of a client.

    Attributes:
        address: where it is.
        connection: to it.
        known: the networks that it is known to have.
        lone: whether the client can never have another one; gRPC then sends again by itself.
        retired: whether its name no longer leads to it; nothing new is sent there.
    """

    def __init__(self, address: Address, connection: C, lone: bool) -> None:
        self.address = address
        self.connection = connection
        self.known = KnownNetworks()
        self.lone = lone
        self.retired = False
        self.in_flight = 0
        self.failures = 0
        self.avoided_until = 0.0

    @property
    def target(self) -> str:
        """The server, as errors name it."""
        return self.address.target

    def __repr__(self) -> str:
        return f"Replica({self.target!r}, in_flight={self.in_flight}, failures={self.failures})"


class Replicas(Generic[C]):
    """All servers of a client.

    Args:
        endpoint: which they are.
        connect: a connection to an address; told whether it is the only one. It is not made before a call.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        connect: Callable[[Endpoint, Address, bool], C],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self.directory = Directory(endpoint.targets, clock)
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows, and the replicas' own counts
        self._addresses: tuple[Address, ...] = ()
        self._current: tuple[Replica[C], ...] = ()
        self._retired: list[Replica[C]] = []
        self._turn = 0
        self._closed = False
        _ALL.add(self)

    def current(self) -> tuple[Replica[C], ...]:
        """One for every server there is, as far as is known at the moment.

        Raises:
            InvalidRequest: the client is closed.
        """
        with self._lock:
            return self._updated()

    def choose(self, tried: Collection[Replica[C]] = ()) -> Replica[C]:
        """The replica that the next call goes to, counted as one more in flight until `done`.

        Args:
            tried: those that are not to be asked now, as long as there are others.

        Raises:
            InvalidRequest: the client is closed.
        """
        now = self._clock()
        with self._lock:
            replicas = self._updated()
            start, count = self._turn, len(replicas)
            in_turn = [replicas[(start + at) % count] for at in range(count)]
            left = [replica for replica in in_turn if replica not in tried] or in_turn
            well = [replica for replica in left if replica.avoided_until <= now]
            chosen = min(well, key=_load) if well else min(left, key=_avoided)
            self._turn = replicas.index(chosen) + 1
            if chosen.failures:  # one call tries it, the others wait for how that ends
                chosen.avoided_until = now + pause(chosen.failures)
            chosen.in_flight += 1
            return chosen

    @contextmanager
    def all(self) -> Generator[tuple[Replica[C], ...]]:
        """Every server there is, each with one more in flight while the context lasts: none is closed.

        Raises:
            InvalidRequest: the client is closed.
        """
        with self._lock:
            replicas = self._updated()
            for replica in replicas:
                replica.in_flight += 1
        try:
            yield replicas
        finally:
            for replica in replicas:
                self.done(replica)

    @contextmanager
    def use(self, replica: Replica[C]) -> Generator[Replica[C]]:
        """Counts one more in flight at a replica while the context lasts."""
        with self._lock:
            replica.in_flight += 1
        try:
            yield replica
        finally:
            self.done(replica)

    def done(self, replica: Replica[C]) -> None:
        """One less is in flight there."""
        with self._lock:
            replica.in_flight -= 1

    def succeeded(self, replica: Replica[C]) -> None:
        """A call there came back."""
        if replica.failures:
            with self._lock:
                replica.failures = 0
                replica.avoided_until = 0.0

    def failed(self, replica: Replica[C], error: ConvServiceError) -> None:
        """A call there ended with `error`, which tells of how the replica fares."""
        if isinstance(error, ResourceExhausted) and error.retry_after is not None:
            with self._lock:
                replica.avoided_until = max(replica.avoided_until, self._clock() + error.retry_after)
        elif isinstance(error, DeadlineExceeded | ServiceUnavailable) and error.reason != Reason.IDLE:
            with self._lock:
                replica.failures += 1
                replica.avoided_until = self._clock() + pause(replica.failures, error.retry_after)
            self.directory.refresh()

    def close(self) -> list[C]:
        """Ends everything; hands back the connections to be closed."""
        with self._lock:
            self._closed = True
            return [replica.connection for replica in (*self._current, *self._retired)]

    def discarded(self) -> list[C]:
        """Connections to servers that are no more, on which nothing runs, to be closed; each once."""
        if not self._retired:
            return []
        with self._lock:
            idle = [replica for replica in self._retired if not replica.in_flight]
            self._retired = [replica for replica in self._retired if replica.in_flight]
        return [replica.connection for replica in idle]

    def after_fork(self) -> None:
        """Forgets, in a forked child, what belongs to its parent: threads, locks, calls that run."""
        self._lock = threading.Lock()
        self.directory.after_fork()
        for replica in self._current:
            replica.in_flight = 0

    def _updated(self) -> tuple[Replica[C], ...]:
        """The replicas after what the directory knows now; the lock is held."""
        if self._closed:
            raise closed_error(self.endpoint.target)
        addresses = self.directory.addresses()
        if addresses != self._addresses:
            lone = len(addresses) == 1 and not self.directory.named  # a name may lead elsewhere soon
            kept = {replica.address: replica for replica in self._current if replica.lone == lone}
            self._addresses = addresses
            before, self._current = (
                self._current,
                tuple(
                    kept.get(address) or Replica(address, self._connect(self.endpoint, address, lone), lone)
                    for address in addresses
                ),
            )
            for replica in set(before) - set(self._current):
                replica.retired = True
                self._retired.append(replica)
        return self._current


def _load(replica: Replica[Any]) -> int:
    return replica.in_flight


def _avoided(replica: Replica[Any]) -> float:
    return replica.avoided_until


_ALL: weakref.WeakSet[Replicas[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for replicas in list(_ALL):
        replicas.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Route(Generic[C]):
    """One piece of work's way: at one replica until that fails, then at another. For one thread or task.

    Args:
        replicas: to choose from.
    """

    def __init__(self, replicas: Replicas[C]) -> None:
        self._replicas = replicas
        self._attempts: Attempts[Replica[C]] = Attempts()
        self._at: Replica[C] | None = None

    @property
    def replica(self) -> Replica[C]:
        """Where the work is now.

        Raises:
            InvalidRequest: the client is closed.
        """
        if self._at is None:
            self._at = self._replicas.choose(self._attempts.tried)
        return self._at

    @property
    def target(self) -> str:
        """Where the work is, or may be, for errors."""
        return self._replicas.endpoint.target if self._at is None else self._at.target

    def failed(
        self, error: ConvServiceError, left: float | None = None, *, patient: bool = False
    ) -> float | None:
        """The attempt at `replica` ended with `error`, and the work leaves it.

        Args:
            error: how.
            left: seconds that are left for the work.
            patient: whether a client's only server is asked again as well: gRPC has not done so.

        Returns:
            Seconds to pause before the next attempt; None where the error stands.
        """
        replica = self.replica
        self._replicas.failed(replica, error)
        self.leave()
        if again(error) is Again.NOTHING or (replica.lone and not patient):
            return None
        seconds = self._attempts.failed(replica, error, self._replicas.current())
        return None if seconds is None or (left is not None and seconds >= left) else seconds

    def succeeded(self) -> None:
        """The attempt at `replica` came back; what comes next has all its attempts before it."""
        self._attempts = Attempts()
        if self._at is not None:
            self._replicas.succeeded(self._at)

    def leave(self) -> None:
        """The work is done here, or goes elsewhere."""
        if self._at is not None:
            self._replicas.done(self._at)
            self._at = None
