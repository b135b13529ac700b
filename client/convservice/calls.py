"""The sync client's way of making the calls of a flow: at one replica, wherever it goes, or at all of them.

Given `Replicas` and a flow for one of them, `Calls` makes its calls, all of one attempt at the same replica,
and goes to another where `attempts` says so; it hands back the flow's result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from convservice.channel import Connection
from convservice.errors import ConvServiceError
from convservice.flows import Flow
from convservice.replicas import Replica, Replicas, Route

T = TypeVar("T")

SyncReplica = Replica[Connection]

Make = Callable[[SyncReplica], Flow[T]]
"""A flow for a replica; called anew for each attempt."""


class Calls:
    """Makes the calls of flows.

    Args:
        replicas: where they go.
    """

    def __init__(self, replicas: Replicas[Connection]) -> None:
        self.replicas = replicas

    @contextmanager
    def route(self, timeout: float | None) -> Generator[Route[Connection]]:
        """A way for one piece of work; the names of servers have been looked up when it begins."""
        self.replicas.directory.wait(timeout)
        route = Route(self.replicas)
        try:
            yield route
        finally:
            route.leave()
            self._discard()

    def anywhere(self, make: Make[T], timeout: float | None) -> T:
        """The result of a flow at one replica or another, within `timeout` seconds."""
        with self.route(timeout) as route:
            return self.along(route, make, timeout)

    def along(self, route: Route[Connection], make: Make[T], timeout: float | None) -> T:
        """The same where the route leads, which stays at the replica that did it."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else end - time.monotonic()
            replica = route.replica
            try:
                result = self.at(replica, make(replica), left)
            except ConvServiceError as exc:
                pause = route.failed(exc, None if end is None else end - time.monotonic())
                if pause is None:
                    raise
                time.sleep(pause)
            else:
                route.succeeded()
                return result

    def everywhere(self, make: Make[T], timeout: float | None) -> dict[str, T | ConvServiceError]:
        """The result of a flow, or its error, at each replica by its address; each has `timeout` seconds."""
        self.replicas.directory.wait(timeout)
        found: dict[str, T | ConvServiceError] = {}
        with self.replicas.all() as replicas:
            for replica in replicas:
                try:
                    found[replica.target] = self.at(replica, make(replica), timeout)
                except ConvServiceError as exc:
                    self.replicas.failed(replica, exc)
                    found[replica.target] = exc
                else:
                    self.replicas.succeeded(replica)
        return found

    def at(self, replica: SyncReplica, flow: Flow[T], timeout: float | None) -> T:
        """Makes the calls of a flow at one replica, all of them within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        try:
            call = next(flow)
            while True:
                left = None if end is None else max(0.001, end - time.monotonic())
                try:
                    answer = replica.connection.unary(call.method, call.payload(), left)
                except ConvServiceError as exc:
                    call = flow.throw(exc)
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def close(self) -> None:
        """Closes every connection; what runs on them is cancelled."""
        for connection in self.replicas.close():
            connection.close()

    def _discard(self) -> None:
        for connection in self.replicas.discarded():
            connection.close()
