"""Targets, credentials, retries, and every status code as an error of the service."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2

import convservice
from convservice import (
    BackendUnavailable,
    Cancelled,
    ConvClient,
    ConvServiceError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NetworkNotFound,
    PermissionDenied,
    ResourceExhausted,
    ServiceUnavailable,
    Unauthenticated,
)
from convservice.addresses import Address
from convservice.channel import Connection
from convservice.endpoint import Endpoint, is_local
from convservice.errors import Reason, to_status
from convservice.rpc_errors import error_of
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import add_ConvServiceServicer_to_server
from tests.client.fake import FakeServer, FakeService, Refused, hang, relu

CLASSES = {
    grpc.StatusCode.CANCELLED: ServiceUnavailable,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NetworkNotFound,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequest,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: BackendUnavailable,
    grpc.StatusCode.ABORTED: InternalError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InternalError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAVAILABLE: ServiceUnavailable,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_code_is_an_error_of_the_service(code: grpc.StatusCode) -> None:
    error = error_of(Refused(code, "why"), "host:1", "Convolve")
    assert type(error) is CLASSES[code]
    assert "why" in error.message
    assert (error.target, error.method) == ("host:1", "Convolve")


@pytest.mark.parametrize(
    ("code", "reason", "message"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.UNREACHABLE, "the server at host:1 cannot be reached.*: why"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE, r"not done within .* time limit of 2\.5 s: why"),
        (grpc.StatusCode.CANCELLED, Reason.UNREACHABLE, "the server at host:1 ended the call.*: why"),
    ],
)
def test_an_error_of_grpcs_own_has_a_reason(code: grpc.StatusCode, reason: Reason, message: str) -> None:
    error = error_of(Refused(code, "why"), "host:1", "Convolve", 2.5)
    assert error.reason == reason
    assert re.fullmatch(message, error.message)


def test_a_call_is_cancelled_only_by_its_own_side() -> None:
    given_up = error_of(Refused(grpc.StatusCode.CANCELLED, "why"), "host:1", "Convolve", cancelled_here=True)
    assert (type(given_up), given_up.reason, given_up.message) == (Cancelled, Reason.CANCELLED, "why")
    status = to_status(Cancelled("you gave up", reason=Reason.CANCELLED)).SerializeToString()
    refused = Refused(grpc.StatusCode.CANCELLED, "you gave up", (("grpc-status-details-bin", status),))
    assert type(error_of(refused, "host:1", "Convolve")) is ServiceUnavailable


def test_a_deadline_names_the_limit_where_it_is_known() -> None:
    refused = Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "why")
    known = error_of(refused, "host:1", "Convolve", 0.9999998)
    assert known.message == "not done within the call's time limit of 1 s: why"
    assert known.metadata == {"timeout_s": "1"}
    unknown = error_of(refused, "host:1", "Convolve")
    assert unknown.message == "not done within the call's time limit: why"
    assert unknown.metadata == {}


@pytest.mark.parametrize("trailing", [None, (), (("grpc-status-details-bin", b"\xff\xff"),)])
def test_details_that_cannot_be_read_leave_the_status(trailing: Any) -> None:
    error = error_of(Refused(grpc.StatusCode.INTERNAL, "why", trailing), "host:1", "Convolve")
    assert (type(error), error.message, error.reason) == (InternalError, "why", "INTERNAL")


def test_details_that_contradict_the_status_do_not_count() -> None:
    status = status_pb2.Status(code=5, message="lost")
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    error = error_of(Refused(grpc.StatusCode.UNAVAILABLE, "gone", trailing), "host:1", "Convolve")
    assert type(error) is ServiceUnavailable


def test_details_come_through_the_channel(fake: FakeService, client: ConvClient) -> None:
    sent = ResourceExhausted(
        "no room: 5 of 4", reason=Reason.MEMORY_BUDGET, metadata={"bytes": "5"}, retry_after=2.5
    )
    fake.fail("GetServerInfo", sent)
    with pytest.raises(ResourceExhausted, match="no room: 5 of 4") as caught:
        client.info()
    error = caught.value
    assert (error.reason, error.metadata, error.retry_after) == ("MEMORY_BUDGET", {"bytes": "5"}, 2.5)
    assert (error.target, error.method) == (client.target, "GetServerInfo")
    assert error.request_id
    sent.request_id = error.request_id
    assert to_status(error) == to_status(sent)


def test_a_server_that_is_not_there_is_unavailable_after_retries() -> None:
    with (
        convservice.connect("127.0.0.1:1") as client,
        pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1") as c,
    ):
        client.info()
    assert isinstance(c.value, ConnectionError)
    assert c.value.reason == Reason.UNREACHABLE


def test_another_service_is_named(fake_server: FakeServer) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            convservice.connect(f"127.0.0.1:{port}") as client,
            pytest.raises(InternalError, match="does not serve"),
        ):
            client.info()
    finally:
        server.stop(None).wait()


def test_unary_calls_are_retried_when_the_server_is_unavailable(
    fake: FakeService, client: ConvClient
) -> None:
    fake.fail("Convolve", ServiceUnavailable("busy"), Cancelled("stopping"))
    x = np.full((1, 1, 128 * 1023), -1, "float32")  # the largest request: more than gRPC's own retry buffer
    assert not client.run(relu(), x).any()
    assert fake.count("Convolve") == 3


def test_deleting_is_not_retried(fake: FakeService, client: ConvClient) -> None:
    fake.fail("DeleteNetwork", ServiceUnavailable("busy"))
    with pytest.raises(ServiceUnavailable):
        client.unregister(relu())
    assert fake.count("DeleteNetwork") == 1


def test_a_deadline_that_passes(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(hang)
    with pytest.raises(DeadlineExceeded, match=r"within the call's time limit of 0\.2 s: .") as caught:
        list(client.stream(relu(), iter([]), shape=(1, None, 3), dtype="float32", timeout=0.2))
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.reason == Reason.DEADLINE


@pytest.mark.parametrize("timeout", [4e8, 9e9, 1e19, 10**30])
def test_a_timeout_of_many_years_is_none(client: ConvClient, timeout: float) -> None:
    x = np.ones((1, 1, 3), np.float32)
    assert np.array_equal(client.run(relu(), x, timeout=timeout), x)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_timeout_is_seconds_above_zero(timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout must be seconds above 0"):
        convservice.connect("localhost:1", timeout=timeout)


@pytest.mark.parametrize("target", ["", "localhost", "localhost:", "a b:1", None, 50051])
def test_a_target_is_host_and_port(target: Any) -> None:
    with pytest.raises(InvalidRequest, match="target must be 'HOST:PORT'"):
        convservice.connect(target)


def test_a_token_travels_with_every_call(fake_server: FakeServer) -> None:
    with convservice.connect(fake_server.target, token="s3cret") as client:
        client.info()
        list(client.map(relu(), [np.ones((1, 2, 2), "float32")]))
    assert {found.get("authorization") for found in fake_server.service.metadata} == {"Bearer s3cret"}
    assert "s3cret" not in repr(client)


def test_a_token_never_travels_in_plaintext_to_another_machine() -> None:
    with pytest.raises(InvalidRequest, match=r"plaintext to example\.org:443"):
        convservice.connect("example.org:443", token="s3cret")
    convservice.connect("example.org:443", token="s3cret", tls=True).close()


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("unix:/run/x.sock", True),
        ("dns:///localhost:1", True),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
        ("localhost.example.org:1", False),
        ("dns:///example.org:1", False),
    ],
)
def test_what_is_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


@pytest.mark.parametrize("tls", ["/no/such/file.pem", (None, "/no/cert", "/no/key"), (b"ca", b"cert")])
def test_certificates_must_be_readable(tls: Any) -> None:
    with pytest.raises(InvalidRequest, match="tls"):
        convservice.connect("localhost:1", tls=tls)


def test_tls_with_a_given_authority(tmp_path: Path) -> None:
    program = which("openssl")
    if program is None:
        pytest.skip("no openssl program to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = grpc.server(ThreadPoolExecutor(2))
    fake = FakeService()
    add_ConvServiceServicer_to_server(fake, server)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        for authority in (certificate, certificate.read_bytes()):
            with convservice.connect(f"localhost:{port}", tls=authority, token="s3cret") as client:
                assert client.info().version == "1.2"
    finally:
        server.stop(None).wait()


def test_closing_the_client_ends_what_runs(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(hang)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.run, relu(), np.zeros((3, 400, 500), "float32"))
        assert fake.streaming.wait(30)
        client.close()
        with pytest.raises(Cancelled):
            running.result(30)
    assert fake.streams == 1


def test_a_closed_client_says_so(client: ConvClient) -> None:
    client.close()
    client.close()
    with pytest.raises(ConvServiceError, match="the client is closed"):
        client.info()


class ClosedMeanwhile(Connection):
    """A connection that another thread closes just when a call has its stub."""

    def stub(self) -> Any:
        stub = super().stub()
        self.close()
        return stub


def test_a_client_that_is_closed_as_a_call_begins_says_so() -> None:
    def connection() -> Connection:
        return ClosedMeanwhile(Endpoint.of("localhost:1"), Address("localhost:1"))

    with pytest.raises(InvalidRequest, match="the client is closed"):
        connection().unary("GetServerInfo", pb.GetServerInfoRequest(), 1.0)
    with pytest.raises(InvalidRequest, match="the client is closed"):
        connection().stream(iter(()), 1.0)
