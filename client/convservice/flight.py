"""The book of what `map` has written and not yet delivered: no I/O, no locks.

Given jobs as they are written and word of those delivered, it says whether the next one may be written too,
and which must be written again when a connection is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from convservice.jobs import Job

FLIGHT_BYTES = 64 << 20
"""Input and outputs that `map` has in flight: written, and not yet handed to the user."""


class Flight:
    """What `map` has written and not yet delivered, oldest first; bounded in bytes."""

    def __init__(self, limit: int = FLIGHT_BYTES) -> None:
        self._limit = limit
        self._jobs: deque[Job] = deque()
        self._written = 0
        self._bytes = 0

    def admits(self, job: Job) -> bool:
        """Whether a job fits beside what is in flight; one alone always does."""
        return not self._jobs or self._bytes + job.nbytes <= self._limit

    def write(self, job: Job) -> None:
        """The job is being written."""
        self._jobs.append(job)
        self._bytes += job.nbytes
        self._written += 1

    def rewrite(self) -> Job | None:
        """The next job that an earlier connection lost, now being written again; None when there is none."""
        if self._written == len(self._jobs):
            return None
        self._written += 1
        return self._jobs[self._written - 1]

    @property
    def oldest(self) -> Job | None:
        """The job whose results come next; None when nothing is being written."""
        return self._jobs[0] if self._written else None

    def deliver(self) -> None:
        """The oldest job's results are handed on."""
        self._bytes -= self._jobs.popleft().nbytes
        self._written -= 1

    def lose(self) -> None:
        """The connection is lost: everything in flight must be written again."""
        self._written = 0

    def __len__(self) -> int:
        return len(self._jobs)


def numbered(jobs: Iterator[Job]) -> Iterator[Job]:
    """The jobs with ids 1, 2, ... as a stream wants them."""
    for number, job in enumerate(jobs, 1):
        yield streamed(job, number)


def streamed(job: Job, number: int) -> Job:
    """The job as a stream wants it: with its id, and without a limit at the server.

    There the time goes on while the user takes their own over the results before; here it does not.
    """
    return replace(job, request=replace(job.request, tensor_id=number, timeout_ms=0))
