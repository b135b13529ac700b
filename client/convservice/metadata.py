"""What goes with every call beside credentials: an id, and the trace that it belongs to.

The id is in every line that the server's log has about the call, and in the errors of the call. The trace is
that of the application's active span where it uses OpenTelemetry; the SDK itself neither needs nor imports it
otherwise.
"""

from __future__ import annotations

import secrets
import sys

Metadata = tuple[tuple[str, str], ...]

REQUEST_ID = "x-request-id"
"""The name under which a call's id travels, both ways."""

_TRACE_HEADERS = ("traceparent", "tracestate")


def identified(authorization: Metadata) -> tuple[str, Metadata]:
    """A new call's id, and all that goes with it.

    Args:
        authorization: the credentials' part.
    """
    request_id = secrets.token_hex(8)
    return request_id, (*authorization, (REQUEST_ID, request_id), *_trace())


def _trace() -> Metadata:
    """The active span's trace headers (W3C); none where there is no such span."""
    if "opentelemetry.trace" not in sys.modules:  # an application with a span has imported it
        return ()
    try:
        from opentelemetry import propagate

        carrier: dict[str, str] = {}
        propagate.inject(carrier)
    except Exception:  # noqa: BLE001 - whatever an application's propagator does, the call goes on
        return ()
    return tuple((name, carrier[name]) for name in _TRACE_HEADERS if name in carrier)
