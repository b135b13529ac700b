"""The sync client's whole tensors, one after another over one stream.

Given `Calls` and jobs, `Pipeline` hands on their results in order. gRPC takes the requests in a thread of its
own, from the start of the call; the answers are read in the caller's thread, so that neither waits for the
other. The books are kept by `jobs`, `flight` and `attempts`; here are the thread, the locks and the
reconnecting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from convservice import flows
from convservice.attempts import is_missing
from convservice.calls import Calls, SyncReplica
from convservice.channel import Connection
from convservice.errors import Cancelled, ConvServiceError, DeadlineExceeded, Reason, ServiceUnavailable
from convservice.flight import Flight
from convservice.jobs import Collector, Job, broken
from convservice.known import KnownNetworks
from convservice.network import Network
from convservice.progress import Meter
from convservice.replicas import Route
from convservice.v1 import conv_pb2 as pb
from convservice.watchdog import Watchdog
from convservice.wire.headers import TensorReport

METHOD = "ConvolveStream"

Supply = Callable[[KnownNetworks], flows.Flow[None]]
"""What sends a network to a server, where that is needed."""

OnReport = Callable[[TensorReport], None] | None
"""What a caller passes as `on_report`."""


class Pipeline:
    """Whole tensors through one stream: written ahead within `Flight`'s bound, results in order.

    A connection that is lost is opened anew once there is something to send, to another replica where there
    is one, and what was not delivered is sent again. An error of the jobs' own iterator comes out after the
    results of the jobs before it.

    Args:
        calls: to the servers.
        jobs: numbered 1, 2, ...; taken as there is room in flight, in gRPC's thread, or in the caller's
            while there is no connection.
        timeout: seconds that each tensor may take, from its turn on; None for no limit.
        meter: is told of every byte.
        on_report: is given each tensor's report before its result is handed on.
    """

    def __init__(
        self,
        calls: Calls,
        jobs: Iterator[Job],
        *,
        timeout: float | None,
        meter: Meter,
        on_report: OnReport = None,
    ) -> None:
        self._calls = calls
        self._route: Route[Connection] = Route(calls.replicas)
        self._jobs = jobs
        self._timeout = timeout
        self._meter = meter
        self._on_report = on_report
        self._waiting_since: float | None = None
        self._answers: Iterator[pb.ConvolveStreamResponse] = iter(())
        self._pulling = threading.Lock()  # guards the next two: one writer at a time takes from `_jobs`
        self._pulled: Job | None = None
        self._jobs_error: BaseException | None = None
        self._changed = threading.Condition()  # guards what follows
        self._ended = False
        self._flight = Flight()
        self._generation = 0
        self._call: Any = None
        self._fatal: BaseException | None = None

    def results(self, network: Network) -> Iterator[Any]:
        """The results, in order. Leaving early cancels the call.

        Args:
            network: the jobs', which is sent to the first server before them.
        """
        with self._calls.route(self._timeout) as self._route:
            try:
                self._calls.along(self._route, lambda at: flows.ensure(at.known, network), self._timeout)
                with Watchdog(self._timeout, self.due, self._time_out):
                    while (collector := self._next()) is not None:
                        if self._on_report is not None and collector.report is not None:
                            self._on_report(collector.report)
                        yield collector.result()
            finally:
                self._drop_call()
        if self._jobs_error is not None:
            raise self._jobs_error

    def _next(self) -> Collector | None:
        """The next tensor's results, over as many connections as it takes; None at the end."""
        registered: set[SyncReplica] = set()
        supply: Supply | None = None
        while True:
            try:
                if supply is not None:
                    self._supply(supply)
                    supply = None
                collector = self._attempt()
            except ConvServiceError as exc:
                self._drop_call()
                if self._fatal is not None:
                    raise self._fatal from None
                if isinstance(exc, ServiceUnavailable) and self._nothing_to_send():
                    if self._job_comes():
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
                time.sleep(pause)
            else:
                self._route.succeeded()
                return collector

    def _supply(self, supply: Supply) -> None:
        """Sends the network to the server where the work is now."""
        replica = self._route.replica
        self._calls.at(replica, supply(replica.known), self._timeout)

    def _nothing_to_send(self) -> bool:
        """Whether a lost connection matters to no job; the call must have been dropped."""
        return not len(self._flight) and self._pulled is None

    def _job_comes(self) -> bool:
        """Waits for the next job, which the last call's thread may be taking; false where there is none."""
        with self._pulling:
            self._pull()
            return self._pulled is not None

    def _attempt(self) -> Collector | None:
        call = self._call or self._open_call()
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._flight) or self._ended or self._fatal or not call.is_active()
            )
            if len(self._flight) and self._waiting_since is None:
                self._waiting_since = time.monotonic()
        if self._ended and not len(self._flight):
            self._read_end()
            return None
        collector = self._read()
        self._waiting_since = None
        return collector

    def _read(self) -> Collector:
        collector: Collector | None = None
        for message in self._answers:
            if collector is None:
                collector = self._collector()
            self._meter.received(len(message.payload.data))
            if collector.receive(message):
                with self._changed:
                    self._flight.deliver()
                    self._changed.notify_all()
                return collector
        raise unanswered(self._route.target)

    def _read_end(self) -> None:
        """Lets the server end the stream; with every tensor delivered, how it ends is all the same."""
        with suppress(Cancelled, ServiceUnavailable):
            for _ in self._answers:
                raise broken("an answer came after every tensor was closed", self._route.target)

    def _collector(self) -> Collector:
        with self._changed:
            job = self._flight.oldest
        if job is None:
            raise broken("an answer came before any tensor was sent", self._route.target)
        return Collector(job, self._route.target)

    def _open_call(self) -> Any:
        self._meter.restart()
        with self._changed:
            if self._fatal is not None:
                raise self._fatal
            self._flight.lose()
            connection = self._route.replica.connection
            call = self._call = connection.stream(self._requests(self._generation), None)
            self._answers = connection.answers(call, None)
        call.add_callback(self._wake)
        return call

    def _wake(self) -> None:
        """The call has ended: its writer may never take the next job."""
        with self._changed:
            self._changed.notify_all()

    def _drop_call(self) -> None:
        """Cancels the call and tells its writer to stop."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()
            call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def _fail(self, error: BaseException) -> None:
        """Ends everything with `error`, from another thread than the reader's."""
        with self._changed:
            self._fatal = error
            self._changed.notify_all()
            call = self._call
        if call is not None:
            call.cancel()

    # In gRPC's thread:

    def _requests(self, generation: int) -> Iterator[pb.ConvolveStreamRequest]:
        try:
            while (job := self._next_job(generation)) is not None:
                for message in job.messages():
                    yield message
                    self._meter.sent(len(message.payload.data))
        except GeneratorExit:  # gRPC has ended the call
            raise
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
            self._fail(exc)

    def _next_job(self, generation: int) -> Job | None:
        """The next job to write, when there is room for it; None when this writer is to end."""
        with self._changed:
            job = self._flight.rewrite() if generation == self._generation else None
        if job is not None:
            return job
        with self._pulling:
            if generation == self._generation:
                self._pull()
            job = self._pulled
            if job is None:
                return None
            with self._changed:
                self._changed.wait_for(lambda: generation != self._generation or self._flight.admits(job))
                if generation != self._generation:
                    return None
                self._flight.write(job)
                self._changed.notify_all()
                self._pulled = None
                return job

    def _pull(self) -> None:
        """Takes the next job from the caller's iterator, unless one is at hand."""
        if self._pulled is not None or self._ended:
            return
        try:
            self._pulled = next(self._jobs, None)
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
            self._jobs_error = exc
        if self._pulled is None:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    # In the watchdog's thread:

    def due(self) -> float | None:
        """When the tensor that is waited for must be complete."""
        since, timeout = self._waiting_since, self._timeout
        return None if since is None or timeout is None else since + timeout

    def _time_out(self) -> None:
        self._fail(timed_out(self._timeout or 0.0, self._route.target))


def unanswered(target: str) -> ServiceUnavailable:
    """A stream that ended well, but too early."""
    return ServiceUnavailable(
        "the server ended the stream before it had answered every tensor",
        reason=Reason.UNREACHABLE,
        target=target,
        method=METHOD,
    )


def timed_out(timeout: float, target: str) -> DeadlineExceeded:
    """A tensor that took longer than it may."""
    return DeadlineExceeded(
        f"the tensor was not complete after {timeout:g} s",
        reason=Reason.DEADLINE,
        metadata={"timeout_s": f"{timeout:g}"},
        target=target,
        method=METHOD,
    )
