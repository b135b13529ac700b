"""What health says: of the whole server, of its service, and of each backend by itself.

Given the registry of backends, `Health` keeps the answers of the standard health protocol true: NOT_SERVING
while the server warms up and while it drains, and for a backend that cannot run here or has failed for good.
`HealthPort` answers the same on a port of its own, in plaintext and nothing else, for orchestrators that have
neither certificate nor token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from convservice.errors import BackendUnavailable
from convservice.v1 import conv_pb2 as pb
from convservice_backends.registry import Registry
from convservice_server.listening import bind, transport_options

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ConvService"].full_name

BACKEND_SERVICE = "convservice.backend."
"""Before a backend's name: the service under which health tells of that backend alone."""

_UNKNOWN = "?"
"""A name that no service has."""

MESSAGE_BYTES = 64 << 10
"""Largest message on the port for health alone."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The server's health; NOT_SERVING until `ready`.

    Args:
        registry: the backends.

    Attributes:
        servicer: answers Check and Watch; to be added to any server that is to tell.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.RLock()  # guards the two below; asking the registry may come back here
        self._ready = False
        self._told: dict[str, bool] = {}
        names = ("", SERVICE_NAME, *(BACKEND_SERVICE + name for name in registry.names))
        self.servicer = _Servicer(frozenset(names))
        self._tell(*names, serves=False)

    def ready(self) -> None:
        """Says that the server has warmed up: from now on the backends decide."""
        with self._lock:
            self._ready = True
        self._registry.watch(self._backend_changed)
        self._judge()

    @property
    def serves(self) -> bool:
        """Whether the server as a whole serves."""
        with self._lock:
            return self._told[""]

    def drain(self) -> None:
        """Says NOT_SERVING from now on, of everything."""
        with self._lock:
            self._told[""] = False
        self.servicer.enter_graceful_shutdown()

    def _backend_changed(self, name: str, serves: bool) -> None:
        self._tell(BACKEND_SERVICE + name, serves=serves)
        self._judge()

    def _judge(self) -> None:
        """The whole serves as long as there is a backend for requests that name none."""
        with self._lock:
            try:
                self._registry.resolve()
            except BackendUnavailable:
                self._tell("", SERVICE_NAME, serves=False)
            else:
                self._tell("", SERVICE_NAME, serves=self._ready)

    def _tell(self, *services: str, serves: bool) -> None:
        """Sets what is asked about services; those that watch are told only of changes."""
        with self._lock:
            for service in services:
                if self._told.get(service) is not serves:
                    self._told[service] = serves
                    self.servicer.set(service, _SERVING if serves else _NOT_SERVING)


class _Servicer(health.HealthServicer):
    """The standard servicer, of which nothing is left of a watch that has ended.

    By itself it keeps every name that was ever watched, and whoever hung up before he was entered in its
    books: anybody could fill the memory with those.

    Args:
        names: the services that there are, now and later.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:
        """See the protocol; all services that there are not are watched under one name."""
        if request.service not in self._names:
            request = health_pb2.HealthCheckRequest(service=_UNKNOWN)
        untyped = cast("Any", super())  # of a context it needs `add_callback` alone
        return untyped.Watch(request, _Leaving(context), send_response_callback)


class _Leaving:
    """A call's context, which says that the call has ended also where it had before anybody asked."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Has `callback` called when the call ends, or now; whether that is still to come."""
        added = self._context.add_callback(callback)
        if not added:
            callback()
        return added


class HealthPort:
    """A listener that answers health checks alone, in plaintext.

    Args:
        health: what it tells.
        workers: checks that may be waited for at the same time.
        guard: what stands before every handler.
    """

    def __init__(self, health: Health, workers: int, guard: grpc.ServerInterceptor) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="health-port")
        self._grpc = grpc.server(self._pool, interceptors=[guard], options=transport_options(MESSAGE_BYTES))
        cast("Any", health_pb2_grpc).add_HealthServicer_to_server(health.servicer, self._grpc)

    def listen(self, address: str) -> int:
        """Begins to answer; the port that it listens on.

        Raises:
            ServiceUnavailable: the address cannot be listened on.
        """
        port = bind(self._grpc, "health_listen", address)
        self._grpc.start()
        return port

    def stop(self) -> None:
        """Ends every check; more than once does no harm, nor does it before `listen`."""
        self._grpc.stop(0).wait()
        self._pool.shutdown()
