"""Traces, as they arrive at a collector of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import grpc
import numpy as np
import pytest

from convservice.errors import InvalidRequest
from convservice_server.config import ServerConfig
from tests.server.support import WAIT, collect, pointwise, running, tensor_messages, unary

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

X = np.ones((1, 1, 3, 2), np.float32)
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards the two below
        self.spans: list[trace_pb2.Span] = []
        self.resources: list[dict[str, str]] = []
        self.port = 0

    def Export(  # noqa: N802 - as the contract names it
        self, request: service.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> service.ExportTraceServiceResponse:
        with self.changed:
            for resource in request.resource_spans:
                self.resources.append(values(resource.resource))
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            self.changed.notify_all()
        return service.ExportTraceServiceResponse()

    def named(self, name: str) -> trace_pb2.Span:
        """The one span of that name, waited for."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(span.name == name for span in self.spans), WAIT)
            (span,) = [span for span in self.spans if span.name == name]
            return span


def values(holder: Any) -> dict[str, Any]:
    """Attributes by name."""
    found: dict[str, Any] = {}
    for attribute in holder.attributes:
        kind = attribute.value.WhichOneof("value")
        found[attribute.key] = getattr(attribute.value, kind)
    return found


@contextmanager
def collecting() -> Generator[Collector]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    cast("Any", service_grpc).add_TraceServiceServicer_to_server(collector, server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def test_a_call_is_a_span_in_the_clients_trace_with_its_tensor_and_phases() -> None:
    with collecting() as collector:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "job-7"))
        with running(traces=f"http://127.0.0.1:{collector.port}") as found:
            network = pointwise()
            name = found.register(network)
            stream = found.stub.ConvolveStream(tensor_messages(name, X, 3), timeout=WAIT, metadata=metadata)
            assert collect(stream)[3].done is not None
        call = collector.named("convservice.v1.ConvService/ConvolveStream")
        tensor = collector.named("tensor")
        assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT)
        assert tensor.parent_span_id == call.span_id
        assert values(call)["convservice.request_id"] == "job-7"
        assert values(call)["convservice.status"] == "OK"
        assert values(tensor)["convservice.backend"] == "double"
        assert values(tensor)["convservice.network"] == name
        assert int(values(tensor)["convservice.tensor_id"]) == 3
        assert int(values(tensor)["convservice.bytes_in"]) == X.nbytes
        for phase in ("queue", "receive", "compute", "send"):
            span = collector.named(phase)
            assert span.parent_span_id == tensor.span_id
            assert span.trace_id.hex() == TRACE
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            assert values(span)["convservice.busy_ms"] >= 0
        assert call.start_time_unix_nano <= tensor.start_time_unix_nano
        registered = collector.named("convservice.v1.ConvService/RegisterNetwork")
        assert registered.trace_id.hex() not in {"", TRACE}
        assert not registered.parent_span_id
        (resource, *_) = collector.resources
        assert resource["service.name"] == "convservice"


def test_what_fails_says_so_in_its_span() -> None:
    with collecting() as collector:
        with (
            running(traces=f"http://127.0.0.1:{collector.port}") as found,
            pytest.raises(grpc.RpcError),
        ):
            found.stub.Convolve(unary(pointwise(), X, backend="made"), timeout=WAIT)
        for name in ("convservice.v1.ConvService/Convolve", "tensor"):
            span = collector.named(name)
            assert span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
            assert "there is no backend 'made'" in span.status.message
            assert values(span)["convservice.reason"] == "BACKEND_UNAVAILABLE"


@pytest.mark.parametrize("header", ["00-0-0-00", "nonsense", f"00-{TRACE}-{PARENT}-00"])
def test_a_trace_that_is_wrong_or_not_sampled_harms_no_call(header: str) -> None:
    with collecting() as collector:
        with running(traces=f"http://127.0.0.1:{collector.port}") as found:
            found.stub.Convolve(unary(pointwise(), X), timeout=WAIT, metadata=(("traceparent", header),))
        if header.endswith(f"{PARENT}-00"):
            assert not collector.spans
        else:
            assert collector.named("tensor").trace_id.hex() not in {"", TRACE}


def test_a_collector_that_is_not_there_costs_spans_and_nothing_else() -> None:
    with running(traces="http://127.0.0.1:1") as found:
        for _ in range(3):
            found.stub.Convolve(unary(pointwise(), X), timeout=WAIT)
        assert found.server.stop()
        with pytest.raises(grpc.RpcError):
            found.info()


@pytest.mark.parametrize("traces", ["localhost:4317", "http://localhost", "ftp://localhost:1", ""])
def test_an_endpoint_is_checked(traces: str) -> None:
    with pytest.raises(InvalidRequest, match="traces must be "):
        ServerConfig(traces=traces)
