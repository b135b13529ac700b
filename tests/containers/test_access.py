"""TLS, tokens and mutual TLS as the compose overrides switch them on, with secrets as Compose mounts them."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

import convservice
from convservice import NetworkNotFound, ServiceUnavailable, Unauthenticated
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT
from tests.containers.engine import Project, Running, told

ANN, BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
USER = 65532


@dataclass(frozen=True)
class Secrets:
    """A folder of secrets as the compose overrides take it, and an authority that has signed what is in it.

    Attributes:
        folder: it; only the container's user and root may read what is in it.
    """

    folder: Path

    @property
    def ca(self) -> str:
        """The authority's certificate."""
        return str(self.folder / "ca.pem")

    def write(self, name: str, text: bytes) -> str:
        """The path of a new file, or of an old one that holds something else now."""
        path = self.folder / name
        path.write_bytes(text)
        path.chmod(0o400)
        os.chown(path, USER, USER)
        return str(path)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    found = Secrets(tmp_path_factory.mktemp("secrets"))
    authority = trustme.CA()
    found.write("ca.pem", authority.cert_pem.bytes())
    for name, identity in (("server", "127.0.0.1"), ("ann", "ann.example.org"), ("bob", "bob.example.org")):
        made = authority.issue_cert(identity, common_name=name)
        found.write(f"{name}.pem", b"".join(pem.bytes() for pem in made.cert_chain_pems))
        found.write(f"{name}.key", made.private_key_pem.bytes())
    found.write("tokens", f"ann {ANN}\n".encode())
    return found


@contextmanager
def up(override: str, secrets: Secrets, image: str, base_image: str) -> Generator[Running]:
    """The service with an override, once the engine finds it healthy."""
    environment = told(image, base_image, CONVSERVICE_SECRETS=str(secrets.folder))
    with Project(["docker-compose.yml", override], environment=environment) as project:
        project("up", "-d")
        (unit,) = project.containers("convservice")
        unit.wait_until_healthy()
        yield unit


def works(client: convservice.ConvClient) -> bool:
    """Whether a client may call, and gets the right answer."""
    return bool(np.array_equal(client.conv2d(INPUT, WEIGHT), FEATURE_MAP))


def test_tls_and_tokens(secrets: Secrets, image: str, base_image: str) -> None:
    with up("docker-compose.secure.yml", secrets, image, base_image) as unit:
        target = unit.published()

        def client(token: str | None = ANN, tls: Any = secrets.ca) -> convservice.ConvClient:
            return convservice.connect(target, tls=tls, token=token, timeout=60)

        with client() as ann:
            assert works(ann)
        with client(None) as nobody, pytest.raises(Unauthenticated) as caught:
            nobody.conv2d(INPUT, WEIGHT)
        assert caught.value.reason == "TOKEN_REQUIRED"
        with client(BOB) as bob, pytest.raises(Unauthenticated) as caught:
            bob.conv2d(INPUT, WEIGHT)
        assert caught.value.reason == "TOKEN_UNKNOWN"
        with client(None, tls=None) as plain, pytest.raises(ServiceUnavailable):
            plain.info()
        assert BOB not in "".join(unit.logs())
        assert ANN not in "".join(unit.logs())


def test_a_token_is_added_while_it_runs(secrets: Secrets, image: str, base_image: str) -> None:
    with up("docker-compose.secure.yml", secrets, image, base_image) as unit:
        secrets.write("tokens", f"ann {ANN}\nbob {BOB}\n".encode())
        with convservice.connect(unit.published(), tls=secrets.ca, token=BOB, timeout=60) as bob:
            assert eventually_works(bob)


def eventually_works(client: convservice.ConvClient) -> bool:
    """Calls until it is let in: the file is looked at once a second, so some calls are refused before."""
    for _ in range(100_000):
        try:
            return works(client)
        except Unauthenticated:
            continue
    return False


def test_mutual_tls(secrets: Secrets, image: str, base_image: str) -> None:
    with up("docker-compose.mtls.yml", secrets, image, base_image) as unit:

        def client(name: str) -> convservice.ConvClient:
            shown = (secrets.ca, str(secrets.folder / f"{name}.pem"), str(secrets.folder / f"{name}.key"))
            return convservice.connect(unit.published(), tls=shown, timeout=60)

        with client("ann") as ann, client("bob") as bob:
            assert works(ann)
            network = ann.register(convservice.Conv(WEIGHT[None, None]))
            assert ann.networks() == (network.name,)
            with pytest.raises(NetworkNotFound):  # it is ann's
                bob.network(network.name)
        without = convservice.connect(unit.published(), tls=secrets.ca, timeout=60)
        with without as nobody, pytest.raises(ServiceUnavailable):
            nobody.info()
