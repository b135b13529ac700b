"""Fixtures of the client's tests: a scripted server, and a client of it that does not wait to reconnect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import convservice
from convservice import ConvClient
from tests.client.blocking import Blocking, Connect
from tests.client.fake import FakeServer, FakeService


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A scripted server of its own for each test."""
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def fake(fake_server: FakeServer) -> FakeService:
    """What the scripted server does and has seen."""
    return fake_server.service


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnecting is tested, not the pause before it."""
    monkeypatch.setattr("convservice.attempts.BACKOFF", (0.0, 0.0, 0.0))


@pytest.fixture
def client(fake_server: FakeServer) -> Iterator[ConvClient]:
    """A client of the scripted server."""
    with convservice.connect(fake_server.target) as found:
        yield found


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    """Three scripted servers."""
    found = [FakeServer() for _ in range(3)]
    yield found
    for server in found:
        server.stop()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of either kind, and closes them."""
    made: list[Blocking] = []

    def make(target: Any, **options: Any) -> Blocking:
        made.append(Blocking(request.param, target, **options))
        return made[-1]

    yield make
    for client in made:
        client.shut()
