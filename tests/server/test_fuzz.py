"""Random bytes and mutated messages at every call: no crash, no hang, no leak, no INTERNAL error.

The numbers are random but the same every time. The backends are the real ones, with little memory to give.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from convservice.dtypes import FLOAT32
from convservice.layers import Activation, Conv
from convservice.network import Network
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice.wire.networks import inline_to_proto
from convservice_server.config import ServerConfig
from convservice_server.server import Server
from tests.helpers import every_layer
from tests.server.support import (
    WAIT,
    abort_message,
    connect,
    put_messages,
    raw,
    tensor_messages,
    unary,
    weight,
)

ROUNDS = 150
X = np.arange(60, dtype=np.float32).reshape(2, 1, 6, 5)
NETWORK = Network(
    [
        Conv(np.ones((2, 1, 3, 3), np.float32), padding="same"),
        Activation("leaky_relu"),
        Conv(np.ones((1, 2, 2, 2), np.float32)),
    ]
)
EVERY_LAYER = every_layer(FLOAT32)
MAPS = np.arange(288, dtype=np.float32).reshape(2, 2, 8, 9) % 7
FORBIDDEN = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
}
NUMBERS = (0, 1, 2, 3, 5, 255, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def messages() -> dict[str, list[Message]]:
    """Valid requests of every call."""
    name = NETWORK.name
    inline = inline_to_proto(NETWORK)
    return {
        "Convolve": [unary(NETWORK, X), unary(NETWORK, X, inline=False), unary(EVERY_LAYER, MAPS)],
        "ConvolveStream": [
            *tensor_messages(name, X, 0, message_bytes=50),
            *list(tensor_messages(name, X[:1], 1))[:2],
            abort_message(1),
            *tensor_messages(name, X, 2, band_rows=2),
            *tensor_messages(EVERY_LAYER.name, MAPS, 3, band_rows=3),
        ],
        "PutWeights": list(put_messages(weight(3.0, 8), 16)),
        "RegisterNetwork": [
            pb.RegisterNetworkRequest(network=inline),
            pb.RegisterNetworkRequest(network=inline_to_proto(EVERY_LAYER)),
        ],
        "GetNetwork": [pb.GetNetworkRequest(name=name)],
        "ListNetworks": [pb.ListNetworksRequest(page_size=2, page_token=name)],
        "DeleteNetwork": [pb.DeleteNetworkRequest(name=name)],
        "GetServerInfo": [pb.GetServerInfoRequest()],
    }


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    config = ServerConfig.of(
        listen="127.0.0.1:0", idle_timeout=5.0, memory_budget_bytes="256MiB", weights_budget_bytes="8MiB"
    )
    with Server(config) as server:
        yield server


def is_well(server: Server) -> None:
    """Whether it still answers rightly, and holds nothing that nobody uses."""
    assert server.wait_idle(WAIT)
    with connect(server.port) as channel:
        stub = conv_pb2_grpc.ConvServiceStub(channel)
        response = stub.Convolve(unary(Network([Conv(np.ones((1, 1, 1, 1), np.float32))]), X), timeout=WAIT)
        assert response.data[0] == X.tobytes()
        usage = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT).usage
    assert (usage.reserved_bytes, usage.streams, usage.tensors) == (0, 0, 0)
    assert usage.weights_bytes <= server.config.weights_budget_bytes
    for thread in threading.enumerate():
        if thread.name == "stream-reader":
            thread.join(WAIT)
            assert not thread.is_alive()


def throw(server: Server, method: str, make: Callable[[random.Random], list[bytes]]) -> None:
    """Sends what `make` makes, `ROUNDS` times."""
    rng = random.Random(f"{method}")
    with connect(server.port) as channel:
        call = raw(channel, method)
        for _ in range(ROUNDS):
            sent = make(rng)
            try:
                for data in call(iter(sent), timeout=WAIT):
                    if method == "ConvolveStream":
                        response = pb.ConvolveStreamResponse.FromString(data)
                        assert response.error.code != 13, (response.error, sent)
            except grpc.RpcError as exc:
                error = cast("Any", exc)
                assert error.code() not in FORBIDDEN, (error.code(), error.details(), sent)
    is_well(server)


@pytest.mark.parametrize("method", messages())
def test_random_bytes(served: Server, method: str) -> None:
    def make(rng: random.Random) -> list[bytes]:
        return [rng.randbytes(rng.choice((0, 1, 2, 10, 1000))) for _ in range(rng.randint(1, 3))]

    throw(served, method, make)


@pytest.mark.parametrize("method", messages())
def test_mutated_bytes(served: Server, method: str) -> None:
    valid = messages()
    every = [message.SerializeToString() for found in valid.values() for message in found]

    def make(rng: random.Random) -> list[bytes]:
        sent = [message.SerializeToString() for message in valid[method]]
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(sent))
            sent[at] = _mutated(sent[at], rng, every)
        return sent

    throw(served, method, make)


@pytest.mark.parametrize("method", messages())
def test_mutated_fields(served: Server, method: str) -> None:
    def make(rng: random.Random) -> list[bytes]:
        sent = messages()[method]
        for _ in range(rng.randint(1, 3)):
            _mutate_field(rng.choice(sent), rng)
        if rng.random() < 0.3:
            rng.shuffle(sent)
        return [message.SerializeToString() for message in sent]

    throw(served, method, make)


def _mutated(data: bytes, rng: random.Random, every: list[bytes]) -> bytes:
    changed = bytearray(data)
    at = rng.randrange(len(changed) + 1)
    kind = rng.randrange(5)
    if kind == 0 and at < len(changed):
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = rng.randbytes(rng.randint(1, 8))
    elif kind == 3:
        changed[at:] = rng.choice(every)
    else:
        changed += changed[at:]
    return bytes(changed)


def _mutate_field(message: Any, rng: random.Random) -> None:
    """Sets a field somewhere inside a message to a value at the edge of what it may be, or clears it."""
    fields: list[FieldDescriptor] = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    chosen = [field for field, _ in message.ListFields()] or fields
    field = rng.choice(chosen if rng.random() < 0.8 else fields)
    value: Any = getattr(message, field.name)
    if field.is_repeated:
        if len(value) and rng.random() < 0.5:
            at = rng.randrange(len(value))
            if field.message_type is not None:
                _mutate_field(value[at], rng)
            else:
                value[at] = _edge(field, rng)
        elif len(value):
            value.extend(list(value) * rng.randint(1, 3))
        elif field.message_type is None:
            value.append(_edge(field, rng))
        else:
            value.add()
    elif field.message_type is not None:
        if rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            value.SetInParent()
            _mutate_field(value, rng)
    else:
        setattr(message, field.name, _edge(field, rng))


def _edge(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 31, 32, 33, 500)))
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(
            ("", "input", "layer0", "networks/sha256-", "\N{SNOWMAN}" * 50, "a" * 5000, NETWORK.name)
        )
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return rng.choice((0.0, -1.0, 1e308, float("nan"), float("inf")))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    limit = {FieldDescriptor.TYPE_UINT32: 2**32, FieldDescriptor.TYPE_ENUM: 2**31}.get(field.type, 2**64)
    return rng.choice([number for number in NUMBERS if number < limit])
