"""Who may call.

Given a file of tokens, and whether clients show certificates, `Access` says for each call by which name its
caller goes, or refuses the call. That name owns what the call brings and bounds what it may take. A token
that is no longer in the file opens nothing more, not even in a stream that runs. Nothing here knows gRPC, and
nothing here writes a token anywhere: tokens are kept and compared as SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from convservice.endpoint import is_local
from convservice.errors import InvalidRequest, Reason, Unauthenticated
from convservice_server.calls import Clock, allowed
from convservice_server.config import ServerConfig
from convservice_server.files import Replaceable, wrong_file

LOOK_INTERVAL = 1.0
"""Seconds for which a replaced token file may go unnoticed."""

MOST_TOKENS = 1000
"""In one file: each call compares with all of them."""

SHORTEST_TOKEN, LONGEST_TOKEN = 16, 512

_SETTING = "token_file"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)

Metadata: TypeAlias = "Iterable[tuple[str, str | bytes]]"
Identity = Callable[[], Mapping[str, Sequence[bytes]]]
"""What the transport says of the client's verified certificate: names of properties to their values."""


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        name: whose networks and weights the call may use, and by whose limits it goes.
        check: returns while this caller may begin anything more.
    """

    name: str = ""
    check: Callable[[], None] = allowed


ANYBODY = Caller()
"""Every caller of a server that asks nobody who he is: all are one."""


class Access:
    """Says who calls.

    Args:
        tokens: the tokens that are accepted; None where none is asked for.
        certificates: whether every client has shown a certificate that was verified.
    """

    def __init__(self, tokens: Tokens | None, *, certificates: bool) -> None:
        self._tokens = tokens
        self._certificates = certificates

    @classmethod
    def of(cls, config: ServerConfig) -> Access:
        """What the settings ask for.

        Raises:
            InvalidRequest: as `Tokens`.
        """
        tokens = None if config.token_file is None else Tokens(config.token_file)
        return cls(tokens, certificates=config.tls_client_ca is not None)

    def admit(self, metadata: Metadata, identity: Identity) -> Caller:
        """Who calls with this metadata.

        Raises:
            Unauthenticated: `TOKEN_REQUIRED`, `TOKEN_UNKNOWN` or `CERTIFICATE_WITHOUT_NAME`.
        """
        if self._tokens is not None:
            return self._tokens.admit(metadata)
        return Caller(certificate_name(identity())) if self._certificates else ANYBODY


class Tokens:
    """The tokens of a file, which may be replaced at any time.

    A line holds `NAME TOKEN`; empty lines and those that begin with `#` are skipped. A name may have several
    tokens, a token one name.

    Args:
        path: the file.
        clock: tells the time.

    Raises:
        InvalidRequest: the file cannot be read, breaks a rule (with the line's number) or holds no token.
    """

    def __init__(self, path: str, clock: Clock = time.monotonic) -> None:
        self._names = Replaceable(
            {_SETTING: path}, lambda files: _names(path, files[_SETTING]), LOOK_INTERVAL, clock
        )

    def admit(self, metadata: Metadata) -> Caller:
        """Who carries the token in this metadata.

        Raises:
            Unauthenticated: `TOKEN_REQUIRED`: it holds none or several; `TOKEN_UNKNOWN`: it holds another.
        """
        given = [value for key, value in metadata if key == "authorization"]
        match = _BEARER.fullmatch(given[0]) if len(given) == 1 and isinstance(given[0], str) else None
        if match is None:
            raise Unauthenticated(
                "this server asks for a token: the call must carry it once, as `authorization: Bearer TOKEN`",
                reason=Reason.TOKEN_REQUIRED,
            )
        digest = _digest(match[1])
        name = self._name(digest)
        if name is None:
            raise _unknown()

        def check() -> None:
            if self._name(digest) != name:
                raise _unknown()

        return Caller(name, check)

    def _name(self, digest: bytes) -> str | None:
        """The name of a token; takes the same time whichever it is."""
        found = None
        for known, name in self._names.current():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def certificate_name(identity: Mapping[str, Sequence[bytes]]) -> str:
    """The name that a client's verified certificate gives: its common name, else its first alternative name.

    Raises:
        Unauthenticated: `CERTIFICATE_WITHOUT_NAME`: it has neither, or no printable one.
    """
    for source in ("x509_common_name", "x509_subject_alternative_name"):
        for value in identity.get(source, ()):
            name = value.decode("utf-8", "replace")
            if name and name.isprintable() and "\ufffd" not in name:
                return name
    raise Unauthenticated(
        "the client's certificate names nobody: it needs a common name or a subject alternative name",
        reason=Reason.CERTIFICATE_WITHOUT_NAME,
    )


def exposures(config: ServerConfig) -> list[tuple[int, str]]:
    """What whoever runs the server should know of how open it is: levels of `logging`, and texts."""
    if is_local(config.listen):
        return []
    open_at = f"the server is open to the network at {config.listen}"
    found: list[tuple[int, str]] = []
    if config.tls_certificate is None:
        plain = f"{open_at} without TLS: who is on the way can read and change what passes"
        found.append((logging.WARNING, f"{plain}; set tls_certificate and tls_key"))
    if config.tls_certificate is None and config.token_file is not None:
        stolen = "tokens come in plaintext: who is on the way can take them and call in their names"
        found.append((logging.ERROR, f"{stolen}; set tls_certificate and tls_key, or listen on 127.0.0.1"))
    if not config.names_callers:
        found.append((logging.WARNING, f"{open_at} to everybody; set token_file or tls_client_ca"))
    return found


def _names(path: str, data: bytes) -> tuple[tuple[bytes, str], ...]:
    """The digest and name of every token in a file. What is refused is told without a word of the line."""
    names: dict[bytes, str] = {}
    lines: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        if len(words) != 2:
            raise _bad_line(path, number, f"it has {len(words)} words; a line is NAME TOKEN")
        name, token = (word.decode("ascii", "replace") for word in words)
        if not _NAME.fullmatch(name):
            raise _bad_line(
                path,
                number,
                "a name has 1 to 64 of A-Z a-z 0-9 . _ @ and -, the first a letter or digit",
            )
        if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN:
            raise _bad_line(
                path,
                number,
                f"a token has {SHORTEST_TOKEN} to {LONGEST_TOKEN} characters, this has {len(token)}",
            )
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise _bad_line(path, number, "a token consists of printable ASCII characters")
        digest = _digest(token)
        if digest in lines:
            raise _bad_line(path, number, f"it repeats the token of line {lines[digest]}")
        lines[digest], names[digest] = number, name
    if not 1 <= len(names) <= MOST_TOKENS:
        raise wrong_file(_SETTING, path, f"it holds {len(names)} tokens; 1 to {MOST_TOKENS} are needed")
    return tuple(names.items())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _bad_line(path: str, number: int, rule: str) -> InvalidRequest:
    return wrong_file(_SETTING, path, f"line {number}: {rule}")


def _unknown() -> Unauthenticated:
    return Unauthenticated("the server does not know this token", reason=Reason.TOKEN_UNKNOWN)
