"""The log's lines about calls and tensors.

Each tensor has one line, whatever came of it, and so has each call that carried none: registrations, uploads,
questions, refusals. Every line has the call's request id, which the client knows. What fails is logged no
faster than a person can read, and the next line says how many were left out.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from convservice_server.calls import Clock
from convservice_server.observation import Observer
from convservice_server.records import CallRecord, TensorRecord

log = logging.getLogger(__name__)

_BURST = 50
"""Lines about failed calls and tensors that may come at once."""

_PER_SECOND = 10.0
"""Lines about failed calls and tensors that may come in the long run."""


class Budget:
    """How many lines may be written: a burst, then so many a second.

    Args:
        burst: at once.
        per_second: in the long run.
        clock: tells the time.
    """

    def __init__(self, burst: int, per_second: float, clock: Clock = time.monotonic) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._lock = threading.Lock()  # guards the fields below
        self._left = float(burst)
        self._since = clock()
        self._left_out = 0

    def take(self) -> int | None:
        """How many lines were left out before this one; None if this one is to be left out too."""
        with self._lock:
            now = self._clock()
            self._left = min(self._burst, self._left + (now - self._since) * self._per_second)
            self._since = now
            if self._left < 1:
                self._left_out += 1
                return None
            self._left -= 1
            left_out, self._left_out = self._left_out, 0
            return left_out


class Lines(Observer):
    """Writes the lines.

    Args:
        budget: for lines about failed calls and tensors.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self._budget = budget or Budget(_BURST, _PER_SECOND)

    def call_ended(self, call: CallRecord) -> None:
        """One line for a call without a tensor, unless it is one too many."""
        if call.tensors or not log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "call": call.method,
            "request_id": call.request_id,
            "total_ms": _milliseconds(call.ended - call.arrived),
            "queue_ms": _milliseconds(call.began - call.arrived),
            "bytes_in": call.bytes_in,
            "bytes_out": call.bytes_out,
            "status": call.status,
        }
        if call.owner:
            fields["owner"] = call.owner
        if call.status != "OK":
            if not self._admits(fields):
                return
            fields |= {"peer": call.peer, "reason": call.reason, "error": call.message}
        log.info("call", extra={"fields": fields})

    def tensor_ended(self, tensor: TensorRecord) -> None:
        """One line, unless it is one too many."""
        if not log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "call": tensor.call.method,
            "request_id": tensor.call.request_id,
            "tensor_id": tensor.tensor_id,
            "network": tensor.network,
        }
        if tensor.call.owner:
            fields["owner"] = tensor.call.owner
        if tensor.meter is not None:
            fields |= {
                "input": tensor.input,
                "outputs": tensor.outputs,
                "backend": tensor.backend,
                "algorithms": ",".join(sorted(set(tensor.algorithms.values()))),
                "total_ms": _milliseconds(tensor.seconds),
                **{f"{name}_ms": _milliseconds(phase.seconds) for name, phase in tensor.meter.phases.items()},
                "bytes_in": tensor.bytes_in,
                "bytes_out": tensor.meter.bytes_out,
                "reserved_bytes": tensor.meter.reserved,
            }
        fields["status"] = tensor.status
        if tensor.error is not None:
            if not self._admits(fields):
                return
            fields |= {"reason": tensor.error.reason, "error": tensor.error.message}
        log.info("tensor", extra={"fields": fields})

    def _admits(self, fields: dict[str, Any]) -> bool:
        """Whether a line about what failed may be written; it is told how many were not before it."""
        left_out = self._budget.take()
        if left_out:
            fields["lines_left_out"] = left_out
        return left_out is not None


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
