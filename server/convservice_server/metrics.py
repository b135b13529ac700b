"""What Prometheus is told: counts, times and bytes of calls and tensors, and what is in use.

`Metrics` hangs on the observation and counts; what is in use is read from the service only when somebody asks
for the page. Labels come from small fixed sets (the contract's methods, status names, phases, backends,
algorithms, reasons), never from a client. It needs prometheus-client and is imported only where metrics are
wanted.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from convservice.errors import Reason
from convservice.v1 import conv_pb2 as pb
from convservice_backends.interface import TellsDeviceMemory
from convservice_backends.registry import Registry
from convservice_server.observation import Observer
from convservice_server.records import UNKNOWN_METHOD, CallRecord, TensorRecord
from convservice_server.service import Service

T = TypeVar("T")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""Bounds of the buckets of times."""

METHODS = frozenset(pb.DESCRIPTOR.services_by_name["ConvService"].methods_by_name) | {"ServerReflectionInfo"}
"""The methods that are told apart; all others are one."""

REFUSED = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"}
"""What a call or tensor ends with that was refused and not tried."""

OTHER = "OTHER"
"""The label of a reason that is none of the service's own."""

_REASONS = {str(reason) for reason in Reason}


class Metrics(Observer):
    """Counts what it is told.

    Args:
        service: what is asked for what is in use.
        backends: the backends.
        streams: how many streams are open.
        serves: whether the server as a whole serves.

    Attributes:
        registry: what a page is made of; this server's own.
    """

    def __init__(
        self,
        service: Service,
        backends: Registry,
        streams: Callable[[], int],
        serves: Callable[[], bool],
    ) -> None:
        registry = self.registry = CollectorRegistry()
        self._calls = Counter(
            "convservice_calls", "Calls that have ended.", ["method", "status"], registry=registry
        )
        self._call_seconds = Histogram(
            "convservice_call_seconds",
            "Time from a call's arrival to its end, the wait for a worker included.",
            ["method"],
            buckets=SECONDS,
            registry=registry,
        )
        self._bytes_in = Counter(
            "convservice_received_bytes", "Bytes of messages that came.", ["method"], registry=registry
        )
        self._bytes_out = Counter(
            "convservice_sent_bytes", "Bytes of messages that were sent.", ["method"], registry=registry
        )
        self._tensors = Counter(
            "convservice_tensors",
            "Tensors that have ended, by what computed them (none if that was never decided).",
            ["backend", "status"],
            registry=registry,
        )
        self._tensor_seconds = Histogram(
            "convservice_tensor_seconds",
            "Time from a tensor's header to its end.",
            buckets=SECONDS,
            registry=registry,
        )
        phases = Histogram(
            "convservice_tensor_phase_seconds",
            "Time that a tensor spent waiting to be taken (queue), waiting for input (receive), being"
            " computed (compute), and waiting for its output to be read (send).",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self._phases = {name: phases.labels(name) for name in ("queue", "receive", "compute", "send")}
        self._layers = Counter(
            "convservice_layers",
            "Layers that tensors have passed through.",
            ["backend", "algorithm"],
            registry=registry,
        )
        self._refusals = Counter(
            "convservice_refusals",
            "Calls and tensors that were refused and not tried.",
            ["reason"],
            registry=registry,
        )
        self._of_method = _Children(self._method_children)
        self._of_call = _Children(self._calls.labels)
        self._of_tensor = _Children(self._tensors.labels)
        self._of_layer = _Children(self._layers.labels)
        ProcessCollector(registry=registry)
        registry.register(_InUse(service, backends, streams, serves))

    def call_ended(self, call: CallRecord) -> None:
        """Counts a call."""
        method = call.method if call.method in METHODS else UNKNOWN_METHOD
        self._of_call(method, call.status).inc()
        seconds, bytes_in, bytes_out = self._of_method(method)
        seconds.observe(call.ended - call.arrived)
        bytes_in.inc(call.bytes_in)
        bytes_out.inc(call.bytes_out)
        if not call.tensors:
            self._refuse(call.status, call.reason)

    def tensor_ended(self, tensor: TensorRecord) -> None:
        """Counts a tensor."""
        backend = tensor.backend or "none"
        self._of_tensor(backend, tensor.status).inc()
        if tensor.error is not None:
            self._refuse(tensor.status, tensor.error.reason)
        if tensor.meter is None:
            return
        self._tensor_seconds.observe(tensor.seconds)
        for name, phase in tensor.meter.phases.items():
            if phase.first is not None:
                self._phases[name].observe(phase.seconds)
        if tensor.error is None:
            for algorithm in tensor.algorithms.values():
                self._of_layer(backend, algorithm).inc()

    def _refuse(self, status: str, reason: str) -> None:
        if status in REFUSED:
            self._refusals.labels(reason if reason in _REASONS else OTHER).inc()

    def _method_children(self, method: str) -> tuple[Histogram, Counter, Counter]:
        return (
            self._call_seconds.labels(method),
            self._bytes_in.labels(method),
            self._bytes_out.labels(method),
        )


class _Children(Generic[T]):
    """A metric's children by their labels, looked up once: that is what costs most in counting."""

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._made: dict[tuple[str, ...], T] = {}

    def __call__(self, *labels: str) -> T:
        """The child with these labels; making one twice at the same time gives the same one."""
        child = self._made.get(labels)
        if child is None:
            child = self._made[labels] = self._make(*labels)
        return child


class _InUse(Collector):
    """What is in use, asked for when a page is made."""

    def __init__(
        self,
        service: Service,
        backends: Registry,
        streams: Callable[[], int],
        serves: Callable[[], bool],
    ) -> None:
        self._service = service
        self._backends = backends
        self._streams = streams
        self._serves = serves

    def describe(self) -> list[Metric]:
        """Nothing: names are checked by the tests, and asking the service is for pages alone."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The gauges, as they are now."""
        service = self._service
        for name, text, value in (
            ("serving", "1 while the server takes work.", int(self._serves())),
            ("bands_in_flight", "Bands of input taken and not computed yet.", service.bands.now),
            ("tensors_running", "Tensors that run.", service.admission.running),
            ("streams_open", "Streams that are open.", self._streams()),
            ("reserved_bytes", "Memory reserved by tensors that run.", service.admission.reserved),
            ("memory_budget_bytes", "Memory for all tensors together.", service.admission.budget),
            ("weights_bytes", "Memory that weights take.", service.store.used),
            ("weights_budget_bytes", "Memory for all weights together.", service.store.budget),
            ("networks", "Networks that are registered.", service.store.count),
        ):
            yield GaugeMetricFamily(f"convservice_{name}", text, value)
        yield from self._of_backends()
        info = InfoMetricFamily("convservice_build", "The server's version.")
        info.add_metric([], {"version": version("convservice"), "python": platform.python_version()})
        yield info

    def _of_backends(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("convservice_backend_up", "1 if a backend can run.", labels=["backend"])
        used = GaugeMetricFamily(
            "convservice_device_memory_bytes",
            "Memory of a device that tensors and weights take.",
            labels=["backend", "device"],
        )
        limit = GaugeMetricFamily(
            "convservice_device_memory_limit_bytes",
            "Memory of a device that may be taken.",
            labels=["backend", "device"],
        )
        for name, backend in self._backends.constructed().items():
            up.add_metric([name], int(backend is not None and not backend.failure))
            for device, (taken, most) in enumerate(_device_memory(backend)):
                used.add_metric([name, str(device)], taken)
                limit.add_metric([name, str(device)], most)
        yield from (up, used, limit)


def _device_memory(backend: object) -> Sequence[tuple[int, int]]:
    return backend.device_memory() if isinstance(backend, TellsDeviceMemory) else ()
