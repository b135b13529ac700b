"""Three real servers, each a process of its own: killed, stopped and frozen under load, and no call fails."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import convservice
from convservice import Conv, ConvClient, Network, channel
from convservice.addresses import Address
from convservice.cli.embedded import EmbeddedServer
from convservice_backends.interface import Backend
from tests.helpers import Array

NETWORK = Network([Conv(np.arange(36, dtype="float32").reshape(4, 1, 3, 3) - 18, padding="same")])
WAIT = 240.0


@pytest.fixture
def servers(backend: Backend) -> Iterator[list[EmbeddedServer]]:
    """Three servers, stopped and killed at the end whatever became of them."""
    with ExitStack() as stack:
        found: list[EmbeddedServer] = []
        for _ in range(3):
            found.append(EmbeddedServer(["--backend", backend.name]))
            stack.callback(end, found[-1])
        yield found


def end(server: EmbeddedServer) -> None:
    """Ends a server that may be frozen, or ended already: nobody has asked for its status so far."""
    os.kill(server.pid, signal.SIGKILL)
    server.stop()


@pytest.fixture
def client(servers: list[EmbeddedServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[ConvClient]:
    """A client of the three, which notices a frozen one sooner than users' do."""
    quick = {"grpc.keepalive_time_ms": 1_000, "grpc.keepalive_timeout_ms": 1_000}
    honest = channel.channel_options

    def options(address: Address, lone: bool) -> tuple[tuple[str, Any], ...]:
        return tuple({**dict(honest(address, lone)), **quick}.items())

    monkeypatch.setattr(channel, "channel_options", options)
    with convservice.connect([server.target for server in servers]) as found:
        yield found


def given(number: int) -> Array:
    """Small integers that differ by number; their results are exact."""
    return np.random.default_rng(number).integers(-4, 5, (1, 40, 50)).astype("float32")


def expected(number: int) -> Array:
    """The feature maps of `given(number)`, from windows written out."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(given(number)[0], 1), (3, 3))
    weight = np.arange(36, dtype="float32").reshape(4, 3, 3) - 18
    return np.moveaxis(np.tensordot(windows, weight, ([2, 3], [1, 2])), -1, 0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
@pytest.mark.timeout(600)
@pytest.mark.multiply_adds(10**9)
def test_no_call_fails_and_every_result_is_right(
    servers: list[EmbeddedServer], client: ConvClient, how: signal.Signals
) -> None:
    """Unary calls from two threads and a `map`, all before, while and after one of three goes."""
    going, wrong = threading.Event(), list[BaseException | int]()
    done = itertools.count()

    def call(first: int) -> None:
        try:
            for number in range(first, first + 60):
                if number - first == 20:
                    assert going.wait(WAIT)
                if not np.array_equal(client.run(NETWORK, given(number)), expected(number)):
                    wrong.append(number)
                next(done)
        except BaseException as exc:  # noqa: BLE001 - shown by the test's own thread
            wrong.append(exc)

    callers = [threading.Thread(target=call, args=(first,)) for first in (0, 100)]
    for caller in callers:
        caller.start()
    for number, result in enumerate(client.map(NETWORK, map(given, range(300)))):
        assert np.array_equal(result, expected(number))
        if number == 30:
            os.kill(servers[1].pid, how)
            going.set()
    for caller in callers:
        caller.join(WAIT)
    assert not wrong
    assert next(done) == 120
    assert set(client.infos(timeout=WAIT)) >= {servers[0].target, servers[2].target}
