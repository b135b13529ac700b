"""Health that means something: while a server warms up, serves and drains, and for each backend by itself."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convservice.errors import BackendUnavailable, InvalidRequest, Reason, ServiceUnavailable
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice_backends.registry import Registry
from convservice_backends.trial import try_worked_example
from convservice_server.config import ServerConfig
from convservice_server.health import BACKEND_SERVICE, SERVICE_NAME, Health
from convservice_server.server import Server
from tests.server.support import (
    WAIT,
    Double,
    Requests,
    connect,
    error_of,
    pointwise,
    running,
    tensor_messages,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WHOLE = ("", SERVICE_NAME)
X = np.ones((1, 1, 2, 2), np.float32)


def status(channel: grpc.Channel, service: str) -> int:
    stub = cast("Any", health_pb2_grpc).HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT).status)


def watch(channel: grpc.Channel, service: str) -> Iterator[int]:
    stub = cast("Any", health_pb2_grpc).HealthStub(channel)
    for answer in stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT):
        yield int(answer.status)


@contextmanager
def warming(
    trial: Callable[[Any], None], *names: str, **settings: Any
) -> Generator[tuple[Server, threading.Thread, list[Exception]]]:
    """A server that listens, and the thread in which it warms up."""
    doubles: dict[str, Double] = {name: type("Named", (Double,), {"name": name})() for name in names}
    factories = {name: partial(doubles.__getitem__, name) for name in names}
    config = ServerConfig.of(**{"listen": "127.0.0.1:0", **settings})
    server = Server(config, Registry(config.backend, factories, trial))
    failed: list[Exception] = []

    def warm() -> None:
        try:
            server.warm()
        except BackendUnavailable as exc:
            failed.append(exc)

    thread = threading.Thread(target=warm)
    try:
        server.listen()
        thread.start()
        yield server, thread, failed
    finally:
        thread.join(WAIT)
        server.stop(0)


def test_while_it_warms_up_health_says_so_and_calls_may_be_tried_again() -> None:
    entered, gate = threading.Event(), threading.Event()

    def trial(backend: Double) -> None:
        entered.set()
        assert gate.wait(WAIT)

    with warming(trial, "a") as (server, thread, failed), connect(server.port) as channel:
        try:
            assert entered.wait(WAIT)
            for service in (*WHOLE, BACKEND_SERVICE + "a"):
                assert status(channel, service) == NOT_SERVING
            seen = watch(channel, "")
            assert next(seen) == NOT_SERVING
            stub = conv_pb2_grpc.ConvServiceStub(channel)
            calls: list[Callable[[], object]] = [
                lambda: stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT),
                lambda: stub.PutWeights(iter(()), timeout=WAIT),
                lambda: list(stub.ConvolveStream(iter(()), timeout=WAIT)),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                error = error_of(caught.value)
                assert isinstance(error, ServiceUnavailable)
                assert (error.reason, error.retry_after) == (Reason.WARMING, 1.0)
        finally:
            gate.set()
        assert next(seen) == SERVING
        thread.join(WAIT)
        assert not failed
        for service in (*WHOLE, BACKEND_SERVICE + "a"):
            assert status(channel, service) == SERVING
        stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        server.stop()
        assert next(seen) == NOT_SERVING


def test_a_backend_with_a_wrong_answer_is_taken_out_with_its_reason() -> None:
    def trial(backend: Double) -> None:
        if backend.name == "a":
            raise BackendUnavailable("the trial gave [[0]]", reason=Reason.BACKEND_UNAVAILABLE)

    with warming(trial, "a", "b") as (server, thread, failed), connect(server.port) as channel:
        thread.join(WAIT)
        assert not failed
        assert [status(channel, BACKEND_SERVICE + name) for name in "ab"] == [NOT_SERVING, SERVING]
        assert status(channel, "") == SERVING
        info = conv_pb2_grpc.ConvServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        told = {backend.name: backend for backend in info.backends}
        assert told["a"].reason == "backend 'a' cannot run here: the trial gave [[0]]"
        assert told["b"].is_default


@pytest.mark.parametrize("backend", ["auto", "a"])
def test_where_no_backend_passes_nothing_is_served(backend: str) -> None:
    def trial(backend: Double) -> None:
        if backend.name == "a":
            raise ZeroDivisionError("no answer")

    names = ("a",) if backend == "auto" else ("a", "b")
    with (
        warming(trial, *names, backend=backend) as (server, thread, failed),
        connect(server.port) as channel,
    ):
        thread.join(WAIT)
        (error,) = failed
        assert "backend 'a' cannot run here: ZeroDivisionError: no answer" in str(error)
        assert status(channel, "") == NOT_SERVING


def test_a_backend_that_fails_its_trial_is_closed() -> None:
    double = Double()
    registry = Registry(factories={"double": lambda: double}, trial=try_worked_example)
    with pytest.raises(BackendUnavailable, match="cannot run here"):
        registry.resolve("double")  # a double takes 1x1 filters alone
    assert double.closed


def test_the_installed_backends_pass_their_trial_before_the_server_serves() -> None:
    with Server(ServerConfig(listen="127.0.0.1:0")) as server, connect(server.port) as channel:
        info = conv_pb2_grpc.ConvServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        assert info.backends
        for backend in info.backends:
            expected = SERVING if backend.available else NOT_SERVING
            assert status(channel, BACKEND_SERVICE + backend.name) == expected
        assert status(channel, "") == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            status(channel, BACKEND_SERVICE + "abacus")
        assert cast("Any", caught.value).code() is grpc.StatusCode.NOT_FOUND


def test_while_it_drains_health_says_so() -> None:
    with running() as found:
        name = found.register(pointwise())
        header, *rest = tensor_messages(name, X)
        requests = Requests([header])
        responses = found.stub.ConvolveStream(requests, timeout=WAIT)
        next(responses)
        services = (*WHOLE, BACKEND_SERVICE + "double")
        watches = [watch(found.channel, service) for service in services]
        assert [next(seen) for seen in watches] == [SERVING] * 3
        stopping = threading.Thread(target=found.server.stop)
        stopping.start()
        assert [next(seen) for seen in watches] == [NOT_SERVING] * 3
        assert [status(found.channel, service) for service in services] == [NOT_SERVING] * 3
        requests.send(*rest)
        requests.end()
        with suppress(grpc.RpcError):
            list(responses)
        stopping.join(WAIT)
        assert not stopping.is_alive()


def test_a_port_for_health_alone() -> None:
    with running(health_listen="127.0.0.1:0") as found, connect(found.server.health_port) as channel:
        assert found.server.health_port not in {0, found.server.port}
        assert status(channel, "") == status(channel, BACKEND_SERVICE + "double") == SERVING
        assert next(watch(channel, "")) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            conv_pb2_grpc.ConvServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        assert cast("Any", caught.value).code() is grpc.StatusCode.UNIMPLEMENTED
        found.backend.failure = "the device is gone"
        found.server.service.registry.review()
        assert status(channel, "") == status(channel, BACKEND_SERVICE + "double") == NOT_SERVING


def test_a_port_for_health_that_is_taken_is_a_clear_error() -> None:
    with running() as found:
        taken = f"127.0.0.1:{found.server.port}"
        with pytest.raises(ServiceUnavailable) as caught, running(health_listen=taken):
            pass
        assert caught.value.field == "health_listen"
        assert caught.value.message.startswith(f"cannot listen on {taken}; is the port taken?")


def test_an_address_for_health_is_checked() -> None:
    with pytest.raises(InvalidRequest, match="health_listen must be HOST:PORT"):
        ServerConfig(health_listen="here")


class Watcher:
    """The context of a call that watches, which ends when told to or has ended before it is asked."""

    def __init__(self, *, over: bool) -> None:
        self.over = over
        self.callbacks: list[Callable[[], None]] = []
        self.told: list[Any] = []
        self.weight = bytearray(1 << 20)

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self.over:
            self.callbacks.append(callback)
        return not self.over

    def tell(self, answer: Any) -> None:
        self.told.append(answer if answer is None else answer.status)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("length", [0, 1 << 20])
def test_nothing_is_left_of_a_watch_that_has_ended(length: int, over: bool) -> None:
    servicer = Health(Registry(factories={"double": Double})).servicer
    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

    def watch_and_leave(number: int) -> None:
        call = Watcher(over=over)
        service = str(number % 10) * length
        cast("Any", servicer).Watch(health_pb2.HealthCheckRequest(service=service), call, call.tell)
        for callback in call.callbacks:
            callback()
        assert call.told == [unknown if service else NOT_SERVING, None]

    tracemalloc.start()
    try:
        for number in range(20):
            watch_and_leave(number)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_service_that_there_is_not_can_be_watched() -> None:
    with running() as served:
        assert next(watch(served.channel, "nobody")) == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
