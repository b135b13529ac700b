"""The channel to one server: options, gRPC's own retries, fork.

Given an `Endpoint` and the `Address` of one of its servers, `Connection` keeps a channel open for the sync
client and opens a new one after a fork.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grpc

from convservice.addresses import Address
from convservice.endpoint import Endpoint
from convservice.errors import InvalidRequest, Reason
from convservice.metadata import identified
from convservice.rpc_errors import SERVICE, error_of
from convservice.v1 import conv_pb2 as pb
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice.version import __version__

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's default limit, said aloud: messages of this contract stay well below it, both ways."""

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
                # CANCELLED is how a server ends a call that reaches it in the moment in which it stops.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ]
}
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Channels share their sockets by default, and a child's new channel would then write to its parent's.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that accepts and never answers is noticed within half a minute, however long a call may take.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.primary_user_agent", f"convservice-python/{__version__}"),
)
_LONE_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A request that outgrows this buffer is not retried; the largest request is one message.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
)
_PEER_OPTIONS: tuple[tuple[str, Any], ...] = (
    # There are others to go to: a server that cannot be reached is neither waited for nor shunned for long.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def channel_options(address: Address, lone: bool) -> tuple[tuple[str, Any], ...]:
    """The options of a channel to `address`.

    gRPC itself sends again only where there is no other server: it would ask the same one four times.
    """
    options = _OPTIONS + (_LONE_OPTIONS if lone else _PEER_OPTIONS)
    if address.authority is None:
        return options
    return (*options, ("grpc.default_authority", address.authority), ("grpc.enable_http_proxy", 0))


def open_channel(endpoint: Endpoint, address: Address, lone: bool = True) -> grpc.Channel:
    """A new channel; it connects when the first call is made."""
    options, credentials = channel_options(address, lone), endpoint.credentials()
    if credentials is None:
        return grpc.insecure_channel(address.target, options=options)
    return grpc.secure_channel(address.target, credentials, options=options)


class Connection:
    """One channel, opened when it is first needed, and anew in a process that was forked.

    Args:
        endpoint: credentials, and what goes with every call.
        address: the server.
        lone: whether the client has no other one.
    """

    def __init__(self, endpoint: Endpoint, address: Address, lone: bool = True) -> None:
        self._endpoint = endpoint
        self._address = address
        self._lone = lone
        self._lock = threading.Lock()  # guards the three below
        self._channel: grpc.Channel | None = None
        self._stub: ConvServiceStub | None = None
        self._closed = False
        self._request_ids: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # of streams
        _CONNECTIONS.add(self)

    @property
    def target(self) -> str:
        """The server."""
        return self._address.target

    def stub(self) -> ConvServiceStub:
        """The service's methods over this process's channel.

        Raises:
            InvalidRequest: the client is closed.
        """
        with self._lock:
            if self._closed:
                raise closed_error(self.target)
            if self._stub is None:
                self._channel = open_channel(self._endpoint, self._address, self._lone)
                self._stub = ConvServiceStub(self._channel)
            return self._stub

    def unary(self, method: str, request: Any, timeout: float | None) -> Any:
        """The answer of a call with one answer; `request` is a message, or an iterator of messages."""
        call = getattr(self.stub(), method)
        request_id, metadata = identified(self._endpoint.authorization)
        try:
            return call(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as exc:
            raise error_of(
                exc, self.target, method, timeout, request_id, cancelled_here=self._closed
            ) from exc
        except ValueError as exc:
            raise self._refused(exc) from exc

    def stream(self, requests: Iterator[pb.ConvolveStreamRequest], timeout: float | None) -> Any:
        """Starts a `ConvolveStream` call; gRPC takes the requests in a thread of its own from now on."""
        request_id, metadata = identified(self._endpoint.authorization)
        stub = self.stub()
        try:
            call = stub.ConvolveStream(requests, timeout=timeout, metadata=metadata)
        except ValueError as exc:
            raise self._refused(exc) from exc
        self._request_ids[call] = request_id
        return call

    def answers(self, call: Any, timeout: float | None) -> Iterator[Any]:
        """The answers of a `ConvolveStream` call that was started with `timeout`."""
        try:
            yield from call
        except grpc.RpcError as exc:
            request_id, here = self._request_ids.get(call), self._closed or call.cancelled()
            raise error_of(
                exc, self.target, "ConvolveStream", timeout, request_id, cancelled_here=here
            ) from exc

    def _refused(self, exc: ValueError) -> ValueError:
        """What to raise where gRPC makes no call: another thread may have closed the client meanwhile."""
        return closed_error(self.target) if self._closed else exc

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
