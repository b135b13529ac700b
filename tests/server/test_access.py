"""Who may call: tokens on every method, rotated by file, and what each name can see of another's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import convservice
from convservice.errors import InvalidRequest, Reason, Unauthenticated
from convservice.v1 import conv_pb2 as pb
from convservice_server import access
from convservice_server.access import MOST_TOKENS, Access, Tokens, certificate_name, exposures
from convservice_server.config import ServerConfig
from convservice_server.settings import gather
from tests.server.support import (
    WAIT,
    Requests,
    Running,
    collect,
    error_of,
    pointwise,
    put_messages,
    running,
    status_of,
    tensor_messages,
    unary,
    weight,
)

ANN, ANN_NEXT, BOB = "ann-0123456789abcdef", "ann-fedcba9876543210", "bob-0123456789abcdef"
STRANGER = "who-0123456789abcdef"
X = np.ones((1, 1, 2, 2), np.float32)

METHODS = tuple(
    f"/{service.full_name}/{method.name}"
    for service in (
        pb.DESCRIPTOR.services_by_name["ConvService"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    )
    for method in service.methods
)
"""Every method that the server has, health's apart."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def write(path: Path, *lines: str) -> str:
    """Replaces a file as one should: whole, under its name, in one step."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(line + "\n" for line in lines))
    os.replace(fresh, path)  # noqa: PTH105 - the very call that is meant
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    write(path, "# the pipelines", f"ann {ANN}", "", f"ann {ANN_NEXT}", f"  bob\t{BOB}  ")
    return path


def name_of(tokens: Tokens, token: str) -> str | None:
    try:
        return tokens.admit(bearer(token)).name
    except Unauthenticated:
        return None


# Tokens.


def test_a_token_goes_by_its_name_and_a_name_has_several_tokens(path: Path) -> None:
    tokens = Tokens(str(path))
    assert [name_of(tokens, token) for token in (ANN, ANN_NEXT, BOB)] == ["ann", "ann", "bob"]
    assert [name_of(tokens, token) for token in (STRANGER, ANN[:-1], ANN + "x", ANN.upper())] == [None] * 4


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", ANN),),
        (("authorization", f"Basic {ANN}"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Bearer {ANN} {ANN}"),),
        (("authorization", f"Bearer {ANN}"), ("authorization", f"Bearer {ANN}")),
        (("x-authorization", f"Bearer {ANN}"),),
        (("authorization", f"Bearer {ANN}".encode()),),
    ],
)
def test_a_call_without_one_token_is_refused(path: Path, metadata: Sequence[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tokens(str(path)).admit(metadata)
    assert caught.value.reason == Reason.TOKEN_REQUIRED
    assert ANN not in caught.value.message


def test_a_replaced_file_is_noticed_once_its_time_has_come(path: Path) -> None:
    clock = Clock()
    tokens = Tokens(str(path), clock)
    ann = tokens.admit(bearer(ANN))
    write(path, f"ann {ANN_NEXT}")
    clock.now += access.LOOK_INTERVAL / 2
    assert name_of(tokens, ANN) == "ann", "the file is not looked at for every call"
    clock.now += access.LOOK_INTERVAL / 2
    assert name_of(tokens, ANN_NEXT) == "ann"
    assert name_of(tokens, ANN) is None
    with pytest.raises(Unauthenticated):
        ann.check()


def test_a_token_that_changes_hands_opens_nothing_for_who_had_it(path: Path) -> None:
    clock = Clock()
    tokens = Tokens(str(path), clock)
    ann = tokens.admit(bearer(ANN))
    ann.check()
    write(path, f"bob {ANN}")
    clock.now += access.LOOK_INTERVAL
    with pytest.raises(Unauthenticated):
        ann.check()
    assert name_of(tokens, ANN) == "bob"


@pytest.mark.parametrize("broken", ["", "# nobody\n", "ann\n", f"ann {ANN}\nbob short\n", None])
def test_a_file_that_is_broken_leaves_the_tokens_and_is_logged_once(
    path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tokens = Tokens(str(path), clock)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for _ in range(3):
        clock.now += access.LOOK_INTERVAL
        assert [name_of(tokens, token) for token in (ANN, BOB)] == ["ann", "bob"]
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert str(path) in record.getMessage()
    assert ANN not in record.getMessage()
    write(path, f"bob {BOB}")
    clock.now += access.LOOK_INTERVAL
    assert [name_of(tokens, token) for token in (ANN, BOB)] == [None, "bob"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "it holds 0 tokens; 1 to 1000 are needed"),
        ("# only this\n\n", "it holds 0 tokens"),
        (f"ann {ANN}\nSECRET-SECRET-SECRET\n", "line 2: it has 1 words; a line is NAME TOKEN"),
        (f"ann {ANN} SECRET\n", "line 1: it has 3 words"),
        (f"# two\n\nann/SECRET {ANN}\n", "line 3: a name has 1 to 64 of"),
        (f"{'n' * 65} {ANN}\n", "line 1: a name has 1 to 64 of"),
        ("ann SECRET\n", "line 1: a token has 16 to 512 characters, this has 6"),
        (f"ann {'SECRET' * 100}\n", "line 1: a token has 16 to 512 characters, this has 600"),
        ("ann SECRET-é-0123456789\n", "line 1: a token consists of printable ASCII characters"),
        (f"ann {ANN}\nbob {ANN}\n", "line 2: it repeats the token of line 1"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_without_telling_a_token(
    path: Path, text: str, rule: str
) -> None:
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        Tokens(str(path))
    assert caught.value.message.startswith(f"token_file {path}: {rule}")
    assert caught.value.field == "token_file"
    assert "SECRET" not in caught.value.message
    assert ANN not in caught.value.message


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n")
    for name, rule in {
        "pipe": "it is no regular file",
        "large": "it has more than 1048576 bytes",
        "missing": "it cannot be read: No such file or directory",
        ".": "it",
    }.items():
        with pytest.raises(InvalidRequest, match=f"token_file {tmp_path / name}: {rule}"):
            Tokens(str(tmp_path / name))


def test_there_are_so_many_tokens_and_no_more(path: Path) -> None:
    write(path, *(f"n{number} token-{number:016}" for number in range(MOST_TOKENS)))
    assert name_of(Tokens(str(path)), f"token-{MOST_TOKENS - 1:016}") == f"n{MOST_TOKENS - 1}"
    write(path, *(f"n{number} token-{number:016}" for number in range(MOST_TOKENS + 1)))
    with pytest.raises(InvalidRequest, match="it holds 1001 tokens"):
        Tokens(str(path))


# Certificates that name their holder.


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        ({"x509_common_name": [b"ann"], "x509_subject_alternative_name": [b"other"]}, "ann"),
        ({"x509_common_name": [b""], "x509_subject_alternative_name": [b"ann.example"]}, "ann.example"),
        ({"x509_subject_alternative_name": ["änn".encode(), b"other"]}, "änn"),
    ],
)
def test_a_certificate_names_its_holder(identity: dict[str, list[bytes]], name: str) -> None:
    assert certificate_name(identity) == name


@pytest.mark.parametrize(
    "identity", [{}, {"x509_common_name": [b"a\nb"]}, {"x509_common_name": [b"\xff"], "peer": [b"ann"]}]
)
def test_a_certificate_that_names_nobody(identity: dict[str, list[bytes]]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Access(None, certificates=True).admit((), lambda: identity)
    assert caught.value.reason == Reason.CERTIFICATE_WITHOUT_NAME


# A server that asks for tokens.


@pytest.fixture
def served(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server that notices a replaced file at the next call."""
    monkeypatch.setattr(access, "LOOK_INTERVAL", 0.0)
    with running(token_file=str(path)) as found:
        yield found


def ask(
    channel: grpc.Channel, method: str, metadata: Sequence[tuple[str, str]]
) -> convservice.ConvServiceError:
    """What a method answers to a call that carries no message, which none can take for a request."""
    call = cast("Any", channel).stream_stream(method)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([b"\xff"]), timeout=WAIT, metadata=metadata))
    return error_of(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_asks_for_a_token(served: Running, method: str) -> None:
    for metadata, reason in (((), Reason.TOKEN_REQUIRED), (bearer(STRANGER), Reason.TOKEN_UNKNOWN)):
        error = ask(served.channel, method, metadata)
        assert isinstance(error, Unauthenticated)
        assert error.reason == reason
    assert not isinstance(ask(served.channel, method, bearer(ANN)), Unauthenticated)


def test_the_methods_are_those_that_the_server_has(served: Running) -> None:
    stub = cast("Any", reflection_pb2_grpc).ServerReflectionStub(served.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=WAIT, metadata=bearer(ANN))
    services = {service.name for service in answer.list_services_response.service}
    assert services == {method.split("/")[1] for method in METHODS} | {"grpc.health.v1.Health"}
    assert len(METHODS) == 9


def test_a_call_is_refused_before_its_request_has_come(served: Running) -> None:
    requests = Requests()
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.ConvolveStream(requests, timeout=WAIT))
    assert status_of(caught.value).code == grpc.StatusCode.UNAUTHENTICATED.value[0]
    requests.end()


def test_health_is_open(served: Running) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)
    status = cast("Any", stub).Check(health_pb2.HealthCheckRequest(), timeout=WAIT).status
    assert status == health_pb2.HealthCheckResponse.SERVING


def test_the_sdk_carries_its_token(served: Running) -> None:
    target = f"127.0.0.1:{served.server.port}"
    with convservice.connect(target, token=ANN, timeout=WAIT) as client:
        assert client.run(pointwise(scale=3), X[0])[0, 0, 0] == 3.0
    with convservice.connect(target, timeout=WAIT) as client, pytest.raises(Unauthenticated) as caught:
        client.info()
    assert caught.value.reason == Reason.TOKEN_REQUIRED


def test_two_names_cannot_see_each_other(served: Running) -> None:
    network = pointwise(scale=2)
    stub = served.stub
    stub.Convolve(unary(network, X), timeout=WAIT, metadata=bearer(ANN))

    def names(token: str) -> list[str]:
        return list(stub.ListNetworks(pb.ListNetworksRequest(), timeout=WAIT, metadata=bearer(token)).names)

    assert names(ANN) == names(ANN_NEXT) == [network.name]
    assert names(BOB) == []
    for call in (
        lambda: stub.Convolve(unary(network, X, inline=False), timeout=WAIT, metadata=bearer(BOB)),
        lambda: stub.GetNetwork(pb.GetNetworkRequest(name=network.name), timeout=WAIT, metadata=bearer(BOB)),
        lambda: stub.DeleteNetwork(
            pb.DeleteNetworkRequest(name=network.name), timeout=WAIT, metadata=bearer(BOB)
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert isinstance(error_of(caught.value), convservice.NetworkNotFound)
    responses = stub.ConvolveStream(tensor_messages(network.name, X), timeout=WAIT, metadata=bearer(BOB))
    assert isinstance(collect(responses)[0].error, convservice.NetworkNotFound)
    assert names(ANN) == [network.name]


def test_weights_put_by_one_are_not_there_for_another(served: Running) -> None:
    tensor = weight(7.0)
    served.stub.PutWeights(put_messages(tensor), timeout=WAIT, metadata=bearer(ANN))
    store = served.server.service.store
    assert store.renew("ann", tensor)
    assert not store.renew("bob", tensor)


def test_tokens_are_rotated_while_the_server_runs(served: Running, path: Path) -> None:
    def info(token: str) -> pb.GetServerInfoResponse:
        return served.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT, metadata=bearer(token))

    info(BOB)
    write(path, f"ann {ANN_NEXT}", f"carl {STRANGER}")
    info(STRANGER)
    info(ANN_NEXT)
    for token in (ANN, BOB):
        with pytest.raises(grpc.RpcError) as caught:
            info(token)
        assert error_of(caught.value).reason == Reason.TOKEN_UNKNOWN


def test_a_removed_token_opens_no_further_tensor_in_a_running_stream(served: Running, path: Path) -> None:
    network = pointwise(scale=2)
    served.stub.Convolve(unary(network, X), timeout=WAIT, metadata=bearer(BOB))
    first, *rest = tensor_messages(network.name, X, 1)
    requests = Requests([first])
    responses = iter(served.stub.ConvolveStream(requests, timeout=WAIT, metadata=bearer(BOB)))
    seen = [next(responses)]
    assert seen[0].WhichOneof("message") == "header"
    write(path, f"ann {ANN}")
    requests.send(*rest, *tensor_messages(network.name, X, 2))
    requests.end()
    results = collect([*seen, *responses])
    assert results[1].done is not None, "what runs is finished"
    assert results[1].floats == [2.0] * 4
    assert isinstance(results[2].error, Unauthenticated)
    assert results[2].error.reason == Reason.TOKEN_UNKNOWN
    served.settle()


def test_no_token_is_in_the_logs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(token_file=str(path)) as served:
        served.stub.Convolve(unary(pointwise(), X), timeout=WAIT, metadata=bearer(ANN))
        with pytest.raises(grpc.RpcError):
            served.stub.Convolve(unary(pointwise(), X), timeout=WAIT, metadata=bearer(STRANGER))
    text = "\n".join(json.dumps(record.__dict__, default=str) for record in caplog.records)
    assert "UNAUTHENTICATED" in text
    assert "TOKEN_UNKNOWN" in text
    assert ANN not in text
    assert STRANGER not in text


# How open it is, and settings that would open it by mistake.


@pytest.mark.parametrize(
    ("listen", "settings", "levels"),
    [
        ("127.0.0.1:0", {}, []),
        ("localhost:0", {}, []),
        ("[::1]:0", {}, []),
        ("0.0.0.0:0", {}, ["without TLS", "to everybody"]),
        ("[::]:0", {}, ["without TLS", "to everybody"]),
        ("a.host.example:1", {}, ["without TLS", "to everybody"]),
        ("0.0.0.0:0", {"token_file": "t"}, ["without TLS", "tokens come in plaintext"]),
        ("0.0.0.0:0", {"tls_certificate": "c", "tls_key": "k"}, ["to everybody"]),
        ("0.0.0.0:0", {"tls_certificate": "c", "tls_key": "k", "token_file": "t"}, []),
        ("0.0.0.0:0", {"tls_certificate": "c", "tls_key": "k", "tls_client_ca": "a"}, []),
    ],
)
def test_what_is_open_to_the_network_is_said(
    listen: str, settings: dict[str, str], levels: list[str]
) -> None:
    found = exposures(ServerConfig(listen=listen, **settings))  # type: ignore[arg-type] # texts all
    assert len(found) == len(levels)
    for (level, text), expected in zip(found, levels, strict=True):
        assert expected in text
        assert level == (logging.ERROR if "tokens" in expected else logging.WARNING)


def test_a_server_that_starts_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with running(listen="0.0.0.0:0"):
        pass
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("is open to the network at 0.0.0.0:0" in text for text in warnings) == 2


@pytest.mark.parametrize("name", ["token_file", "tls_certificate", "listen", "max_streams"])
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_value_is_refused_wherever_it_stands(name: str, empty: str, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'{name} = "{empty}"\n')
    variable = f"CONVSERVICE_{name.upper()}"
    flag = "--" + name.replace("_", "-")
    for flags, environment, path, source in (
        ({name: empty}, {}, None, flag),
        ({}, {variable: empty}, None, variable),
        ({}, {}, str(file), str(file)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            gather(flags, environment, path)
        assert caught.value.message == f"{source}: {name} is empty; leave it out for its default"
    with pytest.raises(InvalidRequest, match="CONVSERVICE_CONFIG: config is empty"):
        gather({}, {"CONVSERVICE_CONFIG": empty})


def test_a_token_file_that_cannot_be_used_is_refused_with_its_source(path: Path) -> None:
    path.write_text("# nobody yet\n")
    with pytest.raises(InvalidRequest) as caught:
        gather({}, {"CONVSERVICE_TOKEN_FILE": str(path)})
    assert caught.value.message.startswith(f"CONVSERVICE_TOKEN_FILE: token_file {path}: it holds 0 tokens")


def test_what_is_printed_names_the_file_and_no_token(path: Path) -> None:
    printed = gather({"token_file": str(path)}, {}).as_toml()
    assert f'token_file = "{path}"  # --token-file\n' in printed
    assert ANN not in printed
    assert "# tls_key is not set  # default\n" in printed
