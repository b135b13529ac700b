"""Names behind which there are several servers: looked up, kept up to date, and certificates for the name."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from convservice import ServiceUnavailable
from convservice.addresses import FRESH_SECONDS, Address, Directory, look_up, name_in
from convservice.v1.conv_pb2_grpc import add_ConvServiceServicer_to_server
from tests.client.blocking import Blocking, Connect
from tests.client.fake import FakeServer, FakeService, relu, serve_then_break
from tests.client.test_map import arrays
from tests.client.test_several import counts, marks

NAME = "servers.example:50051"


class Names:
    """A name service of the test's own.

    Attributes:
        found: what every name leads to; nothing: it does not resolve.
        asked: how often it was asked.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.asked = 0

    def look_up(self, host: str, port: int) -> list[str]:
        self.asked += 1
        if not self.found:
            raise socket.gaierror(socket.EAI_NONAME, f"no address for {host}")
        return list(self.found)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Takes the place of the name service; names may be looked up at any moment."""
    found = Names()
    monkeypatch.setattr("convservice.addresses.look_up", found.look_up)
    monkeypatch.setattr("convservice.addresses.PAUSE_SECONDS", 0.0)
    return found


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("convservice:50051", ("convservice", 50051)),
        ("dns:///a.example.org:443", ("a.example.org", 443)),
        ("dns:a_b:1", ("a_b", 1)),
        ("dns://10.0.0.1/a.example.org:443", None),
        ("10.0.0.1:50051", None),
        ("ipv4:10.0.0.1:50051", None),
        ("[::1]:50051", None),
        ("localhost:50051", None),
        ("dns:///localhost:50051", None),
        ("unix:/run/x.sock", None),
        ("unix:50051", None),
        ("xds:///a:1", None),
    ],
)
def test_what_is_looked_up_here(
    target: str, name: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(variable, raising=False)
    assert name_in(target) == name


def test_what_a_proxy_looks_up_is_not_looked_up_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "convservice,.internal")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    assert name_in("example.org:443") is None
    assert name_in("convservice:50051") == ("convservice", 50051)
    assert name_in("a.internal:50051") == ("a.internal", 50051)


@pytest.mark.parametrize(
    ("four", "six", "expected"),
    [
        (["10.0.0.1"], [], ["10.0.0.1:7"]),
        (["10.0.0.1"], ["fd00::1"], ["10.0.0.1:7"]),
        (["10.0.0.1", "10.0.0.2", "10.0.0.1"], ["fd00::1", "fd00::2"], ["10.0.0.1:7", "10.0.0.2:7"]),
        (["10.0.0.1"], ["fd00::1", "fd00::2"], ["[fd00::1]:7", "[fd00::2]:7"]),
    ],
)
def test_one_family_counts(
    monkeypatch: pytest.MonkeyPatch, four: list[str], six: list[str], expected: list[str]
) -> None:
    """A server that has an address of each is one server."""

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        answers: list[Any] = [(socket.AF_INET6, 1, 6, "", (address, port, 0, 0)) for address in six]
        return answers + [(socket.AF_INET, 1, 6, "", (address, port)) for address in four]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert look_up("a", 7) == expected


def looked_up(directory: Directory, use: Callable[[], Any]) -> None:
    """Waits until the directory has looked names up because of `use`."""
    done = threading.Event()
    directory.subscribe(done.set)
    use()
    assert done.wait(30)
    directory.unsubscribe(done.set)


def test_names_are_looked_up_again_when_old_and_when_asked_for(names: Names) -> None:
    now = 0.0
    directory = Directory(("10.0.0.9:1", NAME), clock=lambda: now)
    assert not directory.known
    assert names.asked == 0
    names.found = ["10.0.0.2:1", "10.0.0.1:1"]
    directory.wait(30)
    two = tuple(Address(target, NAME) for target in ("10.0.0.1:1", "10.0.0.2:1"))
    assert directory.addresses() == (Address("10.0.0.9:1"), *two)
    assert names.asked == 1
    names.found = ["10.0.0.3:1"]
    looked_up(directory, directory.refresh)
    assert directory.addresses() == (Address("10.0.0.9:1"), Address(NAME))
    names.found = []
    looked_up(directory, directory.refresh)
    assert directory.addresses() == (Address("10.0.0.9:1"), Address(NAME)), "what was known is kept"
    assert names.asked == 3
    now += FRESH_SECONDS + 1
    looked_up(directory, directory.addresses)
    assert names.asked == 4


def test_addresses_are_never_looked_up(names: Names) -> None:
    directory = Directory(("10.0.0.9:1", "localhost:1"))
    assert directory.known
    directory.refresh()
    directory.wait(30)
    assert [address.target for address in directory.addresses()] == ["10.0.0.9:1", "localhost:1"]
    assert names.asked == 0


@pytest.fixture
def client(names: Names, servers: list[FakeServer], connect: Connect) -> Blocking:
    """A client of the name of three servers."""
    names.found = [server.target for server in servers]
    return connect(NAME)


def test_the_servers_behind_a_name_are_used_in_turn(
    servers: list[FakeServer],
    client: Blocking,
) -> None:
    for _ in range(6):
        client.info()
    assert counts(servers, "GetServerInfo") == [2, 2, 2]
    assert client.client.target == NAME
    assert set(client.infos()) == {server.target for server in servers}


def test_a_name_that_does_not_resolve_is_unavailable(names: Names, connect: Connect) -> None:
    client = connect("no-such-host.invalid:50051")
    with pytest.raises(ServiceUnavailable, match=r"no-such-host\.invalid"):
        client.info()


def test_servers_that_come_are_found_when_one_goes(
    names: Names,
    servers: list[FakeServer],
    connect: Connect,
) -> None:
    names.found = [server.target for server in servers[:2]]
    client = connect(NAME)
    client.info()
    names.found = [server.target for server in servers[1:]]
    servers[0].stop()
    while not servers[2].service.count("GetServerInfo"):
        client.info()
    assert servers[0].target not in client.infos()


def test_map_moves_on_to_servers_that_come(
    names: Names,
    servers: list[FakeServer],
    connect: Connect,
) -> None:
    """All that were there when it began are replaced, one after another."""
    names.found = [server.target for server in servers[:2]]
    client = connect(NAME)
    results = client.map(relu(), (np.full((1, 1, 4, 4), i, "float32") for i in itertools.count()))
    found = marks(itertools.islice(results, 10))
    names.found = [servers[2].target, servers[1].target]
    servers[0].stop()
    while not servers[2].service.streams:
        found += marks(itertools.islice(results, 1))
    servers[0].service.forget()
    servers[0].start()
    before = servers[0].service.streams
    names.found = [servers[2].target, servers[0].target]
    servers[1].stop()
    while servers[0].service.streams == before:
        found += marks(itertools.islice(results, 1))
    results.close()
    assert found == list(range(len(found)))


def test_a_lone_name_is_grpcs_own(
    names: Names,
    servers: list[FakeServer],
    connect: Connect,
) -> None:
    """Where there is one server the channel has the name, which gRPC resolves by itself."""
    port = servers[0].port
    name = f"no-such-host.invalid:{port}"
    names.found = [servers[0].target]
    client = connect(name)
    with pytest.raises(ServiceUnavailable) as caught:
        client.info()
    assert caught.value.target == name


@pytest.fixture
def secure(names: Names) -> Iterator[tuple[bytes, list[FakeService]]]:
    """Two servers with a certificate for a name alone; the authority."""
    authority = trustme.CA()
    made = authority.issue_cert("servers.example")
    chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(made.private_key_pem.bytes(), chain)])
    running: list[grpc.Server] = []
    services: list[FakeService] = []
    for _ in range(2):
        server, service = grpc.server(ThreadPoolExecutor(4)), FakeService()
        add_ConvServiceServicer_to_server(service, server)
        names.found.append(f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}")
        server.start()
        running.append(server)
        services.append(service)
    yield authority.cert_pem.bytes(), services
    for server in running:
        server.stop(None).wait()


def test_certificates_are_for_the_name(
    secure: tuple[bytes, list[FakeService]],
    connect: Connect,
) -> None:
    ca, services = secure
    client = connect(NAME, tls=ca, token="s3cret")
    services[0].scripts.append(serve_then_break(0))
    assert marks(client.map(relu(), arrays(20))) == list(range(20))
    for _ in range(2):
        assert client.run(relu(), np.ones((1, 2, 2), "float32")).all()
    assert [service.count("Convolve") for service in services] == [1, 1]
    assert {found.get("authorization") for service in services for found in service.metadata} == {
        "Bearer s3cret"
    }
    with pytest.raises(ServiceUnavailable):
        connect("other.example:50051", tls=ca).info()
