"""The metrics page, read with Prometheus's own parser and compared with the calls that were made."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from contextlib import suppress
from typing import Any, cast

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import convservice
from convservice.errors import InvalidRequest, ServiceUnavailable
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice_backends.interface import Backend, TellsDeviceMemory
from convservice_backends.registry import Registry
from convservice_server.config import ServerConfig
from convservice_server.metrics_port import MOST_CONNECTIONS, MetricsPort
from convservice_server.observation import Observation, Observer
from convservice_server.records import CallRecord, TensorRecord
from convservice_server.server import Server
from tests.server.support import (
    WAIT,
    Requests,
    Running,
    collect,
    pointwise,
    put_messages,
    raw,
    running,
    tensor_messages,
    unary,
    weight,
)

X = np.ones((1, 1, 3, 2), np.float32)
Labels = frozenset[tuple[str, str]]


def fetch(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


class Page:
    """The samples of a page."""

    def __init__(self, port: int) -> None:
        status, _, text = fetch(port)
        assert status == 200
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation, family.name
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.samples
                self.samples[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """A sample's value; 0 for one that is not there."""
        return self.samples.get((f"convservice_{name}", frozenset(labels.items())), 0.0)

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for sample, labels in self.samples if sample == f"convservice_{name}"]


def page(found: Running) -> Page:
    return Page(found.server.metrics_port)


def test_what_was_called_is_counted() -> None:
    with running(metrics="127.0.0.1:0") as found:
        network = pointwise()
        found.register(network)
        request = unary(network, X, inline=False)
        received = 0
        for _ in range(5):
            received += found.stub.Convolve(request, timeout=WAIT).ByteSize()
        with pytest.raises(grpc.RpcError):
            found.stub.Convolve(unary(pointwise(2), X, inline=False), timeout=WAIT)
        results = collect(found.stub.ConvolveStream(tensor_messages(network.name, X), timeout=WAIT))
        assert results[0].done is not None
        found.stub.PutWeights(put_messages(weight(size=1000)), timeout=WAIT)
        seen = page(found)
        assert seen.value("calls_total", method="Convolve", status="OK") == 5
        assert seen.value("calls_total", method="Convolve", status="FAILED_PRECONDITION") == 1
        assert seen.value("calls_total", method="ConvolveStream", status="OK") == 1
        assert seen.value("calls_total", method="RegisterNetwork", status="OK") == 1
        assert seen.value("call_seconds_count", method="Convolve") == 6
        assert seen.value("call_seconds_bucket", method="Convolve", le="+Inf") == 6
        assert seen.value("call_seconds_sum", method="Convolve") > 0
        assert seen.value("received_bytes_total", method="Convolve") > 5 * request.ByteSize()
        assert seen.value("sent_bytes_total", method="Convolve") == received
        assert seen.value("received_bytes_total", method="PutWeights") > 4000
        assert seen.value("tensors_total", backend="double", status="OK") == 6
        assert seen.value("tensors_total", backend="none", status="FAILED_PRECONDITION") == 1
        assert seen.value("layers_total", backend="double", algorithm="direct") == 6
        assert seen.value("tensor_seconds_count") == 7
        for phase, count in {"queue": 7, "receive": 7, "compute": 6, "send": 1}.items():
            assert seen.value("tensor_phase_seconds_count", phase=phase) == count, phase


def test_what_is_in_use_is_told_while_it_is() -> None:
    with running(metrics="127.0.0.1:0", memory_budget_bytes="64MiB", weights_budget_bytes="32MiB") as found:
        name = found.register(pointwise())
        found.backend.gate.clear()
        requests = Requests(tensor_messages(name, X))
        responses = found.stub.ConvolveStream(requests, timeout=WAIT)
        found.backend.wait_for_block()
        busy = page(found)
        info = found.info()
        found.backend.gate.set()
        requests.end()
        list(responses)
        found.settle()
        idle = page(found)
        for name in ("bands_in_flight", "tensors_running", "streams_open"):
            assert (busy.value(name), idle.value(name)) == (1, 0), name
        assert busy.value("reserved_bytes") == info.usage.reserved_bytes > 0
        assert idle.value("reserved_bytes") == 0
        assert busy.value("weights_bytes") == info.usage.weights_bytes > 0
        assert busy.value("memory_budget_bytes") == 64 << 20
        assert busy.value("weights_budget_bytes") == 32 << 20
        assert busy.value("networks") == 1
        assert busy.value("serving") == 1
        assert busy.value("backend_up", backend="double") == 1
        assert idle.samples[("process_resident_memory_bytes", frozenset())] > 0
        (build,) = busy.labels("build_info")
        assert build["version"] == convservice.__version__


def test_what_was_refused_is_counted_by_its_reason() -> None:
    with running(metrics="127.0.0.1:0", max_streams=1, memory_budget_bytes=10) as found:
        name = found.register(pointwise())
        with pytest.raises(grpc.RpcError):
            found.stub.Convolve(unary(pointwise(), X), timeout=WAIT)
        requests = Requests()
        first = found.stub.ConvolveStream(requests, timeout=WAIT)
        requests.send(*tensor_messages(name, X))
        next(first)  # it is open
        with pytest.raises(grpc.RpcError):
            list(found.stub.ConvolveStream(iter(()), timeout=WAIT))
        requests.end()
        list(first)
        seen = page(found)
        assert seen.value("refusals_total", reason="MEMORY_BUDGET") == 2
        assert seen.value("refusals_total", reason="TOO_MANY_STREAMS") == 1
        assert seen.value("calls_total", method="ConvolveStream", status="RESOURCE_EXHAUSTED") == 1


def test_no_label_is_a_clients_text() -> None:
    with running(metrics="127.0.0.1:0") as found:
        for number in range(3):
            with pytest.raises(grpc.RpcError):
                list(raw(found.channel, f"Made{number}")(iter(()), timeout=WAIT))
            with pytest.raises(grpc.RpcError):
                found.stub.Convolve(unary(pointwise(), X, backend=f"made-{number}"), timeout=WAIT)
        seen = page(found)
        assert seen.value("calls_total", method="unknown", status="UNIMPLEMENTED") == 3
        assert seen.value("tensors_total", backend="none", status="FAILED_PRECONDITION") == 3
        text = fetch(found.server.metrics_port)[2]
        assert "made" not in text.lower()


def test_a_call_that_its_client_gives_up_is_counted_as_cancelled() -> None:
    with running(metrics="127.0.0.1:0") as found:
        name = found.register(pointwise())
        found.backend.gate.clear()
        requests = Requests(tensor_messages(name, X))
        responses = found.stub.ConvolveStream(requests, timeout=WAIT)
        found.backend.wait_for_block()
        server: Any = found.server
        (call,) = server._host._calls
        responses.cancel()
        assert call._given_up.wait(WAIT)
        found.backend.gate.set()
        requests.end()
        with suppress(grpc.RpcError):
            list(responses)
        found.settle()
        seen = page(found)
        assert seen.value("tensors_total", backend="double", status="CANCELLED") == 1


def test_while_it_drains_the_page_is_there_and_says_so() -> None:
    with running(metrics="127.0.0.1:0") as found:
        name = found.register(pointwise())
        found.backend.gate.clear()
        requests = Requests(tensor_messages(name, X))
        responses = found.stub.ConvolveStream(requests, timeout=WAIT)
        found.backend.wait_for_block()
        stopping = threading.Thread(target=found.server.stop)
        stopping.start()
        while page(found).value("serving"):
            pass
        assert page(found).value("tensors_running") == 1
        found.backend.gate.set()
        requests.end()
        list(responses)
        stopping.join(WAIT)
        assert not stopping.is_alive()
        with pytest.raises(ConnectionError):
            page(found)


def test_it_speaks_http() -> None:
    with running(metrics="127.0.0.1:0") as found:
        port = found.server.metrics_port
        status, kind, text = fetch(port)
        assert (status, kind.split(";")[0]) == (200, "text/plain")
        status, kind, text = fetch(port, Accept="application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        families = cast("Any", openmetrics).text_string_to_metric_families(text)
        assert {family.name for family in families} > {"convservice_calls"}
        assert fetch(port, "/elsewhere")[0] == 404
        assert fetch(port, method="HEAD")[::2] == (200, "")
        assert fetch(port, method="POST")[0] == 501
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        for _ in range(2):  # over one connection, which is open while the server stops
            kept.request("GET", "/metrics?name[]=x")
            response = kept.getresponse()
            response.read()
            assert (response.status, response.version) == (200, 11)
        found.server.stop()
        kept.close()


def test_a_port_that_is_taken_is_a_clear_error() -> None:
    with running(metrics="127.0.0.1:0") as found:
        taken = f"127.0.0.1:{found.server.metrics_port}"
        with pytest.raises(ServiceUnavailable) as caught, running(metrics=taken):
            pass
        assert caught.value.field == "metrics"
        assert caught.value.message.startswith(f"cannot listen on {taken}; is the port taken?")
        with pytest.raises(InvalidRequest, match="metrics must be HOST:PORT"):
            ServerConfig(metrics="9464")


def test_two_servers_in_a_process_count_each_its_own() -> None:
    with running(metrics="127.0.0.1:0") as one, running(metrics="127.0.0.1:0") as other:
        one.info()
        assert page(one).value("calls_total", method="GetServerInfo", status="OK") == 1
        assert page(other).value("calls_total", method="GetServerInfo", status="OK") == 0


def test_every_backend_is_told_of_and_its_devices_where_it_can_tell(backend: Backend) -> None:
    config = ServerConfig(listen="127.0.0.1:0", metrics="127.0.0.1:0", backend=backend.name)
    with Server(config) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = conv_pb2_grpc.ConvServiceStub(channel)
        stub.Convolve(unary(pointwise(), X), timeout=WAIT)
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        seen = Page(server.metrics_port)
        assert seen.value("tensors_total", backend=backend.name, status="OK") == 1
        for told in info.backends:
            assert seen.value("backend_up", backend=told.name) == told.available
        if isinstance(backend, TellsDeviceMemory):
            used = seen.value("device_memory_bytes", backend=backend.name, device="0")
            assert 0 < used <= seen.value("device_memory_limit_bytes", backend=backend.name, device="0")


def test_a_backend_that_was_never_asked_for_is_not_constructed_to_be_told_of() -> None:
    registry = Registry(factories={"a": lambda: pytest.fail("it is constructed")})
    assert registry.constructed() == {"a": None}


class Failing(Observer):
    def call_ended(self, call: CallRecord) -> None:
        raise ZeroDivisionError

    def tensor_ended(self, tensor: TensorRecord) -> None:
        raise ZeroDivisionError


class Kept(Observer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call_ended(self, call: CallRecord) -> None:
        self.calls.append(call)


def test_an_observer_that_fails_harms_nobody_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    observation = Observation([Failing(), kept])
    for _ in range(3):
        observation.call_ended(CallRecord())
    assert len(kept.calls) == 3
    assert [record.message for record in caplog.records].count(
        "Failing failed; that it does so again is not logged"
    ) == 1


def ended(connection: socket.socket) -> bool:
    """Waits until the other side has ended a connection on which it sends nothing."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_who_holds_connections_shuts_nobody_out_and_holds_up_no_stop() -> None:
    port = MetricsPort("127.0.0.1:0", CollectorRegistry())
    held: list[socket.socket] = []
    try:
        for _ in range(2 * MOST_CONNECTIONS):
            held.append(socket.create_connection(("127.0.0.1", port.port), WAIT))
            held[-1].sendall(b"GET /metrics HTTP/1.1\r\n")  # and never the rest
            assert fetch(port.port)[0] == 200
        assert ended(held[0]), "the one that has been there longest is gone"
        port.stop()
        assert all(map(ended, held))
    finally:
        port.stop()
        for connection in held:
            connection.close()


class _Broken:
    def collect(self) -> list[Any]:
        raise ZeroDivisionError

    def describe(self) -> list[Any]:
        return []


def test_a_page_that_cannot_be_made_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    registry.register(cast("Any", _Broken()))
    port = MetricsPort("127.0.0.1:0", registry)
    try:
        for _ in range(3):
            with pytest.raises(ConnectionError):
                fetch(port.port)
        assert fetch(port.port, "/elsewhere")[0] == 404
    finally:
        port.stop()
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
