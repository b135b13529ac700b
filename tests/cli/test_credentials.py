"""How commands show who they are: certificates and tokens from files, never from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from convservice.cli.credentials import TOKEN_VARIABLE
from convservice.cli.main import COMMANDS
from convservice_server.server import Server
from tests.cli.conftest import Cli
from tests.server.support import running

TOKEN = "ann-0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An authority, certificates of a server and of a client, and a client's token."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("server", "client"):
        made = ca.issue_cert("127.0.0.1", common_name=name)
        made.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        made.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "tokens").write_text(f"ann {TOKEN}\n")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """A server that asks for certificates and tokens."""
    with running(
        tls_certificate=str(folder / "server.pem"),
        tls_key=str(folder / "server.key"),
        tls_client_ca=str(folder / "ca.pem"),
        token_file=str(folder / "tokens"),
    ) as served:
        yield served.server


def test_every_command_that_takes_a_target_takes_credentials() -> None:
    with_target: set[str] = set()
    for command in COMMANDS:
        one = argparse.ArgumentParser()
        command.add_arguments(one)
        words = set(one.format_help().split())
        if "--target" in words:
            with_target.add(command.name)
            assert {"--tls", "--ca", "--certificate", "--key", "--token-file"} <= words, command.name
            assert "--token" not in words, "every process can read a command line"
    assert {"health", "info", "example", "explain", "filter", "bench", "warm"} <= with_target


def test_commands_show_certificate_and_token(cli: Cli, folder: Path, server: Server) -> None:
    target = ("--target", f"127.0.0.1:{server.port}", "--ca", folder / "ca.pem")
    certificate = ("--certificate", folder / "client.pem", "--key", folder / "client.key")
    assert cli("info", *target, *certificate, "--token-file", folder / "token", "--json").status == 0
    health = cli("health", *target, *certificate)
    assert (health.status, "SERVING" in health.out) == (0, True), "health asks for no token"
    refused = cli("info", *target, *certificate)
    assert refused.status == 1
    assert "this server asks for a token" in refused.err
    assert cli("info", *target, "--token-file", folder / "token").status == 3, "it asks for a certificate"
    assert cli("health", *target).status == 1
    assert cli("health", "--target", f"127.0.0.1:{server.port}", "--tls").status == 1


def test_the_environment_may_name_the_file_of_the_token(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, str(folder / "token"))
    with running(token_file=str(folder / "tokens")) as served:
        target = ("--target", f"127.0.0.1:{served.server.port}")
        assert cli("info", *target).status == 0
        (folder / "wrong").write_text("who-0123456789abcdef")
        wrong = cli("info", *target, "--token-file", folder / "wrong")
    assert wrong.status == 1
    assert "does not know this token" in wrong.err
    assert "who-0123456789abcdef" not in wrong.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--certificate", "{}/client.pem"), "--certificate and --key go together"),
        (("--key", "{}/client.key"), "--certificate and --key go together"),
        (("--ca", "{}/none.pem"), "none.pem"),
        (("--token-file", "{}/none"), "--token-file: cannot read '{}/none': No such file or directory"),
        (("--token-file", "{}/tokens"), "tokens holds 2 words; it must hold a token alone"),
    ],
)
@pytest.mark.parametrize("command", ["info", "health"])
def test_what_cannot_be_used_is_refused(
    cli: Cli, folder: Path, command: str, options: tuple[str, ...], message: str
) -> None:
    ended = cli(command, "--target", "127.0.0.1:1", *(option.format(folder) for option in options))
    assert ended.status == 2
    assert message.format(folder) in ended.err


def test_a_token_does_not_travel_in_plaintext_to_another_machine(cli: Cli, folder: Path) -> None:
    ended = cli("info", "--target", "192.0.2.1:1", "--token-file", folder / "token")
    assert ended.status == 2
    assert "a token would travel in plaintext to 192.0.2.1:1" in ended.err


def test_an_empty_variable_is_no_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    ended = cli("info", "--target", "127.0.0.1:1")
    assert ended.status == 2
    assert TOKEN_VARIABLE in ended.err


def test_credentials_need_a_target(cli: Cli) -> None:
    ended = cli("example", "--tls")
    assert ended.status == 2
    assert "--tls says how to reach a server: it needs --target HOST:PORT" in ended.err
