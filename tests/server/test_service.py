"""The unary calls of the contract, without any transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from convservice.errors import (
    BackendUnavailable,
    Cancelled,
    InvalidRequest,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.layers import Activation, Conv
from convservice.network import MAX_NODES, Network, Node
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.networks import inline_to_proto, network_from_proto, network_to_proto
from convservice.wire.weights import weight_to_proto
from convservice_backends.registry import Registry
from convservice_server.calls import Call
from convservice_server.config import ServerConfig
from convservice_server.service import Service
from tests.server.support import Double, pointwise, put_messages, unary, weight

X = np.arange(24, dtype=np.float32).reshape(2, 1, 4, 3)
CALL = Call()


@pytest.fixture
def backend() -> Double:
    return Double()


@pytest.fixture
def service(backend: Double) -> Service:
    return Service(ServerConfig(), Registry(factories={"double": lambda: backend}))


def put(service: Service, tensor: Tensor, chunk: int = 1 << 20) -> pb.PutWeightsResponse:
    return service.put_weights(put_messages(tensor, chunk), CALL)


def register(service: Service, network: Network, *, inline: bool = True) -> str:
    message = inline_to_proto(network) if inline else pb.InlineNetwork(network=network_to_proto(network))
    return service.register_network(pb.RegisterNetworkRequest(network=message), CALL).name


# Convolve.


def test_convolve_with_the_network_inline_and_then_by_name(service: Service) -> None:
    network = pointwise(outputs=2, scale=3)
    for inline in (True, False):
        response = service.convolve(unary(network, X, inline=inline), CALL)
        (result,) = response.results
        assert (result.name, result.samples, result.band_rows) == ("output", 2, 4)
        assert (result.sample_shape.channels, result.sample_shape.rows, list(result.sample_shape.rest)) == (
            2,
            4,
            [3],
        )
        got = np.frombuffer(response.data[0], np.float32).reshape(2, 2, 4, 3)
        np.testing.assert_array_equal(got, np.concatenate([3 * X, 3 * X], axis=1))
        assert (response.done.backend, response.done.input_rows) == ("double", 8)
        assert [(entry.node, entry.algorithm) for entry in response.done.algorithms] == [("layer0", "direct")]
    assert service.admission.reserved == 0


def test_convolve_channels_last_and_another_output_type(service: Service) -> None:
    x = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    request = unary(pointwise(inputs=2), x)
    request.header.data_format = pb.DATA_FORMAT_CHANNELS_LAST
    request.header.output_data_type = pb.DATA_TYPE_INT16
    request.data = np.moveaxis(x, 1, -1).tobytes()
    response = service.convolve(request, CALL)
    got = np.frombuffer(response.data[0], np.int16).reshape(1, 4, 3, 1)
    np.testing.assert_array_equal(got[..., 0], x.astype(int).sum(axis=1))


def test_an_empty_batch(service: Service) -> None:
    response = service.convolve(unary(pointwise(), X[:0]), CALL)
    assert list(response.data) == [b""]
    assert response.results[0].samples == 0


@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_the_wrong_size(service: Service, change: int) -> None:
    request = unary(pointwise(), X)
    request.data = request.data[:change] if change < 0 else request.data + b"0"
    with pytest.raises(InvalidRequest, match=f"has 96 bytes .* {96 + change} were sent") as caught:
        service.convolve(request, CALL)
    assert caught.value.reason == Reason.PAYLOAD_SIZE


def test_an_output_too_large_for_a_unary_call(service: Service) -> None:
    with pytest.raises(ResourceExhausted, match="ConvolveStream") as caught:
        service.convolve(unary(pointwise(outputs=64), np.zeros((1, 1, 80, 80), np.float32)), CALL)
    assert caught.value.reason == Reason.UNARY_TOO_LARGE
    assert caught.value.metadata["bytes"] == str(65 * 80 * 80 * 4)


def test_a_unary_call_needs_the_height(service: Service) -> None:
    request = unary(pointwise(), X[:1])
    request.header.sample_shape.ClearField("rows")
    with pytest.raises(InvalidRequest) as caught:
        service.convolve(request, CALL)
    assert caught.value.reason == Reason.HEIGHT_REQUIRED


def test_a_network_that_is_not_here(service: Service) -> None:
    with pytest.raises(NetworkNotFound) as caught:
        service.convolve(unary(pointwise(), X, inline=False), CALL)
    assert caught.value.reason == Reason.NETWORK_NOT_REGISTERED
    assert caught.value.metadata["network"] == pointwise().name


def test_a_header_that_names_another_network_than_came(service: Service) -> None:
    request = unary(pointwise(), X)
    request.header.network = pointwise(2).name
    with pytest.raises(InvalidRequest) as caught:
        service.convolve(request, CALL)
    assert caught.value.reason == Reason.INVALID_NETWORK


def test_a_backend_that_is_not_here(service: Service) -> None:
    with pytest.raises(BackendUnavailable, match="known are double"):
        service.convolve(unary(pointwise(), X, backend="abacus"), CALL)


def test_convolve_stops_between_blocks_when_the_caller_is_gone(service: Service, backend: Double) -> None:
    call = Call()
    call.give_up()
    with pytest.raises(Cancelled):
        service.convolve(unary(pointwise(), X), call)
    assert backend.blocks == 0
    assert backend.sessions == 0
    assert service.admission.reserved == 0


# Weights and networks.


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_put_register_convolve(service: Service, chunk: int) -> None:
    tensor = weight(2.0, 300)
    response = put(service, tensor, chunk)
    assert (response.digest, response.lease_seconds) == (tensor.digest, 60)
    network = Network([Conv(tensor)])
    assert register(service, network, inline=False) == network.name
    got = service.convolve(unary(network, np.ones((1, 1, 1, 1), np.float32), inline=False), CALL)
    assert np.frombuffer(got.data[0], np.float32).tolist() == [2.0] * 300


def test_bytes_are_not_read_again(service: Service) -> None:
    tensor = weight()
    put(service, tensor)
    messages = put_messages(tensor)
    assert service.put_weights(messages, CALL).digest == tensor.digest
    assert next(messages).WhichOneof("message") == "chunk", "it answered at the header"


def put_errors() -> dict[str, tuple[list[pb.PutWeightsRequest], Reason]]:
    header, *chunks = put_messages(weight(1.0, 10), 8)
    other = pb.PutWeightsRequest()
    other.CopyFrom(header)
    other.header.tensor.digest = bytes(32)
    short = pb.PutWeightsRequest()
    short.CopyFrom(header)
    short.header.tensor.digest = bytes(31)
    integers = pb.PutWeightsRequest()
    integers.CopyFrom(header)
    integers.header.tensor.data_type = pb.DATA_TYPE_INT8
    huge = pb.PutWeightsRequest()
    huge.CopyFrom(header)
    huge.header.tensor.shape[:] = [2**31 - 1, 2**31 - 1, 2**20]
    return {
        "nothing": ([], Reason.FRAMING),
        "no header": (chunks, Reason.FRAMING),
        "two headers": ([header, header], Reason.FRAMING),
        "an empty message": ([header, pb.PutWeightsRequest()], Reason.FRAMING),
        "too few bytes": ([header, *chunks[:-1]], Reason.PAYLOAD_SIZE),
        "too many bytes": ([header, *chunks, *chunks], Reason.PAYLOAD_SIZE),
        "other bytes": ([other, *chunks], Reason.TENSOR_MISMATCH),
        "a short digest": ([short, *chunks], Reason.INVALID_NETWORK),
        "an integer type": ([integers, *chunks], Reason.INVALID_SHAPE),
        "a huge shape": ([huge], Reason.SIZE_OVERFLOW),
    }


@pytest.mark.parametrize("kind", put_errors())
def test_weights_that_are_refused_leave_nothing(service: Service, kind: str) -> None:
    messages, reason = put_errors()[kind]
    with pytest.raises(InvalidRequest) as caught:
        service.put_weights(iter(messages), CALL)
    assert caught.value.reason == reason
    assert service.store.used == 0


def test_weights_beyond_the_budget_are_refused_at_the_header(backend: Double) -> None:
    config = ServerConfig(weights_budget_bytes=10_000)
    service = Service(config, Registry(factories={"double": lambda: backend}))
    messages = put_messages(weight(1.0, 5000))
    with pytest.raises(ResourceExhausted) as caught:
        service.put_weights(messages, CALL)
    assert caught.value.reason == Reason.WEIGHTS_BUDGET
    assert next(messages).WhichOneof("message") == "chunk", "no byte was read"


def test_an_upload_that_is_given_up_leaves_nothing(service: Service) -> None:
    call = Call()

    def messages() -> Iterator[pb.PutWeightsRequest]:
        yield from put_messages(weight(1.0, 10), 8)
        call.give_up()

    with pytest.raises(Cancelled):
        service.put_weights(messages(), call)
    assert service.store.used == 0


def test_missing_weights_are_named(service: Service) -> None:
    network = Network([Conv(weight(value)) for value in range(40)])
    put(service, weight(0))
    with pytest.raises(NetworkNotFound) as caught:
        register(service, network, inline=False)
    assert caught.value.reason == Reason.WEIGHTS_MISSING
    assert caught.value.metadata["count"] == "39"
    named = caught.value.metadata["digests"].split(",")
    assert set(named) < {tensor.digest.hex() for tensor in network.tensors}
    assert len(named) == 16


def test_registering_twice_is_the_same_as_once(service: Service) -> None:
    assert register(service, pointwise()) == register(service, pointwise()) == pointwise().name
    assert service.store.count == 1


def test_inline_weights_have_a_limit(service: Service) -> None:
    network = Network([Conv(weight(1.0, (1 << 18) + 1))])
    with pytest.raises(ResourceExhausted, match="PutWeights") as caught:
        register(service, network)
    assert caught.value.reason == Reason.INLINE_TOO_LARGE


def test_a_network_has_a_largest_size(service: Service) -> None:
    node = pb.Node(id="a", inputs=["input"], activation=pb.Activation())
    message = pb.InlineNetwork(network=pb.Network(nodes=[node] * (MAX_NODES + 1)))
    with pytest.raises(ResourceExhausted) as caught:
        service.register_network(pb.RegisterNetworkRequest(network=message), CALL)
    assert caught.value.reason == Reason.NETWORK_TOO_LARGE


def conv_node(**changes: Any) -> pb.Network:
    """A network of one convolution, with fields of its node or its layer changed."""
    network = network_to_proto(pointwise())
    node: Any = network.nodes[0]
    for name, value in changes.items():
        part, change = (node, pb.Node) if name in ("id", "inputs") else (node.conv, pb.Conv)
        part.ClearField(name)
        part.MergeFrom(change(**{name: value}))
    return network


BAD_NETWORKS: dict[str, tuple[pb.Network, str]] = {
    "no nodes": (pb.Network(outputs=[pb.NetworkOutput(name="a", node="b")]), Reason.INVALID_NETWORK),
    "no outputs": (pb.Network(nodes=conv_node().nodes), Reason.INVALID_NETWORK),
    "an unknown input": (conv_node(inputs=["nowhere"]), Reason.INVALID_NETWORK),
    "an id of its own": (conv_node(id="input"), Reason.INVALID_NETWORK),
    "no layer": (
        pb.Network(nodes=[pb.Node(id="a", inputs=["input"])], outputs=[pb.NetworkOutput(name="o", node="a")]),
        Reason.UNKNOWN_LAYER,
    ),
    "a stride of zero": (conv_node(stride=[0, 1]), Reason.INVALID_PARAMETER),
    "too many strides": (conv_node(stride=[1, 1, 1]), Reason.INVALID_PARAMETER),
    "groups that do not divide": (conv_node(groups=7), Reason.CHANNEL_MISMATCH),
    "an unknown padding mode": (
        conv_node(padding_mode=pb.PaddingMode.ValueType(9)),
        Reason.INVALID_PARAMETER,
    ),
    "a slope that is no number": (
        conv_node(
            activation=pb.Activation(function=pb.ACTIVATION_FUNCTION_LEAKY_RELU, negative_slope=float("nan"))
        ),
        Reason.INVALID_PARAMETER,
    ),
}


@pytest.mark.parametrize("kind", BAD_NETWORKS)
def test_a_network_that_breaks_a_rule(service: Service, kind: str) -> None:
    message, reason = BAD_NETWORKS[kind]
    inline = pb.InlineNetwork(network=message, weights=[weight_to_proto(weight())])
    with pytest.raises(InvalidRequest) as caught:
        service.register_network(pb.RegisterNetworkRequest(network=inline), CALL)
    assert caught.value.reason == reason
    assert service.store.used == 0


def test_get_list_delete(service: Service) -> None:
    networks = {network.name: network for network in map(pointwise, range(1, 8))}
    for network in networks.values():
        register(service, network)
    names: list[str] = []
    token = ""
    for _ in range(3):
        page = service.list_networks(pb.ListNetworksRequest(page_size=3, page_token=token), CALL)
        names += page.names
        token = page.next_page_token
    assert token == ""
    assert names == sorted(networks)
    for name, network in networks.items():
        got = service.get_network(pb.GetNetworkRequest(name=name), CALL)
        assert (got.name, network_from_proto(got.network).name) == (name, network.name)
        service.delete_network(pb.DeleteNetworkRequest(name=name), CALL)
        for request in (
            lambda name=name: service.get_network(pb.GetNetworkRequest(name=name), CALL),
            lambda name=name: service.delete_network(pb.DeleteNetworkRequest(name=name), CALL),
        ):
            with pytest.raises(NetworkNotFound) as caught:
                request()
            assert caught.value.reason == Reason.NETWORK_NOT_FOUND
    assert not service.list_networks(pb.ListNetworksRequest(), CALL).names
    assert service.store.used == 0


def test_a_page_has_a_default_and_a_largest_size(service: Service) -> None:
    for scale in range(105):
        register(service, pointwise(scale=scale))
    first = service.list_networks(pb.ListNetworksRequest(), CALL)
    assert len(first.names) == 100
    rest = service.list_networks(pb.ListNetworksRequest(page_token=first.next_page_token), CALL)
    assert (len(rest.names), rest.next_page_token) == (5, "")
    assert len(service.list_networks(pb.ListNetworksRequest(page_size=10**6), CALL).names) == 105
    with pytest.raises(InvalidRequest):
        service.list_networks(pb.ListNetworksRequest(page_token="what?"), CALL)


def test_a_deep_network_is_served_or_refused_with_a_reason(service: Service) -> None:
    nodes = [
        Node(f"n{at}", Activation("relu"), (f"n{at - 1}" if at else "input",)) for at in range(MAX_NODES)
    ]
    network = Network(nodes)
    assert register(service, network) == network.name
    assert service.get_network(pb.GetNetworkRequest(name=network.name), CALL).network == network_to_proto(
        network
    )


# Information and drain.


def test_information(service: Service) -> None:
    register(service, pointwise())
    info = service.get_server_info(streams=3)
    (backend,) = info.backends
    assert (backend.name, backend.available, backend.is_default, backend.device) == (
        "double",
        True,
        True,
        "a test",
    )
    assert (dict(backend.versions), backend.workers) == ({"double": "1"}, 3)
    assert info.version
    assert info.limits.max_unary_bytes == 1 << 20
    assert info.limits.idle_timeout_ms == 60_000
    assert (info.usage.networks, info.usage.streams, info.usage.tensors) == (1, 3, 0)
    assert info.usage.weights_bytes == service.store.used > 0


def test_a_backend_that_cannot_run_is_listed_with_its_reason(backend: Double) -> None:
    def broken() -> Double:
        raise BackendUnavailable("no device")

    registry = Registry(factories={"double": lambda: backend, "other": broken})
    info = Service(ServerConfig(), registry).get_server_info(0)
    reasons = {entry.name: (entry.available, entry.reason) for entry in info.backends}
    assert reasons["double"] == (True, "")
    assert not reasons["other"][0]
    assert "no device" in reasons["other"][1]


def test_draining_refuses_new_work(service: Service) -> None:
    service.drain()
    for call in (
        lambda: service.convolve(unary(pointwise(), X), CALL),
        lambda: register(service, pointwise()),
        lambda: put(service, weight()),
        lambda: service.get_server_info(0),
    ):
        with pytest.raises(ServiceUnavailable) as caught:
            call()
        assert caught.value.reason == Reason.DRAINING
        assert caught.value.retry_after is not None
