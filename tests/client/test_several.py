"""Several servers: the work is spread, nothing is lost with one of them, and each is sent things once."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from convservice import (
    Cancelled,
    Conv,
    ConvClient,
    DeadlineExceeded,
    InvalidRequest,
    Network,
    NetworkNotFound,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
)
from convservice.exchange import tensor_error
from convservice.flight import FLIGHT_BYTES
from tests.client.blocking import Blocking, Connect
from tests.client.fake import FakeServer, FakeService, hang, relu, serve_then_break
from tests.client.test_calls import LARGE
from tests.client.test_map import arrays, opened

X = np.linspace(-1, 1, 60, dtype="float32").reshape(1, 3, 4, 5)
LARGE_X = np.random.default_rng(4).normal(size=(1, 3, 400, 500)).astype("float32")


@pytest.fixture
def client(servers: list[FakeServer], connect: Connect) -> Blocking:
    """A client of the three."""
    return connect([server.target for server in servers])


def services(servers: list[FakeServer]) -> list[FakeService]:
    return [server.service for server in servers]


def counts(servers: list[FakeServer], method: str) -> list[int]:
    return [server.service.count(method) for server in servers]


def marks(results: Any) -> list[int]:
    """The numbers that `arrays` marked its arrays with, from their results."""
    return [int(result.flat[0]) for result in results]


def away() -> ServiceUnavailable:
    return ServiceUnavailable("away")


def test_calls_go_to_each_in_turn(servers: list[FakeServer], client: Blocking) -> None:
    for _ in range(9):
        assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
    assert counts(servers, "Convolve") == [3, 3, 3]


def test_targets_may_be_one_string(servers: list[FakeServer], connect: Connect) -> None:
    client = connect(",".join(server.target for server in servers))
    for _ in range(3):
        client.info()
    assert counts(servers, "GetServerInfo") == [1, 1, 1]
    assert client.client.target == ",".join(server.target for server in servers)


@pytest.mark.parametrize("target", [[], ["localhost:1", "nothing"], "localhost:1,", ["localhost:1", 3]])
def test_every_target_is_checked(connect: Connect, target: Any) -> None:
    with pytest.raises(InvalidRequest, match="target must"):
        connect(target)


def test_a_token_needs_tls_for_every_target(connect: Connect) -> None:
    with pytest.raises(InvalidRequest, match=r"plaintext to example\.org:443"):
        connect(["localhost:1", "example.org:443"], token="s3cret")


def test_a_call_goes_elsewhere_at_once_when_a_server_is_away(
    servers: list[FakeServer], client: Blocking
) -> None:
    servers[1].stop()
    for _ in range(20):
        assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
        assert np.array_equal(client.run(relu(), LARGE_X), np.maximum(LARGE_X, 0))
    client.register(LARGE)
    assert LARGE.name in client.networks()


@pytest.mark.parametrize("method", ["Convolve", "RegisterNetwork", "PutWeights"])
def test_a_call_that_comes_as_a_server_stops_goes_elsewhere(
    servers: list[FakeServer], client: Blocking, method: str
) -> None:
    """gRPC's server ends with CANCELLED what reaches it between its stop and the client's word of that."""
    for service in services(servers)[:2]:
        service.fail(method, Cancelled("CANCELLED"))
    for _ in servers:
        client.register(LARGE)
        assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
    assert not any(service.failures[method] for service in services(servers)[:2])


def test_an_error_names_the_server_that_gave_it(servers: list[FakeServer], client: Blocking) -> None:
    for server in servers:
        server.service.fail("GetServerInfo", ResourceExhausted("never"))
    seen: list[str | None] = []
    for _ in servers:
        with pytest.raises(ResourceExhausted) as caught:
            client.info()
        seen.append(caught.value.target)
    assert sorted(map(str, seen)) == sorted(server.target for server in servers)


def test_a_server_that_was_away_is_used_again(servers: list[FakeServer], client: Blocking) -> None:
    servers[0].service.fail("GetServerInfo", away())
    for _ in range(4):
        client.info()
    assert sum(counts(servers, "GetServerInfo")) == 5
    assert counts(servers, "GetServerInfo")[0] == 2


def test_all_are_asked_and_more_than_once_before_it_is_an_error(
    servers: list[FakeServer], client: Blocking
) -> None:
    for service in services(servers):
        service.fail("GetServerInfo", *[away()] * 9)
    with pytest.raises(ServiceUnavailable, match="away"):
        client.info()
    assert counts(servers, "GetServerInfo") == [4, 4, 4]


def test_a_full_server_is_left_for_another_and_each_is_asked_once(
    servers: list[FakeServer], client: Blocking
) -> None:
    full = ResourceExhausted("no room", reason=Reason.MEMORY_BUDGET, retry_after=0.001)
    servers[0].service.fail("Convolve", full)
    servers[1].service.fail("Convolve", full)
    assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
    assert counts(servers, "Convolve") == [1, 1, 1]
    for service in services(servers):
        service.fail("Convolve", full)
    with pytest.raises(ResourceExhausted, match="no room"):
        client.run(relu(), X)
    assert counts(servers, "Convolve") == [2, 2, 2]


def test_weights_go_to_each_server_once(servers: list[FakeServer], client: Blocking) -> None:
    layer = Network([Conv(np.ones((600, 512, 1, 1), "float32")), Conv(np.ones((512, 600, 1, 1), "float32"))])
    for _ in range(6):
        client.run(layer, np.ones((512, 2, 2), "float32"))
    assert counts(servers, "PutWeights") == [2, 2, 2]  # two tensors
    assert counts(servers, "Convolve") == [2, 2, 2]


def test_weights_and_the_network_go_to_the_same_server(servers: list[FakeServer], client: Blocking) -> None:
    """One that is lost between the two has not got them; they go to another one whole."""
    servers[0].service.fail("PutWeights", *[away()] * 3)
    client.register(LARGE)
    assert [LARGE.name in service.networks for service in services(servers)] == [False, True, False]
    assert counts(servers, "PutWeights") == [3, 2, 0]


def test_what_was_registered_at_one_is_sent_to_another_that_lacks_it(
    servers: list[FakeServer], client: Blocking
) -> None:
    registered = client.register(relu())
    assert [len(service.networks) for service in services(servers)] == [1, 0, 0]
    for _ in range(3):
        assert np.array_equal(client.run(registered, X), np.maximum(X, 0))
    assert [len(service.networks) for service in services(servers)] == [1, 1, 1]


def test_a_server_that_was_restarted_is_sent_what_it_lacks(
    servers: list[FakeServer], client: Blocking
) -> None:
    for _ in range(3):
        client.run(relu(), X)
    servers[1].service.forget()
    for _ in range(3):
        assert np.array_equal(client.run(relu(), X), np.maximum(X, 0))
    assert counts(servers, "Convolve") == [2, 3, 2]


def test_a_network_is_found_wherever_it_is(servers: list[FakeServer], client: Blocking) -> None:
    """Its weights are not known here, so it runs where they are."""
    network = Network([relu()])
    for _ in range(2):
        client.info()
    client.register(network)  # at the third
    assert client.networks() == (network.name,)
    for _ in range(3):
        assert client.network(network.name).name == network.name
    client.unregister(network)
    assert client.networks() == ()
    assert counts(servers, "DeleteNetwork") == [1, 1, 1]
    with pytest.raises(NetworkNotFound):
        client.network(network.name)


def test_a_network_known_by_name_alone_runs_where_it_is(servers: list[FakeServer], client: Blocking) -> None:
    network = Network([Conv(np.ones((1, 1, 1, 1), "float32"))])
    client.register(network)
    found = client.network(network.name)
    x = np.ones((1, 1, 4, 5), "float32")
    for _ in range(3):
        assert client.run(found, x).all()
        assert client.run(found, LARGE_X[:, :1]).shape == (1, 1, 400, 500)
    assert len(list(client.map(found, [x] * 9))) == 9
    assert [len(service.networks) for service in services(servers)] == [1, 0, 0]


def test_unregistering_is_done_everywhere_and_says_where_it_could_not(
    servers: list[FakeServer], client: Blocking
) -> None:
    missing = NetworkNotFound("no such network", reason=Reason.NETWORK_NOT_FOUND)
    for service in services(servers)[:2]:
        service.fail("DeleteNetwork", missing)
    client.unregister(relu())
    for service in services(servers):
        service.fail("DeleteNetwork", missing)
    with pytest.raises(NetworkNotFound):
        client.unregister(relu())
    servers[0].service.fail("DeleteNetwork", away())
    with pytest.raises(ServiceUnavailable) as caught:
        client.unregister(relu())
    assert caught.value.target == servers[0].target
    assert counts(servers, "DeleteNetwork") == [3, 3, 3]


def test_infos_are_of_all_that_answer(servers: list[FakeServer], client: Blocking) -> None:
    servers[2].stop()
    assert {target: info.version for target, info in client.infos().items()} == {
        server.target: "1.2" for server in servers[:2]
    }
    servers[0].stop()
    servers[1].stop()
    with pytest.raises(ServiceUnavailable):
        client.infos()


def test_a_stream_is_at_one_server_and_never_sent_again(servers: list[FakeServer], client: Blocking) -> None:
    bands = [X[0, :, at : at + 1] for at in range(4)]
    for _ in range(3):
        found = list(client.stream(relu(), bands, shape=(3, 4, 5), dtype="float32", band_rows=1))
        assert np.array_equal(np.concatenate([band.array for band in found], axis=1), np.maximum(X[0], 0))
    assert [service.streams for service in services(servers)] == [1, 1, 1]
    for service in services(servers):
        service.scripts.append(serve_then_break(0))
    with pytest.raises(ServiceUnavailable, match="the connection broke") as caught:
        list(client.stream(relu(), bands, shape=(3, 4, 5), dtype="float32", band_rows=1))
    assert caught.value.metadata["last_row"] == "-1"
    assert sum(service.streams for service in services(servers)) == 4


def test_a_stream_begins_at_a_server_that_is_there(servers: list[FakeServer], client: Blocking) -> None:
    servers[0].stop()
    for _ in range(4):
        found = list(client.stream(relu(), [X[0]], shape=(3, None, 5), dtype="float32"))
        assert sum(band.array.shape[1] for band in found) == 4


def test_a_large_tensor_goes_elsewhere(servers: list[FakeServer], client: Blocking) -> None:
    servers[0].service.scripts.append(serve_then_break(0))
    servers[1].service.scripts.append(serve_then_break(0))
    assert np.array_equal(client.run(relu(), LARGE_X), np.maximum(LARGE_X, 0))
    assert [service.streams for service in services(servers)] == [1, 1, 1]


def test_map_is_spread_and_in_order(servers: list[FakeServer], client: Blocking) -> None:
    everywhere = threading.Barrier(3, timeout=30)

    def together(fake: FakeService, requests: Any, context: Any) -> Iterator[Any]:
        everywhere.wait()  # only streams to all three at a time come past this
        yield from fake.serve(requests)

    for service in services(servers):
        service.scripts.append(together)
    reports: list[Any] = []
    assert marks(client.map(relu(), arrays(200), on_report=reports.append)) == list(range(200))
    assert len(reports) == 200
    assert [service.streams for service in services(servers)] == [1, 1, 1]
    assert all(opened(service) == sorted(opened(service)) for service in services(servers))
    assert sum(len(opened(service)) for service in services(servers)) == 200


def test_map_of_nothing(client: Blocking) -> None:
    assert list(client.map(relu(), [])) == []


def test_map_goes_on_without_a_server_that_is_away(servers: list[FakeServer], client: Blocking) -> None:
    servers[0].stop()
    assert marks(client.map(relu(), arrays(60))) == list(range(60))


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
@pytest.mark.parametrize("served", [0, 1, 7])
def test_map_survives_lost_connections(
    servers: list[FakeServer], client: Blocking, served: int, code: grpc.StatusCode
) -> None:
    for service in services(servers)[:2]:
        service.scripts.extend([serve_then_break(served, code), serve_then_break(0, code)])
    assert marks(client.map(relu(), arrays(100))) == list(range(100))


def test_map_survives_a_server_that_stops_for_good(servers: list[FakeServer], client: Blocking) -> None:
    results = client.map(relu(), arrays(600))
    found = marks(itertools.islice(results, 20))
    servers[2].stop()
    servers[2].service.forget()
    assert found + marks(results) == list(range(600))


def test_map_leaves_a_server_that_drains(servers: list[FakeServer], client: Blocking) -> None:
    def drain(fake: FakeService, requests: Any, context: Any) -> Iterator[Any]:
        yield from fake.serve(requests, 2)
        for message in requests:
            if message.HasField("header"):
                error = ServiceUnavailable("stopping", reason=Reason.DRAINING, retry_after=0.001)
                yield tensor_error(message.header.tensor_id, error)

    servers[0].service.scripts.append(drain)
    assert marks(client.map(relu(), arrays(50))) == list(range(50))


def test_map_leaves_a_server_that_is_full(servers: list[FakeServer], client: Blocking) -> None:
    full = ResourceExhausted("no room", reason=Reason.MEMORY_BUDGET, retry_after=0.001)

    def refuse(fake: FakeService, requests: Any, context: Any) -> Iterator[Any]:
        yield tensor_error(next(requests).header.tensor_id, full)

    servers[0].service.scripts.append(refuse)
    assert marks(client.map(relu(), arrays(50))) == list(range(50))
    for service in services(servers):
        service.scripts.extend([refuse] * 4)
    with pytest.raises(ResourceExhausted, match="no room"):
        list(client.map(relu(), arrays(50)))


def test_map_gives_up_when_no_server_gets_anything_through(
    servers: list[FakeServer], client: Blocking
) -> None:
    for service in services(servers):
        service.scripts.extend([serve_then_break(0)] * 100)
    with pytest.raises(ServiceUnavailable, match="the connection broke"):
        list(client.map(relu(), arrays(5)))
    assert sum(service.streams for service in services(servers)) <= 5 * 3 * 4


def test_what_map_lost_is_resent_while_the_iterable_waits_for_it(
    servers: list[FakeServer], client: Blocking
) -> None:
    """Nothing that is lost waits for the caller's iterator to move on."""
    delivered = threading.Event()

    def slowly() -> Iterator[Any]:
        yield from arrays(3)
        if isinstance(client.client, ConvClient):  # the async client's loop must not be held up
            assert delivered.wait(30)
        yield from arrays(1)

    for service in services(servers):
        service.scripts.append(serve_then_break(0))
    results = client.map(relu(), slowly())
    assert marks(itertools.islice(results, 3)) == [0, 1, 2]
    delivered.set()
    assert marks(results) == [0]


def test_map_sends_each_server_the_network_once(servers: list[FakeServer], client: Blocking) -> None:
    network = Network([relu()])
    list(client.map(network, arrays(90)))
    before = counts(servers, "RegisterNetwork")
    assert all(count <= 1 for count in before)
    for service in services(servers):
        service.forget()
    assert marks(client.map(network, arrays(90))) == list(range(90))
    assert all(count <= 2 for count in counts(servers, "RegisterNetwork"))


def test_leaving_map_early_cancels_all_streams(servers: list[FakeServer], client: Blocking) -> None:
    def one_and_no_more(fake: FakeService, requests: Any, context: Any) -> Iterator[Any]:
        yield from fake.serve(requests, 1)
        yield from hang(fake, requests, context)

    for service in services(servers):
        service.scripts.append(one_and_no_more)
    results = client.map(relu(), (np.full((1, 1, 4, 4), i, "float32") for i in itertools.count()))
    assert marks(itertools.islice(results, 1)) == [0]
    results.close()
    used = [service for service in services(servers) if service.streams]
    assert used
    assert all(service.cancelled.wait(30) for service in used)


def test_errors_of_map_come_in_their_turn(servers: list[FakeServer], client: Blocking) -> None:
    def broken() -> Iterator[Any]:
        yield from arrays(7)
        raise KeyError("the camera is gone")

    for given, kind in ((broken(), KeyError), ([*arrays(7), np.zeros(3, "float32")], InvalidRequest)):
        results = client.map(relu(), given)
        assert marks(itertools.islice(results, 7)) == list(range(7))
        with pytest.raises(kind):
            next(results)


def test_what_map_has_in_flight_is_bounded_over_all(servers: list[FakeServer], client: Blocking) -> None:
    """A tensor and its result take 16 MiB here: four at most are open and not delivered."""
    most = delivered = 0
    for _ in client.map(relu(), (np.zeros((1, 1, 2048, 1024), "float32") for _ in range(9))):
        delivered += 1
        most = max(most, sum(len(opened(service)) for service in services(servers)) - delivered)
    assert delivered == 9
    assert most <= FLIGHT_BYTES // (16 << 20)


def test_a_closed_client_says_so(client: Blocking) -> None:
    client.close()
    for use in (client.info, lambda: list(client.map(relu(), [X])), lambda: client.unregister(relu())):
        with pytest.raises(InvalidRequest, match="the client is closed"):
            use()


def test_a_server_that_never_answers_holds_up_nothing_for_good(
    servers: list[FakeServer], connect: Connect
) -> None:
    """The kernel accepts connections to it, and that is all: a call there takes its time and no longer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        client = connect([target, servers[0].target])
        with pytest.raises(DeadlineExceeded) as caught:
            client.run(relu(), X, timeout=0.5)
        assert caught.value.target == target
        assert np.array_equal(client.run(relu(), X, timeout=30), np.maximum(X, 0))
        assert marks(client.map(relu(), arrays(40), timeout=30)) == list(range(40))
