"""Listening: gRPC's options for a server's side, and an address that cannot be had as a clear error."""

from __future__ import annotations

import socket

import grpc

from convservice.bands import PAYLOAD_BYTES
from convservice.errors import InvalidRequest, Reason, ServiceUnavailable
from convservice_server.config import split_address


def transport_options(message_bytes: int) -> tuple[tuple[str, int], ...]:
    """gRPC's options for a server that takes and sends messages of so many bytes."""
    return (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.so_reuseport", 0),  # so that a port which is taken is an error, not shared
        # A stream's window: one message on its way. gRPC would widen it with its estimate of the connection,
        # to tens of megabytes where the server is the slower side, and no limit of memory knows of those.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", PAYLOAD_BYTES),
        # A peer that is gone without a word is noticed within a minute and its calls are ended.
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def bind(
    server: grpc.Server, setting: str, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Has a server listen, in plaintext without credentials; the port, another where the address says 0.

    Raises:
        ServiceUnavailable: the address cannot be listened on.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        raise cannot_listen(setting, address, exc) from exc


def missing_package(setting: str, exc: ModuleNotFoundError, extra: str) -> InvalidRequest:
    """The error for a setting that needs a package which is not installed."""
    return InvalidRequest(
        f"{setting} needs the package {exc.name}: pip install 'convservice[{extra}]'",
        reason=Reason.INVALID_PARAMETER,
        metadata={"package": str(exc.name)},
        field=setting,
    )


def cannot_listen(setting: str, address: str, exc: Exception) -> ServiceUnavailable:
    """The error for an address that was refused; gRPC says only in its own log what was wrong.

    Args:
        setting: the setting that holds the address.
        address: `HOST:PORT`.
        exc: what was raised.
    """
    host, port = split_address(address, setting)
    why = f"is the port taken? ({exc})"
    try:
        socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as unresolved:
        why = f"the host {host!r} does not resolve ({unresolved})"
    return ServiceUnavailable(
        f"cannot listen on {address}; {why}",
        reason=Reason.INVALID_PARAMETER,
        metadata={setting: address},
        field=setting,
    )
