"""Which replica a call goes to, and when one that failed is tried again: no server, and no real time."""

from __future__ import annotations

import pytest

from convservice import DeadlineExceeded, InvalidRequest, Reason, ResourceExhausted, ServiceUnavailable
from convservice.addresses import Address
from convservice.endpoint import Endpoint
from convservice.replicas import Replica, Replicas, Route

AWAY = ServiceUnavailable("away", reason=Reason.UNREACHABLE)


@pytest.fixture(autouse=True)
def _pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses as users have them, without their spread."""

    def middle(low: float, high: float) -> float:
        return (low + high) / 2

    monkeypatch.setattr("convservice.attempts.BACKOFF", (0.1, 0.4, 1.6))
    monkeypatch.setattr("random.uniform", middle)


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def connection(endpoint: Endpoint, address: Address, lone: bool) -> str:
    """What stands for a connection here."""
    return f"{address.target} lone={lone}"


def of(*targets: str, clock: Clock | None = None) -> Replicas[str]:
    return Replicas(Endpoint.of(list(targets)), connection, clock or Clock())


def chosen(replicas: Replicas[str], count: int) -> list[str]:
    """Where so many calls go, one after another."""
    found: list[str] = []
    for _ in range(count):
        replica = replicas.choose()
        replicas.done(replica)
        found.append(replica.target[0])
    return found


def named(replicas: Replicas[str], name: str) -> Replica[str]:
    return next(replica for replica in replicas.current() if replica.target[0] == name)


def test_in_turn_while_all_are_even() -> None:
    assert chosen(of("a:1", "b:1", "c:1"), 7) == list("abcabca")


def test_the_one_with_the_least_in_flight() -> None:
    replicas = of("a:1", "b:1", "c:1")
    held = [replicas.choose() for _ in range(5)]  # a b c a b
    assert replicas.choose().target == "c:1"
    replicas.done(held[0])
    replicas.done(held[3])
    assert replicas.choose().target == "a:1"


def test_a_single_one_is_lone_and_always_chosen() -> None:
    replicas = of("10.0.0.1:1")
    (lone,) = replicas.current()
    assert lone.connection == "10.0.0.1:1 lone=True"
    for _ in range(9):
        replicas.failed(lone, AWAY)
        assert replicas.choose() is lone


def test_the_only_one_behind_a_name_is_not_the_last_that_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two servers that are restarted one after another, one is known alone when it goes."""
    replicas = of("a:1")
    (only,) = replicas.current()
    assert only.connection == "a:1 lone=False"
    route = Route(replicas)
    assert route.replica is only
    monkeypatch.setattr(replicas.directory, "addresses", lambda: (Address("b:1"),))
    assert route.failed(AWAY) == 0
    assert route.replica.target == "b:1"


def test_no_connection_is_closed_while_all_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = of("a:1", "b:1")
    with replicas.all() as everyone:
        monkeypatch.setattr(replicas.directory, "addresses", lambda: (Address("b:1"), Address("c:1")))
        assert {replica.target for replica in replicas.current()} == {"b:1", "c:1"}
        assert [replica.in_flight for replica in everyone] == [1, 1]
        assert replicas.discarded() == []
    assert replicas.discarded() == ["a:1 lone=False"]


def test_one_that_failed_is_left_alone_then_tried_with_one_call() -> None:
    clock = Clock()
    replicas = of("a:1", "b:1", clock=clock)
    failing = named(replicas, "a")
    assert failing.connection == "a:1 lone=False"
    for seconds in (0.1, 0.4, 1.6, 6.4):
        replicas.failed(failing, AWAY)
        clock.now += seconds - 0.01
        assert chosen(replicas, 3) == list("bbb")
        clock.now += 0.02
        assert sorted(chosen(replicas, 4)) == list("abbb")
    replicas.succeeded(failing)
    assert sorted(chosen(replicas, 4)) == list("aabb")


def test_the_last_is_asked_however_it_fares() -> None:
    replicas = of("a:1", "b:1")
    for name in "ab":
        replicas.failed(named(replicas, name), AWAY)
    assert replicas.choose({named(replicas, "a")}).target == "b:1"
    assert replicas.choose(set(replicas.current())).target in {"a:1", "b:1"}


def test_what_tells_that_a_replica_is_not_well() -> None:
    clock = Clock()
    replicas = of("a:1", "b:1", clock=clock)
    replica = named(replicas, "a")
    for error in (InvalidRequest("wrong"), ServiceUnavailable("idle", reason=Reason.IDLE)):
        replicas.failed(replica, error)
        assert replica.avoided_until <= clock.now
    replicas.failed(replica, ResourceExhausted("full", retry_after=5.0))
    assert (replica.failures, replica.avoided_until) == (0, clock.now + 5.0)
    replicas.failed(replica, DeadlineExceeded("late"))
    assert replica.failures == 1


def test_a_route_stays_until_it_fails() -> None:
    replicas = of("a:1", "b:1")
    route = Route(replicas)
    assert route.replica is route.replica
    assert named(replicas, "a").in_flight == 1
    assert route.failed(AWAY) == 0.0
    assert (route.replica.target, named(replicas, "a").in_flight) == ("b:1", 0)
    assert route.failed(AWAY, left=0.05) is None, "a pause that outlasts the limit is no use"
    route.leave()
    assert all(replica.in_flight == 0 for replica in replicas.current())


def test_a_lone_one_is_asked_again_by_grpc_unless_patience_is_asked_for() -> None:
    route = Route(of("10.0.0.1:1"))
    assert route.failed(AWAY) is None
    assert [route.failed(AWAY, patient=True) for _ in range(4)] == [0.1, 0.4, 1.6, None]


def test_a_success_gives_what_comes_next_all_its_attempts() -> None:
    route = Route(of("a:1"))
    assert [route.failed(AWAY, patient=True) for _ in range(3)] == [0.1, 0.4, 1.6]
    route.succeeded()
    assert route.failed(AWAY, patient=True) == 0.1


def test_a_closed_one_chooses_nothing() -> None:
    replicas = of("a:1", "b:1")
    replicas.choose()
    assert len(replicas.close()) == 2
    with pytest.raises(InvalidRequest, match="the client is closed"):
        replicas.choose()
