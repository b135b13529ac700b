"""gRPC's side of the service: servicers that map calls, errors and time-outs.

Given gRPC's requests and contexts this hands the service plain messages and a `Call`, and gives gRPC the
responses. An error becomes a status with details. A handler of a stream runs on a pool thread, waits for
requests through an `Inbox` and computes when gRPC asks for the next response; a response that the peer does
not read holds it up there, which is all the flow control there is, until the watchdog ends the call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar, cast

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice_server.calls import Call
from convservice_server.config import ServerConfig
from convservice_server.faults import draining
from convservice_server.guard import Door
from convservice_server.holdings import Holdings
from convservice_server.inbox import Inbox
from convservice_server.lanes import Lane
from convservice_server.observing import Calls
from convservice_server.service import Service
from convservice_server.status import abort
from convservice_server.watchdog import Watchdog

Request = TypeVar("Request")
Response = TypeVar("Response")

_FOREVER = 1e9
"""Seconds: gRPC reports a call without a deadline as one of many years."""


class Host:
    """What all servicers share: who runs, who waits, and how long.

    Args:
        config: the limits.
        watchdog: ends calls whose peer does not move.
        door: knows whose calls they are.
        calls: knows more of each.
    """

    def __init__(self, config: ServerConfig, watchdog: Watchdog, door: Door, calls: Calls) -> None:
        self.watchdog = watchdog
        self._door = door
        self._records = calls
        streams = Holdings("max_streams_per_name", "streams", config.max_streams_per_name)
        self.streams = Lane("streams", config.max_streams, streams)
        what = "uploads and reflection calls"
        uploads = Holdings("max_uploads_per_name", what, config.max_uploads_per_name)
        self.uploads = Lane(what, config.max_uploads, uploads)
        self._config = config
        self._changed = threading.Condition()  # guards the fields below
        self._calls: set[Call] = set()  # whose last byte has not left yet
        self._handlers = 0  # that have not returned yet
        self._inboxes: set[Inbox[Any]] = set()
        self._draining = False

    @contextmanager
    def call(self, context: grpc.ServicerContext) -> Generator[Call]:
        """The call behind a handler's context: its deadline, and given up when gRPC says so."""
        left = context.time_remaining()
        caller = self._door.caller(context)
        deadline = None if left > _FOREVER else time.monotonic() + left
        record = self._records.record(context)
        call = Call(caller.name, deadline, still_allowed=caller.check, record=record)

        def ended() -> None:
            call.give_up()
            with self._changed:
                self._calls.discard(call)
                self._changed.notify_all()

        with self._changed:
            self._calls.add(call)
            self._handlers += 1
        try:
            if not context.add_callback(ended):
                ended()
            yield call
        finally:
            with self._changed:
                self._handlers -= 1
                self._changed.notify_all()

    def give_up(self) -> None:
        """Gives every call up that still runs, because the server stops."""
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.give_up(draining())

    def drain(self) -> None:
        """Ends streams as soon as no tensor is open in them."""
        with self._changed:
            self._draining = True
            inboxes = list(self._inboxes)
        for inbox in inboxes:
            inbox.drain()

    def wait_idle(self, timeout: float) -> bool:
        """Waits until no call runs and all answers have left; False if that takes over `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls and not self._handlers, timeout)

    @contextmanager
    def inbox(
        self, requests: Iterator[Request], call: Call, between: Callable[[], bool]
    ) -> Generator[Inbox[Request]]:
        """The messages of a stream, for as long as the context lasts."""
        inbox = Inbox(
            requests,
            call,
            idle_timeout=self._config.idle_timeout,
            linger=self._config.drain_linger,
            between=between,
        )
        with self._changed:
            self._inboxes.add(inbox)
            if self._draining:
                inbox.drain()
        try:
            with inbox:
                yield inbox
        finally:
            with self._changed:
                self._inboxes.discard(inbox)


class ConvServicer(conv_pb2_grpc.ConvServiceServicer):
    """The contract's calls.

    Args:
        service: does them.
        host: counts them and waits for them.
    """

    def __init__(self, service: Service, host: Host) -> None:
        self._service = service
        self._host = host

    def Convolve(self, request: pb.ConvolveRequest, context: grpc.ServicerContext) -> pb.ConvolveResponse:
        """See the contract."""
        return self._unary(self._service.convolve, request, context)

    def ConvolveStream(
        self, request_iterator: Iterator[pb.ConvolveStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ConvolveStreamResponse]:
        """See the contract."""
        host = self._host
        try:
            with host.call(context) as call, host.streams.enter(call.owner):
                stream = self._service.open_stream(call)
                with (
                    host.inbox(request_iterator, call, lambda: stream.between) as inbox,
                    closing(stream.run(inbox, lambda: inbox.has_next)) as responses,
                ):
                    for response in responses:
                        with host.watchdog.watch(context.cancel):
                            yield response
        except Exception as exc:  # noqa: BLE001 - every error becomes a status; the unexpected are logged on the way
            abort(context, exc)

    def PutWeights(
        self, request_iterator: Iterator[pb.PutWeightsRequest], context: grpc.ServicerContext
    ) -> pb.PutWeightsResponse:
        """See the contract."""
        host = self._host
        try:
            with (
                host.call(context) as call,
                host.uploads.enter(call.owner),
                host.inbox(request_iterator, call, lambda: False) as inbox,
            ):
                return self._service.put_weights(inbox, call)
        except Exception as exc:  # noqa: BLE001 - as above
            abort(context, exc)

    def RegisterNetwork(
        self, request: pb.RegisterNetworkRequest, context: grpc.ServicerContext
    ) -> pb.RegisterNetworkResponse:
        """See the contract."""
        return self._unary(self._service.register_network, request, context)

    def GetNetwork(
        self, request: pb.GetNetworkRequest, context: grpc.ServicerContext
    ) -> pb.GetNetworkResponse:
        """See the contract."""
        return self._unary(self._service.get_network, request, context)

    def ListNetworks(
        self, request: pb.ListNetworksRequest, context: grpc.ServicerContext
    ) -> pb.ListNetworksResponse:
        """See the contract."""
        return self._unary(self._service.list_networks, request, context)

    def DeleteNetwork(
        self, request: pb.DeleteNetworkRequest, context: grpc.ServicerContext
    ) -> pb.DeleteNetworkResponse:
        """See the contract."""
        return self._unary(self._service.delete_network, request, context)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """See the contract."""
        streams = self._host.streams
        return self._unary(lambda _, __: self._service.get_server_info(streams.count), request, context)

    def _unary(
        self, method: Callable[[Request, Call], Response], request: Request, context: grpc.ServicerContext
    ) -> Response:
        try:
            with self._host.call(context) as call:
                return method(request, call)
        except Exception as exc:  # noqa: BLE001 - as above
            abort(context, exc)


class Reflection:
    """gRPC's reflection, whose streams are counted and time out like the others.

    Args:
        names: the services to tell of.
        host: counts the calls and waits for them.
    """

    def __init__(self, names: tuple[str, ...], host: Host) -> None:
        self._inner = cast("Any", reflection).ReflectionServicer(names)
        self._host = host

    def ServerReflectionInfo(
        self,
        request_iterator: Iterator[reflection_pb2.ServerReflectionRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[reflection_pb2.ServerReflectionResponse]:
        """Answers questions about the services."""
        host = self._host
        try:
            with (
                host.call(context) as call,
                host.uploads.enter(call.owner),
                host.inbox(request_iterator, call, lambda: True) as inbox,
            ):
                for response in self._inner.ServerReflectionInfo(inbox, context):
                    with host.watchdog.watch(context.cancel):
                        yield response
        except Exception as exc:  # noqa: BLE001 - as above
            abort(context, exc)
