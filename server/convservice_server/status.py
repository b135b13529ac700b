"""An error of the service as gRPC has it: a status with its details in the trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import grpc
from grpc_status import rpc_status

from convservice.errors import to_status
from convservice_server.faults import as_error


def abort(context: grpc.ServicerContext, exc: Exception) -> NoReturn:
    """Ends the call with the status that stands for `exc`; raises, as gRPC's own `abort` does."""
    untyped = cast("Any", rpc_status)
    context.abort_with_status(untyped.to_status(to_status(as_error(exc))))
    raise AssertionError("abort_with_status returned")
