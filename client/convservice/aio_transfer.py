"""The async client's whole tensors: the twin of `transfer`, with tasks where that has threads and locks.

A task of its own writes, from the start of the call; the answers are read in the caller's task. Everything
runs in one event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from convservice import flows
from convservice.aio_calls import AsyncCalls, AsyncReplica
from convservice.aio_channel import AsyncConnection, AsyncStream
from convservice.attempts import is_missing
from convservice.errors import Cancelled, ConvServiceError, ServiceUnavailable
from convservice.flight import Flight, streamed
from convservice.jobs import Collector, Job, broken
from convservice.network import Network
from convservice.progress import Meter
from convservice.replicas import Route
from convservice.transfer import OnReport, Supply, timed_out, unanswered
from convservice.v1 import conv_pb2 as pb

T = TypeVar("T")


class AsyncPipeline:
    """Whole tensors through one stream: written ahead within `Flight`'s bound, results in order.

    See `transfer.Pipeline`, whose arguments it takes.
    """

    def __init__(
        self,
        calls: AsyncCalls,
        jobs: AsyncIterator[Job],
        *,
        timeout: float | None,
        meter: Meter,
        on_report: OnReport = None,
    ) -> None:
        self._calls = calls
        self._route: Route[AsyncConnection] = Route(calls.replicas)
        self._jobs = jobs
        self._timeout = timeout
        self._meter = meter
        self._on_report = on_report
        self._pulling: asyncio.Task[None] | None = None
        self._pulled: Job | None = None
        self._jobs_error: BaseException | None = None
        self._ended = False
        self._flight = Flight()
        self._changed = asyncio.Event()  # set whenever reader or writer may have something to do
        self._call: AsyncStream | None = None
        self._writer: asyncio.Task[None] | None = None
        self._fatal: BaseException | None = None

    async def results(self, network: Network) -> AsyncGenerator[Any, None]:
        """The results, in order. Leaving early cancels the call."""
        async with self._calls.route(self._timeout) as self._route:
            try:
                await self._calls.along(
                    self._route, lambda at: flows.ensure(at.known, network), self._timeout
                )
                while (collector := await self._next()) is not None:
                    if self._on_report is not None and collector.report is not None:
                        self._on_report(collector.report)
                    yield collector.result()
            finally:
                self._drop_call()
                if self._pulling is not None:
                    self._pulling.cancel()
        if self._jobs_error is not None:
            raise self._jobs_error

    async def _next(self) -> Collector | None:
        """The next tensor's results, over as many connections as it takes; None at the end."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                return await self._attempts(limit)
        except TimeoutError:
            if limit.expired():
                raise timed_out(self._timeout or 0.0, self._route.target) from None
            raise

    async def _attempts(self, limit: asyncio.Timeout) -> Collector | None:
        registered: set[AsyncReplica] = set()
        supply: Supply | None = None
        while True:
            try:
                if supply is not None:
                    await self._supply(supply)
                    supply = None
                collector = await self._attempt(limit)
            except ConvServiceError as exc:
                self._drop_call()
                if self._fatal is not None:
                    raise self._fatal from None
                if isinstance(exc, ServiceUnavailable) and self._nothing_to_send():
                    if await self._at_hand() is not None:
                        continue
                    return None
                job = self._flight.oldest
                if is_missing(exc) and self._route.replica not in registered and job is not None:
                    registered.add(self._route.replica)
                    supply = partial(flows.register, network=job.network)
                    continue
                pause = self._route.failed(exc, patient=True)
                if pause is None:
                    raise
                supply = None if job is None else partial(flows.ensure, network=job.network)
                await asyncio.sleep(pause)
            else:
                self._route.succeeded()
                return collector

    async def _supply(self, supply: Supply) -> None:
        """Sends the network to the server where the work is now."""
        replica = self._route.replica
        await self._calls.at(replica, supply(replica.known), self._timeout)

    def _nothing_to_send(self) -> bool:
        """Whether a lost connection matters to no job."""
        return not len(self._flight) and self._pulled is None

    async def _attempt(self, limit: asyncio.Timeout) -> Collector | None:
        call = self._call or self._open_call()
        while not (len(self._flight) or self._ended or self._fatal or call.over):
            await self._change()
        if self._ended and not len(self._flight):
            await self._read_end(call)
            return None
        if len(self._flight) and limit.when() is None and self._timeout is not None:
            limit.reschedule(asyncio.get_running_loop().time() + self._timeout)
        return await self._read(call)

    async def _read(self, call: AsyncStream) -> Collector:
        collector: Collector | None = None
        while (message := await call.answer()) is not None:
            if collector is None:
                collector = self._collector()
            self._meter.received(len(message.payload.data))
            if collector.receive(message):
                self._flight.deliver()
                self._changed.set()
                return collector
        raise unanswered(self._route.target)

    async def _read_end(self, call: AsyncStream) -> None:
        """Lets the server end the stream; with every tensor delivered, how it ends is all the same."""
        with suppress(Cancelled, ServiceUnavailable):
            if await call.answer() is not None:
                raise broken("an answer came after every tensor was closed", self._route.target)

    def _collector(self) -> Collector:
        job = self._flight.oldest
        if job is None:
            raise broken("an answer came before any tensor was sent", self._route.target)
        return Collector(job, self._route.target)

    def _open_call(self) -> AsyncStream:
        self._meter.restart()
        self._flight.lose()
        call = self._call = self._route.replica.connection.stream(None)
        call.when_over(self._changed.set)
        self._writer = asyncio.create_task(self._write(call))
        return call

    def _drop_call(self) -> None:
        """Cancels the call and its writer."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._writer is not None:
            self._writer.cancel()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # In the writer's task:

    async def _write(self, call: AsyncStream) -> None:
        try:
            await write_all(call, self._messages(), self._meter)
        except asyncio.CancelledError:  # the call is dropped
            raise
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's task
            self._fatal = exc
            self._changed.set()
            call.cancel()

    async def _messages(self) -> AsyncIterator[pb.ConvolveStreamRequest]:
        while (job := await self._next_job()) is not None:
            for message in job.messages():
                yield message

    async def _next_job(self) -> Job | None:
        """The next job to write, when there is room for it; None at the end."""
        job = self._flight.rewrite()
        if job is not None:
            return job
        job = await self._at_hand()
        if job is None:
            return None
        while not self._flight.admits(job):
            await self._change()
        self._flight.write(job)
        self._changed.set()
        self._pulled = None
        return job

    async def _at_hand(self) -> Job | None:
        """The next job, once there is one; None at the end."""
        if self._pulled is None and not self._ended:
            if self._pulling is None:  # a task of its own, which a lost connection does not cancel
                self._pulling = asyncio.create_task(self._pull())
            await asyncio.shield(self._pulling)
        return self._pulled

    async def _pull(self) -> None:
        """Takes the next job from the caller's iterator."""
        try:
            self._pulled = await anext(self._jobs, None)
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's task
            self._jobs_error = exc
        self._ended = self._pulled is None
        self._pulling = None
        self._changed.set()


async def write_all(
    call: AsyncStream, messages: AsyncIterator[pb.ConvolveStreamRequest], meter: Meter
) -> None:
    """Writes messages until they end, or the call does: why it did, its answers tell."""
    async for message in messages:
        if not await call.write(message):
            return
        meter.sent(len(message.payload.data))
    await call.done_writing()


async def each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """The items of an iterable of either kind."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def numbered(jobs: AsyncIterator[Job]) -> AsyncIterator[Job]:
    """The jobs with ids 1, 2, ... as a stream wants them."""
    number = 0
    async for job in jobs:
        number += 1
        yield streamed(job, number)
