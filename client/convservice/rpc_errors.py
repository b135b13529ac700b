"""gRPC's errors as the service's own.

Every `grpc.RpcError` of either client becomes a `ConvServiceError` in `error_of` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from convservice.errors import ConvServiceError, Reason, ServiceUnavailable, from_status

SERVICE = "convservice.v1.ConvService"
"""The service's full name."""

_DEFAULT_REASONS = {
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE,
    grpc.StatusCode.INTERNAL: Reason.INTERNAL,
    grpc.StatusCode.UNAVAILABLE: Reason.UNREACHABLE,
}


def error_of(
    exc: grpc.RpcError,
    target: str,
    method: str,
    timeout: float | None = None,
    request_id: str | None = None,
    *,
    cancelled_here: bool = False,
) -> ConvServiceError:
    """The error that gRPC's stands for, with what the server said in its trailing metadata.

    A call that is cancelled though this side did not do it has reached a server in the moment in which it
    stops, or has been given up there: it is as unavailable as one that has stopped.

    Args:
        exc: what gRPC raised.
        target: the server.
        method: the RPC's name.
        timeout: seconds that the call had; None for no limit.
        request_id: the id that the call was sent with.
        cancelled_here: whether this side has cancelled the call or closed its channel.
    """
    if exc.code() is grpc.StatusCode.CANCELLED and not cancelled_here:
        error = _ended_there(exc, target, method)
    else:
        error = _error_of(exc, target, method, timeout)
    error.request_id = error.request_id or request_id
    return error


def _error_of(exc: grpc.RpcError, target: str, method: str, timeout: float | None) -> ConvServiceError:
    code = exc.code()
    status = _rich_status(exc)
    if status is not None:
        return from_status(status, target=target, method=method)
    message = exc.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"the server at {target} cannot be reached, or the connection broke: {message}"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"what answers at {target} does not serve {SERVICE}/{method}: {message}"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        limit = "" if timeout is None else f" of {round(timeout, 3):g} s"
        message = f"not done within the call's time limit{limit}: {message}"
    plain = status_pb2.Status(code=code.value[0], message=message)
    error = from_status(plain, target=target, method=method)
    error.reason = str(_DEFAULT_REASONS.get(code, ""))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
        error.metadata["timeout_s"] = f"{round(timeout, 3):g}"
    return error


def _ended_there(exc: grpc.RpcError, target: str, method: str) -> ConvServiceError:
    return ServiceUnavailable(
        f"the server at {target} ended the call before it was done: {exc.details() or 'CANCELLED'}",
        reason=Reason.UNREACHABLE,
        target=target,
        method=method,
    )


def _rich_status(exc: grpc.RpcError) -> status_pb2.Status | None:
    """The status that travelled beside gRPC's own; None where there is none, or it contradicts that."""
    trailing = cast("Iterable[tuple[str, bytes]]", exc.trailing_metadata() or ())
    found = next((value for key, value in trailing if key == "grpc-status-details-bin"), None)
    if found is None:
        return None
    try:
        status = status_pb2.Status.FromString(found)
    except DecodeError:
        return None
    return status if status.code == exc.code().value[0] else None
