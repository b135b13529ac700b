"""What is tried again, where and when: rules and books, with neither a server nor a clock."""

from __future__ import annotations

import pytest

from convservice import (
    BackendUnavailable,
    Cancelled,
    ConvServiceError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.attempts import LONGEST_PAUSE, Again, Attempts, again, pause

DRAINING = ServiceUnavailable("stopping", reason=Reason.DRAINING, retry_after=1.0)
AWAY = ServiceUnavailable("away", reason=Reason.UNREACHABLE)
FULL = ResourceExhausted("full", reason=Reason.MEMORY_BUDGET, retry_after=2.5)


@pytest.fixture(autouse=True)
def _pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses as users have them, without their spread."""
    monkeypatch.setattr("convservice.attempts.BACKOFF", (0.1, 0.4, 1.6))

    def middle(low: float, high: float) -> float:
        return (low + high) / 2

    monkeypatch.setattr("random.uniform", middle)


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (AWAY, Again.LATER),
        (DRAINING, Again.LATER),
        (FULL, Again.ELSEWHERE),
        (ResourceExhausted("never", reason=Reason.MEMORY_BUDGET), Again.NOTHING),
        (NetworkNotFound("no", reason=Reason.NETWORK_NOT_REGISTERED), Again.ELSEWHERE),
        (NetworkNotFound("no", reason=Reason.WEIGHTS_MISSING), Again.ELSEWHERE),
        (NetworkNotFound("no", reason=Reason.NETWORK_NOT_FOUND), Again.ELSEWHERE),
        (InvalidRequest("wrong"), Again.NOTHING),
        (DeadlineExceeded("late"), Again.NOTHING),
        (Cancelled("left"), Again.NOTHING),
        (InternalError("broken"), Again.NOTHING),
        (BackendUnavailable("none"), Again.NOTHING),
    ],
)
def test_what_helps(error: ConvServiceError, helps: Again) -> None:
    assert again(error) is helps


def test_every_replica_is_asked_before_there_is_a_pause() -> None:
    attempts, replicas = Attempts[str](), ["a", "b", "c"]
    assert attempts.failed("a", AWAY, replicas) == 0.0
    assert attempts.failed("b", AWAY, replicas) == 0.0
    assert attempts.tried == {"a", "b"}
    assert attempts.failed("c", AWAY, replicas) == 0.1
    assert attempts.tried == set()


def test_rounds_are_bounded_and_pauses_grow() -> None:
    attempts = Attempts[str]()
    assert [attempts.failed("a", AWAY, ["a"]) for _ in range(4)] == [0.1, 0.4, 1.6, None]


def test_a_server_that_names_a_time_is_given_it() -> None:
    assert Attempts[str]().failed("a", DRAINING, ["a"]) == 1.0


def test_a_replica_that_refuses_is_not_asked_again() -> None:
    attempts = Attempts[str]()
    assert attempts.failed("a", FULL, ["a", "b"]) == 0.0
    assert attempts.failed("b", AWAY, ["a", "b"]) == 0.1
    assert attempts.tried == {"a"}
    assert attempts.failed("b", FULL, ["a", "b"]) is None


def test_one_that_is_new_is_asked_at_once() -> None:
    attempts = Attempts[str]()
    assert attempts.failed("a", AWAY, ["b"]) == 0.0


def test_what_nothing_helps_stands() -> None:
    assert Attempts[str]().failed("a", InvalidRequest("wrong"), ["a", "b"]) is None


def test_pauses_grow_to_a_limit() -> None:
    pauses = [pause(failures) for failures in range(1, 40)]
    assert pauses[:5] == [0.1, 0.4, 1.6, 6.4, 25.6]
    assert max(pauses) == LONGEST_PAUSE
    assert pause(1, 7.0) == 7.0
