"""Lanes: the three streams and the slots by which bands reach a device and results leave it.

Uploads, kernels and downloads are each work of one kind, done in order, by engines of the device that work
side by side: one stream for each kind, and events where one kind waits for another. A `Slot` is page-locked
memory of the host with its counterpart on the device; there are a few each way, so that a band goes up
while its neighbour is computed and the one before comes down.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.errors import BackendUnavailable
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import Bytes, Device, Event, Memory, Stream
from convservice_backends.cuda.elementwise import DeviceArrays

log = logging.getLogger(__name__)

SLOTS = 3
"""Slots each way."""

SLOT_BYTES = 8 << 20
"""Size of a slot, unless one row or one small sample is larger: some 200 microseconds of a PCIe link."""


@dataclass(eq=False)
class Slot:
    """Memory on both sides.

    Attributes:
        host: page-locked.
        memory: on the device.
        free: passes when the device has no more use for it; None where it has none now.
        done: passes when what is in it has come down.
    """

    host: Bytes
    memory: Memory
    free: Event | None = None
    done: Event | None = None

    @property
    def is_free(self) -> bool:
        """Whether the host may write it now."""
        return self.free is None or self.free.done

    def wait_free(self) -> None:
        """Returns when the host may write it."""
        if self.free is not None:
            self.free.synchronize()
            self.free = None

    @property
    def is_down(self) -> bool:
        """Whether what is in it has come down."""
        return self.done is None or self.done.done

    def wait_down(self) -> None:
        """Returns when what is in it has come down."""
        if self.done is not None:
            self.done.synchronize()


@dataclass(eq=False)
class Streams:
    """One lane's streams, handed from session to session: memory freed on a stream is found there again."""

    upload: Stream
    compute: Stream
    download: Stream

    @classmethod
    def of(cls, device: Device) -> Streams:
        """New streams."""
        return cls(device.stream(), device.stream(), device.stream())

    def synchronize(self) -> None:
        """Returns when all three are done."""
        for stream in (self.upload, self.compute, self.download):
            stream.synchronize()


@dataclass(eq=False)
class Lane:
    """One session's way through one device.

    Attributes:
        device: the device.
        streams: its streams.
        in_bytes: size of a slot that bands go up in.
        out_bytes: size of a slot that results come down in.
        slots: slots each way.
    """

    device: Device
    streams: Streams
    in_bytes: int
    out_bytes: int
    slots: int = SLOTS
    _all: list[Slot] = field(default_factory=list[Slot], init=False)
    """Every slot, whoever has it: a copy may be at work on its memory until `close` has waited."""
    _up: deque[Slot] = field(default_factory=deque[Slot], init=False)
    _down: list[Slot] = field(default_factory=list[Slot], init=False)
    _made_down: int = field(default=0, init=False)
    _asked: Event | None = field(default=None, init=False)
    """Behind the last work on rows that were sent up before those that come now."""

    def up(self, rows: NDArray[np.generic], dtype: DType) -> tuple[Slot, DeviceArray]:
        """Sends rows (samples, channels, rows, *rest) of at most `in_bytes` up.

        Returns:
            The slot, to be given to `taken` once all kernels that read the rows are launched, and the rows on
            the device, for work on the compute stream.
        """
        slot = self._free_up()
        size = math.prod(rows.shape) * dtype.itemsize
        packed = slot.host[:size].view(dtype.numpy).reshape(rows.shape)
        np.copyto(packed, rows)
        self.streams.upload.upload(slot.host[:size], slot.memory)
        self.streams.compute.wait(self.streams.upload.record())
        return slot, DeviceArray.packed(slot.memory, rows.shape, dtype)

    def taken(self, slot: Slot) -> None:
        """Says that everything that reads the slot is launched."""
        slot.free = self._asked = self.streams.compute.record()
        self._up.append(slot)

    def is_behind(self) -> bool:
        """Whether the device is still at work on earlier rows, so that later ones may wait for more."""
        return self._asked is not None and not self._asked.done

    def _free_up(self) -> Slot:
        if len(self._up) < self.slots and not (self._up and self._up[0].is_free):
            # Of the upload stream's memory: an upload has nothing to wait for.
            return self._slot(self.in_bytes, self.streams.upload)
        slot = self._up.popleft()
        slot.wait_free()
        return slot

    @property
    def has_room_down(self) -> bool:
        """Whether a result can be sent down without waiting for one to be taken."""
        return bool(self._down) or self._made_down < self.slots

    def down(self, rows: DeviceArray) -> tuple[Slot, NDArray[np.generic]]:
        """Sends rows of at most `out_bytes` down; there must be room.

        Returns:
            The slot, to be given back to `emptied`, and the rows on the host, there when `slot.done` passes.
        """
        if self._down:
            slot = self._down.pop()
        else:
            slot = self._slot(self.out_bytes, self.streams.compute)
            self._made_down += 1
        packed = DeviceArray.packed(slot.memory, rows.shape, rows.dtype)
        DeviceArrays(self.streams.compute).copy(rows, packed)
        self.streams.download.wait(self.streams.compute.record())
        self.streams.download.download(slot.memory, slot.host[: packed.nbytes])
        slot.done = self.streams.download.record()
        return slot, slot.host[: packed.nbytes].view(rows.dtype.numpy).reshape(rows.shape)

    def emptied(self, slot: Slot) -> None:
        """Says that the host has no more use for what came down in a slot."""
        slot.done = None
        self._down.append(slot)

    def close(self) -> None:
        """Waits for all work, then gives the slots back, also where the device has failed."""
        try:
            self.streams.synchronize()
        except BackendUnavailable as exc:
            log.warning("a session ends on a device that has failed: %s", exc.message)
        finally:
            self._up.clear()
            self._down.clear()
            self._all.clear()
            self._asked = None

    def _slot(self, nbytes: int, stream: Stream) -> Slot:
        slot = Slot(self.device.pinned(nbytes), stream.allocate(nbytes))
        self._all.append(slot)
        return slot


def locked_bytes(nbytes: int) -> int:
    """What page-locked memory of a slot takes: pools keep it in powers of two, up to a slot's common size."""
    return nbytes if nbytes > SLOT_BYTES else 1 << max(9, (nbytes - 1).bit_length())


def slot_bytes(unit: int, most: int) -> int:
    """Size of a slot for pieces that are made of units (a row, a small sample), `most` bytes in all."""
    return max(1, unit, min(most, SLOT_BYTES // max(1, unit) * unit))
