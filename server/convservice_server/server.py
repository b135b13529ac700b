"""The server's life: listen, warm up, serve, drain, stop.

Given a `ServerConfig`, `Server` listens, has every backend compute the worked example, and serves the
contract with health and reflection. Until the backends have been tried, health says NOT_SERVING and all else
is refused with WARMING. Stopping: health says NOT_SERVING, new work is refused with DRAINING, tensors that
run are finished, streams between two tensors are closed, and what is left after the grace time is cancelled;
then the backends are closed. `process` is the process around it.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, cast

import grpc
from grpc_health.v1 import health as health_protocol
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from convservice.v1 import conv_pb2_grpc
from convservice_backends.registry import Registry
from convservice_backends.trial import try_worked_example
from convservice_server.access import Access, exposures
from convservice_server.config import ServerConfig
from convservice_server.grpc_adapter import ConvServicer, Host, Reflection
from convservice_server.guard import Door, Guard
from convservice_server.health import SERVICE_NAME, Health, HealthPort
from convservice_server.lines import Lines
from convservice_server.listening import bind, missing_package, transport_options
from convservice_server.observation import Observation
from convservice_server.observing import Calls, Observing
from convservice_server.service import Service
from convservice_server.tls import Certificates
from convservice_server.transport import credentials
from convservice_server.watchdog import Watchdog

if TYPE_CHECKING:
    from convservice_server.metrics_port import MetricsPort
    from convservice_server.traces import Traces

log = logging.getLogger(__name__)

_LAST_WORDS = 0.2
"""Seconds for what is left when all work is done: watchers of health, calls refused in the last moment."""


class Server:
    """One listening server; a context manager that starts and stops it.

    Args:
        config: its settings.
        registry: the backends; when not given those installed, each tried with the worked example. The server
            closes it.

    Attributes:
        port: where it listens; 0 before it does.
        health_port: where it answers health checks alone; 0 if nowhere.
        metrics_port: where Prometheus finds its page; 0 if nowhere.

    Raises:
        InvalidRequest: tokens or certificates that the settings name cannot be used.
    """

    def __init__(self, config: ServerConfig, registry: Registry | None = None) -> None:
        self.config = config
        self._certificates = Certificates.of(config)
        door = Door(Access.of(config))
        self._registry = Registry(config.backend, trial=try_worked_example) if registry is None else registry
        few = config.unary_workers // 2
        self._watchdog = Watchdog(config.idle_timeout)
        self._arrivals = Watchdog(config.idle_timeout, few, config.crowd_timeout)
        self._observation = Observation([Lines()])
        calls = Calls(self._observation)
        self._host = Host(config, self._watchdog, door, calls)
        self.service = Service(config, self._registry, observation=self._observation)
        self.service.warming = True
        self._health = Health(self._registry)
        self._pool = ThreadPoolExecutor(config.pool_size, thread_name_prefix="call")
        # More than the few silent calls that are let be, so that these do not stop it.
        self._health_pool = ThreadPoolExecutor(few + 1, thread_name_prefix="health")
        pools = {health_protocol.SERVICE_NAME: self._health_pool}
        guard = Guard(self._arrivals, pools, door, open_services={health_protocol.SERVICE_NAME})
        options = transport_options(config.max_message_bytes)
        observing = Observing(calls, {health_protocol.SERVICE_NAME})
        self._grpc = grpc.server(self._pool, interceptors=[observing, guard], options=options)
        self._health_only = (
            HealthPort(self._health, few + 1, guard) if config.health_listen is not None else None
        )
        self._stop_lock = threading.Lock()  # guards the fields below; a second stop waits for the first
        self._started = False
        self._stopped = False
        self._metrics_port: MetricsPort | None = None
        self._traces: Traces | None = None
        self.port = 0
        self.health_port = 0
        self.metrics_port = 0

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
        """Begins to serve: `listen`, then `warm`.

        Returns:
            The port it listens on.

        Raises:
            BackendUnavailable: the configured backend cannot run here.
            ServiceUnavailable: the address cannot be listened on, for instance because it is taken.
        """
        self.listen()
        self.warm()
        return self.port

    def listen(self) -> None:
        """Begins to answer: health checks truly, everything else with WARMING.

        Raises:
            ServiceUnavailable: an address cannot be listened on.
        """
        conv_pb2_grpc.add_ConvServiceServicer_to_server(ConvServicer(self.service, self._host), self._grpc)
        cast("Any", health_pb2_grpc).add_HealthServicer_to_server(self._health.servicer, self._grpc)
        names = (SERVICE_NAME, health_protocol.SERVICE_NAME, reflection.SERVICE_NAME)
        untyped = cast("Any", reflection_pb2_grpc)
        untyped.add_ServerReflectionServicer_to_server(Reflection(names, self._host), self._grpc)
        secure = None if self._certificates is None else credentials(self._certificates)
        self.port = bind(self._grpc, "listen", self.config.listen, secure)
        for level, text in exposures(self.config):
            log.log(level, text)
        if self._health_only is not None and self.config.health_listen is not None:
            self.health_port = self._health_only.listen(self.config.health_listen)
        if self.config.metrics is not None:
            self._open_metrics(self.config.metrics)
        if self.config.traces is not None:
            self._open_traces(self.config.traces)
        self._watchdog.__enter__()
        self._arrivals.__enter__()
        self._grpc.start()
        with self._stop_lock:
            self._started = True
        ports = {"port": self.port, "health_port": self.health_port, "metrics_port": self.metrics_port}
        log.info("listening", extra={"fields": {name: port for name, port in ports.items() if port}})

    def warm(self) -> None:
        """Tries every backend that is installed, and begins to serve.

        Raises:
            BackendUnavailable: the configured backend cannot run here, or none can.
        """
        self._registry.statuses()
        backend = self._registry.resolve()
        self.service.warming = False
        self._health.ready()
        fields = {"port": self.port, "backend": backend.name, "device": backend.describe().device}
        log.info("serving", extra={"fields": fields})

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
            self._health.drain()
            finished = self._host.wait_idle(seconds)
            if not finished:
                self._host.give_up()
            self._grpc.stop(_LAST_WORDS if finished else 0).wait()
            if self._health_only is not None:
                self._health_only.stop()
            self._pool.shutdown()
            self._health_pool.shutdown()
            self._watchdog.__exit__(None, None, None)
            self._arrivals.__exit__(None, None, None)
            if self._metrics_port is not None:
                self._metrics_port.stop()
            if self._traces is not None:
                self._traces.stop()
            self._registry.close()
            if self._started:
                log.info("stopped", extra={"fields": {"finished": finished}})
            return finished

    def wait_idle(self, timeout: float) -> bool:
        """Waits until no call runs and all answers have left; False if that takes over `timeout` seconds."""
        return self._host.wait_idle(timeout)

    def _open_metrics(self, address: str) -> None:
        """Begins to count, and to answer those who ask for the counts."""
        try:
            from convservice_server.metrics import Metrics
            from convservice_server.metrics_port import MetricsPort
        except ModuleNotFoundError as exc:
            raise missing_package("metrics", exc, "server") from exc
        metrics = Metrics(
            self.service, self._registry, lambda: self._host.streams.count, lambda: self._health.serves
        )
        self._observation.add(metrics)
        self._metrics_port = MetricsPort(address, metrics.registry)
        self.metrics_port = self._metrics_port.port

    def _open_traces(self, endpoint: str) -> None:
        """Begins to make spans, and to send them."""
        try:
            from convservice_server.traces import Traces, to_collector
        except ModuleNotFoundError as exc:
            raise missing_package("traces", exc, "otel") from exc
        self._traces = Traces(to_collector(endpoint))
        self._observation.add(self._traces)
