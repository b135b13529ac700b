"""Waiting for a peer: the inbox of a stream, the watchdog, and the lanes that count calls."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from convservice.errors import (
    Cancelled,
    ConvServiceError,
    DeadlineExceeded,
    InvalidRequest,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice_server.calls import Call, WaitEnded
from convservice_server.faults import draining
from convservice_server.holdings import Holdings
from convservice_server.inbox import Inbox
from convservice_server.lanes import Lane
from convservice_server.watchdog import Watchdog
from tests.server.support import WAIT


class Source:
    """A transport's iterator: what the test gives, then waits until told to end or to raise."""

    def __init__(self, *messages: int, error: Exception | None = None) -> None:
        self.messages = list(messages)
        self.error = error
        self.asked = threading.Semaphore(0)  # released whenever the reader asks
        self.release = threading.Event()

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> int:
        self.asked.release()
        if self.messages:
            return self.messages.pop(0)
        assert self.release.wait(WAIT)
        if self.error is not None:
            raise self.error
        raise StopIteration


def inbox(
    source: Iterator[int],
    call: Call | None = None,
    idle: float = WAIT,
    linger: float = WAIT,
    between: Callable[[], bool] = lambda: True,
) -> Inbox[int]:
    return Inbox(source, call or Call(), idle_timeout=idle, linger=linger, between=between)


def test_messages_come_in_order_and_end() -> None:
    source = Source(1, 2, 3)
    source.release.set()
    with inbox(source) as messages:
        assert list(messages) == [1, 2, 3]
        assert next(messages, None) is None


def test_the_next_message_is_read_only_when_the_last_was_taken() -> None:
    source = Source(1, 2, 3)
    with inbox(source) as messages:
        for expected in (1, 2):
            assert source.asked.acquire(timeout=WAIT)
            assert next(messages) == expected
        assert source.asked.acquire(timeout=WAIT)
        assert not source.asked.acquire(blocking=False), "one message waits, and nothing more is read"
        assert source.messages == []
        source.release.set()


def test_silence_ends_the_call() -> None:
    source = Source()
    with inbox(source, idle=0.01) as messages, pytest.raises(ServiceUnavailable, match=r"0\.01 s") as caught:
        next(messages)
    assert caught.value.reason == Reason.IDLE
    source.release.set()


def test_draining_ends_a_stream_between_tensors() -> None:
    source = Source()
    with inbox(source, linger=0.01) as messages:
        messages.drain()
        with pytest.raises(ServiceUnavailable) as caught:
            next(messages)
    assert caught.value.reason == Reason.DRAINING
    source.release.set()


def test_draining_wakes_a_stream_that_waits() -> None:
    source = Source()
    errors: list[ConvServiceError] = []

    def wait(messages: Inbox[int]) -> None:
        with pytest.raises(ServiceUnavailable) as caught:
            next(messages)
        errors.append(caught.value)

    with inbox(source, linger=0) as messages:
        waiting = threading.Thread(target=wait, args=(messages,))
        waiting.start()
        messages.drain()
        waiting.join(WAIT)
    assert [error.reason for error in errors] == [Reason.DRAINING]
    source.release.set()


def test_draining_leaves_an_open_tensor_its_time() -> None:
    source = Source()
    with inbox(source, idle=0.01, linger=0, between=lambda: False) as messages:
        messages.drain()
        with pytest.raises(ServiceUnavailable) as caught:
            next(messages)
    assert caught.value.reason == Reason.IDLE
    source.release.set()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("reset"), Cancelled),
        (InvalidRequest("no message", reason=Reason.FRAMING), InvalidRequest),
    ],
)
def test_what_the_source_raises(raised: Exception, expected: type[Exception]) -> None:
    source = Source(7, error=raised)
    source.release.set()
    with inbox(source) as messages:
        assert next(messages) == 7
        with pytest.raises(expected, match=str(raised)):
            next(messages)


def test_a_call_that_was_given_up_says_so_first() -> None:
    call = Call()
    source = Source(error=RuntimeError("cancelled"))
    with inbox(source, call) as messages:
        call.give_up()
        source.release.set()
        with pytest.raises(Cancelled, match="gave the call up"):
            next(messages)


def test_a_call_that_the_server_gives_up_says_why() -> None:
    call = Call()
    call.give_up(draining())
    call.give_up()  # which gRPC says of every call that ends
    with pytest.raises(ServiceUnavailable) as caught:
        call.check()
    assert caught.value.reason == Reason.DRAINING


def test_the_reader_ends_when_the_inbox_is_closed() -> None:
    before = set(threading.enumerate())
    source = Source(1, 2)
    with inbox(source):
        assert source.asked.acquire(timeout=WAIT)
    for thread in threading.enumerate():
        if thread.name == "stream-reader":
            thread.join(WAIT)
    assert set(threading.enumerate()) <= before
    assert source.messages == [2]


def test_a_single_wait_can_be_ended_and_the_next_goes_on() -> None:
    call, source = Call(), Source(error=RuntimeError("reset"))
    with inbox(source, call) as messages:
        call.wait_until = time.monotonic()
        with pytest.raises(WaitEnded):
            next(messages)
        call.wait_until = None
        source.release.set()
        with pytest.raises(Cancelled, match="reset"):
            next(messages)


def test_a_call_with_a_deadline() -> None:
    now = [0.0]
    call = Call(deadline=5.0, clock=lambda: now[0])
    call.check()
    now[0] = 5.0
    with pytest.raises(DeadlineExceeded):
        call.check()


def test_the_watchdog_ends_what_takes_too_long() -> None:
    ended = threading.Event()
    with Watchdog(0.01) as watchdog, watchdog.watch(ended.set):
        assert ended.wait(WAIT)


def test_the_watchdog_leaves_what_is_done_in_time() -> None:
    fired: list[Any] = []
    late = threading.Event()
    with Watchdog(0.5) as watchdog:
        with watchdog.watch(lambda: fired.append(None)):
            pass
        with watchdog.watch(late.set):
            assert late.wait(WAIT), "the watchdog has looked since"
    assert not fired


def test_the_watchdog_ends_the_longest_of_many_waits_sooner() -> None:
    names = ["first", "second", "third"]
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    with Watchdog(WAIT, few=1, patience=0.01) as watchdog, ExitStack() as waits:
        for name in names:
            waits.enter_context(watchdog.watch(functools.partial(ended.put, name)))
        assert [ended.get(timeout=WAIT) for _ in names[1:]] == ["first", "second"]
        with watchdog.watch(lambda: None):
            assert ended.get(timeout=WAIT) == "third"
    assert ended.empty()


def test_a_lane_counts_and_refuses() -> None:
    lane = Lane("streams", 2, Holdings("max_streams_per_name", "streams"))
    with lane.enter("ann"), lane.enter("ann"):
        assert lane.count == 2
        with pytest.raises(ResourceExhausted, match="at most 2 streams") as caught, lane.enter("ann"):
            pass
        assert caught.value.reason == Reason.TOO_MANY_STREAMS
        assert caught.value.retry_after is not None
    assert lane.count == 0
