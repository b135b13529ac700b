"""The errors of the service, and their one mapping to and from google.rpc.Status.

    ConvServiceError
    ├── InvalidRequest (ValueError)          the request breaks a rule; sending it again will not help
    ├── Unauthenticated (PermissionError)    no or wrong credentials
    ├── PermissionDenied (PermissionError)   known, but not allowed
    ├── NetworkNotFound (LookupError)        no such network, or its weights are missing
    ├── BackendUnavailable                   the backend asked for cannot run there
    ├── ResourceExhausted                    a budget or a limit; `retry_after` seconds where known
    ├── DeadlineExceeded (TimeoutError)      not done in time
    ├── ServiceUnavailable (ConnectionError) not reachable, draining, or the connection broke
    ├── Cancelled                            given up by the caller
    ├── MissingPackage (ImportError)         a package that an extra brings is not installed here
    └── InternalError                        a fault of the server

Client, server and backends raise these and nothing else on purpose. `to_status` turns one into the
message that travels; `from_status` turns that message back into the same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "convservice.v1"
"""The `domain` of every ErrorInfo."""


class Reason(StrEnum):
    """Stable names of what went wrong, for programs; listed in the contract at `TensorError`.

    Three are not among those, because clients alone raise them: `UNREACHABLE`, where gRPC itself says
    UNAVAILABLE, `INVALID_FILE`, of a file that holds no network, and `PACKAGE_MISSING`.
    """

    INVALID_SHAPE = "INVALID_SHAPE"
    DATA_TYPE_MISMATCH = "DATA_TYPE_MISMATCH"
    UNKNOWN_DATA_TYPE = "UNKNOWN_DATA_TYPE"
    CHANNEL_MISMATCH = "CHANNEL_MISMATCH"
    OUTPUT_EMPTY = "OUTPUT_EMPTY"
    PADDING_TOO_LARGE = "PADDING_TOO_LARGE"
    HEIGHT_REQUIRED = "HEIGHT_REQUIRED"
    INVALID_PARAMETER = "INVALID_PARAMETER"
    UNKNOWN_LAYER = "UNKNOWN_LAYER"
    INVALID_NETWORK = "INVALID_NETWORK"
    TENSOR_MISMATCH = "TENSOR_MISMATCH"
    PAYLOAD_SIZE = "PAYLOAD_SIZE"
    PAYLOAD_OFFSET = "PAYLOAD_OFFSET"
    FRAMING = "FRAMING"
    SIZE_OVERFLOW = "SIZE_OVERFLOW"
    NETWORK_NOT_REGISTERED = "NETWORK_NOT_REGISTERED"
    WEIGHTS_MISSING = "WEIGHTS_MISSING"
    TOKEN_REQUIRED = "TOKEN_REQUIRED"  # noqa: S105 - a reason, no token
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"  # noqa: S105 - likewise
    CERTIFICATE_WITHOUT_NAME = "CERTIFICATE_WITHOUT_NAME"
    BACKEND_UNAVAILABLE = "BACKEND_UNAVAILABLE"
    NETWORK_NOT_FOUND = "NETWORK_NOT_FOUND"
    MEMORY_BUDGET = "MEMORY_BUDGET"
    WEIGHTS_BUDGET = "WEIGHTS_BUDGET"
    OUT_OF_DEVICE_MEMORY = "OUT_OF_DEVICE_MEMORY"
    DEVICE_LOST = "DEVICE_LOST"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    NAME_LIMIT = "NAME_LIMIT"
    INLINE_TOO_LARGE = "INLINE_TOO_LARGE"
    UNARY_TOO_LARGE = "UNARY_TOO_LARGE"
    NETWORK_TOO_LARGE = "NETWORK_TOO_LARGE"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    DEADLINE = "DEADLINE"
    ABORTED = "ABORTED"
    CANCELLED = "CANCELLED"
    DRAINING = "DRAINING"
    WARMING = "WARMING"
    IDLE = "IDLE"
    UNREACHABLE = "UNREACHABLE"
    INVALID_FILE = "INVALID_FILE"
    PACKAGE_MISSING = "PACKAGE_MISSING"
    INTERNAL = "INTERNAL"


class ConvServiceError(Exception):
    """What every error of the service is.

    Args:
        message: the rule and the numbers.
        reason: a `Reason`, or what a newer server says.
        metadata: the numbers, by name.
        field: the message field that is wrong, for a bad shape or parameter.
        target: the server the call went to, where there was one.
        method: the RPC's name, where there was one.
        retry_after: seconds after which the same call may succeed, where the server said so.
        request_id: the call's id, under which the server's log has it; None where no call was made.
    """

    code: ClassVar[int] = code_pb2.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field: str | None = None,
        target: str | None = None,
        method: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = str(reason)
        self.metadata = dict(metadata or {})
        self.field = field
        self.target = target
        self.method = method
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(cls: type[ConvServiceError], message: str, state: dict[str, Any]) -> ConvServiceError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class InvalidRequest(ConvServiceError, ValueError):
    """The request breaks a rule that the message states; sending it again will not help."""

    code = code_pb2.INVALID_ARGUMENT


class Unauthenticated(ConvServiceError, PermissionError):
    """The call carried no credentials that the server accepts."""

    code = code_pb2.UNAUTHENTICATED


class PermissionDenied(ConvServiceError, PermissionError):
    """The caller is known and may not do this."""

    code = code_pb2.PERMISSION_DENIED


class NetworkNotFound(ConvServiceError, LookupError):
    """The server has no such network for this caller, or not all its weights."""

    code = code_pb2.NOT_FOUND


class BackendUnavailable(ConvServiceError):
    """The backend asked for is not there or cannot run; the message says why."""

    code = code_pb2.FAILED_PRECONDITION


class ResourceExhausted(ConvServiceError):
    """A budget or limit of the server would be passed; `retry_after` is set where waiting helps."""

    code = code_pb2.RESOURCE_EXHAUSTED


class DeadlineExceeded(ConvServiceError, TimeoutError):
    """The call did not finish in the time it was given."""

    code = code_pb2.DEADLINE_EXCEEDED


class ServiceUnavailable(ConvServiceError, ConnectionError):
    """The server cannot be reached, is stopping, or the connection broke."""

    code = code_pb2.UNAVAILABLE


class Cancelled(ConvServiceError):
    """The caller gave the call up."""

    code = code_pb2.CANCELLED


class MissingPackage(ConvServiceError, ImportError):
    """This needs a package that is not installed here; the message says which extra brings it."""

    code = code_pb2.FAILED_PRECONDITION

    @classmethod
    def of(cls, package: str, extra: str) -> MissingPackage:
        """The error for a package and the extra that brings it."""
        return cls(
            f"this needs the package {package}: pip install 'convservice[{extra}]'",
            reason=Reason.PACKAGE_MISSING,
            metadata={"package": package, "extra": extra},
        )


class InternalError(ConvServiceError):
    """A fault of the server, or an answer that this client cannot read."""

    code = code_pb2.INTERNAL


_CLASS_OF_CODE: dict[int, type[ConvServiceError]] = {
    code_pb2.CANCELLED: Cancelled,
    code_pb2.UNKNOWN: InternalError,
    code_pb2.INVALID_ARGUMENT: InvalidRequest,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceeded,
    code_pb2.NOT_FOUND: NetworkNotFound,
    code_pb2.ALREADY_EXISTS: InvalidRequest,
    code_pb2.PERMISSION_DENIED: PermissionDenied,
    code_pb2.UNAUTHENTICATED: Unauthenticated,
    code_pb2.RESOURCE_EXHAUSTED: ResourceExhausted,
    code_pb2.FAILED_PRECONDITION: BackendUnavailable,
    code_pb2.ABORTED: InternalError,
    code_pb2.OUT_OF_RANGE: InvalidRequest,
    code_pb2.UNIMPLEMENTED: InternalError,
    code_pb2.INTERNAL: InternalError,
    code_pb2.UNAVAILABLE: ServiceUnavailable,
    code_pb2.DATA_LOSS: InternalError,
}
_REQUEST_ID = "request_id"
"""The name among an ErrorInfo's metadata under which the call's id travels."""

_MISSING_THERE = {Reason.NETWORK_NOT_REGISTERED, Reason.WEIGHTS_MISSING}


def to_status(error: ConvServiceError) -> status_pb2.Status:
    """The google.rpc.Status that carries `error`: its code and message, an ErrorInfo, and where they
    apply a BadRequest with the field and a RetryInfo."""
    code = code_pb2.FAILED_PRECONDITION if error.reason in _MISSING_THERE else error.code
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if error.request_id is not None:
        info.metadata[_REQUEST_ID] = error.request_id
    details = [_packed(info)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_packed(retry))
    return status_pb2.Status(code=code, message=error.message, details=details)


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def from_status(
    status: status_pb2.Status, *, target: str | None = None, method: str | None = None
) -> ConvServiceError:
    """The error that a google.rpc.Status stands for; never raises, whatever the status holds."""
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        _unpack(detail, info)
        _unpack(detail, bad)
        if _unpack(detail, retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    metadata = dict(info.metadata)
    request_id = metadata.pop(_REQUEST_ID, None)
    cls = _CLASS_OF_CODE.get(status.code, InternalError)
    if info.reason in _MISSING_THERE:
        cls = NetworkNotFound
    return cls(
        status.message or code_name(status.code),
        reason=info.reason,
        metadata=metadata,
        field=bad.field_violations[0].field if bad.field_violations else None,
        target=target,
        method=method,
        retry_after=retry_after,
        request_id=request_id,
    )


def _unpack(detail: any_pb2.Any, message: Message) -> bool:
    """Reads `detail` into `message` where it is of that kind and whole."""
    try:
        return bool(detail.Unpack(message))
    except DecodeError:
        return False


def code_name(code: int) -> str:
    """The name of a google.rpc.Code, such as `"INVALID_ARGUMENT"`; `"CODE 42"` for an unknown one."""
    try:
        return code_pb2.Code.Name(code_pb2.Code.ValueType(code))
    except ValueError:
        return f"CODE {code}"
