"""A backend on CUDA devices, whatever runs the kernels.

`CudaBackend` is given the devices (one model; samples are spread over them) and does the rest: prepares
networks, keeps streams and memory of each device, says when a device has failed for good. CuPy's backend and
the one for tests differ only in the devices they bring.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from convservice.errors import BackendUnavailable, ConvServiceError, Reason
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.device import Device
from convservice_backends.cuda.lanes import Streams
from convservice_backends.cuda.memory import DeviceMemory
from convservice_backends.cuda.network import CudaNetwork
from convservice_backends.cuda.operators import LAYERS
from convservice_backends.interface import Description
from convservice_backends.operators import require_layers
from convservice_backends.plan import Manner

log = logging.getLogger(__name__)

RUN_BYTES = 64 << 20
"""Preferred bytes of a run: enough that a launch takes far longer than asking for it."""

WHOLE_BYTES = 2 << 20
"""Samples of at most so many bytes go whole."""

PIECE_BYTES = 8 << 20
"""Rows that are handed at a time to branches that meet again, which hold about as much."""

KEPT_STREAMS = 8
"""Lanes whose streams, and the memory that was freed on them, are kept for the next sessions."""

MANNER = Manner(run_bytes=RUN_BYTES, whole_bytes=WHOLE_BYTES, piece_bytes=PIECE_BYTES, float_rows=True)


class DeviceContext:
    """One device with what all its sessions share.

    Attributes:
        device: the device.
        memory: what of its memory is taken.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory = DeviceMemory(device)
        self._lock = threading.Lock()  # guards _streams
        self._streams: list[Streams] = []

    @contextmanager
    def streams(self) -> Generator[Streams]:
        """Three streams for one session, used before by another where there are any."""
        with self._lock:
            streams = self._streams.pop() if self._streams else None
        streams = streams or Streams.of(self.device)
        try:
            yield streams
        finally:
            with self._lock:
                if len(self._streams) < KEPT_STREAMS:
                    self._streams.append(streams)


class CudaBackend:
    """Convolution on CUDA devices.

    Args:
        devices: the devices, all of one model: bits are promised per model.
        versions: libraries that bits depend on, name to version.
        algorithm: a convolution algorithm to take wherever it fits.
        manner: run and sample sizes.
    """

    name: ClassVar[str] = "cuda"

    def __init__(
        self,
        devices: Sequence[Device],
        versions: dict[str, str],
        *,
        algorithm: str | None = None,
        manner: Manner = MANNER,
    ) -> None:
        if not devices:
            raise BackendUnavailable("there is no CUDA device", reason=Reason.BACKEND_UNAVAILABLE)
        self._contexts = tuple(DeviceContext(device) for device in devices)
        self._versions = versions
        self._algorithm = algorithm
        self._manner = manner

    @property
    def failure(self) -> str:
        """Why it cannot be used any more; empty while it works."""
        return next((context.device.failure for context in self._contexts if context.device.failure), "")

    @property
    def contexts(self) -> tuple[DeviceContext, ...]:
        """The devices with what their sessions share."""
        return self._contexts

    def describe(self) -> Description:
        """The devices' model, the libraries, and how many devices there are."""
        return Description(self._contexts[0].device.info.name, self._versions, len(self._contexts))

    def device_memory(self) -> tuple[tuple[int, int], ...]:
        """Per device: bytes promised to tensors and taken by weights, and the most that may be taken."""
        return tuple(
            (context.memory.promised + context.memory.resident, context.device.info.memory_bytes)
            for context in self._contexts
        )

    def prepare(self, network: Network, precision: Precision) -> CudaNetwork:
        """Puts a network's algorithms in place; its weights follow when a session is first opened.

        Raises:
            BackendUnavailable: a layer that this backend has no operator for.
        """
        require_layers(network, LAYERS, self.name)
        return CudaNetwork(network, precision, self._contexts, self._manner, self._algorithm)

    def close(self) -> None:
        """Gives the devices back, each also where another cannot be."""
        for context in self._contexts:
            try:
                context.memory.close()
                context.device.close()
            except ConvServiceError as exc:
                log.warning("a device could not be closed: %s", exc.message)
