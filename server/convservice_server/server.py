"""The server's life: start, serve, drain, stop.

Given a `ServerConfig`, `Server` listens and serves the contract with health and reflection; `serve` is the
whole process around it, signals included. Stopping: health says NOT_SERVING, new work is refused with
DRAINING, tensors that run are finished, streams between two tensors are closed, and what is left after the
grace time is cancelled; then the backends are closed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from convservice.errors import BackendUnavailable, ConvServiceError, Reason, ServiceUnavailable
from convservice.v1 import conv_pb2 as pb
from convservice.v1 import conv_pb2_grpc
from convservice_backends.registry import Registry
from convservice_server import logs
from convservice_server.config import ServerConfig
from convservice_server.environment import keep_freed_memory, one_blas_thread
from convservice_server.grpc_adapter import ConvServicer, Host, Reflection
from convservice_server.guard import Guard
from convservice_server.service import Service
from convservice_server.watchdog import Watchdog

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ConvService"].full_name

EXIT_OK = 0
EXIT_CANNOT_START = 1
EXIT_FORCED = 2

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKEND_SERVICE = "convservice.backend."
"""Before a backend's name: the service under which health tells of that backend alone."""

_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_LAST_WORDS = 0.2
"""Seconds for what is left when all work is done: watchers of health, calls refused in the last moment."""


class Server:
    """One listening server; a context manager that starts and stops it.

    Args:
        config: its settings.
        registry: the backends; those installed when not given. The server closes it.
    """

    def __init__(self, config: ServerConfig, registry: Registry | None = None) -> None:
        self.config = config
        self._registry = Registry(config.backend) if registry is None else registry
        few = config.unary_workers // 2
        self._watchdog = Watchdog(config.idle_timeout)
        self._arrivals = Watchdog(config.idle_timeout, few, config.crowd_timeout)
        self._host = Host(config, self._watchdog)
        self.service = Service(config, self._registry)
        self._health = health.HealthServicer()
        self._pool = ThreadPoolExecutor(config.pool_size, thread_name_prefix="call")
        # More than the few silent calls that are let be, so that these do not stop it.
        self._health_pool = ThreadPoolExecutor(few + 1, thread_name_prefix="health")
        guard = Guard(self._arrivals, {health.SERVICE_NAME: self._health_pool})
        self._grpc = grpc.server(self._pool, interceptors=[guard], options=_options(config))
        self._stop_lock = threading.Lock()  # guards the fields below; a second stop waits for the first
        self._started = False
        self._stopped = False
        self.port = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop(0)
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> int:
        """Begins to serve.

        Returns:
            The port it listens on.

        Raises:
            BackendUnavailable: the configured backend cannot run here.
            ServiceUnavailable: the address cannot be listened on, for instance because it is taken.
        """
        backend = self._registry.resolve()
        conv_pb2_grpc.add_ConvServiceServicer_to_server(ConvServicer(self.service, self._host), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        untyped = cast("Any", reflection_pb2_grpc)
        untyped.add_ServerReflectionServicer_to_server(Reflection(names, self._host), self._grpc)
        self.port = self._bind()
        self._watchdog.__enter__()
        self._arrivals.__enter__()
        self._grpc.start()
        with self._stop_lock:
            self._started = True
        for name in ("", SERVICE_NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._registry.watch(self._backend_changed)
        described = backend.describe()
        log.info(
            "serving",
            extra={"fields": {"port": self.port, "backend": backend.name, "device": described.device}},
        )
        return self.port

    def _backend_changed(self, name: str, serves: bool) -> None:
        """Keeps health true: of the backend's own service, and of the whole where none can take its place."""
        status = health_pb2.HealthCheckResponse.SERVING if serves else _NOT_SERVING
        self._health.set(BACKEND_SERVICE + name, status)
        if serves:
            return
        try:
            self._registry.resolve()
        except BackendUnavailable:
            for service in ("", SERVICE_NAME):
                self._health.set(service, _NOT_SERVING)

    def stop(self, grace: float | None = None) -> bool:
        """Drains and stops; more than once does no harm.

        Args:
            grace: seconds for running tensors; None for the configured time.

        Returns:
            Whether everything that ran was finished.
        """
        with self._stop_lock:
            if self._stopped:
                return True
            self._stopped = True
            seconds = self.config.drain_grace if grace is None else grace
            if self._started:
                log.info("draining", extra={"fields": {"grace_s": seconds}})
            self.service.drain()
            self._host.drain()
            self._health.enter_graceful_shutdown()
            finished = self._host.wait_idle(seconds)
            if not finished:
                self._host.give_up()
            self._grpc.stop(_LAST_WORDS if finished else 0).wait()
            self._pool.shutdown()
            self._health_pool.shutdown()
            self._watchdog.__exit__(None, None, None)
            self._arrivals.__exit__(None, None, None)
            self._registry.close()
            if self._started:
                log.info("stopped", extra={"fields": {"finished": finished}})
            return finished

    def wait_idle(self, timeout: float) -> bool:
        """Waits until no call runs and all answers have left; False if that takes over `timeout` seconds."""
        return self._host.wait_idle(timeout)

    def _bind(self) -> int:
        try:
            return self._grpc.add_insecure_port(self.config.listen)
        except RuntimeError as exc:
            raise _cannot_listen(self.config, exc) from exc


def serve(config: ServerConfig, misspelt: Sequence[str] = ()) -> int:
    """Runs a server until SIGTERM or SIGINT; a second signal ends the process at once.

    It owns the process: it sets up logging, signals, memory, and BLAS (see `environment`), and prints
    `listening on HOST:PORT` as the first line of standard output once it is ready.

    Args:
        config: the settings.
        misspelt: names in the environment that look like settings and are none, to warn of.

    Returns:
        The exit code: 0 after a drain, 1 when the server cannot start.
    """
    one_blas_thread()
    keep_freed_memory()
    logs.configure(config.log_format, config.log_level)
    for name in misspelt:
        log.warning("%s in the environment is no setting", name)
    wanted = threading.Event()
    # Blocked before there is any other thread, so that all inherit it and none but the watcher takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_watch_signals, args=(wanted,), name="signals", daemon=True).start()
    server = Server(config)
    try:
        port = server.start()
    except ConvServiceError as exc:
        sys.stderr.write(f"convservice: {exc.message}\n")
        server.stop(0)
        return EXIT_CANNOT_START
    host, _ = config.address
    sys.stdout.write(f"listening on {host}:{port}\n")
    sys.stdout.flush()
    wanted.wait()
    server.stop()
    return EXIT_OK


def _watch_signals(wanted: threading.Event) -> None:
    """Says that a signal came, and ends the process at the second one, whatever it is doing."""
    signal.sigwait(_SIGNALS)
    wanted.set()
    signal.sigwait(_SIGNALS)
    os._exit(EXIT_FORCED)


def _cannot_listen(config: ServerConfig, exc: RuntimeError) -> ServiceUnavailable:
    """The error for an address that gRPC refused, which says only in its own log what was wrong."""
    host, port = config.address
    why = f"is the port taken? ({exc})"
    try:
        socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as unresolved:
        why = f"the host {host!r} does not resolve ({unresolved})"
    return ServiceUnavailable(
        f"cannot listen on {config.listen}; {why}",
        reason=Reason.INVALID_PARAMETER,
        metadata={"listen": config.listen},
        field="listen",
    )


def _options(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.so_reuseport", 0),  # so that a port which is taken is an error, not shared
        # A peer that is gone without a word is noticed within a minute and its calls are ended.
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )
