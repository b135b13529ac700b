"""What is known of a call and of a tensor: ids, times, bytes, and how they ended.

`CallRecord` and `TensorRecord` are what observers are told (`observation`); they are filled while the call
and the tensor run and read when those have ended. Times are those of `time.monotonic`, in seconds.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from convservice.bands import Band
from convservice.errors import ConvServiceError, code_name, to_status
from convservice.metadata import REQUEST_ID
from convservice.wire.headers import TensorRequest
from convservice_backends.interface import SessionPlan

TRACE_HEADERS = ("traceparent", "tracestate")
"""Metadata: the client's trace, as W3C has it."""

UNKNOWN_METHOD = "unknown"
"""The name that every method has that there is not."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,64}")


class Phase:
    """Time spent in one thing, in pieces.

    Attributes:
        seconds: all of it.
        first: when the first piece began; None if there was none.
        last: when the last piece ended.
    """

    __slots__ = ("first", "last", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.first: float | None = None
        self.last = 0.0

    def add(self, start: float, end: float) -> None:
        """Counts a piece."""
        self.seconds += end - start
        self.last = end
        if self.first is None:
            self.first = start


class CallRecord:
    """A call.

    Args:
        method: its name, as the contract has it; `UNKNOWN_METHOD` for a method that there is not.
        request_id: the client's, where it is one that may stand in a log.
        trace: the client's trace headers.

    Attributes:
        owner: whose call it is.
        arrived: when gRPC had its headers.
        began: when a worker took it; until then it waited for one.
        received: when its request had come, for a call of one request.
        ended: when it ended.
        bytes_in, bytes_out: of its messages.
        tensors: how many it has carried.
        status: `"OK"`, or the name of the code that it failed with.
        reason, message: why it failed; empty if it did not. The error itself is not kept: it would hold on to
            the call's frames, and so to its messages, for as long as the record is there.
        peer: where it came from; known of a call that failed.
    """

    __slots__ = (
        "__weakref__",
        "arrived",
        "began",
        "bytes_in",
        "bytes_out",
        "ended",
        "message",
        "method",
        "owner",
        "peer",
        "reason",
        "received",
        "request_id",
        "status",
        "tensors",
        "trace",
    )

    def __init__(
        self, method: str = UNKNOWN_METHOD, request_id: str = "", trace: Mapping[str, str] | None = None
    ) -> None:
        self.method = method
        self.request_id = request_id if _SAFE_ID.fullmatch(request_id) else secrets.token_hex(8)
        self.trace = trace or {}
        self.owner = ""
        self.peer = ""
        self.arrived = self.began = self.received = self.ended = time.monotonic()
        self.bytes_in = self.bytes_out = self.tensors = 0
        self.status, self.reason, self.message = "OK", "", ""

    @classmethod
    def of(cls, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> CallRecord:
        """The record of a call with this metadata."""
        request_id, trace = "", dict[str, str]()
        for key, value in metadata:
            if isinstance(value, str):
                if key == REQUEST_ID:
                    request_id = value
                elif key in TRACE_HEADERS:
                    trace[key] = value
        return cls(method, request_id, trace)

    def fail(self, error: ConvServiceError) -> None:
        """Says why it failed."""
        self.status = code_name(to_status(error).code)
        self.reason, self.message = error.reason, error.message


@dataclass
class Meter:
    """What a tensor took: time per phase, input rows, bytes of output, memory reserved."""

    clock: Callable[[], float]
    queue: Phase = field(default_factory=Phase)
    receive: Phase = field(default_factory=Phase)
    compute: Phase = field(default_factory=Phase)
    send: Phase = field(default_factory=Phase)
    bytes_out: int = 0
    rows: int = 0
    reserved: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def phases(self) -> dict[str, Phase]:
        """The phases by name."""
        return {
            "queue": self.queue,
            "receive": self.receive,
            "compute": self.compute,
            "send": self.send,
        }

    def computed(self, bands: Iterable[Band]) -> Iterator[Band]:
        """The bands as they are computed, the time for each counted."""
        iterator = iter(bands)
        while True:
            start = self.clock()
            band = next(iterator, None)
            self.compute.add(start, self.clock())
            if band is None:
                return
            yield band


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that has ended.

    Attributes:
        call: what carried it.
        tensor_id: the client's number for it.
        network: the name that was asked for.
        meter: what it took; None if its header could not be taken.
        ended: when.
        error: why it failed; None if it did not.
        request: its header; None likewise.
        plan: how it was to pass; None if that was never decided.
        backend: what computed it; empty likewise.
    """

    call: CallRecord
    tensor_id: int
    network: str
    meter: Meter | None
    ended: float
    error: ConvServiceError | None = None
    request: TensorRequest | None = None
    plan: SessionPlan | None = None
    backend: str = ""

    @property
    def status(self) -> str:
        """`"OK"`, or the name of the error's code."""
        return "OK" if self.error is None else code_name(to_status(self.error).code)

    @property
    def seconds(self) -> float:
        """From its header to its end."""
        return 0.0 if self.meter is None else self.ended - self.meter.started

    @property
    def bytes_in(self) -> int:
        """Bytes of input that were taken."""
        if self.meter is None or self.request is None:
            return 0
        return self.meter.rows * self.request.spec.row_bytes

    @property
    def input(self) -> str:
        """Its shape and dtype, in words."""
        if self.request is None:
            return ""
        spec = self.request.spec
        return f"{spec.samples} x {spec.sample} {spec.dtype}"

    @property
    def outputs(self) -> str:
        """The outputs' names, shapes and dtypes, in words."""
        results = () if self.plan is None else self.plan.results
        return "; ".join(f"{result.name} {result.spec.sample} {result.spec.dtype}" for result in results)

    @property
    def algorithms(self) -> Mapping[str, str]:
        """Node id to algorithm."""
        return {} if self.plan is None else self.plan.algorithms
