"""Bad input gets a clear, typed error, unsent where the client can know, and the server lives on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2
from grpc_status import rpc_status

from convservice import (
    BackendUnavailable,
    Conv,
    ConvClient,
    ConvServiceError,
    InvalidRequest,
    Network,
    NetworkNotFound,
    ResourceExhausted,
)
from convservice.bands import TensorSpec
from convservice.dtypes import FLOAT32, DType
from convservice.errors import from_status
from convservice.geometry import MAX_SIZE, SampleShape
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice.wire.headers import TensorRequest, request_to_proto
from convservice.wire.networks import inline_to_proto
from tests.helpers import FLOATS, worked_example
from tests.raw_stream import RawStream, RawTensor, wait_until_nothing_runs

X = np.ones((1, 3, 9, 8), np.float32)
WEIGHT = np.ones((4, 3, 3, 3), np.float32)


@pytest.fixture(autouse=True)
def the_server_lives_on(client: ConvClient, stub: ConvServiceStub) -> Iterator[None]:
    """After every test of this module the server gives the right answer and holds nothing."""
    yield
    x, weight, fm = worked_example(2, FLOAT32, FLOAT32)
    assert client.conv2d(x, weight).tolist() == fm.tolist()
    wait_until_nothing_runs(stub)


NOT_SENT: dict[str, tuple[Callable[[ConvClient], Any], str, str]] = {
    "an axis too few": (lambda c: c.conv2d(X[0, 0, 0], WEIGHT), "INVALID_SHAPE", "axes"),
    "an axis too many": (lambda c: c.conv2d(X[None], WEIGHT), "INVALID_SHAPE", "axes"),
    "another rank of weight": (lambda c: c.conv2d(X, WEIGHT[..., 0]), "INVALID_SHAPE", "out_channels"),
    "other channels": (
        lambda c: c.conv2d(X[:, :2], WEIGHT),
        "CHANNEL_MISMATCH",
        "3 input channels per group",
    ),
    "other groups": (lambda c: c.conv2d(X, WEIGHT, groups=2), "CHANNEL_MISMATCH", "2 groups"),
    "groups that do not divide": (lambda c: c.conv2d(X, WEIGHT, groups=3), "CHANNEL_MISMATCH", "groups is 3"),
    "no stride": (lambda c: c.conv2d(X, WEIGHT, stride=0), "INVALID_PARAMETER", "stride must be an integer"),
    "a negative stride": (lambda c: c.conv2d(X, WEIGHT, stride=(1, -1)), "INVALID_PARAMETER", "not -1"),
    "a stride that is no number": (
        lambda c: c.conv2d(X, WEIGHT, stride=float("nan")),  # type: ignore[arg-type]
        "INVALID_PARAMETER",
        "not nan",
    ),
    "an empty output": (lambda c: c.conv2d(X[:, :, :2], WEIGHT), "OUTPUT_EMPTY", "output would be empty"),
    "a reflection too wide": (
        lambda c: c.conv2d(X, WEIGHT, padding=9, padding_mode="reflect"),
        "PADDING_TOO_LARGE",
        "size 9",
    ),
    "a shape that is no number": (
        lambda c: list(c.stream(Conv(WEIGHT), [], shape=(3, float("nan"), 8), dtype="float32")),  # type: ignore[arg-type]
        "INVALID_PARAMETER",
        "nan",
    ),
    "a negative size": (
        lambda c: list(c.stream(Conv(WEIGHT), [], shape=(3, -9, 8), dtype="float32")),
        "INVALID_PARAMETER",
        "-9",
    ),
    "an unknown dtype": (
        lambda c: c.conv2d(X.astype(np.complex64), WEIGHT),
        "UNKNOWN_DATA_TYPE",
        "complex64",
    ),
    "an unknown result dtype": (
        lambda c: c.conv2d(X, WEIGHT, out_dtype="int64"),
        "UNKNOWN_DATA_TYPE",
        "int64",
    ),
    "two dtypes": (lambda c: c.conv2d(X.astype(np.float64), WEIGHT), "DATA_TYPE_MISMATCH", "x is float64"),
    "an integer weight": (lambda c: c.conv2d(X, WEIGHT.astype(np.int8)), "DATA_TYPE_MISMATCH", "float dtype"),
    "an unknown activation": (
        lambda c: c.conv2d(X, WEIGHT, activation="softmax"),
        "INVALID_PARAMETER",
        "relu",
    ),
    "an unknown data format": (
        lambda c: c.conv2d(X, WEIGHT, data_format="NCHW"),
        "INVALID_PARAMETER",
        "NCHW",
    ),
    "an unknown precision": (lambda c: c.conv2d(X, WEIGHT, precision="low"), "INVALID_PARAMETER", "low"),
    "a photograph as (C, H, W)": (
        lambda c: c.conv2d(np.ones((480, 640, 3), np.uint8), WEIGHT),
        "CHANNEL_MISMATCH",
        "data_format",
    ),
}


@pytest.mark.parametrize("name", NOT_SENT)
def test_what_the_client_can_know_is_not_sent(client: ConvClient, name: str) -> None:
    call, reason, message = NOT_SENT[name]
    with pytest.raises(InvalidRequest, match=message) as caught:
        call(client)
    assert isinstance(caught.value, ValueError)
    assert caught.value.reason == reason
    assert caught.value.method is None, "it was not sent"


@pytest.mark.parametrize("given", [8, 10])
def test_too_few_or_too_many_rows(client: ConvClient, given: int) -> None:
    rows = [np.ones((3, 1, 8), np.float32)] * given
    with pytest.raises(InvalidRequest):
        list(client.stream(Conv(WEIGHT), rows, shape=(3, 9, 8), dtype="float32", band_rows=1))


def test_a_backend_that_is_not_there(client: ConvClient) -> None:
    for call in (
        lambda: client.conv2d(X, WEIGHT, backend="abacus"),
        lambda: next(client.map(Conv(WEIGHT), [X], backend="abacus")),
    ):
        with pytest.raises(BackendUnavailable, match="abacus") as caught:
            call()
        assert caught.value.reason == "BACKEND_UNAVAILABLE"
        assert caught.value.target


def test_a_network_that_is_not_there(client: ConvClient) -> None:
    name = "networks/sha256-" + "0" * 64
    with pytest.raises(NetworkNotFound, match=name) as caught:
        client.network(name)
    assert isinstance(caught.value, LookupError)
    with pytest.raises(NetworkNotFound):
        client.unregister(name)


def registered(client: ConvClient) -> str:
    network = Network([Conv(WEIGHT)])
    client.register(network)
    return network.name


def spec(rows: int = 9, width: int = 8, samples: int = 1, band_rows: int = 9) -> TensorSpec:
    return TensorSpec(FLOAT32, SampleShape(3, rows, (width,)), samples, band_rows)


def test_a_network_that_is_not_registered(stub: ConvServiceStub) -> None:
    with RawStream(stub) as stream:
        error = RawTensor(stream, TensorRequest("networks/sha256-" + "1" * 64, spec())).fail()
    assert type(error) is NetworkNotFound
    assert error.reason == "NETWORK_NOT_REGISTERED"


@pytest.mark.parametrize("samples", [1, 2**38])
def test_a_shape_of_terabytes_is_refused_before_anything_is_allocated(
    client: ConvClient, stub: ConvServiceStub, samples: int
) -> None:
    wide = TensorSpec(FLOAT32, SampleShape(3, 2**20, (2**29,)), 1, 1)
    many = TensorSpec(FLOAT32, SampleShape(3, 9, (2**16,)), samples, 2**30)
    with RawStream(stub) as stream:
        error = RawTensor(stream, TensorRequest(registered(client), wide)).fail()
        assert type(error) is ResourceExhausted
        assert error.reason == "MEMORY_BUDGET"
        assert error.metadata
        stream.send(pb.ConvolveStreamRequest(end=pb.End()))
        after = RawTensor(stream, TensorRequest(registered(client), many, tensor_id=1))
        after.results()  # only rows are held, so that the size of the whole does not matter
        after.abort()
        assert after.fail().reason == "ABORTED"


@pytest.mark.parametrize("sizes", [(MAX_SIZE, MAX_SIZE, MAX_SIZE), (3, 0, 8), (MAX_SIZE + 1, 1, 1)])
def test_a_shape_that_is_none_is_refused(
    client: ConvClient, stub: ConvServiceStub, sizes: tuple[int, ...]
) -> None:
    header = request_to_proto(TensorRequest(registered(client), spec()))
    header.sample_shape.CopyFrom(pb.SampleShape(channels=sizes[0], rows=sizes[1], rest=sizes[2:]))
    with RawStream(stub) as stream:
        stream.send(pb.ConvolveStreamRequest(header=header))
        answer = stream.receive()
    assert answer.error.code == code_pb2.INVALID_ARGUMENT


@pytest.mark.parametrize("change", [-1, 1, 4000])
def test_a_header_that_lies_about_its_size(client: ConvClient, stub: ConvServiceStub, change: int) -> None:
    with RawStream(stub) as stream:
        tensor = RawTensor(stream, TensorRequest(registered(client), spec()))
        tensor.results()
        data = bytes(9 * 8 * 3 * 4 + change)
        stream.send(pb.ConvolveStreamRequest(payload=pb.Payload(data=data)))
        stream.send(pb.ConvolveStreamRequest(end=pb.End()))
        error = tensor.fail()
        assert (type(error), error.reason) == (InvalidRequest, "PAYLOAD_SIZE")
        assert str(9 * 8 * 3 * 4) in error.message
        good = RawTensor(stream, TensorRequest(registered(client), spec(), tensor_id=1))
        results = good.results()
        good.send_rows(X)
        good.end()
        assert good.collect(results)["output"].shape == (1, 4, 7, 6)


@pytest.mark.parametrize("change", [-4, 4])
def test_a_unary_call_that_lies_about_its_size(stub: ConvServiceStub, change: int) -> None:
    request = pb.ConvolveRequest(
        header=request_to_proto(TensorRequest("", spec())),
        network=inline_to_proto(Network([Conv(WEIGHT)])),
        data=bytes(9 * 8 * 3 * 4 + change),
    )
    error = failed(lambda: stub.Convolve(request, timeout=30))
    assert (type(error), error.reason, error.field) == (InvalidRequest, "PAYLOAD_SIZE", "data")


def failed(call: Callable[[], object]) -> ConvServiceError:
    """The error that a raw call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    found: Any = caught.value
    from_call = cast("Any", rpc_status).from_call
    status: Any = from_call(found)
    if status is None:
        return ConvServiceError(found.details(), reason=found.code().name)
    return from_status(status)


def test_a_message_over_the_limit(client: ConvClient, stub: ConvServiceStub) -> None:
    limit = client.info().limits.max_message_bytes
    error = failed(lambda: stub.Convolve(pb.ConvolveRequest(data=bytes(limit + 1)), timeout=30))
    assert error.reason == "RESOURCE_EXHAUSTED"
    with RawStream(stub) as stream:
        stream.send(pb.ConvolveStreamRequest(payload=pb.Payload(data=bytes(limit + 1))))
        assert failed(stream.receive).reason == "RESOURCE_EXHAUSTED"


def test_a_unary_call_that_is_too_large(client: ConvClient, stub: ConvServiceStub) -> None:
    limit = client.info().limits.max_unary_bytes
    rows = limit // (3 * 8 * 4) + 1
    header = request_to_proto(TensorRequest(registered(client), spec(rows)))
    error = failed(
        lambda: stub.Convolve(pb.ConvolveRequest(header=header, data=bytes(rows * 96)), timeout=30)
    )
    assert (type(error), error.reason) == (ResourceExhausted, "UNARY_TOO_LARGE")


def test_weights_that_are_too_large_to_come_inline(client: ConvClient, stub: ConvServiceStub) -> None:
    limit = client.info().limits.max_inline_weight_bytes
    layer = Conv(np.ones((1, limit // 4 + 1, 1), np.float32))
    request = pb.RegisterNetworkRequest(network=inline_to_proto(Network([layer])))
    error = failed(lambda: stub.RegisterNetwork(request, timeout=30))
    assert (type(error), error.reason) == (ResourceExhausted, "INLINE_TOO_LARGE")


@pytest.mark.parametrize("kind", ["payload", "end", "abort", "nothing", "twice", "an id again"])
def test_a_framing_error_ends_the_stream(client: ConvClient, stub: ConvServiceStub, kind: str) -> None:
    header = pb.ConvolveStreamRequest(header=request_to_proto(TensorRequest(registered(client), spec())))
    messages = {
        "payload": [pb.ConvolveStreamRequest(payload=pb.Payload(data=b"x"))],
        "end": [pb.ConvolveStreamRequest(end=pb.End())],
        "abort": [pb.ConvolveStreamRequest(abort=pb.Abort())],
        "nothing": [pb.ConvolveStreamRequest()],
        "twice": [header, header],
        "an id again": [header, pb.ConvolveStreamRequest(abort=pb.Abort()), header],
    }[kind]
    with RawStream(stub) as stream:
        for message in messages:
            stream.send(message)
        error = failed(lambda: [stream.receive() for _ in range(4)])
    assert (type(error), error.reason) == (InvalidRequest, "FRAMING")


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype != FLOAT32], ids=str)
def test_a_dtype_other_than_the_weights(client: ConvClient, stub: ConvServiceStub, dtype: DType) -> None:
    other = TensorSpec(dtype, SampleShape(3, 9, (8,)), 1, 9)
    with RawStream(stub) as stream:
        error = RawTensor(stream, TensorRequest(registered(client), other)).fail()
    assert (type(error), error.reason) == (InvalidRequest, "DATA_TYPE_MISMATCH")


def test_weights_that_are_missing(stub: ConvServiceStub) -> None:
    message = inline_to_proto(Network([Conv(WEIGHT * 17)]))
    message.ClearField("weights")
    error = failed(lambda: stub.RegisterNetwork(pb.RegisterNetworkRequest(network=message), timeout=30))
    assert (type(error), error.reason) == (NetworkNotFound, "WEIGHTS_MISSING")
    assert Network([Conv(WEIGHT * 17)]).tensors[0].digest.hex() in str(error.metadata)
