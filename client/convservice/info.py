"""What a server says about itself: version, backends, limits and use."""

from __future__ import annotations

from dataclasses import dataclass

from convservice.v1 import conv_pb2 as pb


@dataclass(frozen=True)
class BackendInfo:
    """One backend of a server.

    Attributes:
        name: as the `backend` argument takes it.
        available: whether it can run there.
        reason: why it cannot; empty when it can.
        is_default: whether it is the server's own choice.
        device: the processor's or device's name.
        versions: libraries that its bits depend on, name to version.
        workers: blocks it computes at the same time.
    """

    name: str
    available: bool
    reason: str
    is_default: bool
    device: str
    versions: dict[str, str]
    workers: int


@dataclass(frozen=True)
class Limits:
    """What a server accepts; sizes in bytes.

    Attributes:
        max_message_bytes: largest message.
        max_unary_bytes: largest input and outputs of one unary call together.
        max_inline_weight_bytes: largest weights carried inline in one call.
        memory_budget_bytes: for all running tensors together.
        weights_budget_bytes: for all weights together.
        max_streams: streams served at the same time.
        idle_timeout: seconds after which a stream on which nothing moves is ended.
    """

    max_message_bytes: int
    max_unary_bytes: int
    max_inline_weight_bytes: int
    memory_budget_bytes: int
    weights_budget_bytes: int
    max_streams: int
    idle_timeout: float


@dataclass(frozen=True)
class Usage:
    """What is in use on a server at the moment.

    Attributes:
        reserved_bytes: reserved for running tensors.
        weights_bytes: weights kept.
        networks: networks kept.
        streams: streams open.
        tensors: tensors running.
    """

    reserved_bytes: int
    weights_bytes: int
    networks: int
    streams: int
    tensors: int


@dataclass(frozen=True)
class ServerInfo:
    """What `info()` hands back.

    Attributes:
        version: the server's version.
        backends: every backend it knows, available or not.
        limits: what it accepts.
        usage: what is in use at the moment.
    """

    version: str
    backends: tuple[BackendInfo, ...]
    limits: Limits
    usage: Usage


def info_from_proto(message: pb.GetServerInfoResponse) -> ServerInfo:
    """The answer of `GetServerInfo`."""
    limits, usage = message.limits, message.usage
    return ServerInfo(
        version=message.version,
        backends=tuple(
            BackendInfo(
                backend.name,
                backend.available,
                backend.reason,
                backend.is_default,
                backend.device,
                dict(backend.versions),
                backend.workers,
            )
            for backend in message.backends
        ),
        limits=Limits(
            limits.max_message_bytes,
            limits.max_unary_bytes,
            limits.max_inline_weight_bytes,
            limits.memory_budget_bytes,
            limits.weights_budget_bytes,
            limits.max_streams,
            limits.idle_timeout_ms / 1e3,
        ),
        usage=Usage(usage.reserved_bytes, usage.weights_bytes, usage.networks, usage.streams, usage.tensors),
    )
