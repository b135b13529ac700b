"""TLS: certificates that fit, that clients must show, and that are replaced while the server runs."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

import convservice
from convservice.errors import InvalidRequest, NetworkNotFound, Reason, ServiceUnavailable, Unauthenticated
from convservice_server.config import ServerConfig
from convservice_server.server import Server
from convservice_server.settings import gather
from convservice_server.tls import Certificates
from tests.server.support import WAIT, Running, pointwise, running

X = np.ones((1, 2, 2), np.float32)
README = Path(__file__).parents[2] / "README.md"
TOKEN = "ann-0123456789abcdef"


class Authority:
    """An authority of the test's own, and the files of certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self._ca = trustme.CA()
        self.ca = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *identities: str, common_name: str | None = None) -> tuple[str, str]:
        """The paths of a new certificate and its key, in place of those of that name."""
        made = self._ca.issue_cert(*identities, common_name=common_name)
        chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(chain)
        key.write_bytes(made.private_key_pem.bytes())
        return str(certificate), str(key)

    def settings(self, *, clients: bool = False) -> dict[str, Any]:
        """A server's settings with a certificate for this machine."""
        certificate, key = self.issue("server", "localhost", "127.0.0.1")
        return {"tls_certificate": certificate, "tls_key": key} | (
            {"tls_client_ca": self.ca} if clients else {}
        )

    def client(self, served: Running, name: str = "", **options: Any) -> convservice.ConvClient:
        """A client that trusts this authority, and shows the certificate of that name if there is one."""
        shown = (self.folder / f"{name}.pem", self.folder / f"{name}.key")
        tls = (self.ca, *shown) if name else self.ca
        return convservice.connect(f"127.0.0.1:{served.server.port}", tls=tls, timeout=WAIT, **options)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other")


@pytest.fixture
def mutual(authority: Authority) -> Iterator[Running]:
    """A server that asks clients for certificates of its own authority."""
    with running(**authority.settings(clients=True)) as served:
        yield served


def shown_serial(port: int) -> str:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=WAIT) as plain,
        context.wrap_socket(plain) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
        assert shown is not None
        return serial_of(ssl.DER_cert_to_PEM_cert(shown))


def serial_of(pem: str) -> str:
    """What tells a certificate from others."""
    return pem.split("-----BEGIN CERTIFICATE-----")[1].split("-----END", maxsplit=1)[0].strip()


# One side shows a certificate.


def test_a_client_that_trusts_the_authority_is_served(authority: Authority) -> None:
    with running(**authority.settings()) as served, authority.client(served) as client:
        assert client.run(pointwise(scale=3), X)[0, 0, 0] == 3.0


def test_nobody_else_is_served(authority: Authority, other: Authority) -> None:
    with running(**authority.settings()) as served:
        target = f"127.0.0.1:{served.server.port}"
        for tls in (None, other.ca):
            with convservice.connect(target, tls=tls, timeout=WAIT) as client:
                with pytest.raises(ServiceUnavailable) as caught:
                    client.info()
                assert caught.value.reason == Reason.UNREACHABLE


def test_a_token_goes_with_tls(authority: Authority, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann {TOKEN}\n")
    with running(token_file=str(tokens), **authority.settings()) as served:
        with authority.client(served, token=TOKEN) as client:
            assert client.networks() == ()
        with authority.client(served) as client, pytest.raises(Unauthenticated):
            client.networks()


# Both sides show one.


def test_a_client_goes_by_the_name_in_its_certificate(authority: Authority, mutual: Running) -> None:
    authority.issue("ann", "ann@example.org", common_name="ann")
    authority.issue("bob", "bob.example.org")
    network = pointwise(scale=2)
    with authority.client(mutual, "ann") as ann, authority.client(mutual, "bob") as bob:
        name = ann.register(network).name
        assert ann.networks() == (name,)
        assert bob.networks() == ()
        with pytest.raises(NetworkNotFound):
            bob.network(name)
    assert mutual.server.service.store.names("ann", "", 10) == [name]
    authority.issue("ann-too", "elsewhere", common_name="ann")
    with authority.client(mutual, "ann-too") as client:
        assert client.networks() == (name,), "the name counts, not the key"


def test_a_client_without_a_certificate_of_that_authority_is_not_served(
    authority: Authority, other: Authority, mutual: Running
) -> None:
    shown = other.issue("mallory", "mallory", common_name="ann")
    target = f"127.0.0.1:{mutual.server.port}"
    for tls in (authority.ca, (authority.ca, *shown)):
        with convservice.connect(target, tls=tls, timeout=WAIT) as client, pytest.raises(ServiceUnavailable):
            client.info()


def test_with_a_token_file_both_are_asked_for_and_the_token_names(
    authority: Authority, tmp_path: Path
) -> None:
    authority.issue("bob", "bob", common_name="bob")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann {TOKEN}\n")
    with running(token_file=str(tokens), **authority.settings(clients=True)) as served:
        with authority.client(served, "bob", token=TOKEN) as client:
            name = client.register(pointwise()).name
        assert served.server.service.store.names("ann", "", 10) == [name]
        with authority.client(served, "bob") as client, pytest.raises(Unauthenticated):
            client.info()
        with authority.client(served, token=TOKEN) as client, pytest.raises(ServiceUnavailable):
            client.info()


# Replaced while the server runs.


def test_new_connections_see_a_replaced_certificate_and_old_ones_go_on(authority: Authority) -> None:
    settings = authority.settings()
    with running(**settings) as served, authority.client(served) as before:
        before.info()
        old = serial_of(Path(settings["tls_certificate"]).read_text())
        assert shown_serial(served.server.port) == old
        authority.settings()
        new = serial_of(Path(settings["tls_certificate"]).read_text())
        assert new != old
        assert shown_serial(served.server.port) == new
        before.info()
        with authority.client(served) as after:
            after.info()


def test_a_broken_replacement_leaves_the_certificate_and_is_logged_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    settings = authority.settings()
    certificate, key = Path(settings["tls_certificate"]), Path(settings["tls_key"])
    with running(**settings) as served:
        old = shown_serial(served.server.port)
        whole = certificate.read_bytes()
        certificate.write_bytes(whole[: len(whole) // 2])
        assert [shown_serial(served.server.port) for _ in range(3)] == [old] * 3
        (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
        assert f"tls_certificate {certificate}: it holds no certificate" in record.getMessage()
        caplog.clear()
        authority.issue("next", "localhost")
        shutil.copy(authority.folder / "next.pem", certificate)
        assert [shown_serial(served.server.port) for _ in range(2)] == [old] * 2, "its key is to come"
        (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
        assert f"it is not the key of tls_certificate {certificate}" in record.getMessage()
        shutil.copy(authority.folder / "next.key", key)
        assert shown_serial(served.server.port) == serial_of(certificate.read_text())


def test_another_authority_of_clients_holds_for_new_connections(
    authority: Authority, other: Authority, mutual: Running
) -> None:
    authority.issue("ann", "ann", common_name="ann")
    shown = other.issue("bob", "bob", common_name="bob")
    with authority.client(mutual, "ann") as client:
        client.info()
        trusted = Path(authority.ca).read_bytes()
        shutil.copy(other.ca, authority.ca)
        ours = authority.folder / "ours.pem"
        ours.write_bytes(trusted)
        target = f"127.0.0.1:{mutual.server.port}"
        with convservice.connect(target, tls=(ours, *shown), timeout=WAIT) as bob:
            bob.register(pointwise())
        ann = (ours, authority.folder / "ann.pem", authority.folder / "ann.key")
        with convservice.connect(target, tls=ann, timeout=WAIT) as late, pytest.raises(ServiceUnavailable):
            late.info()


# What is refused at the start.


def test_files_that_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("one", "localhost")
    _, other_key = authority.issue("two", "localhost")
    text = tmp_path / "text"
    text.write_text("no PEM at all\n")
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        load_pem_private_key(Path(key).read_bytes(), None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        )
    )
    missing = str(tmp_path / "missing")
    for files, message in {
        (certificate, other_key): f"tls_key {other_key}: it is not the key of tls_certificate {certificate}",
        (certificate, str(text)): f"tls_key {text}: it holds no private key in PEM form",
        (certificate, str(locked)): f"tls_key {locked}: it is encrypted",
        (str(text), key): f"tls_certificate {text}: it holds no certificate in PEM form",
        (key, key): f"tls_certificate {key}: it holds no certificate in PEM form",
        (certificate, key, str(text)): f"tls_client_ca {text}: it holds no certificate in PEM form",
        (missing, key): f"tls_certificate {missing}: it cannot be read: No such file or directory",
        (certificate, missing): f"tls_key {missing}: it cannot be read: No such file or directory",
        (certificate, key, str(tmp_path)): f"tls_client_ca {tmp_path}: it",
    }.items():
        with pytest.raises(InvalidRequest) as caught:
            Certificates(*files)
        assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tls_certificate"], "tls_certificate must be given together with tls_key"),
        (["tls_key"], "tls_key must be given together with tls_certificate"),
        (["tls_client_ca"], "tls_client_ca must be given together with tls_certificate"),
        (["tls_key", "tls_client_ca"], "tls_key must be given together with tls_certificate"),
    ],
)
def test_settings_that_go_together(given: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        gather({}, {f"CONVSERVICE_{name.upper()}": "a file" for name in given})
    assert caught.value.message == f"CONVSERVICE_{given[0].upper()}: {message}"


def test_a_refusal_at_the_start_says_where_the_setting_came_from(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'tls_certificate = "{tmp_path}/none.pem"\n')
    with pytest.raises(InvalidRequest) as caught:
        gather({"tls_key": "key.pem"}, {}, str(file))
    assert caught.value.message.startswith(f"{file}: tls_certificate {tmp_path}/none.pem: it cannot be read")


def test_a_server_is_not_made_of_files_that_do_not_fit(authority: Authority) -> None:
    certificate, _ = authority.issue("one", "localhost")
    _, key = authority.issue("two", "localhost")
    with pytest.raises(InvalidRequest, match="it is not the key of"):
        Server(ServerConfig(listen="127.0.0.1:0", tls_certificate=certificate, tls_key=key))


def test_the_readmes_commands_make_files_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    commands = re.search(r"```\n(openssl req -x509.*?)\n\n", README.read_text(), flags=re.DOTALL)
    assert commands is not None
    subprocess.run(["bash", "-e", "-c", commands[1]], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    token = Path("pipeline.token").read_text().strip()
    settings = {"tls_certificate": "server.pem", "tls_key": "server.key", "token_file": "tokens"}
    with running(**settings) as served:
        target = f"127.0.0.1:{served.server.port}"
        with convservice.connect(target, tls="ca.pem", token=token, timeout=WAIT) as client:
            name = client.register(pointwise()).name
        assert served.server.service.store.names("pipeline", "", 10) == [name]
