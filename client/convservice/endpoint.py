"""What `connect` takes, checked once: targets, TLS, a token, a time limit.

Given a caller's arguments, `Endpoint` refuses what breaks a rule and hands on credentials and what goes with
every call. It opens nothing: `channel` does.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from convservice.errors import InvalidRequest, Reason

Pem = str | os.PathLike[str] | bytes
"""A certificate or key: its bytes, or the path of its file."""

Tls = bool | Pem | tuple[Pem | None, Pem, Pem] | None
"""None: plaintext. True: the system's authorities. A CA. Or (CA or None, client certificate, client key)."""

Target = str | Sequence[str]
"""`HOST:PORT` or a gRPC target; several of them as a sequence, or in one string with commas between."""

MOST_SECONDS = 10 * 365 * 86400.0
"""Time limits from here on are none: gRPC counts in nanoseconds and would overflow."""

_TARGET = re.compile(r"\S*:\d+|unix\S*:\S+|\w+://\S+")


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Servers that do the same work, and how to reach them; made by `of` from what `connect` takes.

    Attributes:
        targets: each `HOST:PORT`, or a gRPC target such as `unix:PATH` or `dns:///HOST:PORT`; at least one.
        tls: None for plaintext; True for TLS with the system's authorities; a CA (path or PEM bytes); or
            (CA or None, client certificate, client key) for mutual TLS.
        token: sent with every call as `authorization: Bearer TOKEN`; over plaintext only to this machine.

    Raises:
        InvalidRequest: a target without a port, a certificate that cannot be read, or a token that would
            travel in plaintext to another machine.
    """

    targets: tuple[str, ...]
    tls: Tls = None
    token: str | None = None

    @classmethod
    def of(cls, target: Target, tls: Tls = None, token: str | None = None) -> Self:
        """The endpoint for what a caller names."""
        parts: Sequence[Any] = target if isinstance(target, Sequence) else [target]
        if isinstance(target, str):
            parts = [target] if target.startswith("unix") else target.split(",")
        return cls(tuple(parts), tls, token)

    def __post_init__(self) -> None:
        if not self.targets:
            raise _bad("target", "target must name at least one server, and names none")
        for target in self.targets:
            if not isinstance(target, str) or not _TARGET.fullmatch(target):
                raise _bad(
                    "target", f"target must be 'HOST:PORT' or a gRPC target, or several, not {target!r}"
                )
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise _bad("token", "token must be one or more printable ASCII characters without spaces")
        for target in self.targets:
            if self.token is not None and not self.tls and not is_local(target):
                raise _bad(
                    "token",
                    f"a token would travel in plaintext to {target}: use tls, or a target on this machine",
                )
        self.credentials()

    @property
    def target(self) -> str:
        """All targets in one string."""
        return ",".join(self.targets)

    @property
    def authorization(self) -> tuple[tuple[str, str], ...]:
        """The metadata that proves to a server who calls; none without a token."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """A channel's credentials; None for plaintext."""
        if self.tls is None or self.tls is False:
            return None
        if self.tls is True:
            return grpc.ssl_channel_credentials()
        if isinstance(self.tls, tuple):
            if len(self.tls) != 3:
                raise _bad(
                    "tls", f"tls as a tuple is (ca or None, certificate, key), not {len(self.tls)} items"
                )
            ca, certificate, key = self.tls
            root = None if ca is None else _pem(ca)
            return grpc.ssl_channel_credentials(root, _pem(key), _pem(certificate))
        return grpc.ssl_channel_credentials(_pem(self.tls))

    def __repr__(self) -> str:
        return f"Endpoint({self.target!r}, tls={bool(self.tls)}, token={self.token is not None})"


def is_local(target: str) -> bool:
    """Whether a target is on this machine: a Unix socket, localhost or a loopback address."""
    if target.startswith("unix"):
        return True
    host = target.rsplit("/", 1)[-1].rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_timeout(timeout: float | None) -> float | None:
    """`timeout` in seconds as a float above 0, or None; more than ten years are no limit, and None.

    Raises:
        InvalidRequest: `INVALID_PARAMETER` for anything else, NaN and infinity included.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise _bad("timeout", f"timeout must be seconds above 0, or None for no limit, not {timeout!r}")
    return float(timeout) if timeout < MOST_SECONDS else None


def _pem(value: Pem) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return Path(value).read_bytes()
    except (OSError, TypeError) as exc:
        raise _bad("tls", f"tls must name a readable PEM file or be its bytes; {value!r}: {exc}") from exc


def _bad(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.INVALID_PARAMETER, metadata={"name": name}, field=name)
