"""What goes with every call: an id that the server's log and errors share, and the application's trace."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import convservice
from convservice.errors import ConvServiceError, ServiceUnavailable
from convservice.metadata import REQUEST_ID, identified
from tests.server.support import Running, running

X = np.ones((1, 1, 3, 2), np.float32)
WEIGHT = np.ones((1, 1, 1, 1), np.float32)
LARGE = np.ones((1, 1, 600, 1024), np.float32)


@pytest.fixture
def served(caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    caplog.set_level(logging.INFO)
    with running() as found:
        yield found


def ids(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        vars(record)["fields"]["request_id"]
        for record in caplog.records
        if record.name == "convservice_server.lines"
    ]


@pytest.mark.parametrize("x", [X, LARGE], ids=["unary", "stream"])
def test_an_error_names_the_line_in_the_servers_log(
    served: Running, caplog: pytest.LogCaptureFixture, x: Any
) -> None:
    with convservice.connect(f"127.0.0.1:{served.server.port}") as client:
        client.conv2d(x, WEIGHT)
        with pytest.raises(ConvServiceError) as caught:
            client.conv2d(x, WEIGHT, backend="made")
    assert caught.value.request_id == ids(caplog)[-1]
    assert len(set(ids(caplog))) > 1, "each call has an id of its own"


@pytest.mark.parametrize("x", [X, LARGE], ids=["unary", "stream"])
def test_the_async_clients_errors_do_so_too(
    served: Running, caplog: pytest.LogCaptureFixture, x: Any
) -> None:
    async def convolve() -> None:
        async with convservice.connect_async(f"127.0.0.1:{served.server.port}") as client:
            await client.conv2d(x, WEIGHT, backend="made")

    with pytest.raises(ConvServiceError) as caught:
        asyncio.run(convolve())
    assert caught.value.request_id == ids(caplog)[-1]


def test_a_call_that_reaches_nobody_has_an_id_all_the_same() -> None:
    with convservice.connect("127.0.0.1:1") as client, pytest.raises(ServiceUnavailable) as caught:
        client.info(timeout=60)
    assert caught.value.request_id


def test_without_opentelemetry_nothing_of_it_is_imported_or_sent() -> None:
    program = (
        "import sys; from convservice.metadata import identified; found = identified(());"
        "assert [name for name, _ in found[1]] == ['x-request-id'], found;"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_active_span_is_the_calls_parent() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra `otel` is not installed")
    tracer = trace.TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with tracer.start_as_current_span("work") as span:
        request_id, metadata = identified((("authorization", "Bearer x"),))
    found = dict(metadata)
    context = span.get_span_context()
    assert found["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert found[REQUEST_ID] == request_id
    assert found["authorization"] == "Bearer x"
    assert "traceparent" not in dict(identified(())[1])


def test_a_propagator_that_fails_harms_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    propagate = pytest.importorskip("opentelemetry.propagate", reason="the extra `otel` is not installed")

    def fail(carrier: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(propagate, "inject", fail)
    assert [name for name, _ in identified(())[1]] == [REQUEST_ID]
