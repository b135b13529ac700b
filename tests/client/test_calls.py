"""Unary calls, registration, and what is sent again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from convservice import (
    ConvClient,
    InternalError,
    InvalidRequest,
    Network,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
    TensorReport,
)
from convservice.channel import Connection
from convservice.errors import ConvServiceError
from convservice.jobs import INLINE_BYTES
from convservice.layers import Conv
from convservice.v1 import conv_pb2 as pb
from tests.client.fake import REPORT, FakeService, relu

X = np.linspace(-1, 1, 60, dtype="float32").reshape(1, 3, 4, 5)
SMALL = Network([Conv(np.ones((1, 1, 1, 1), "float32"))])
LARGE = Network([Conv(np.ones((513, 512, 1, 1), "float32"), np.ones(513, "float32"))])


def missing(reason: Reason) -> NetworkNotFound:
    return NetworkNotFound("not here", reason=reason)


def methods(fake: FakeService) -> list[str]:
    return [method for method, _ in fake.requests]


def test_a_small_tensor_is_one_call_and_its_network_travels_once(
    fake: FakeService, client: ConvClient
) -> None:
    for _ in range(3):
        assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
    assert methods(fake) == ["Convolve"] * 3
    carried = [
        request.HasField("network") for _, request in fake.requests if isinstance(request, pb.ConvolveRequest)
    ]
    assert carried == [True, False, False]


def test_input_and_outputs_together_decide(fake: FakeService, client: ConvClient) -> None:
    client.run(relu(), np.zeros((1, 1, 1 << 19), "uint8"), out_dtype="uint8")
    assert methods(fake) == ["Convolve"]
    client.run(relu(), np.zeros((1, 1, (1 << 19) + 1), "uint8"), out_dtype="uint8")
    assert methods(fake)[1] == "ConvolveStream"


@pytest.mark.parametrize("reason", [Reason.NETWORK_NOT_REGISTERED, Reason.WEIGHTS_MISSING])
def test_a_server_that_lacks_the_network_is_sent_it(
    fake: FakeService, client: ConvClient, reason: Reason
) -> None:
    client.run(relu(), X)
    fake.fail("Convolve", missing(reason))
    assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
    last = fake.requests[-1][1]
    assert isinstance(last, pb.ConvolveRequest)
    assert last.HasField("network")


def test_the_network_is_sent_at_most_once_a_call(fake: FakeService, client: ConvClient) -> None:
    fake.fail("Convolve", *[missing(Reason.NETWORK_NOT_REGISTERED)] * 2)
    with pytest.raises(NetworkNotFound):
        client.run(relu(), X)
    assert fake.count("Convolve") == 2


def test_other_errors_are_not_sent_again(fake: FakeService, client: ConvClient) -> None:
    fake.fail("Convolve", NetworkNotFound("no", reason=Reason.NETWORK_NOT_FOUND))
    with pytest.raises(NetworkNotFound):
        client.run(relu(), X)
    assert fake.count("Convolve") == 1


def test_weights_up_to_a_mebibyte_travel_inline(fake: FakeService, client: ConvClient) -> None:
    assert sum(tensor.nbytes for tensor in LARGE.tensors) > INLINE_BYTES
    client.register(SMALL)
    assert methods(fake) == ["RegisterNetwork"]


def test_larger_weights_are_put_first_and_only_what_is_missing(fake: FakeService, client: ConvClient) -> None:
    client.register(LARGE)  # the server names one missing tensor at a time
    assert methods(fake) == [
        "RegisterNetwork",
        "PutWeights",
        "RegisterNetwork",
        "PutWeights",
        "RegisterNetwork",
    ]
    fake.requests.clear()
    client.register(LARGE)
    assert methods(fake) == ["RegisterNetwork"]
    fake.networks.clear()
    del fake.weights[LARGE.tensors[0].digest]
    fake.requests.clear()
    client.register(LARGE)
    assert methods(fake) == ["RegisterNetwork", "PutWeights", "RegisterNetwork"]


def test_putting_weights_is_tried_again(fake: FakeService, client: ConvClient) -> None:
    fake.fail("PutWeights", *[ServiceUnavailable("restarting")] * 2)
    client.register(LARGE)
    assert LARGE.name in fake.networks


def test_a_server_that_never_has_enough_weights_is_given_up(fake: FakeService, client: ConvClient) -> None:
    fake.fail("RegisterNetwork", *[missing(Reason.WEIGHTS_MISSING)] * 9)
    with pytest.raises(NetworkNotFound):
        client.register(LARGE)
    assert fake.count("PutWeights") == 2


def test_a_server_that_names_another_network_is_not_believed(
    fake: FakeService, client: ConvClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(inline: pb.InlineNetwork) -> Network:
        return Network([relu(), relu()])

    monkeypatch.setattr(fake, "keep", keep)
    with pytest.raises(InternalError, match="do not agree on its canonical form"):
        client.register(relu())


def test_a_server_with_lower_limits(fake: FakeService, client: ConvClient) -> None:
    fake.fail("Convolve", ResourceExhausted("too large", reason=Reason.INLINE_TOO_LARGE))
    fake.fail("RegisterNetwork", ResourceExhausted("too large", reason=Reason.INLINE_TOO_LARGE))
    assert client.run(SMALL, np.ones((1, 4, 5), "float32")).all()
    assert methods(fake) == [
        "Convolve",
        "RegisterNetwork",
        "RegisterNetwork",
        "PutWeights",
        "RegisterNetwork",
        "Convolve",
    ]
    fake.fail("Convolve", ResourceExhausted("too large", reason=Reason.UNARY_TOO_LARGE))
    assert client.run(SMALL, np.ones((1, 4, 5), "float32")).all()
    assert fake.streams == 1


def test_no_room_for_weights_is_final(fake: FakeService, client: ConvClient) -> None:
    fake.fail("RegisterNetwork", ResourceExhausted("no room", reason=Reason.WEIGHTS_BUDGET))
    with pytest.raises(ResourceExhausted, match="no room"):
        client.register(LARGE)


def test_a_registered_network_is_callable(fake: FakeService, client: ConvClient) -> None:
    network = Network([relu()])
    registered = client.register(network)
    assert (registered.name, registered.digest) == (network.name, network.digest)
    assert registered.output_shape((3, 2, 4, 5)) == (3, 2, 4, 5)
    assert np.array_equal(registered(X), np.maximum(X, 0))
    assert registered.name in repr(registered)
    assert methods(fake) == ["RegisterNetwork", "Convolve"]


def test_networks_are_found_listed_and_let_go(fake: FakeService, client: ConvClient) -> None:
    first, second = client.register(SMALL), client.register(relu())
    assert client.networks() == tuple(sorted([first.name, second.name]))  # a page each
    found = client.network(first.name)
    assert found.name == first.name
    client.unregister(first)
    client.unregister(second.name)
    assert client.networks() == ()
    with pytest.raises(NetworkNotFound):
        client.network(first.name)


def test_a_network_known_by_name_alone_cannot_be_sent(fake: FakeService, client: ConvClient) -> None:
    client.register(SMALL)
    found = client.network(SMALL.name)
    fake.forget()
    with pytest.raises(NetworkNotFound, match="only its shape"):
        found(np.ones((1, 4, 5), "float32"))


@pytest.mark.parametrize("name", ["", "networks/", "networks/sha256-12", "networks/sha256-" + "G" * 64])
def test_a_name_that_is_none(fake: FakeService, client: ConvClient, name: str) -> None:
    with pytest.raises(InvalidRequest, match="a network's name is"):
        client.network(name)
    assert not fake.requests


def test_a_report_says_how_it_went(client: ConvClient) -> None:
    reports: list[TensorReport] = []
    client.run(relu(), X, on_report=reports.append)
    client.run(relu(), np.zeros((1, 1, 1 << 20), "float32"), on_report=reports.append)
    assert reports == [REPORT] * 2


def test_the_default_timeout_and_the_calls_own(fake: FakeService, client: ConvClient) -> None:
    client.run(relu(), X, timeout=5)
    client.run(relu(), X)
    sent = [
        request.header.timeout_ms for _, request in fake.requests if isinstance(request, pb.ConvolveRequest)
    ]
    assert sent == [5000, 0]


def spoil_channels(response: pb.ConvolveResponse) -> None:
    response.results[0].sample_shape.channels = 4_000_000


def spoil_name(response: pb.ConvolveResponse) -> None:
    response.results[0].name = "other"


def spoil_index(response: pb.ConvolveResponse) -> None:
    response.results[0].output = 7


def spoil_dtype(response: pb.ConvolveResponse) -> None:
    response.results[0].data_type = pb.DATA_TYPE_FLOAT64


def spoil_samples(response: pb.ConvolveResponse) -> None:
    response.results[0].samples = 2


def spoil_count(response: pb.ConvolveResponse) -> None:
    response.data.append(b"")


def spoil_by_less(response: pb.ConvolveResponse) -> None:
    response.data[0] = response.data[0][1:]


def spoil_by_more(response: pb.ConvolveResponse) -> None:
    response.data[0] += b"1"


def spoil_all(response: pb.ConvolveResponse) -> None:
    response.results.pop()
    response.data.pop()


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_channels,
        spoil_name,
        spoil_index,
        spoil_dtype,
        spoil_samples,
        spoil_count,
        spoil_by_less,
        spoil_by_more,
        spoil_all,
    ],
)
def test_an_answer_that_geometry_forbids_is_the_servers_fault(
    client: ConvClient, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pb.ConvolveResponse], None]
) -> None:
    honest = Connection.unary

    def unary(self: Connection, method: str, request: object, timeout: float | None) -> object:
        response = honest(self, method, request, timeout)
        spoil(response)
        return response

    monkeypatch.setattr(Connection, "unary", unary)
    with pytest.raises(InternalError, match="the server broke the protocol"):
        client.run(relu(), X)


def test_every_error_is_one_of_the_service(client: ConvClient) -> None:
    with pytest.raises(ConvServiceError):
        client.network("networks/sha256-" + "0" * 64)
