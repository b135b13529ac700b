"""Sessions on devices: bands go up, through the stages, and down, each at the same time as its neighbours.

A `DeviceSession` is given bands of the host's memory and cuts them into pieces that fit a slot. Each piece
goes up to one device, through the same driver that moves rows on any backend (`session.FlowSession` or
`session.WholeSession`, on device arrays), and what the driver hands on is sent down. All of this is only
asked for, not waited for: a result is waited for when all slots are taken, or when the caller drains. While a
device is still at work on earlier rows, rows are collected into larger runs: the device does not idle for it,
and a large launch is worth more than many small ones. Where there are several devices, samples take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from convservice.bands import Band
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.lanes import Lane, Slot
from convservice_backends.interface import Check
from convservice_backends.plan import NetworkPlan
from convservice_backends.session import FlowSession, WholeSession


@dataclass(eq=False)
class Way:
    """One device's part in a session: its lane, and the driver of its stages."""

    lane: Lane
    driver: FlowSession | WholeSession


@dataclass(frozen=True, eq=False)
class _Ticket:
    """A result on its way down."""

    way: Way
    slot: Slot
    band: Band


class DeviceSession:
    """One tensor's passage through one network on one or several devices; see `interface.Session`.

    Args:
        plan: how the tensor passes.
        ways: the devices, each with its lane and driver.
        check: raises when the work is no longer wanted.
        resources: closed with the session: lanes and drivers, weights in use, promises of memory.
    """

    def __init__(self, plan: NetworkPlan, ways: Sequence[Way], check: Check, resources: ExitStack) -> None:
        self._plan = plan
        self._ways = list(ways)
        self._check = check
        self._resources = resources
        self._pending: deque[_Ticket] = deque()
        self._sample = 0  # the next that has not wholly been given
        self._rows = 0  # of it that have been given
        self._way = 0

    def submit(self, band: Band) -> Iterator[Band]:
        """Takes the next rows; hands on what has come down, and what must before more can go up."""
        height = self._plan.spec.sample.rows
        if self._plan.whole and band.array.shape[2] == height:
            yield from self._whole(band.array)
        else:
            for index in range(band.array.shape[0]):
                yield from self._rows_of_one(band.array[index : index + 1])
        while self._pending and self._pending[0].slot.is_down:
            yield from self._deliver()

    def drain(self) -> Iterator[Band]:
        """Hands on all results of what was given so far."""
        for way in self._ways:
            yield from self._sent_down(way, way.driver.drain())
        while self._pending:
            yield from self._deliver()

    def finish(self) -> Iterator[Band]:
        """Ends the input and hands on the rest."""
        if self._plan.spec.sample.rows is None:
            way = self._ways[self._way]
            yield from self._sent_down(way, way.driver.finish())
        yield from self.drain()

    def close(self) -> None:
        """Waits for what is under way and gives everything back; more than once does no harm."""
        self._pending.clear()
        self._ways = []
        self._resources.close()

    def _whole(self, samples: NDArray[Any]) -> Iterator[Band]:
        """Whole small samples: as many at a time as fit a slot and the plan's stack, some for each device."""
        count = samples.shape[0]
        step = max(1, min(self._samples_at_once(), -(-count // len(self._ways))))
        for first in range(0, count, step):
            piece = samples[first : first + step]
            yield from self._through(piece)
            self._sample += piece.shape[0]
            self._turn()

    def _rows_of_one(self, sample: NDArray[Any]) -> Iterator[Band]:
        """Rows of one sample, a piece at a time."""
        spec, count = self._plan.spec, sample.shape[2]
        step = max(1, self._ways[0].lane.in_bytes // spec.row_bytes)
        for first in range(0, count, step):
            piece = sample[:, :, first : first + step]
            yield from self._through(piece)
            self._rows += piece.shape[2]
        if self._rows == spec.sample.rows:
            self._rows = 0
            self._sample += 1
            self._turn()

    def _turn(self) -> None:
        """The next device's turn."""
        self._way = (self._way + 1) % len(self._ways)

    def _samples_at_once(self) -> int:
        spec = self._plan.spec
        sample_bytes = spec.sample.elements * spec.dtype.itemsize
        return max(1, min(self._plan.stack, self._ways[0].lane.in_bytes // max(1, sample_bytes)))

    def _through(self, piece: NDArray[Any]) -> Iterator[Band]:
        """Sends one piece up and through the driver, and what that hands on down."""
        self._check()
        way = self._ways[self._way]
        slot, rows = way.lane.up(piece, self._plan.spec.dtype)
        way.driver.sample = self._sample
        array: Any = rows
        yield from self._sent_down(way, way.driver.submit(Band(array, self._sample, self._rows)))
        way.lane.taken(slot)

    def _sent_down(self, way: Way, bands: Iterator[Band]) -> Iterator[Band]:
        for band in bands:
            rows: Any = band.array
            for piece, sample, row in _pieces(rows, band, way.lane.out_bytes):
                while not way.lane.has_room_down:
                    yield from self._deliver()
                slot, host = way.lane.down(piece)
                self._pending.append(_Ticket(way, slot, Band(host, sample, row, band.output)))

    def _deliver(self) -> Iterator[Band]:
        """Waits for the oldest result and hands it on; its slot is free when the caller comes back."""
        self._check()
        ticket = self._pending.popleft()
        ticket.slot.wait_down()
        try:
            yield ticket.band
        finally:
            ticket.way.lane.emptied(ticket.slot)


def _pieces(rows: DeviceArray, band: Band, most: int) -> Iterator[tuple[DeviceArray, int, int]]:
    """Parts of a band that fit `most` bytes: whole samples, or rows of one; with sample and first row."""
    sample_bytes = rows[:1].nbytes
    if sample_bytes <= most:
        step = max(1, most // max(1, sample_bytes))
        for first in range(0, rows.shape[0], step):
            yield rows[first : first + step], band.sample + first, band.first_row
        return
    step = max(1, most // max(1, rows[:1, :, :1].nbytes))
    for index in range(rows.shape[0]):
        for first in range(0, rows.shape[2], step):
            piece = rows[index : index + 1, :, first : first + step]
            yield piece, band.sample + index, band.first_row + first
