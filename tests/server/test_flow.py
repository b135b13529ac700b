"""Peers that do not move with the flow: never reading, never writing, far ahead, gone in the middle.

However a client behaves, the server takes in no more than HTTP/2's windows hold, other clients are served
meanwhile, and when the client is gone nothing is left.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from convservice.bands import TensorSpec
from convservice.dtypes import FLOAT32
from convservice.errors import DeadlineExceeded
from convservice.geometry import SampleShape
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice_server.calls import Call
from convservice_server.health import SERVICE_NAME
from convservice_server.watchdog import Watchdog
from tests.server.support import (
    WAIT,
    Requests,
    Running,
    collect,
    connect,
    end_message,
    error_of,
    header_message,
    payload_message,
    pointwise,
    running,
    tensor_messages,
    unary,
)

MIB = 1 << 20
WINDOWS = 64 * MIB
"""More than HTTP/2's windows and gRPC's own buffers hold in one direction (measured: about 8 MiB)."""


@pytest.fixture
def served() -> Iterator[Running]:
    with running() as found:
        yield found
        found.settle()


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the server has heard that some caller is gone."""
    heard = threading.Event()
    original = Call.give_up

    def give_up(call: Call) -> None:
        original(call)
        heard.set()

    monkeypatch.setattr(Call, "give_up", give_up)
    return heard


def endless(name: str, height: int) -> Iterator[pb.ConvolveStreamRequest]:
    """A tensor of `height` MiB, a row each."""
    row = np.ones(MIB // 4, np.float32).tobytes()
    yield header_message(name, TensorSpec(FLOAT32, SampleShape(1, height, (MIB // 4,)), 1, 1))
    for number in range(height):
        yield payload_message(row, number * MIB)
    yield end_message()


def tensor_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "tensor"]


def test_a_client_that_never_reads(caplog: pytest.LogCaptureFixture) -> None:
    """The server stops reading, serves others, and ends the call after the idle time."""
    caplog.set_level(logging.INFO)
    with running(idle_timeout=3.0) as served:
        stream = served.stub.ConvolveStream(endless(served.register(pointwise()), 4096), timeout=WAIT)
        served.backend.wait_for_block()
        served.is_serving_others()
        served.settle()
        (line,) = [line for line in tensor_lines(caplog) if line["call"] == "ConvolveStream"]
        assert line["status"] == "CANCELLED"
        assert line["bytes_in"] < WINDOWS
        assert line["bytes_out"] < WINDOWS
        served.is_serving_others()
        with pytest.raises(grpc.RpcError):
            list(stream)


def test_an_output_64_times_the_input_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with running(idle_timeout=3.0) as served:
        stream = served.stub.ConvolveStream(endless(served.register(pointwise(outputs=64)), 8), timeout=WAIT)
        served.backend.wait_for_block()
        served.is_serving_others()
        served.settle()
        (line,) = [line for line in tensor_lines(caplog) if line["call"] == "ConvolveStream"]
        assert line["bytes_in"] <= 2 * MIB
        assert line["bytes_out"] < WINDOWS
        with pytest.raises(grpc.RpcError):
            list(stream)


def test_an_output_64_times_the_input(served: Running) -> None:
    stream = served.stub.ConvolveStream(endless(served.register(pointwise(outputs=64)), 2), timeout=WAIT)
    received = 0
    for response in stream:
        if response.WhichOneof("message") == "payload":
            assert response.payload.byte_offset == received
            received += len(response.payload.data)
    assert received == 128 * MIB


def test_a_client_that_never_writes_holds_up_nobody() -> None:
    with running(max_streams=4) as served:
        silent = [Requests() for _ in range(4)]
        streams = [served.stub.ConvolveStream(requests, timeout=WAIT) for requests in silent]
        served.is_serving_others()
        for requests in silent:
            requests.end()
        for stream in streams:
            assert list(stream) == []
        served.settle()


def test_a_tensor_that_is_not_sent_in_its_time_gives_its_memory_back(served: Running) -> None:
    x = np.ones((1, 1, 2, 2), np.float32)
    header, *rest = tensor_messages(served.register(pointwise()), x, timeout_ms=50)
    requests = Requests([header])
    responses = iter(served.stub.ConvolveStream(requests, timeout=WAIT))
    first = [next(responses), next(responses)]
    assert served.server.service.admission.reserved == 0
    requests.send(*rest, *tensor_messages(header.header.network, x, 1))
    requests.end()
    results = collect([*first, *responses])
    assert isinstance(results[0].error, DeadlineExceeded)
    assert results[0].error.metadata == {"timeout_ms": "50"}
    assert results[1].floats == [1.0] * 4


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released once for each wait that a watchdog watches."""
    seen = threading.Semaphore(0)
    original = Watchdog.watch

    @contextmanager
    def watch(watchdog: Watchdog, end: Callable[[], object]) -> Generator[None]:
        with original(watchdog, end):
            seen.release()
            yield

    monkeypatch.setattr(Watchdog, "watch", watch)
    return seen


@contextmanager
def silent_calls(
    channel: grpc.Channel, method: str, count: int, arrived: threading.Semaphore
) -> Generator[list[Any]]:
    """Calls without a request, each of which has a worker that waits for it."""
    requests = [Requests() for _ in range(count)]
    calls = [cast("Any", channel).stream_stream(method)(each, timeout=2 * WAIT) for each in requests]
    try:
        for _ in calls:
            assert arrived.acquire(timeout=WAIT)
        yield calls
    finally:
        for call, each in zip(calls, requests, strict=True):
            call.cancel()
            each.end()


def is_healthy(channel: grpc.Channel) -> bool:
    stub = cast("Any", health_pb2_grpc).HealthStub(channel)
    status = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


CONVOLVE = f"/{SERVICE_NAME}/Convolve"
CHECK = f"/{health.SERVICE_NAME}/Check"


def test_silent_unary_calls_do_not_stop_health(arrived: threading.Semaphore) -> None:
    with running(max_streams=1, max_uploads=1, unary_workers=2, crowd_timeout=2 * WAIT) as served:
        workers = served.server.config.pool_size
        with silent_calls(served.channel, CONVOLVE, workers, arrived), connect(served.server.port) as channel:
            assert is_healthy(channel)


@pytest.mark.parametrize(("method", "workers"), [(CONVOLVE, 4), (CHECK, 2)])
def test_silent_calls_leave_workers_to_others(
    arrived: threading.Semaphore, method: str, workers: int
) -> None:
    """There are as many as there are workers; one is let be, and the others are ended."""
    ended = threading.Semaphore(0)

    def over(_: object) -> None:
        ended.release()

    with (
        running(max_streams=1, max_uploads=1, unary_workers=2, crowd_timeout=0.2) as served,
        silent_calls(served.channel, method, workers, arrived) as calls,
        connect(served.server.port) as channel,
    ):
        for call in calls:
            call.add_done_callback(over)
        served.is_serving_others()
        assert is_healthy(channel)
        for _ in calls[1:]:
            assert ended.acquire(timeout=WAIT)
        codes = [call.code() for call in calls if not call.is_active()]
        assert codes == [grpc.StatusCode.CANCELLED] * (workers - 1)


def test_a_thousand_tensors_before_the_first_read(served: Running) -> None:
    name = served.register(pointwise(scale=2))
    x = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)
    written = threading.Event()

    def requests() -> Iterator[pb.ConvolveStreamRequest]:
        for number in range(1000):
            yield from tensor_messages(name, x + number, number)
            if number == 100:
                written.set()

    stream = served.stub.ConvolveStream(requests(), timeout=2 * WAIT)
    assert written.wait(WAIT)
    served.is_serving_others()
    results = collect(stream)
    assert list(results) == list(range(1000))
    for number, result in results.items():
        assert result.floats == (2 * (x + number)).ravel().tolist()


def leave(how: str, served: Running, start: Callable[[Any], Any]) -> None:
    """Begins a stream whose first block waits, and leaves it in the middle."""
    channel = connect(served.server.port)
    call = start(channel)
    served.backend.wait_for_block()
    if how == "cancel":
        call.cancel()
    elif how == "disconnect":
        channel.close()
    if how == "deadline":
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert cast("Any", caught.value).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    channel.close()


@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
def test_a_stream_that_is_left_is_freed_within_one_block(
    served: Running, given_up: threading.Event, how: str
) -> None:
    served.backend.gate.clear()
    name = served.register(pointwise())
    served.settle()
    given_up.clear()
    x = np.ones((1, 1, 100, 10), np.float32)

    def start(channel: grpc.Channel) -> Any:
        stub = type(served.stub)(channel)
        return stub.ConvolveStream(tensor_messages(name, x), timeout=2.0 if how == "deadline" else WAIT)

    leave(how, served, start)
    assert given_up.wait(WAIT)
    assert served.backend.blocks == 1
    served.backend.gate.set()
    served.settle()
    assert served.backend.blocks == 1
    served.is_serving_others()


@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
def test_a_unary_call_that_is_left_is_freed_within_one_block(
    served: Running, given_up: threading.Event, how: str
) -> None:
    served.backend.gate.clear()
    request = unary(pointwise(), np.ones((1, 1, 100, 10), np.float32))

    class AsStream:
        """A future as `leave` takes it."""

        def __init__(self, channel: grpc.Channel) -> None:
            stub = type(served.stub)(channel)
            self.future = stub.Convolve.future(request, timeout=2.0 if how == "deadline" else WAIT)

        def cancel(self) -> None:
            self.future.cancel()

        def __iter__(self) -> Iterator[Any]:
            yield self.future.result()

    leave(how, served, AsStream)
    assert given_up.wait(WAIT)
    served.backend.gate.set()
    served.settle()
    assert served.backend.blocks == 1


def test_an_upload_that_is_left_gives_its_room_back(
    served: Running, given_up: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = served.server.service.store
    promised = threading.Event()
    original = store.promise

    @contextmanager
    def promise(owner: str, size: int) -> Generator[Callable[[Tensor], None]]:
        with original(owner, size) as keep:
            promised.set()
            yield keep

    monkeypatch.setattr(store, "promise", promise)
    reference = pb.TensorReference(digest=bytes(32), data_type=pb.DATA_TYPE_FLOAT32, shape=[MIB])
    header = pb.PutWeightsRequest(header=pb.WeightsHeader(tensor=reference))
    requests: Any = Requests(cast("Any", [header]))
    future = served.stub.PutWeights.future(requests, timeout=WAIT)
    assert promised.wait(WAIT)
    assert store.used > 4 * MIB
    future.cancel()
    requests.end()
    assert given_up.wait(WAIT)
    served.settle()
    assert store.used == 0


def test_a_deadline_is_told_as_one(served: Running) -> None:
    served.backend.gate.clear()
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Convolve(unary(pointwise(), np.ones((1, 1, 1, 1), np.float32)), timeout=0.1)
    assert cast("Any", caught.value).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    served.backend.gate.set()


def test_a_stream_that_breaks_off_in_a_tensor_says_so(served: Running) -> None:
    header, payload, _ = tensor_messages(served.register(pointwise()), np.ones((1, 1, 2, 2), np.float32))
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.ConvolveStream(iter([header, payload]), timeout=WAIT))
    assert "the stream ended while tensor 0 was open" in error_of(caught.value).message
