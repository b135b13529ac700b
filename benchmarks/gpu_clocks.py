"""How long work on a device takes: by the device's events, and on the host that asks for it.

A `Clock` is given a function that asks for one piece of work and hands on `Times`. On a GPU (`EventClock`)
the work is asked for while the device is kept waiting, so that between the two events it never waits for the
host: that is the device's time. The same asked for without that head start shows what the host costs.

Caches. Pieces of work follow one another on several copies of their tensors, more bytes in all than the last
level cache holds, so that each finds its tensors in device memory, as a layer of a large network does. Small
layers would take thousands of copies: their number is bounded, and the smallest may stay in the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from convservice_backends.cuda.device import Stream

Ask = Callable[[int], None]
"""Asks for one piece of work, given the number of the piece."""

MOST_CALLS = 200
"""Pieces asked for in one go: the driver's queue takes about a thousand launches before the host waits."""

CACHES = 2.5
"""Bytes that copies take, in sizes of the last level cache."""

REPEATS = 7
"""Measurements of which the median counts."""

FEWER_REPEATS = 3
"""For what nobody would be given: algorithms that were not chosen."""

MOST_COPIES = 128
LONGEST_HEAD_START = 0.5  # seconds
CYCLES = 2e9  # about what a device's clock makes in a second; a longer head start does no harm


@dataclass(frozen=True)
class Times:
    """Of one piece of work, in seconds; medians where nothing else is said.

    Attributes:
        device: between events, the device never waiting for the host.
        host: for asking.
        unaided: between events, without a head start.
        fastest: the least that `device` is a median of.
        slowest: the most.
    """

    device: float
    host: float
    unaided: float
    fastest: float
    slowest: float


class Clock(Protocol):
    """Measures."""

    @property
    def cache_bytes(self) -> int:
        """Size of the device's last level cache; 0 where it does not matter."""
        ...

    def times(self, ask: Ask, copies: int, repeats: int = REPEATS) -> Times:
        """Measures a piece of work.

        Args:
            ask: asks for it.
            copies: after so many pieces the same memory is used again.
            repeats: measurements.
        """
        ...


def copies_for(nbytes: int, cache_bytes: int) -> int:
    """Copies of tensors of so many bytes that a cache does not hold."""
    return max(1, min(MOST_COPIES, -(-int(CACHES * cache_bytes) // max(1, nbytes))))


def calls_for(seconds: float, one: float, copies: int) -> int:
    """Pieces in one go: about as many seconds of work, each copy at least once, at most `MOST_CALLS`."""
    return max(1, min(MOST_CALLS, max(copies, round(seconds / max(one, 1e-7)))))


class HostClock:
    """Times on the host, measured once, for a device that is emulated: they mean nothing there.

    Args:
        stream: on which the work is asked for.
    """

    cache_bytes = 0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def times(self, ask: Ask, copies: int, repeats: int = REPEATS) -> Times:
        """See `Clock`."""
        begin = time.perf_counter()
        for piece in range(copies):
            ask(piece)
        asked = (time.perf_counter() - begin) / copies
        self._stream.synchronize()
        whole = (time.perf_counter() - begin) / copies
        return Times(whole, asked, whole, whole, whole)


class EventClock:
    """Times between events on a stream of a GPU, through PyTorch.

    Args:
        torch: the module.
        stream: PyTorch's stream on which the work is asked for.
        seconds: of work in one measurement, about.
    """

    def __init__(self, torch: Any, stream: Any, seconds: float = 0.005) -> None:
        self._torch = torch
        self._stream = stream
        self._seconds = seconds
        self.cache_bytes = int(torch.cuda.get_device_properties(stream.device).L2_cache_size)

    def times(self, ask: Ask, copies: int, repeats: int = REPEATS) -> Times:
        """See `Clock`."""
        with self._torch.cuda.stream(self._stream):
            warm = max(copies, 2)
            self._run(ask, warm, 0.0)
            one, host = self._run(ask, warm, 0.0)
            calls = calls_for(self._seconds, one, copies)
            ahead = min(LONGEST_HEAD_START, 2 * host * calls + 0.0002)
            aided = [self._run(ask, calls, ahead) for _ in range(repeats)]
            unaided = [self._run(ask, calls, 0.0) for _ in range(repeats)]
        devices = [device for device, _ in aided]
        return Times(
            statistics.median(devices),
            statistics.median(host for _, host in aided),
            statistics.median(device for device, _ in unaided),
            min(devices),
            max(devices),
        )

    def _run(self, ask: Ask, calls: int, ahead: float) -> tuple[float, float]:
        """Seconds of one piece on the device and on the host, the device kept waiting for `ahead` seconds."""
        torch, stream = self._torch, self._stream
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(ahead * CYCLES))  # noqa: SLF001 - PyTorch's own benchmarks use it
        start.record(stream)
        begin = time.perf_counter()
        for piece in range(calls):
            ask(piece)
        host = time.perf_counter() - begin
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls, host / calls
