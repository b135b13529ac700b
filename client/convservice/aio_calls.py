"""The async client's way of making the calls of a flow: the twin of `calls`."""

# ruff: noqa: ASYNC109 - `timeout` is shared by the calls of a flow, and travels to the server
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from convservice.addresses import FIRST_SECONDS
from convservice.aio_channel import AsyncConnection
from convservice.errors import ConvServiceError
from convservice.flows import Flow
from convservice.replicas import Replica, Replicas, Route

T = TypeVar("T")

AsyncReplica = Replica[AsyncConnection]

Make = Callable[[AsyncReplica], Flow[T]]
"""A flow for a replica; called anew for each attempt."""


class AsyncCalls:
    """Makes the calls of flows; see `calls.Calls`.

    Args:
        replicas: where they go.
    """

    def __init__(self, replicas: Replicas[AsyncConnection]) -> None:
        self.replicas = replicas

    @asynccontextmanager
    async def route(self, timeout: float | None) -> AsyncGenerator[Route[AsyncConnection]]:
        """A way for one piece of work; the names of servers have been looked up when it begins."""
        await self.look_up(timeout)
        route = Route(self.replicas)
        try:
            yield route
        finally:
            route.leave()
            await self._discard()

    async def look_up(self, timeout: float | None) -> None:
        """Waits until every name has been looked up once; no longer than `FIRST_SECONDS`."""
        directory = self.replicas.directory
        if directory.known:
            return
        loop, found = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(found.set)

        directory.subscribe(listener)
        try:
            directory.refresh()
            if not directory.known:
                limit = FIRST_SECONDS if timeout is None else min(timeout, FIRST_SECONDS)
                await asyncio.wait([asyncio.create_task(found.wait())], timeout=limit)
        finally:
            directory.unsubscribe(listener)

    async def anywhere(self, make: Make[T], timeout: float | None) -> T:
        """The result of a flow at one replica or another, within `timeout` seconds."""
        async with self.route(timeout) as route:
            return await self.along(route, make, timeout)

    async def along(self, route: Route[AsyncConnection], make: Make[T], timeout: float | None) -> T:
        """The same where the route leads, which stays at the replica that did it."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else end - time.monotonic()
            replica = route.replica
            try:
                result = await self.at(replica, make(replica), left)
            except ConvServiceError as exc:
                pause = route.failed(exc, None if end is None else end - time.monotonic())
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                route.succeeded()
                return result

    async def everywhere(self, make: Make[T], timeout: float | None) -> dict[str, T | ConvServiceError]:
        """The result of a flow, or its error, at each replica by its address; each has `timeout` seconds."""
        await self.look_up(timeout)
        found: dict[str, T | ConvServiceError] = {}
        with self.replicas.all() as replicas:
            for replica in replicas:
                try:
                    found[replica.target] = await self.at(replica, make(replica), timeout)
                except ConvServiceError as exc:
                    self.replicas.failed(replica, exc)
                    found[replica.target] = exc
                else:
                    self.replicas.succeeded(replica)
        return found

    async def at(self, replica: AsyncReplica, flow: Flow[T], timeout: float | None) -> T:
        """Makes the calls of a flow at one replica, all of them within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        try:
            call = next(flow)
            while True:
                left = None if end is None else max(0.001, end - time.monotonic())
                try:
                    answer = await replica.connection.unary(call.method, call.payload(), left)
                except ConvServiceError as exc:
                    call = flow.throw(exc)
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def close(self) -> None:
        """Closes every connection; what runs on them is cancelled."""
        for connection in self.replicas.close():
            await connection.close()

    async def _discard(self) -> None:
        for connection in self.replicas.discarded():
            await connection.close()
