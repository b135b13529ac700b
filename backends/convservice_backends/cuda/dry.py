"""A device that computes nothing and writes down what it is asked to launch.

Given a network, a tensor's shape and what a device is, `kernels_for` hands on the kernels that such a tensor
needs there: zeros go the very way of a real tensor, through the same planner, operators and session.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from convservice.bands import PAYLOAD_BYTES, Band, TensorSpec, band_rows_for
from convservice.dtypes import DType
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.cuda.device import Bytes, DeviceInfo, Event, Launch, Memory, Transform
from convservice_backends.cuda.source import Kernel


@dataclass(frozen=True)
class _Memory:
    """Memory that is not there."""

    nbytes: int
    address: int = 1 << 40


class _Event:
    """Always in the past."""

    done = True

    def synchronize(self) -> None:
        """Returns."""


class _Stream:
    """Writes launches down."""

    def __init__(self, launched: dict[Kernel, None]) -> None:
        self._launched = launched

    def allocate(self, nbytes: int) -> Memory:
        """See `device.Stream`."""
        return _Memory(nbytes)

    def launch(self, launch: Launch) -> None:
        """See `device.Stream`."""
        self._launched[launch.kernel] = None

    def transform(self, transform: Transform) -> None:
        """See `device.Stream`."""

    def upload(self, source: Bytes, target: Memory, offset: int = 0) -> None:
        """See `device.Stream`."""

    def download(self, source: Memory, target: Bytes) -> None:
        """See `device.Stream`."""

    def record(self) -> Event:
        """See `device.Stream`."""
        return _Event()

    def wait(self, event: Event) -> None:
        """See `device.Stream`."""

    def synchronize(self) -> None:
        """See `device.Stream`."""


class DryDevice:
    """See the module.

    Args:
        info: what it says it is.

    Attributes:
        launched: the kernels it was asked to launch, each once, in order.
    """

    failure = ""

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self.launched: dict[Kernel, None] = {}

    def stream(self) -> _Stream:
        """See `device.Device`."""
        return _Stream(self.launched)

    def allocate(self, nbytes: int) -> Memory:
        """See `device.Device`."""
        return _Memory(nbytes)

    def pinned(self, nbytes: int) -> Bytes:
        """See `device.Device`."""
        return np.zeros(nbytes, np.uint8)

    def close(self) -> None:
        """See `device.Device`."""


def kernels_for(
    network: Network,
    spec: TensorSpec,
    info: DeviceInfo,
    *,
    precision: Precision = Precision.HIGH,
    out_dtype: DType | None = None,
    algorithm: str | None = None,
) -> tuple[Kernel, ...]:
    """The kernels that a tensor needs, in the order of their first launch.

    Launches may follow how many rows come at once, so the tensor goes through twice: whole, and in bands of
    about 1 MiB, as clients send it.

    Args:
        network: the network.
        spec: the tensor; its height must be known.
        info: the device.
        precision: what the caller allows.
        out_dtype: dtype of the results; None for the network's own.
        algorithm: a convolution algorithm to take wherever it fits.

    Raises:
        BackendUnavailable: a device has no such layer.
        InvalidRequest: the tensor does not fit the network, or there is no algorithm of that name.
        ResourceExhausted: the device's memory is too small for the tensor.
    """
    device = DryDevice(info)
    prepared = CudaBackend([device], {}, algorithm=algorithm).prepare(network, precision)
    height = spec.sample.height
    in_bands = min(height, band_rows_for(spec.row_bytes, PAYLOAD_BYTES))
    for band_rows in dict.fromkeys((height, in_bands)):
        banded = replace(spec, band_rows=band_rows)
        session = prepared.open(prepared.plan(banded, out_dtype), check=lambda: None)
        try:
            for band in _zeros(banded):
                for _ in session.submit(band):
                    pass
            for _ in session.finish():
                pass
        finally:
            session.close()
    return tuple(device.launched)


def _zeros(spec: TensorSpec) -> list[Band]:
    """The bands of a tensor of zeros: all samples in one, or each in its parts. They take no memory."""
    zero, shape, height = np.zeros((), spec.dtype.numpy), spec.sample, spec.sample.height
    if spec.band_rows >= height:
        return [Band(np.broadcast_to(zero, (spec.samples, shape.channels, height, *shape.rest)))]
    return [
        Band(
            np.broadcast_to(zero, (1, shape.channels, min(spec.band_rows, height - row), *shape.rest)),
            sample,
            row,
        )
        for sample in range(spec.samples)
        for row in range(0, height, spec.band_rows)
    ]
