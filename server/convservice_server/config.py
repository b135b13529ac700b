"""The server's settings, validated once.

Given keyword values, as a command line has them, this hands on a `ServerConfig` that the rest of the server
can take as right: every number is in its range and the numbers fit one another.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convservice.bands import PAYLOAD_BYTES
from convservice.errors import InvalidRequest, Reason
from convservice_server.resources import defaults, limits

MIB = 1 << 20
MESSAGE_SLACK_BYTES = 128 << 10
"""Room in a message beside tensor bytes: headers, names, the structure of an inline network."""

_TOGETHER = (
    ("tls_certificate", "tls_key"),
    ("tls_key", "tls_certificate"),
    ("tls_client_ca", "tls_certificate"),
)
"""Settings that mean nothing without another."""


class _Share(int):
    """A default that follows from other settings, and is no value that anybody could set."""


_SHARE = _Share()
_MOST_NETWORKS = 1_000_000

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _default(name: str) -> Any:
    """A field whose default follows from the limits of the machine or container."""
    return field(default_factory=lambda: getattr(defaults(limits()), name))


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a server is told.

    Attributes:
        listen: `HOST:PORT` to listen on; port 0 picks a free one; an IPv6 host stands in brackets.
        health_listen: likewise, for health checks alone, in plaintext; None for no such port.
        metrics: likewise, for Prometheus's page over HTTP; None for none.
        traces: URL of the collector that OpenTelemetry's spans are sent to, `http://HOST:PORT` or with TLS
            `https://HOST:PORT`, by OTLP over gRPC; None for no spans.
        backend: the backend for tensors that name none; `"auto"` takes the first that works.
        memory_budget_bytes: for all running tensors together; half of the memory that the process leaves.
        weights_budget_bytes: for all weights together, prepared forms included; a quarter of it.
        max_streams: `ConvolveStream` calls served at the same time, each with a worker of its own.
        max_uploads: `PutWeights` calls (and reflection calls) served at the same time, likewise.
        unary_workers: workers that streams can never take: for unary calls. Health has its own.
        max_streams_per_name: of `max_streams`, for one name; half of them where callers have names.
        max_uploads_per_name: of `max_uploads`, likewise.
        max_bytes_per_name: of `memory_budget_bytes`, likewise.
        max_weights_per_name_bytes: of `weights_budget_bytes`, likewise; what several names have counts in
            full for each.
        max_networks_per_name: networks kept for one name, 1000 where callers have names; beyond it those go
            that it has not used for longest.
        max_message_bytes: largest message taken or sent; gRPC's own default, which every client and proxy
            passes.
        max_unary_bytes: largest input and outputs of `Convolve` together.
        max_inline_weight_bytes: largest weights carried inline in one call.
        lease_seconds: for which weights that no network uses are kept.
        idle_timeout: seconds after which a call on which nothing moves is ended.
        crowd_timeout: seconds after which unary calls whose request has not come are ended where more of them
            wait than half of `unary_workers`, those that have waited longest first; each takes a worker.
        drain_grace: seconds that running tensors get to finish when the server stops.
        drain_linger: seconds that a stream between two tensors stays open while the server stops.
        token_file: path of the tokens that callers must carry (`access.Tokens`); None where they need none.
        tls_certificate: path of the server's certificate and its chain, PEM; None where it speaks plaintext.
        tls_key: path of the certificate's private key, PEM.
        tls_client_ca: path of the authorities, PEM, one of which must have signed the certificate that every
            client must then show; None where clients need none.
        log_format: `"text"` or `"json"`, on standard error.
        log_level: `"debug"`, `"info"`, `"warning"` or `"error"`.

    Raises:
        InvalidRequest: a setting is out of range; the message names it, the rule and the value.
    """

    listen: str = "127.0.0.1:50051"
    health_listen: str | None = None
    metrics: str | None = None
    traces: str | None = None
    backend: str = "auto"
    memory_budget_bytes: int = _default("memory_budget_bytes")
    weights_budget_bytes: int = _default("weights_budget_bytes")
    max_streams: int = _default("max_streams")
    max_uploads: int = _default("max_uploads")
    unary_workers: int = _default("unary_workers")
    max_streams_per_name: int = _SHARE
    max_uploads_per_name: int = _SHARE
    max_bytes_per_name: int = _SHARE
    max_weights_per_name_bytes: int = _SHARE
    max_networks_per_name: int = _SHARE
    max_message_bytes: int = 4 * MIB
    max_unary_bytes: int = MIB
    max_inline_weight_bytes: int = MIB
    lease_seconds: int = 60
    idle_timeout: float = 60.0
    crowd_timeout: float = 5.0
    drain_grace: float = 30.0
    drain_linger: float = 1.0
    token_file: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        split_address(self.listen)
        for name in ("health_listen", "metrics"):
            if getattr(self, name) is not None:
                split_address(getattr(self, name), name)
        if self.traces is not None:
            match = re.fullmatch(r"https?://(.+?)/?", str(self.traces))
            if match is None:
                raise _wrong("traces", "a URL such as http://localhost:4317", self.traces)
            split_address(match[1], "traces")
        for name in (
            "memory_budget_bytes",
            "weights_budget_bytes",
            "max_unary_bytes",
            "max_inline_weight_bytes",
        ):
            self._whole(name, 1, 1 << 62)
        self._whole("max_message_bytes", PAYLOAD_BYTES + MESSAGE_SLACK_BYTES, 1 << 30)
        for name in ("max_streams", "max_uploads", "unary_workers"):
            self._whole(name, 1, 4096)
        self._whole("lease_seconds", 1, 86_400)
        for name in ("idle_timeout", "crowd_timeout", "drain_grace", "drain_linger"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise _wrong(name, "a number of seconds, at least 0", value)
        for name in ("idle_timeout", "crowd_timeout"):
            if getattr(self, name) == 0:
                raise _wrong(name, "above 0 seconds", getattr(self, name))
        self._one_of("log_format", ("text", "json"))
        self._one_of("log_level", ("debug", "info", "warning", "error"))
        self._files()
        self._shares()
        if not self.backend or not isinstance(self.backend, str):
            raise _wrong("backend", "a backend's name or 'auto'", self.backend)
        together = self.max_unary_bytes + self.max_inline_weight_bytes + MESSAGE_SLACK_BYTES
        if together > self.max_message_bytes:
            raise _wrong(
                "max_message_bytes",
                f"at least max_unary_bytes + max_inline_weight_bytes + {MESSAGE_SLACK_BYTES} = {together}",
                self.max_message_bytes,
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return split_address(self.listen)

    @property
    def names_callers(self) -> bool:
        """Whether callers must say who they are, by token or certificate."""
        return self.token_file is not None or self.tls_client_ca is not None

    @property
    def pool_size(self) -> int:
        """Workers in all: those of streams, of uploads, and those that neither can take."""
        return self.max_streams + self.max_uploads + self.unary_workers

    @classmethod
    def of(cls, **overrides: Any) -> ServerConfig:
        """The defaults with what a command line or a caller set; a None stands for the default.

        Sizes (`is_size`) may be strings with a unit, such as `"512MiB"` or `"2G"`, in powers of 1024.

        Raises:
            InvalidRequest: an unknown setting, or a value out of range.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise _wrong(unknown[0], f"one of the settings {', '.join(sorted(known))}", overrides[unknown[0]])
        return cls(**_given(overrides))

    def _files(self) -> None:
        for name in ("token_file", "tls_certificate", "tls_key", "tls_client_ca"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise _wrong(name, "the path of a file", value)
        for name, other in _TOGETHER:
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise InvalidRequest(
                    f"{name} must be given together with {other}",
                    reason=Reason.INVALID_PARAMETER,
                    metadata={"name": name, "missing": other},
                    field=name,
                )

    def _shares(self) -> None:
        """Checks what one name may have, and chooses it where it was not set."""
        # Half of the whole: whoever comes second finds room, and a name that is alone is not held down far.
        for name, whole, share in (
            ("max_streams_per_name", "max_streams", self.max_streams // 2),
            ("max_uploads_per_name", "max_uploads", self.max_uploads // 2),
            ("max_bytes_per_name", "memory_budget_bytes", self.memory_budget_bytes // 2),
            ("max_weights_per_name_bytes", "weights_budget_bytes", self.weights_budget_bytes // 2),
            ("max_networks_per_name", "", 1000),
        ):
            most = getattr(self, whole) if whole else _MOST_NETWORKS
            if getattr(self, name) is _SHARE:
                object.__setattr__(self, name, max(1, share) if self.names_callers else most)
            self._whole(name, 1, most, f" = {whole}" if whole else "")

    def _whole(self, name: str, minimum: int, maximum: int, of: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise _wrong(name, f"a whole number from {minimum} to {maximum}{of}", value)

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise _wrong(name, " or ".join(repr(value) for value in allowed), getattr(self, name))


def is_size(name: str) -> bool:
    """Whether a field of `ServerConfig` counts bytes."""
    return "_bytes" in name


def split_address(address: str, name: str = "listen") -> tuple[str, int]:
    """Host and port of the setting `name`, `HOST:PORT`; the brackets of an IPv6 host are kept."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+):(\d{1,5})", str(address))
    if match is None or int(match[2]) > 65_535:
        raise _wrong(name, "HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:50051", address)
    return match[1], int(match[2])


def _given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in overrides.items():
        if value is None:
            continue
        given[name] = _size(name, value) if is_size(name) and isinstance(value, str) else value
    return given


def _size(name: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise _wrong(name, "a number of bytes, with or without a unit such as KiB, MiB or GiB", text)
    return int(match[1]) * _UNITS[match[2].upper()]


def _wrong(name: str, rule: str, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"{name} must be {rule}, not {value!r}",
        reason=Reason.INVALID_PARAMETER,
        metadata={"name": name, "value": repr(value)},
        field=name,
    )
