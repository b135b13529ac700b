"""What stands between gRPC and every handler: callers who may not call, requests that never come, bytes that
are no message.

`Guard` registers every method, health and reflection included, as one that is given a stream of raw requests.
So whoever may not call is refused before a byte of the request is read (`Door`). gRPC's thread pool would
wait for a unary call's request without end, and parse requests where a failure cannot be answered properly:
here a single request is awaited under a watchdog, and bytes that do not parse are INVALID_ARGUMENT with a
reason, like every other bad request. That wait takes a worker; a service that must answer however many calls
wait is given workers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import grpc
from google.protobuf.message import DecodeError

from convservice.errors import InvalidRequest, Reason, Unauthenticated
from convservice_server.access import Access, Caller, Identity
from convservice_server.status import abort
from convservice_server.watchdog import Watchdog

Behavior = Callable[..., Any]
Parse = Callable[[bytes], Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Door:
    """Lets calls in, and knows whose they are.

    Args:
        access: says who may call.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._callers: WeakKeyDictionary[grpc.ServicerContext, Caller] = WeakKeyDictionary()

    def admit(self, context: grpc.ServicerContext) -> None:
        """Returns if the call may go on; else ends it."""
        identity = cast("Identity", context.auth_context)  # gRPC's stubs know nothing of the lists
        try:
            self._callers[context] = self._access.admit(context.invocation_metadata(), identity)
        except Unauthenticated as exc:
            abort(context, exc)

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Who makes a call that was let in."""
        return self._callers[context]


class Guard(grpc.ServerInterceptor):
    """Gives every handler its requests.

    Args:
        arrivals: ends unary calls whose request does not come.
        pools: workers that services have to themselves, by the service's full name.
        door: lets calls in.
        open_services: full names of those that anybody may call.
    """

    def __init__(
        self,
        arrivals: Watchdog,
        pools: Mapping[str, ThreadPoolExecutor],
        door: Door,
        open_services: Collection[str],
    ) -> None:
        self._arrivals = arrivals
        self._pools = pools
        self._door = door
        self._open_services = open_services

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
        service = handler_call_details.method.strip("/").partition("/")[0]
        if service not in self._open_services:
            behavior = self._admitted(behavior)
        if getattr(inner, "experimental_non_blocking", False):
            behavior.experimental_non_blocking = True  # type: ignore[attr-defined] # gRPC looks for it here
        if service in self._pools:
            behavior.experimental_thread_pool = self._pools[service]  # type: ignore[attr-defined] # and for this
        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        guarded: Handler = make(behavior, None, handler.response_serializer)
        return guarded

    def _admitted(self, inner: Behavior) -> Behavior:
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, *rest: Any) -> Any:
            self._door.admit(context)
            return inner(requests, context, *rest)

        return behavior

    def _single(self, inner: Behavior, parse: Parse) -> Behavior:
        def behavior(requests: Iterator[bytes], context: grpc.ServicerContext, *rest: Any) -> Any:
            with self._arrivals.watch(context.cancel):
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
