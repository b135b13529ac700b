"""The book of a `map` that goes over several streams at once: no I/O, no locks, no clock.

Given jobs in order, and word of what became of each in the streams, `Spread` says which stream is to take
which job next, what must be written again where a stream is lost, and which result is the next in order. It
is balanced by what is not answered yet: a stream takes the next job only if no other has less, so that a slow
server gets little, and one that is away nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain

from convservice import attempts
from convservice.attempts import Again, Attempts, again, is_missing, pause
from convservice.errors import ConvServiceError
from convservice.flight import FLIGHT_BYTES, streamed
from convservice.jobs import Collector, Job


class Piece:
    """One job on its way.

    Attributes:
        number: its place in the order, from 0.
        job: the job.
        outcome: its results, or the error that it ended with; None until then.
        supplied: the lanes whose servers have been sent the network for it.
        attempts: where it was the one at work when a stream was lost.
    """

    def __init__(self, number: int, job: Job) -> None:
        self.number = number
        self.job = job
        self.outcome: Collector | ConvServiceError | None = None
        self.supplied: set[Lane] = set()
        self.attempts: Attempts[Lane] = Attempts()


class Lane:
    """One stream's share of the work, the stream being opened anew as often as need be.

    Attributes:
        generation: how many streams it has had; what belongs to an earlier one is void.
        failures: streams lost in a row without an answer in between.
        paused: whether its server is left alone for a while.
    """

    def __init__(self) -> None:
        self.written: deque[tuple[Piece, Job]] = deque()
        self.generation = 0
        self.failures = 0
        self.paused = False
        self._last_id = 0

    def write(self, piece: Piece) -> Job:
        """The piece's job as this lane's stream wants it, to be written next."""
        self._last_id += 1
        job = streamed(piece.job, self._last_id)
        self.written.append((piece, job))
        return job

    @property
    def expected(self) -> Job | None:
        """The job whose results come next; None when nothing is being written."""
        return self.written[0][1] if self.written else None

    def restart(self) -> list[Piece]:
        """The stream is over; hands back what it has not answered."""
        lost = [piece for piece, _ in self.written]
        self.written.clear()
        self.generation += 1
        self._last_id = 0
        return lost


class Spread:
    """What a `map` over several streams has on its way, in order.

    Args:
        limit: bytes of input and outputs that may be on their way together, or one job if it alone is more.
    """

    def __init__(self, limit: int = FLIGHT_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._count = 0
        self._ended = False
        self._pieces: deque[Piece] = deque()
        self._waiting: deque[Piece] = deque()
        self._failed_at: int | None = None
        self.lanes: list[Lane] = []

    # What comes in, and what goes out:

    def admits(self, job: Job) -> bool:
        """Whether a job is wanted, and fits beside what is on its way; one alone always does."""
        if not self._pieces:
            return True
        return len(self._waiting) < len(self.lanes) and self._bytes + job.nbytes <= self._limit

    def add(self, job: Job) -> None:
        """The next job in order, which was admitted."""
        piece = Piece(self._count, job)
        self._count += 1
        self._bytes += job.nbytes
        self._pieces.append(piece)
        self._waiting.append(piece)

    def end(self) -> None:
        """No more jobs come."""
        self._ended = True

    @property
    def head(self) -> Piece | None:
        """The piece whose result is next in order; None when nothing is on its way."""
        return self._pieces[0] if self._pieces else None

    @property
    def empty(self) -> bool:
        """Whether everything has been delivered and no more comes."""
        return self._ended and not self._pieces

    @property
    def answered(self) -> bool:
        """Whether nothing will have to be written any more."""
        return self._ended and not self._waiting and not any(lane.written for lane in self.lanes)

    def deliver(self) -> None:
        """The head's result is handed on."""
        self._bytes -= self._pieces.popleft().job.nbytes

    # Lanes:

    def open(self) -> Lane:
        """One more lane."""
        lane = Lane()
        self.lanes.append(lane)
        return lane

    def close(self, lane: Lane) -> None:
        """A lane is no more; what it has not answered goes elsewhere."""
        self._wait_again(lane.restart())
        self.lanes.remove(lane)

    def take(self, lane: Lane) -> Job | None:
        """The job that a lane is to write next; None while it is another's turn, or there is none."""
        piece = next((piece for piece in self._waiting if self._may_take(lane, piece)), None)
        if piece is None or (self._failed_at is not None and piece.number > self._failed_at):
            return None
        rivals = [other for other in self.lanes if not other.paused and other not in piece.attempts.tried]
        if any(len(other.written) < len(lane.written) for other in rivals):
            return None
        self._waiting.remove(piece)
        return lane.write(piece)

    def _may_take(self, lane: Lane, piece: Piece) -> bool:
        """Whether a piece goes to this lane next: it failed there not yet in this round, or there is no lane
        left where it did not, those being gone that it waited for."""
        tried = piece.attempts.tried
        return lane not in tried or tried.issuperset(self.lanes)

    def answer(self, lane: Lane, results: Collector) -> None:
        """The job that the lane expected is complete."""
        piece, _ = lane.written.popleft()
        piece.outcome = results
        lane.failures = 0

    def lose(self, lane: Lane, error: ConvServiceError) -> float | None:
        """The lane's stream, or what had to come before it, ended with `error`, and it will have a new one.

        What it has not answered goes elsewhere, or back to it; the job that was at work, where nothing helps,
        ends with the error.

        Returns:
            Seconds to leave its server alone; None where that has not failed.

        Raises:
            ConvServiceError: the error, where nothing helps and there is no job to blame.
        """
        lost = lane.restart()
        kind = again(error)
        if kind is Again.LATER:  # a server that comes back may have lost its networks, and have room
            for piece in self._pieces:
                piece.supplied.discard(lane)
                piece.attempts.forgive(lane)
        if not lost and kind is Again.NOTHING:
            raise error
        if not lost:  # nothing was to be done: a server need not wait for that
            return None
        first = lost[0]
        seconds = None
        if is_missing(error) and lane not in first.supplied:
            first.supplied.add(lane)
        else:
            lane.failures += 1
            seconds = pause(lane.failures, error.retry_after)
            if self._hopeless(first, lane, error):
                self._fail(first, error)
        self._wait_again(piece for piece in lost if piece.outcome is None)
        return seconds

    def _hopeless(self, piece: Piece, lane: Lane, error: ConvServiceError) -> bool:
        """Whether a piece that ended with `error` in a lane has been tried often enough, or nothing helps."""
        most = len(attempts.BACKOFF)
        others = [other for other in self.lanes if other is not lane and other.failures <= most]
        none_gets_through = not others and lane.failures > most
        return piece.attempts.failed(lane, error, [lane, *others]) is None or none_gets_through

    def _fail(self, piece: Piece, error: ConvServiceError) -> None:
        """The piece ends with `error`; nothing after it is wanted."""
        piece.outcome = error
        self._failed_at = piece.number if self._failed_at is None else min(self._failed_at, piece.number)

    def _wait_again(self, pieces: Iterable[Piece]) -> None:
        """Pieces that wait again, in their places."""
        self._waiting = deque(sorted(chain(pieces, self._waiting), key=_number))


def _number(piece: Piece) -> int:
    return piece.number
