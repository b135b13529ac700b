"""What runs kernels: device memory, streams in which work is done in order, events that order streams.

`Device` is the one thing that differs between a GPU and the processor that stands in for it in tests. All
work is asynchronous: a call on a `Stream` returns at once, and what it was given must stay as it is until
an event recorded after it has passed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from convservice_backends.cuda.source import Kernel

Bytes = NDArray[np.uint8]


class Memory(Protocol):
    """Device memory; given back when the last reference is gone."""

    @property
    def address(self) -> int:
        """Of the first byte, a multiple of 256."""
        ...

    @property
    def nbytes(self) -> int:
        """Its size."""
        ...


@dataclass(frozen=True)
class Launch:
    """One kernel, over one grid.

    Attributes:
        kernel: which.
        grid: blocks along x, y and z.
        arguments: what it is given, by value.
        holds: memory that must not go before the kernel has run.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: ctypes.Structure
    holds: Sequence[Memory] = field(default=())


@dataclass(frozen=True)
class Transform:
    """Discrete Fourier transforms of real arrays, all in one memory; not scaled, in float64.

    Forward, `source` is (count, rows, columns) float64, `target` (count, rows, columns / 2 + 1) complex128,
    the half of each spectrum that says all; backward they are the other way round, and what was in the
    source is lost.

    Attributes:
        memory: which has both.
        source: bytes before what is transformed, a multiple of 16.
        target: bytes before the result, a multiple of 16.
        count: arrays.
        rows: of an array; 1 where its transform is of one dimension.
        columns: of an array, an even number.
        inverse: backward, from spectra to arrays.
    """

    memory: Memory
    source: int
    target: int
    count: int
    rows: int
    columns: int
    inverse: bool

    @property
    def real_shape(self) -> tuple[int, int, int]:
        """Of the float64 arrays."""
        return (self.count, self.rows, self.columns)

    @property
    def spectrum_shape(self) -> tuple[int, int, int]:
        """Of the complex128 spectra."""
        return (self.count, self.rows, self.columns // 2 + 1)


class Event(Protocol):
    """A place in a stream's work."""

    @property
    def done(self) -> bool:
        """Whether the work before it is done; never waits."""
        ...

    def synchronize(self) -> None:
        """Returns when the work before it is done.

        Raises:
            DeviceLost: the device has failed for good.
        """
        ...


class Stream(Protocol):
    """Work done one after the other."""

    def allocate(self, nbytes: int) -> Memory:
        """Memory for work on this stream; it may have been used by earlier work on it.

        Raises:
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`, with the bytes wanted and the limit.
        """
        ...

    def launch(self, launch: Launch) -> None:
        """Runs a kernel."""
        ...

    def transform(self, transform: Transform) -> None:
        """Runs transforms; what a library needs for it beside the memory comes from the device's.

        Raises:
            BackendUnavailable: the library that transforms is not installed.
        """
        ...

    def upload(self, source: Bytes, target: Memory, offset: int = 0) -> None:
        """Copies from page-locked memory to the device's, `offset` bytes behind its beginning."""
        ...

    def download(self, source: Memory, target: Bytes) -> None:
        """Copies from the beginning of the device's memory to page-locked memory, all that fits `target`."""
        ...

    def record(self) -> Event:
        """Marks this place."""
        ...

    def wait(self, event: Event) -> None:
        """Does nothing further before `event`, of any stream of the device, has passed."""
        ...

    def synchronize(self) -> None:
        """Returns when all its work is done.

        Raises:
            DeviceLost: the device has failed for good.
        """
        ...


@dataclass(frozen=True)
class DeviceInfo:
    """What a device is.

    Attributes:
        name: its model; bits are promised per model.
        architecture: compute capability, 10 * major + minor.
        processors: multiprocessors, each of which runs blocks of its own.
        memory_bytes: what the backend may take of its memory.
    """

    name: str
    architecture: int
    processors: int
    memory_bytes: int


class Device(Protocol):
    """One device."""

    @property
    def info(self) -> DeviceInfo:
        """What it is."""
        ...

    @property
    def failure(self) -> str:
        """Why it has failed for good: an error after which no call on it succeeds; empty while it works."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Memory of no stream, for what stays: it is given back to the device itself, in no stream's order.

        Raises:
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`, with the bytes wanted and the limit.
        """
        ...

    def pinned(self, nbytes: int) -> Bytes:
        """Page-locked memory of the host, which copies read and write by themselves.

        Raises:
            ResourceExhausted: the host has no more of it.
        """
        ...

    def close(self) -> None:
        """Gives everything back."""
        ...


__all__ = ["Bytes", "Device", "DeviceInfo", "Event", "Launch", "Memory", "Stream", "Transform"]
