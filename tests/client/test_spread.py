"""The book of `map` over several streams, in any order of events: neither threads nor a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convservice import (
    InvalidRequest,
    Network,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.arrays import Options, as_input
from convservice.bands import DataFormat
from convservice.errors import ConvServiceError
from convservice.jobs import Collector, Job
from convservice.spread import Lane, Spread
from tests.client.fake import relu

NETWORK = Network([relu()])
AWAY = ServiceUnavailable("away", reason=Reason.UNREACHABLE)
FULL = ResourceExhausted("full", retry_after=1.0)


def job(size: int = 4) -> Job:
    x = as_input(np.zeros((1, size, 4), "float32"), None, DataFormat.CHANNELS_FIRST)
    return Job.of(NETWORK, x, Options.of("channels_first", None, "high", None, None))


def results(of: Job) -> Collector:
    return Collector(of, "a server")


def spread(jobs: int, lanes: int, **options: Any) -> tuple[Spread, list[Lane]]:
    made = Spread(**options)
    for _ in range(jobs):
        made.add(job())
    return made, [made.open() for _ in range(lanes)]


def answer(book: Spread, lane: Lane) -> None:
    assert lane.expected is not None
    book.answer(lane, results(lane.expected))


def numbers(lane: Lane) -> list[int]:
    return [piece.number for piece, _ in lane.written]


def test_no_lane_takes_more_while_another_has_less() -> None:
    book, (first, second) = spread(6, 2)
    assert book.take(first) is not None
    assert book.take(first) is None
    assert book.take(second) is not None
    assert book.take(second) is not None
    assert [book.take(second), numbers(first), numbers(second)] == [None, [0], [1, 2]]
    answer(book, second)
    second.paused = True
    assert book.take(first) is not None
    assert book.take(first) is not None, "a lane that is left alone does not count"


def test_ids_begin_anew_with_each_stream() -> None:
    book, (lane,) = spread(3, 1)
    taken = [book.take(lane) for _ in range(2)]
    assert [found.request.tensor_id for found in taken if found] == [1, 2]
    book.lose(lane, AWAY)
    retaken = book.take(lane)
    assert retaken is not None
    assert (retaken.request.tensor_id, numbers(lane)) == (1, [0])


def test_what_a_lane_lost_waits_in_its_place_and_goes_elsewhere_first() -> None:
    book, (first, second) = spread(5, 2)
    for lane in (first, second, first):
        book.take(lane)
    book.lose(first, AWAY)
    answer(book, second)
    assert book.take(first) is not None
    assert numbers(first) == [2], "the one that was at work when it was lost is not its to take"
    assert book.take(second) is not None
    assert numbers(second) == [0]


def test_an_error_comes_in_its_turn_and_nothing_after_it_is_taken() -> None:
    book, (first, second) = spread(4, 2)
    for lane in (first, second):
        book.take(lane)
    book.lose(second, InvalidRequest("wrong"))
    answer(book, first)
    assert book.take(first) is None
    head = book.head
    assert head is not None
    assert isinstance(head.outcome, Collector)
    book.deliver()
    head = book.head
    assert head is not None
    assert isinstance(head.outcome, InvalidRequest)


@pytest.mark.parametrize("error", [FULL, NetworkNotFound("no", reason=Reason.WEIGHTS_MISSING)])
def test_what_every_server_refuses_is_refused(error: ConvServiceError) -> None:
    book, lanes = spread(1, 2)
    losses = 0
    while book.head is not None and book.head.outcome is None:
        for lane in lanes:
            if book.take(lane) is not None:
                book.lose(lane, error)
                losses += 1
    assert book.head is not None
    assert book.head.outcome is error
    assert losses == (2 if error is FULL else 4), "once each, or once more where the network was sent first"


def test_what_waits_for_a_lane_that_goes_returns_to_where_it_failed() -> None:
    book, (first, second) = spread(1, 2)
    assert book.take(first) is not None
    book.lose(first, AWAY)
    assert book.take(first) is None, "the other lane's turn"
    book.close(second)
    assert book.take(first) is not None


def test_a_server_that_was_away_is_sent_the_network_again() -> None:
    """It has refused the job for lack of the network, was started anew, and is the only one that works."""
    missing = NetworkNotFound("no", reason=Reason.WEIGHTS_MISSING)
    book, (first, second) = spread(1, 2)
    for error in (missing, missing):  # sent, and yet not there: refused
        assert book.take(first) is not None
        book.lose(first, error)
    assert book.take(first) is None
    assert book.lose(first, AWAY) is None
    assert book.take(second) is not None
    book.lose(second, AWAY)  # ends the round
    assert book.take(first) is not None
    assert book.lose(first, missing) is None, "the network is sent once more"
    assert book.take(first) is not None
    answer(book, first)


def test_rounds_are_bounded_when_nothing_gets_through() -> None:
    book, lanes = spread(1, 3)
    losses = 0
    while book.head is not None and book.head.outcome is None:
        for lane in lanes:
            if book.take(lane) is not None:
                book.lose(lane, AWAY)
                losses += 1
    assert losses == 12


def test_a_stream_that_ends_with_nothing_to_do_is_no_failure() -> None:
    book, (lane,) = spread(0, 1)
    assert book.lose(lane, AWAY) is None
    assert lane.failures == 0
    with pytest.raises(InvalidRequest):
        book.lose(lane, InvalidRequest("of no tensor"))


def test_bytes_are_bounded_over_all_lanes() -> None:
    book = Spread(limit=3 * job().nbytes)
    lanes = [book.open() for _ in range(9)]
    for lane in lanes[:3]:
        assert book.admits(job())
        book.add(job())
        book.take(lane)
    assert not book.admits(job())
    answer(book, lanes[0])
    assert not book.admits(job()), "a result that was not delivered counts"
    book.deliver()
    assert book.admits(job())
    assert Spread(limit=1).admits(job()), "one alone always fits"


@given(st.data())
def test_everything_comes_once_and_in_order_whatever_is_lost(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 12))
    book, given_jobs, delivered = Spread(limit=4 * job().nbytes), count, 0
    lanes = [book.open() for _ in range(data.draw(st.integers(1, 4)))]
    losses = data.draw(st.integers(0, 6))
    while not book.empty:
        if given_jobs and book.admits(job()):
            book.add(job())
            given_jobs -= 1
        if not given_jobs:
            book.end()
        for lane in data.draw(st.permutations(lanes)):
            book.take(lane)
            if lane.expected is None:
                continue
            if losses and data.draw(st.booleans()):
                losses -= 1
                book.lose(lane, AWAY)
                lane.failures = 0
            else:
                answer(book, lane)
        while book.head is not None and book.head.outcome is not None:
            if isinstance(book.head.outcome, ConvServiceError):
                assert book.head.outcome is AWAY
                return
            assert book.head.number == delivered
            delivered += 1
            book.deliver()
    assert delivered == count
    assert book.answered
