"""A server for the commands, and a way to run them in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from convservice.cli.embedded import EmbeddedServer
from convservice.cli.main import main
from convservice_backends.interface import Backend


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status.
        out: what it printed.
        err: what it printed on the error stream.
    """

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, read as one JSON object; NaN and infinities are none of JSON."""

        def refuse(name: str) -> None:
            pytest.fail(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


Cli = Callable[..., Ended]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process: `cli("info", "--json")`."""

    def run(*arguments: object) -> Ended:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else -1
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def target(backend: Backend) -> Iterator[str]:
    """A server started as commands start one, on each backend in turn."""
    with EmbeddedServer(["--backend", backend.name]) as server:
        yield server.target
