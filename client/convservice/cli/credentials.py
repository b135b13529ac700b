"""Options that say how a command shows who it is, and how it knows the server that it talks to.

Given a command's arguments this hands on what `connect` takes as `tls` and `token`. A token is read from a
file and never from the command line, which every process of the machine may read.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TypedDict

from convservice.cli.outcome import CommandFailed, Exit
from convservice.endpoint import Tls

TOKEN_VARIABLE = "CONVSERVICE_CLIENT_TOKEN_FILE"  # noqa: S105 - a variable's name
"""Environment: the file with the token, where no option names one."""


class Credentials(TypedDict):
    """What `connect` is given."""

    tls: Tls
    token: str | None


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Adds `--tls`, `--ca`, `--certificate`, `--key` and `--token-file`."""
    group = parser.add_argument_group("how to reach the server at --target; any of the first four means TLS")
    group.add_argument("--tls", action="store_true", help="know the server by the system's authorities")
    group.add_argument("--ca", metavar="FILE", help="know it by these authorities alone (PEM)")
    group.add_argument("--certificate", metavar="FILE", help="a certificate to show, with its chain (PEM)")
    group.add_argument("--key", metavar="FILE", help="the certificate's private key (PEM)")
    group.add_argument(
        "--token-file", metavar="FILE", help=f"holds the token to carry (default: {TOKEN_VARIABLE}, if set)"
    )


def credentials(arguments: argparse.Namespace) -> Credentials:
    """What the options say.

    Raises:
        CommandFailed: a certificate without its key, or a token's file that holds no single word.
    """
    return Credentials(tls=_tls(arguments), token=_token(arguments.token_file))


def given(arguments: argparse.Namespace) -> list[str]:
    """The options of `add_credentials` that were given, as they stand on the command line."""
    names = ("tls", "ca", "certificate", "key", "token_file")
    return ["--" + name.replace("_", "-") for name in names if getattr(arguments, name)]


def _tls(arguments: argparse.Namespace) -> Tls:
    if (arguments.certificate is None) != (arguments.key is None):
        raise CommandFailed("--certificate and --key go together", Exit.USAGE)
    if arguments.certificate is not None:
        return (arguments.ca, arguments.certificate, arguments.key)
    return arguments.ca if arguments.ca is not None else arguments.tls or None


def _token(option: str | None) -> str | None:
    path = os.environ.get(TOKEN_VARIABLE) if option is None else option
    if path is None:
        return None
    source = TOKEN_VARIABLE if option is None else "--token-file"
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        why = getattr(exc, "strerror", None) or "it is no text"
        raise CommandFailed(f"{source}: cannot read {path!r}: {why}", Exit.USAGE) from exc
    if len(words) != 1:
        raise CommandFailed(
            f"{source}: {path} holds {len(words)} words; it must hold a token alone", Exit.USAGE
        )
    return words[0]
