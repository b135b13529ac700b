"""Fixtures of the client's tests: a scripted server, and a client of it that does not wait to reconnect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import convservice
from convservice import ConvClient
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
