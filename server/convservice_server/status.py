"""An error of the service as gRPC has it: a status with its details in the trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import grpc
from grpc_status import rpc_status

from convservice.errors import ConvServiceError, to_status
from convservice.metadata import REQUEST_ID
from convservice_server.faults import as_error


class CallFailed(Exception):
    """Ends a handler whose call was given its status.

    Args:
        error: why.
    """

    def __init__(self, error: ConvServiceError) -> None:
        super().__init__(error.message)
        self.error = error


def abort(context: grpc.ServicerContext, exc: Exception) -> NoReturn:
    """Ends the call with the status that stands for `exc`, which gets the id that trails the call.

    Raises:
        CallFailed: always; gRPC takes whatever is raised for the handler's end.
    """
    error = as_error(exc)
    trailing: tuple[tuple[str, str], ...] = cast("Any", context).trailing_metadata() or ()
    error.request_id = dict(trailing).get(REQUEST_ID)
    status = cast("Any", rpc_status).to_status(to_status(error))
    try:
        context.abort_with_status(status._replace(trailing_metadata=(*trailing, *status.trailing_metadata)))
    except Exception:  # noqa: BLE001 - gRPC's own way to end a handler, which says nothing
        raise CallFailed(error) from None
    raise AssertionError("abort_with_status returned")
