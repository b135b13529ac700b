"""Every call over gRPC: answers, errors with details, health, reflection, limits, drain."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from convservice.errors import (
    ConvServiceError,
    InvalidRequest,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.v1 import conv_pb2 as pb
from convservice_server.health import SERVICE_NAME
from tests.server.support import (
    WAIT,
    Requests,
    Running,
    collect,
    error_of,
    pointwise,
    put_messages,
    raw,
    running,
    status_of,
    tensor_messages,
    unary,
    weight,
)

X = np.arange(24, dtype=np.float32).reshape(2, 1, 4, 3)
METHODS = (
    "Convolve",
    "ConvolveStream",
    "PutWeights",
    "RegisterNetwork",
    "GetNetwork",
    "ListNetworks",
    "DeleteNetwork",
    "GetServerInfo",
)


@pytest.fixture
def served() -> Iterator[Running]:
    with running() as found:
        yield found
        found.settle()


def test_every_call(served: Running) -> None:
    network, stub = pointwise(scale=2), served.stub
    tensor = weight(2.0)
    assert stub.PutWeights(put_messages(tensor), timeout=WAIT).digest == tensor.digest
    name = served.register(network)
    response = stub.Convolve(unary(network, X, inline=False), timeout=WAIT)
    assert np.frombuffer(response.data[0], np.float32).tolist() == (2 * X).ravel().tolist()
    (result,) = collect(stub.ConvolveStream(tensor_messages(name, X), timeout=WAIT)).values()
    assert result.floats == (2 * X).ravel().tolist()
    assert list(stub.ListNetworks(pb.ListNetworksRequest(), timeout=WAIT).names) == [name]
    assert stub.GetNetwork(pb.GetNetworkRequest(name=name), timeout=WAIT).name == name
    assert served.info().usage.networks == 1
    stub.DeleteNetwork(pb.DeleteNetworkRequest(name=name), timeout=WAIT)
    assert served.info().usage.networks == 0


def test_an_error_carries_its_details(served: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Convolve(unary(pointwise(inputs=2), X), timeout=WAIT)
    status = status_of(caught.value)
    assert cast("Any", caught.value).code() is grpc.StatusCode.INVALID_ARGUMENT
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.reason, info.domain) == ("CHANNEL_MISMATCH", "convservice.v1")
    assert (info.metadata["channels"], info.metadata["expected"]) == ("1", "2")
    assert bad.field_violations[0].field == "sample_shape"
    assert "weight has 2 input channels per group, the input has 1 channels" in status.message


def test_an_unknown_network_is_a_failed_precondition(served: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Convolve(unary(pointwise(), X, inline=False), timeout=WAIT)
    assert cast("Any", caught.value).code() is grpc.StatusCode.FAILED_PRECONDITION
    assert isinstance(error_of(caught.value), NetworkNotFound)


def test_a_long_error_still_fits_the_trailers(served: Running) -> None:
    request = pb.GetNetworkRequest(name="\N{SNOWMAN}" * 100_000)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.GetNetwork(request, timeout=WAIT)
    assert error_of(caught.value).reason == Reason.NETWORK_NOT_FOUND


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x7f", b"\x00"])
def test_bytes_that_are_no_message(served: Running, method: str, data: bytes) -> None:
    call = raw(served.channel, method)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([data]), timeout=WAIT))
    error = error_of(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.reason == Reason.FRAMING


@pytest.mark.parametrize("method", METHODS)
def test_a_call_without_a_message(served: Running, method: str) -> None:
    call = raw(served.channel, method)
    if method == "ConvolveStream":
        assert list(call(iter([]), timeout=WAIT)) == []
        return
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([]), timeout=WAIT))
    assert error_of(caught.value).reason == Reason.FRAMING


def test_a_method_that_there_is_not(served: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(raw(served.channel, "Deconvolve")(iter([b""]), timeout=WAIT))
    assert cast("Any", caught.value).code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", METHODS)
def test_a_message_over_the_limit(served: Running, method: str) -> None:
    call = raw(served.channel, method)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([bytes((4 << 20) + 1)]), timeout=WAIT))
    assert cast("Any", caught.value).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    served.is_serving_others()


def test_a_framing_error_is_a_status(served: Running) -> None:
    name = served.register(pointwise())
    messages = list(tensor_messages(name, X, tensor_id=4))
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.ConvolveStream(iter([*messages, *messages]), timeout=WAIT))
    assert error_of(caught.value).reason == Reason.FRAMING


def test_an_unexpected_failure_is_internal(served: Running) -> None:
    served.backend.error = ZeroDivisionError()
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Convolve(unary(pointwise(), X), timeout=WAIT)
    error = error_of(caught.value)
    assert error.reason == Reason.INTERNAL
    assert error.metadata["incident"] in error.message
    served.backend.error = None
    served.is_serving_others()


def test_health_and_reflection(served: Running) -> None:
    health = cast("Any", health_pb2_grpc).HealthStub(served.channel)
    for service in ("", SERVICE_NAME):
        got = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT)
        assert got.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT)
    assert cast("Any", caught.value).code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT)
    assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    reflection = cast("Any", reflection_pb2_grpc).ServerReflectionStub(served.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([ask]), timeout=WAIT)
    names = {entry.name for entry in answer.list_services_response.service}
    assert names == {
        SERVICE_NAME,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_streams_are_capped_and_others_keep_their_workers() -> None:
    with running(max_streams=2, max_uploads=1, unary_workers=1) as served:
        name = served.register(pointwise())
        opened = [Requests(tensor_messages(name, X[:1])) for _ in range(2)]
        streams = [served.stub.ConvolveStream(requests, timeout=WAIT) for requests in opened]
        for stream in streams:
            next(iter(stream))
        assert served.info().usage.streams == 2
        with pytest.raises(grpc.RpcError) as caught:
            list(served.stub.ConvolveStream(iter(()), timeout=WAIT))
        error = error_of(caught.value)
        assert isinstance(error, ResourceExhausted)
        assert error.reason == Reason.TOO_MANY_STREAMS
        assert error.retry_after is not None
        served.is_serving_others()
        for requests in opened:
            requests.end()
        for stream in streams:
            list(stream)
        (result,) = collect(served.stub.ConvolveStream(tensor_messages(name, X), timeout=WAIT)).values()
        assert result.done is not None
        served.settle()


def test_a_silent_peer_is_ended_wherever_it_is_silent() -> None:
    with running(idle_timeout=1.0, max_streams=1, max_uploads=1, unary_workers=1) as served:
        name = served.register(pointwise())
        (header, *_) = tensor_messages(name, X)
        for silent in (Requests(), Requests([header])):
            with pytest.raises(grpc.RpcError) as caught:
                list(served.stub.ConvolveStream(silent, timeout=WAIT))
            silent.end()
            error = error_of(caught.value)
            assert isinstance(error, ServiceUnavailable)
            assert error.reason == Reason.IDLE
        upload: Any = Requests()
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.PutWeights(upload, timeout=WAIT)
        upload.end()
        assert error_of(caught.value).reason == Reason.IDLE
        for method in ("Convolve", "GetServerInfo"):
            requests: Any = Requests()
            with pytest.raises(grpc.RpcError) as caught:
                list(raw(served.channel, method)(requests, timeout=WAIT))
            requests.end()
            assert cast("Any", caught.value).code() is grpc.StatusCode.CANCELLED
        served.is_serving_others()
        served.settle()


def other_threads() -> set[threading.Thread]:
    """The threads that are no workers of gRPC's pool, which makes them as they are needed."""
    return {
        thread for thread in threading.enumerate() if not thread.name.startswith(("call_", "convservice-"))
    }


def test_many_callers_at_once(served: Running) -> None:
    """Right answers for everybody, and nothing left over."""
    networks = [pointwise(scale=scale) for scale in range(1, 9)]
    threads = other_threads()

    def work(number: int) -> None:
        network = networks[number % len(networks)]
        expected = (X * (1 + number % len(networks))).ravel().tolist()
        for _ in range(20):
            response = served.stub.Convolve(unary(network, X), timeout=WAIT)
            assert np.frombuffer(response.data[0], np.float32).tolist() == expected
            results = collect(served.stub.ConvolveStream(tensor_messages(network.name, X), timeout=WAIT))
            assert results[0].floats == expected

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert served.backend.prepared == len(networks)
    served.settle()
    assert other_threads() <= threads


def test_draining_in_process(served: Running) -> None:
    """The current tensor is finished; a later header and new calls are refused; health says so."""
    name = served.register(pointwise(scale=2))
    header, payload, end = tensor_messages(name, X)
    requests = Requests([header, payload])
    stream = served.stub.ConvolveStream(requests, timeout=WAIT)
    responses = iter(stream)
    first = next(responses)
    health = cast("Any", health_pb2_grpc).HealthStub(served.channel)
    watch = iter(health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    stopper = threading.Thread(target=served.server.stop)
    stopper.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        served.info()
    assert error_of(caught.value).reason == Reason.DRAINING
    requests.send(end, *tensor_messages(name, X, tensor_id=1))
    requests.end()
    results = collect([first, *responses])
    assert results[0].floats == (2 * X).ravel().tolist()
    assert isinstance(results[1].error, ServiceUnavailable)
    assert results[1].error.reason == Reason.DRAINING
    stopper.join(WAIT)
    assert not stopper.is_alive()
    assert served.backend.closed


def test_an_idle_stream_does_not_hold_the_server_up() -> None:
    with running(drain_grace=WAIT, drain_linger=0.01) as served:
        requests = Requests(tensor_messages(served.register(pointwise()), X))
        responses = iter(served.stub.ConvolveStream(requests, timeout=WAIT))
        while next(responses).WhichOneof("message") != "done":
            pass
        assert served.server.stop()
        with pytest.raises(grpc.RpcError) as caught:
            next(responses)
        requests.end()
        assert error_of(caught.value).reason == Reason.DRAINING


def test_what_is_not_done_within_the_grace_time_is_ended() -> None:
    with running() as served:
        served.backend.gate.clear()
        requests = Requests(tensor_messages(served.register(pointwise()), X))
        stream = served.stub.ConvolveStream(requests, timeout=WAIT)
        served.backend.wait_for_block()
        finished: list[bool] = []
        stopper = threading.Thread(target=lambda: finished.append(served.server.stop(grace=0.01)))
        stopper.start()
        with pytest.raises(grpc.RpcError):
            list(stream)
        requests.end()
        served.backend.gate.set()
        stopper.join(WAIT)
        assert finished == [False]
        assert served.backend.blocks == 1
        assert served.backend.closed
        assert served.server.service.admission.reserved == 0


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_refused_call_leaves_nothing_for_the_garbage_collector(no_garbage_collection: None) -> None:
    """What it would leave holds on to its request, and many refusals would take a container's memory."""

    def errors() -> list[ConvServiceError]:
        return [item for item in gc.get_objects() if isinstance(item, ConvServiceError)]

    with running(memory_budget_bytes=10, metrics="127.0.0.1:0") as found:
        network = pointwise()
        name = found.register(network)
        before = errors()
        for _ in range(3):
            for header in ({}, {"backend": "made"}):
                with pytest.raises(grpc.RpcError):
                    found.stub.Convolve(unary(network, X, inline=False, **header), timeout=WAIT)
            for response in found.stub.ConvolveStream(tensor_messages(name, X), timeout=WAIT):
                assert response.WhichOneof("message") == "error"
        found.settle()
        end = time.monotonic() + WAIT
        while len(errors()) > len(before) and time.monotonic() < end:
            found.info()  # the last handler may still be on its way out
        assert len(errors()) == len(before)
