"""A backend that fails for good while the server runs, and one that holds results back.

A device may fail so that no call on it ever succeeds again. What ran on it fails with DEVICE_LOST; health
tells; new requests that leave the choice to the server go to the next backend; the server lives on.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convservice.bands import Band
from convservice.errors import BackendUnavailable, Reason
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice_backends.registry import Registry
from convservice_server.config import ServerConfig
from convservice_server.health import BACKEND_SERVICE, SERVICE_NAME
from convservice_server.server import Server
from tests.server.support import (
    WAIT,
    Double,
    DoubleSession,
    Requests,
    Running,
    connect,
    error_of,
    header_message,
    payload_message,
    pointwise,
    running,
    spec_of,
    unary,
)

X = np.arange(24, dtype=np.float32).reshape(2, 1, 4, 3)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def serving(*names: str, backend: str = "auto") -> Generator[tuple[grpc.Channel, dict[str, Double]]]:
    """A server whose backends are doubles of these names."""
    doubles: dict[str, Double] = {name: type("Named", (Double,), {"name": name})() for name in names}
    registry = Registry(backend, {name: partial(doubles.__getitem__, name) for name in names})
    config = ServerConfig(listen="127.0.0.1:0", backend=backend)
    with Server(config, registry) as server, connect(server.port) as channel:
        yield channel, doubles


def break_down(double: Double) -> None:
    """The next block fails, and no call on the device succeeds from then on."""

    def fail() -> None:
        double.failure = "device 0 failed for good: an illegal memory access"
        raise BackendUnavailable(double.failure, reason=Reason.DEVICE_LOST)

    double.work = fail


def status(channel: grpc.Channel, service: str) -> int:
    stub = cast("Any", health_pb2_grpc).HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT).status)


def convolve(channel: grpc.Channel, **header: Any) -> pb.ConvolveResponse:
    stub = conv_pb2_grpc.ConvServiceStub(channel)
    return stub.Convolve(unary(pointwise(), X, **header), timeout=WAIT)


def test_auto_goes_to_the_next_backend_and_health_tells() -> None:
    with serving("a", "b") as (channel, doubles):
        convolve(channel, backend="b")
        assert status(channel, BACKEND_SERVICE + "a") == SERVING
        break_down(doubles["a"])
        with pytest.raises(grpc.RpcError) as caught:
            convolve(channel)
        assert error_of(caught.value).reason == Reason.DEVICE_LOST
        assert status(channel, BACKEND_SERVICE + "a") == NOT_SERVING
        assert status(channel, BACKEND_SERVICE + "b") == status(channel, SERVICE_NAME) == SERVING

        before = doubles["b"].blocks
        convolve(channel)
        assert doubles["b"].blocks > before
        with pytest.raises(grpc.RpcError) as caught:
            convolve(channel, backend="a")
        assert "backend 'a' is out of service: device 0 failed for good" in error_of(caught.value).message

        info = conv_pb2_grpc.ConvServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        told = {backend.name: backend for backend in info.backends}
        assert "an illegal memory access" in told["a"].reason
        assert not told["a"].is_default
        assert told["b"].is_default


@pytest.mark.parametrize("backend", ["auto", "a"])
def test_a_server_without_another_backend_is_not_serving(backend: str) -> None:
    names = ("a",) if backend == "auto" else ("a", "b")
    with serving(*names, backend=backend) as (channel, doubles):
        assert status(channel, "") == SERVING
        break_down(doubles["a"])
        with pytest.raises(grpc.RpcError):
            convolve(channel)
        assert status(channel, "") == status(channel, SERVICE_NAME) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            convolve(channel)
        assert error_of(caught.value).reason == Reason.BACKEND_UNAVAILABLE


class Holding(DoubleSession):
    """Computes as it is given rows, and hands nothing on until it is drained."""

    _held: list[Band]

    def submit(self, band: Band) -> Iterator[Band]:
        held = getattr(self, "_held", [])
        self._held = [*held, *super().submit(band)]
        return iter(())

    def drain(self) -> Iterator[Band]:
        held, self._held = self._held, []
        return iter(held)


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr("tests.server.support.DoubleSession", Holding)
    with running() as found:
        yield found
        found.settle()


def test_held_results_leave_when_no_more_rows_are_at_hand(holding: Running) -> None:
    name = holding.register(pointwise(scale=2))
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    rows = [x[0, 0, i].tobytes() for i in range(3)]
    requests = Requests([header_message(name, spec_of(x, 1))])
    responses = holding.stub.ConvolveStream(requests, timeout=WAIT)
    assert next(responses).WhichOneof("message") == "header"
    for index, row in enumerate(rows):  # the client sends a row only after it has the one before
        requests.send(payload_message(row, index * len(row)))
        got = next(responses).payload
        assert np.frombuffer(got.data, np.float32).tolist() == (2 * x[0, 0, index]).tolist()
    requests.end()
    responses.cancel()
