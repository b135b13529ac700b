"""What stands between gRPC and every handler: requests that never come, and bytes that are no message.

gRPC's thread pool waits for a unary call's request without end, and parses requests where a failure cannot be
answered properly. So `Guard` registers every method, health and reflection included, as one that is given a
stream of raw requests: a unary call's single request is awaited under the watchdog, and bytes that do not
parse are INVALID_ARGUMENT with a reason, like every other bad request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from convservice.errors import InvalidRequest, Reason
from convservice_server.status import abort
from convservice_server.watchdog import Watchdog

Behavior = Callable[..., Any]
Parse = Callable[[bytes], Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(grpc.ServerInterceptor):
    """Gives every handler its requests.

    Args:
        watchdog: ends calls whose request does not come.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, guarded; None for a method that there is not."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        parse = handler.request_deserializer or bytes
        kind = ("unary", "stream")
        inner: Behavior = getattr(
            handler, f"{kind[handler.request_streaming]}_{kind[handler.response_streaming]}"
        )
        behavior = _parsed(inner, parse) if handler.request_streaming else self._single(inner, parse)
        if getattr(inner, "experimental_non_blocking", False):
            behavior.experimental_non_blocking = True  # type: ignore[attr-defined] # gRPC looks for it here
        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        guarded: Handler = make(behavior, None, handler.response_serializer)
        return guarded

    def _single(self, inner: Behavior, parse: Parse) -> Behavior:
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, *rest: Any) -> Any:
            with self._watchdog.watch(context.cancel):
                data = next(requests, None)
            try:
                if data is None:
                    raise InvalidRequest("the call ended before its request came", reason=Reason.FRAMING)
                request = _message(data, parse)
            except InvalidRequest as exc:
                abort(context, exc)
            del data
            return inner(request, context, *rest)

        return behavior


def _parsed(inner: Behavior, parse: Parse) -> Behavior:
    def behavior(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        # `map` holds no message while the next one is awaited.
        return inner(map(lambda data: _message(data, parse), requests), context)  # noqa: C417

    return behavior


def _message(data: bytes, parse: Parse) -> Any:
    try:
        return parse(data)
    except DecodeError as exc:
        raise InvalidRequest(
            f"{len(data)} bytes came that are no message: {exc}", reason=Reason.FRAMING
        ) from exc
