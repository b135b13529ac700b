"""Errors on their way out.

Given whatever was raised, `as_error` hands on an error of the service: its own kind as it is, cut to a size
that fits everywhere; anything else becomes INTERNAL with an incident's number, under which the log has the
traceback.
"""

from __future__ import annotations

import logging
import secrets

from convservice.errors import ConvServiceError, InternalError, Reason, ServiceUnavailable

log = logging.getLogger(__name__)

MESSAGE_BYTES = 1000
METADATA_BYTES = 1500
"""An error travels in HTTP/2 trailers, of which clients accept 8 KiB: the message up to three times
(percent-encoded once, in base64 twice) and the metadata once must stay below."""


def as_error(exc: BaseException) -> ConvServiceError:
    """The error of the service that stands for `exc`; what nobody meant to raise is logged."""
    if isinstance(exc, ConvServiceError):
        return _bounded(exc)
    incident = secrets.token_hex(4)
    log.error("incident %s", incident, exc_info=exc)
    return InternalError(
        f"the server failed; its log has the details under incident {incident}",
        reason=Reason.INTERNAL,
        metadata={"incident": incident},
    )


def warming() -> ServiceUnavailable:
    """What every call but health is told while the backends are tried."""
    return ServiceUnavailable(
        "the server is starting and not ready yet; try again in a moment",
        reason=Reason.WARMING,
        retry_after=1.0,
    )


def draining() -> ServiceUnavailable:
    """What new work is told while the server stops."""
    return ServiceUnavailable(
        "the server is stopping and takes no new work; send it to another one or later",
        reason=Reason.DRAINING,
        retry_after=1.0,
    )


def _bounded(error: ConvServiceError) -> ConvServiceError:
    """`error` with what a client's own names and numbers blew up cut short."""
    error.message = _cut(error.message, MESSAGE_BYTES)
    if error.field is not None:
        error.field = _cut(error.field, 100)
    left = METADATA_BYTES - sum(map(len, error.metadata))
    for name, value in list(error.metadata.items()):
        error.metadata[name] = _cut(value, max(left, 0))
        left -= len(error.metadata[name].encode())
    return error


def _cut(text: str, size: int) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= size:
        return text
    return data[: max(size - 3, 0)].decode("utf-8", "ignore") + "..."[:size]
