"""The async client's `map` over several servers: the twin of `spreading`, with tasks in place of threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from convservice import flows
from convservice.aio_calls import AsyncCalls, AsyncReplica
from convservice.aio_channel import AsyncStream
from convservice.aio_transfer import write_all
from convservice.attempts import is_missing
from convservice.errors import ConvServiceError, InvalidRequest
from convservice.jobs import Collector, Job, broken
from convservice.progress import Meter
from convservice.spread import Lane, Spread
from convservice.spreading import LAST_SECONDS
from convservice.transfer import OnReport, timed_out, unanswered
from convservice.v1 import conv_pb2 as pb


class AsyncSpreadPipeline:
    """Whole tensors over one stream per replica: written ahead within one bound for all, results in order.

    See `spreading.SpreadPipeline`, whose arguments it takes.
    """

    def __init__(
        self,
        calls: AsyncCalls,
        jobs: AsyncIterator[Job],
        *,
        timeout: float | None,
        on_report: OnReport = None,
    ) -> None:
        self._calls = calls
        self._jobs = jobs
        self._timeout = timeout
        self._on_report = on_report
        self._changed = asyncio.Event()  # set whenever a task may have something to do
        self._spread = Spread()
        self._lanes: dict[AsyncReplica, Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs_error: BaseException | None = None
        self._fatal: BaseException | None = None
        self._closed = False

    async def results(self) -> AsyncGenerator[Any, None]:
        """The results, in order. Leaving early cancels all streams."""
        loop, directory = asyncio.get_running_loop(), self._calls.replicas.directory

        def listener() -> None:
            loop.call_soon_threadsafe(self._looked_up)

        directory.subscribe(listener)
        try:
            self._start(self._pull())
            while (collector := await self._next()) is not None:
                if self._on_report is not None and collector.report is not None:
                    self._on_report(collector.report)
                yield collector.result()
            await self._until(lambda: not self._lanes, LAST_SECONDS)
        finally:
            directory.unsubscribe(listener)
            self._closed = True
            for task in self._tasks:
                task.cancel()
        if self._jobs_error is not None:
            raise self._jobs_error

    async def _next(self) -> Collector | None:
        """The next tensor's results; None at the end."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                return await self._head(limit)
        except TimeoutError:
            if limit.expired():
                raise timed_out(self._timeout or 0.0, self._calls.replicas.endpoint.target) from None
            raise

    async def _head(self, limit: asyncio.Timeout) -> Collector | None:
        while True:
            if self._fatal is not None:
                raise self._fatal
            if self._spread.empty:
                return None
            head = self._spread.head
            if head is not None and head.outcome is not None:
                break
            if head is not None:
                self._staff()
                if limit.when() is None and self._timeout is not None:
                    limit.reschedule(asyncio.get_running_loop().time() + self._timeout)
            await self._change()
        self._spread.deliver()
        self._changed.set()
        if isinstance(head.outcome, ConvServiceError):
            raise head.outcome
        return head.outcome

    def _staff(self) -> None:
        """Opens a lane for every replica that has none."""
        for replica in self._calls.replicas.current():
            if replica not in self._lanes:
                lane = self._lanes[replica] = self._spread.open()
                self._start(self._work(replica, lane))

    def _looked_up(self) -> None:
        """Names have been looked up: there may be other replicas now, whether or not the caller waits."""
        if self._lanes and not self._closed:
            with suppress(InvalidRequest):  # the client is closed, which its calls will tell
                self._staff()
        self._changed.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _until(self, reached: Callable[[], bool], seconds: float) -> None:
        """Waits until something is reached, no longer than some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not reached():
                    await self._change()

    # In the jobs' task:

    async def _pull(self) -> None:
        """Takes jobs from the caller's iterator as there is room for them."""
        try:
            async for job in self._jobs:
                while not self._spread.admits(job):
                    await self._change()
                self._spread.add(job)
                self._changed.set()
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's task
            self._jobs_error = exc
        self._spread.end()
        self._changed.set()

    # In a lane's task:

    async def _work(self, replica: AsyncReplica, lane: Lane) -> None:
        try:
            with self._calls.replicas.use(replica):
                while (job := await self._take(replica, lane)) is not None:
                    try:
                        await self._stream(replica, lane, job)
                    except ConvServiceError as exc:
                        await self._lose(replica, lane, exc)
        except asyncio.CancelledError:  # the caller has left
            raise
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's task
            self._fatal = exc
        finally:
            self._spread.close(lane)
            del self._lanes[replica]
            self._changed.set()

    async def _stream(self, replica: AsyncReplica, lane: Lane, job: Job) -> None:
        """One stream, from the job that it is opened for until nothing is left to be written."""
        await self._calls.at(replica, flows.ensure(replica.known, job.network), self._timeout)
        call = replica.connection.stream(None)
        writer = asyncio.create_task(self._write(replica, lane, call, job))
        try:
            collector: Collector | None = None
            while (message := await call.answer()) is not None:
                if collector is None:
                    if lane.expected is None:
                        raise broken("an answer came before any tensor was sent", replica.target)
                    collector = Collector(lane.expected, replica.target)
                if collector.receive(message):
                    self._spread.answer(lane, collector)
                    self._changed.set()
                    self._calls.replicas.succeeded(replica)
                    collector = None
            if lane.expected is not None:
                raise unanswered(replica.target)
        finally:
            call.cancel()
            writer.cancel()

    async def _lose(self, replica: AsyncReplica, lane: Lane, error: ConvServiceError) -> None:
        """Takes a stream's end into the books, and leaves the server alone for as long as they say."""
        if is_missing(error):
            replica.known.clear()
        seconds = self._spread.lose(lane, error)
        lane.paused = seconds is not None
        self._changed.set()
        if seconds is not None:
            self._calls.replicas.failed(replica, error)
            await self._until(lambda: self._spread.answered, seconds)
            lane.paused = False

    async def _take(self, replica: AsyncReplica, lane: Lane) -> Job | None:
        """The next job to write in a lane, when it is its turn; None when its stream is to end."""
        while not (replica.retired or self._spread.answered):
            job = self._spread.take(lane)
            if job is not None:
                self._changed.set()  # it is another lane's turn
                return job
            await self._change()
        return None

    # In a writer's task, which ends with its stream:

    async def _write(self, replica: AsyncReplica, lane: Lane, call: AsyncStream, job: Job) -> None:
        try:
            await write_all(call, self._messages(replica, lane, job), Meter(None, None, None))
        except asyncio.CancelledError:  # the stream is over
            raise
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's task
            self._fatal = exc
            self._changed.set()

    async def _messages(
        self, replica: AsyncReplica, lane: Lane, job: Job | None
    ) -> AsyncIterator[pb.ConvolveStreamRequest]:
        while job is not None:
            for message in job.messages():
                yield message
            job = await self._take(replica, lane)
