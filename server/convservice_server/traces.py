"""OpenTelemetry's side of it: a span per call and tensor, and one per phase, sent to a collector.

`Traces` hangs on the observation. A call's span continues the client's trace where the call brought one
(W3C `traceparent`); a tensor's span is its child, and the phases are the tensor's: each from its first piece
to its last, with the time that was really spent in it as an attribute, since the phases of a tensor whose
rows flow overlap. Spans are sent in batches from a thread of OpenTelemetry's own; a collector that is
not there costs spans and nothing else. It needs the packages of the extra `otel` and is imported only where
traces are wanted.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from convservice_server.health import SERVICE_NAME
from convservice_server.logs import MOST_CHARACTERS
from convservice_server.observation import Observer
from convservice_server.records import CallRecord, TensorRecord

EXPORT_SECONDS = 5
"""For which one batch is tried to be sent."""

STOP_SECONDS = 5.0
"""For which the last spans may hold up the server's end."""


Wall = Callable[[float], int]
"""From a time of `time.monotonic` to nanoseconds since 1970."""


class Traces(Observer):
    """Makes spans of what it is told.

    Args:
        exporter: takes the spans; `to_collector` makes one.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "convservice"),
                "service.version": version("convservice"),
                "service.instance.id": str(uuid.uuid4()),
            }
        )
        self._provider = TracerProvider(
            resource=resource,
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_attribute_length=MOST_CHARACTERS),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("convservice", version("convservice"))
        self._headers = TraceContextTextMapPropagator()
        self._lock = threading.Lock()  # guards _calls
        self._calls: dict[CallRecord, tuple[Span, Wall]] = {}

    def call_started(self, call: CallRecord) -> None:
        """Begins the call's span, at the time of its arrival."""
        wall = _wall()
        span = self._tracer.start_span(
            f"{SERVICE_NAME}/{call.method}",
            self._headers.extract(call.trace),
            SpanKind.SERVER,
            {
                "rpc.system": "grpc",
                "rpc.service": SERVICE_NAME,
                "rpc.method": call.method,
                "convservice.request_id": call.request_id,
            },
            start_time=wall(call.arrived),
        )
        with self._lock:
            self._calls[call] = span, wall

    def call_ended(self, call: CallRecord) -> None:
        """Ends the call's span."""
        with self._lock:
            known = self._calls.pop(call, None)
        if known is None:
            return
        span, wall = known
        span.set_attributes(
            {
                "convservice.status": call.status,
                "convservice.queue_ms": _milliseconds(call.began - call.arrived),
                "convservice.bytes_in": call.bytes_in,
                "convservice.bytes_out": call.bytes_out,
            }
        )
        if call.status != "OK":
            span.set_attribute("convservice.reason", call.reason)
            span.set_status(Status(StatusCode.ERROR, call.message))
        span.end(wall(call.ended))

    def tensor_ended(self, tensor: TensorRecord) -> None:
        """Makes the tensor's span and those of its phases."""
        with self._lock:
            known = self._calls.get(tensor.call)
        if known is None or tensor.meter is None:
            return
        parent, wall = known
        if not parent.is_recording():
            return
        span = self._tracer.start_span(
            "tensor",
            set_span_in_context(parent),
            attributes={
                "convservice.tensor_id": tensor.tensor_id,
                "convservice.network": tensor.network,
                "convservice.input": tensor.input,
                "convservice.outputs": tensor.outputs,
                "convservice.backend": tensor.backend,
                "convservice.algorithms": ",".join(sorted(set(tensor.algorithms.values()))),
                "convservice.bytes_in": tensor.bytes_in,
                "convservice.bytes_out": tensor.meter.bytes_out,
                "convservice.reserved_bytes": tensor.meter.reserved,
                "convservice.status": tensor.status,
            },
            start_time=wall(tensor.meter.started),
        )
        if tensor.error is not None:
            span.set_attribute("convservice.reason", tensor.error.reason)
            span.set_status(Status(StatusCode.ERROR, tensor.error.message))
        within = set_span_in_context(span)
        for name, phase in tensor.meter.phases.items():
            if phase.first is not None:
                busy = {"convservice.busy_ms": _milliseconds(phase.seconds)}
                child = self._tracer.start_span(name, within, attributes=busy, start_time=wall(phase.first))
                child.end(wall(phase.last))
        span.end(wall(tensor.ended))

    def stop(self) -> None:
        """Sends what is left, for a bounded time."""
        last = threading.Thread(target=self._provider.shutdown, name="traces-stop", daemon=True)
        last.start()
        last.join(STOP_SECONDS)


def to_collector(endpoint: str) -> SpanExporter:
    """Sends spans to a collector.

    Args:
        endpoint: the URL of its OTLP port for gRPC; TLS where it begins with `https`.
    """
    return OTLPSpanExporter(
        endpoint=endpoint, insecure=not endpoint.startswith("https"), timeout=EXPORT_SECONDS
    )


def _wall() -> Wall:
    """Nanoseconds since 1970 for times of `time.monotonic`, as of now: the spans of one call keep their order
    whatever becomes of the clock on the wall."""
    zero = time.time_ns() - int(time.monotonic() * 1e9)
    return lambda monotonic: zero + int(monotonic * 1e9)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
