"""The sync client's `map` over several servers: as many streams as there are replicas, results in order.

Given `Calls` and jobs, `SpreadPipeline` keeps a thread per replica, which opens its stream, reads the answers
and opens another where that is lost; gRPC takes the requests in threads of its own, and one more takes the
jobs from the caller's iterator, so that none waits for another. What goes where is `spread`'s to say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from convservice import flows
from convservice.attempts import is_missing
from convservice.calls import Calls, SyncReplica
from convservice.errors import ConvServiceError, InvalidRequest
from convservice.jobs import Collector, Job, broken
from convservice.spread import Lane, Spread
from convservice.transfer import OnReport, timed_out, unanswered
from convservice.v1 import conv_pb2 as pb

LAST_SECONDS = 5.0
"""With every result delivered, servers have so long to end their streams; then these are cancelled."""


class SpreadPipeline:
    """Whole tensors over one stream per replica: written ahead within one bound for all, results in order.

    Args:
        calls: to the servers.
        jobs: taken as there is room in flight, in a thread of their own.
        timeout: seconds that each tensor may take, from its turn on; None for no limit.
        on_report: is given each tensor's report before its result is handed on.
    """

    def __init__(
        self, calls: Calls, jobs: Iterator[Job], *, timeout: float | None, on_report: OnReport = None
    ) -> None:
        self._calls = calls
        self._jobs = jobs
        self._timeout = timeout
        self._on_report = on_report
        self._changed = threading.Condition()  # guards what follows
        self._spread = Spread()
        self._lanes: dict[SyncReplica, Lane] = {}
        self._streams: dict[Lane, Any] = {}
        self._jobs_error: BaseException | None = None
        self._fatal: BaseException | None = None
        self._closed = False

    def results(self) -> Iterator[Any]:
        """The results, in order. Leaving early cancels all streams."""
        directory = self._calls.replicas.directory
        directory.subscribe(self._looked_up)
        try:
            self._start("jobs", self._pull)
            while (collector := self._next()) is not None:
                if self._on_report is not None and collector.report is not None:
                    self._on_report(collector.report)
                yield collector.result()
            with self._changed:
                self._changed.wait_for(lambda: not self._lanes, LAST_SECONDS)
        finally:
            directory.unsubscribe(self._looked_up)
            self._close()
        if self._jobs_error is not None:
            raise self._jobs_error

    def _next(self) -> Collector | None:
        """The next tensor's results; None at the end."""
        due: float | None = None
        with self._changed:
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
                    if due is None and self._timeout is not None:
                        due = time.monotonic() + self._timeout
                left = None if due is None else due - time.monotonic()
                if left is not None and left <= 0:
                    raise timed_out(self._timeout or 0.0, self._calls.replicas.endpoint.target)
                self._changed.wait(left)
            self._spread.deliver()
            self._changed.notify_all()
        if isinstance(head.outcome, ConvServiceError):
            raise head.outcome
        return head.outcome

    def _staff(self) -> None:
        """Opens a lane for every replica that has none; the lock is held."""
        for replica in self._calls.replicas.current():
            if replica not in self._lanes:
                lane = self._lanes[replica] = self._spread.open()
                self._start("lane", self._work, replica, lane)

    def _looked_up(self) -> None:
        """Names have been looked up: there may be other replicas now, whether or not the caller waits."""
        with self._changed:
            if self._lanes and not self._closed:
                with suppress(InvalidRequest):  # the client is closed, which its calls will tell
                    self._staff()
            self._changed.notify_all()

    def _start(self, name: str, work: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=work, args=args, name=f"convservice-{name}", daemon=True).start()

    def _fail(self, error: BaseException) -> None:
        """Ends everything with `error`, from another thread than the caller's."""
        with self._changed:
            self._fatal = error
            self._changed.notify_all()

    def _close(self) -> None:
        """Cancels what still runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            streams = list(self._streams.values())
        for call in streams:
            call.cancel()

    # In the jobs' thread:

    def _pull(self) -> None:
        """Takes jobs from the caller's iterator as there is room for them."""
        try:
            for job in self._jobs:
                with self._changed:
                    while not (self._closed or self._spread.admits(job)):
                        self._changed.wait()
                    if self._closed:
                        return
                    self._spread.add(job)
                    self._changed.notify_all()
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
            self._jobs_error = exc
        with self._changed:
            self._spread.end()
            self._changed.notify_all()

    # In a lane's thread:

    def _work(self, replica: SyncReplica, lane: Lane) -> None:
        try:
            with self._calls.replicas.use(replica):
                while (job := self._take(replica, lane, lane.generation)) is not None:
                    try:
                        self._stream(replica, lane, job)
                    except ConvServiceError as exc:
                        self._lose(replica, lane, exc)
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
            self._fail(exc)
        finally:
            with self._changed:
                self._spread.close(lane)
                del self._lanes[replica]
                self._changed.notify_all()

    def _stream(self, replica: SyncReplica, lane: Lane, job: Job) -> None:
        """One stream, from the job that it is opened for until nothing is left to be written."""
        self._calls.at(replica, flows.ensure(replica.known, job.network), self._timeout)
        connection = replica.connection
        call = connection.stream(self._requests(replica, lane, lane.generation, job), None)
        try:
            with self._changed:
                self._streams[lane] = call
                if self._closed:
                    return
            collector: Collector | None = None
            for message in connection.answers(call, None):
                if collector is None:
                    collector = self._collector(replica, lane)
                if collector.receive(message):
                    with self._changed:
                        self._spread.answer(lane, collector)
                        self._changed.notify_all()
                    self._calls.replicas.succeeded(replica)
                    collector = None
            if lane.expected is not None:
                raise unanswered(replica.target)
        finally:
            with self._changed:
                del self._streams[lane]
            call.cancel()

    def _collector(self, replica: SyncReplica, lane: Lane) -> Collector:
        with self._changed:
            job = lane.expected
        if job is None:
            raise broken("an answer came before any tensor was sent", replica.target)
        return Collector(job, replica.target)

    def _lose(self, replica: SyncReplica, lane: Lane, error: ConvServiceError) -> None:
        """Takes a stream's end into the books, and leaves the server alone for as long as they say."""
        if is_missing(error):
            replica.known.clear()
        with self._changed:
            seconds = self._spread.lose(lane, error)
            lane.paused = seconds is not None
            self._changed.notify_all()
        if seconds is not None:
            self._calls.replicas.failed(replica, error)
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._spread.answered, seconds)
                lane.paused = False

    def _take(self, replica: SyncReplica, lane: Lane, generation: int) -> Job | None:
        """The next job to write in a lane, when it is its turn; None when this stream is to end."""
        with self._changed:
            while lane.generation == generation and not (
                self._closed or replica.retired or self._spread.answered
            ):
                job = self._spread.take(lane)
                if job is not None:
                    self._changed.notify_all()  # it is another lane's turn
                    return job
                self._changed.wait()
            return None

    # In gRPC's threads:

    def _requests(
        self, replica: SyncReplica, lane: Lane, generation: int, job: Job | None
    ) -> Iterator[pb.ConvolveStreamRequest]:
        try:
            while job is not None:
                yield from job.messages()
                job = self._take(replica, lane, generation)
        except GeneratorExit:  # gRPC has ended the call
            raise
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
            self._fail(exc)
