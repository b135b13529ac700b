"""The channel to a server: target, credentials, options, retries.

Given what `connect` takes, `Endpoint` checks it once and opens channels; `Connection` keeps one open for the
sync client and opens a new one after a fork.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from convservice.errors import InvalidRequest, Reason
from convservice.rpc_errors import SERVICE, error_of
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice.version import __version__

Pem = str | os.PathLike[str] | bytes
"""A certificate or key: its bytes, or the path of its file."""

Tls = bool | Pem | tuple[Pem | None, Pem, Pem] | None
"""None: plaintext. True: the system's authorities. A CA. Or (CA or None, client certificate, client key)."""

T = TypeVar("T")

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's default limit, said aloud: messages of this contract stay well below it, both ways."""

MOST_SECONDS = 10 * 365 * 86400.0
"""Time limits from here on are none: gRPC counts in nanoseconds and would overflow."""

RETRIED = ("Convolve", "RegisterNetwork", "GetNetwork", "ListNetworks", "GetServerInfo")
"""Methods that gRPC sends again: those of one message that give the same answer each time."""

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE, "method": method} for method in RETRIED],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A request that outgrows this buffer is not retried; the largest request is one message.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # Channels share their sockets by default, and a child's new channel would then write to its parent's.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.primary_user_agent", f"convservice-python/{__version__}"),
)


@dataclass(frozen=True, repr=False)
class Endpoint:
    """A server and how to reach it.

    Args:
        target: `HOST:PORT`, or a gRPC target such as `unix:PATH` or `dns:///HOST:PORT`.
        tls: None for plaintext; True for TLS with the system's authorities; a CA (path or PEM bytes); or
            (CA or None, client certificate, client key) for mutual TLS.
        token: sent with every call as `authorization: Bearer TOKEN`; over plaintext only to this machine.

    Raises:
        InvalidRequest: a target without a port, a certificate that cannot be read, or a token that would
            travel in plaintext to another machine.
    """

    target: str
    tls: Tls = None
    token: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not re.fullmatch(
            r"\S*:\d+|unix\S*:\S+|\w+://\S+", self.target
        ):
            raise _bad("target", f"target must be 'HOST:PORT' or a gRPC target, not {self.target!r}")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise _bad("token", "token must be one or more printable ASCII characters without spaces")
        if self.token is not None and not self.tls and not is_local(self.target):
            raise _bad(
                "token",
                f"a token would travel in plaintext to {self.target}: use tls, or a target on this machine",
            )
        self.credentials()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """The channel's credentials; None for plaintext."""
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

    def open(self) -> grpc.Channel:
        """A new channel; connects when the first call is made."""
        credentials = self.credentials()
        if credentials is None:
            return grpc.insecure_channel(self.target, options=_OPTIONS)
        return grpc.secure_channel(self.target, credentials, options=_OPTIONS)

    def open_async(self) -> grpc.aio.Channel:
        """A new channel for the running event loop."""
        credentials = self.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        return grpc.aio.secure_channel(self.target, credentials, options=_OPTIONS)

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


class Connection:
    """One channel, opened when it is first needed, and anew in a process that was forked."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._lock = threading.Lock()  # guards the three below
        self._channel: grpc.Channel | None = None
        self._stub: ConvServiceStub | None = None
        self._closed = False
        _CONNECTIONS.add(self)

    @property
    def target(self) -> str:
        """The server."""
        return self.endpoint.target

    def stub(self) -> ConvServiceStub:
        """The service's methods over this process's channel.

        Raises:
            InvalidRequest: the client is closed.
        """
        with self._lock:
            if self._closed:
                raise closed_error(self.target)
            if self._stub is None:
                self._channel = self.endpoint.open()
                self._stub = ConvServiceStub(self._channel)
            return self._stub

    def unary(self, method: str, request: Any, timeout: float | None) -> Any:
        """The answer of a call with one answer; `request` is a message, or an iterator of messages."""
        call = getattr(self.stub(), method)
        try:
            return call(request, timeout=timeout, metadata=self.endpoint.metadata)
        except grpc.RpcError as exc:
            raise error_of(exc, self.target, method, timeout) from exc

    def stream(self, requests: Iterator[pb.ConvolveStreamRequest], timeout: float | None) -> Any:
        """Starts a `ConvolveStream` call; gRPC takes the requests in a thread of its own from now on."""
        return self.stub().ConvolveStream(requests, timeout=timeout, metadata=self.endpoint.metadata)

    def answers(self, call: Iterator[T], timeout: float | None) -> Iterator[T]:
        """The answers of a `ConvolveStream` call that was started with `timeout`."""
        try:
            yield from call
        except grpc.RpcError as exc:
            raise error_of(exc, self.target, "ConvolveStream", timeout) from exc

    def close(self) -> None:
        """Closes the channel; what runs on it is cancelled."""
        with self._lock:
            self._closed = True
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            channel.close()

    def after_fork(self) -> None:
        """Forgets, in a forked child, the channel and the lock, which belong to its parent."""
        self._lock = threading.Lock()
        self._channel = self._stub = None


_CONNECTIONS: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_CONNECTIONS):
        connection.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def closed_error(target: str) -> InvalidRequest:
    """What every method of a closed client raises."""
    return InvalidRequest("the client is closed", reason=Reason.INVALID_PARAMETER, target=target)


def _pem(value: Pem) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return Path(value).read_bytes()
    except (OSError, TypeError) as exc:
        raise _bad("tls", f"tls must name a readable PEM file or be its bytes; {value!r}: {exc}") from exc


def _bad(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.INVALID_PARAMETER, metadata={"name": name}, field=name)
