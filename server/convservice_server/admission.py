"""Admission: the byte budget that all running tensors share.

Given the most memory that a tensor will take at any time, `Admission` reserves all of it at the tensor's
header or refuses the tensor; a running tensor never asks for more, so that a server that has begun can
finish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from convservice.bands import TensorSpec
from convservice.errors import Reason, ResourceExhausted
from convservice.network import LayerPlan, Network
from convservice_server.holdings import Holdings

RETRY_AFTER = 1.0
"""Seconds after which a refused tensor that would fit an empty server may be sent again."""


class Admission:
    """Reserves bytes for tensors.

    Args:
        budget: bytes for all running tensors together.
        by_name: counts them by the name of whose tensors they are.
    """

    def __init__(self, budget: int, by_name: Holdings) -> None:
        self.budget = budget
        self._by_name = by_name
        self._lock = threading.Lock()  # guards _by_name, _reserved and _running
        self._reserved = 0
        self._running = 0

    @property
    def reserved(self) -> int:
        """Bytes reserved now."""
        with self._lock:
            return self._reserved

    @property
    def running(self) -> int:
        """Tensors running now."""
        with self._lock:
            return self._running

    @contextmanager
    def reserve(self, name: str, wanted: int, describe: Callable[[], str]) -> Generator[None]:
        """Holds `wanted` bytes while the context lasts; they are released once, however it ends.

        Args:
            name: whose tensor it is.
            wanted: the most bytes the tensor takes at any time.
            describe: says what takes most of them; asked only when the tensor is refused.

        Raises:
            ResourceExhausted: `MEMORY_BUDGET`, or `NAME_LIMIT` for what one name may hold; with
                `retry_after` if an empty server could take the tensor.
        """
        with self._lock:
            free = self.budget - self._reserved
            admitted = wanted <= free
            if admitted:
                self._by_name.take(name, wanted)
                self._reserved += wanted
                self._running += 1
        if not admitted:
            raise self._refused(wanted, free, describe())
        try:
            yield
        finally:
            with self._lock:
                self._by_name.give(name, wanted)
                self._reserved -= wanted
                self._running -= 1

    def _refused(self, wanted: int, free: int, what: str) -> ResourceExhausted:
        fits = wanted <= self.budget
        return ResourceExhausted(
            f"the tensor needs {wanted} bytes of memory while it runs ({what}); {max(free, 0)} of the"
            f" server's {self.budget} are free" + ("" if fits else ", so it can never run here"),
            reason=Reason.MEMORY_BUDGET,
            metadata={"bytes": str(wanted), "free": str(free), "budget": str(self.budget)},
            retry_after=RETRY_AFTER if fits else None,
        )


def largest_holding(network: Network, spec: TensorSpec) -> str:
    """The layer that holds most while the tensor streams, in words: its id, rows and bytes."""
    plans = network.plan((spec.sample.channels, *spec.sample.spatial), spec.dtype)
    most = max(plans, key=_bytes_held)
    return (
        f"layer {most.node!r} holds most: {most.rows_held} rows of {most.input_shape}, {most.bytes_held}"
        f" bytes; a band of the input has {spec.band_bytes}"
    )


def _bytes_held(plan: LayerPlan) -> int:
    return plan.bytes_held
