"""One tensor's passage through one network, from its header to its report.

Given a tensor's header, `Passage` finds network and backend, plans, reserves the memory and opens a session;
given bands of input it hands on the outputs' bytes as soon as they are computed. It measures what it does and
writes the one line that the log has about a tensor, whatever came of it. The stream and the unary call are
both made of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from convservice.bands import Band
from convservice.errors import Cancelled, ConvServiceError, DeadlineExceeded, Reason, code_name, to_status
from convservice.packing import BandPacker
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import ResultSpec, TensorReport, TensorRequest
from convservice_backends.interface import Session, SessionPlan
from convservice_backends.registry import Registry
from convservice_server.admission import Admission, largest_holding
from convservice_server.calls import Call, Clock
from convservice_server.faults import as_error
from convservice_server.store import Store

log = logging.getLogger(__name__)

AtHand = Callable[[], bool]
"""Whether the next rows have already come."""


def nothing_at_hand() -> bool:
    """False: whoever does not know waits for no rows."""
    return False


@dataclass(frozen=True)
class Engine:
    """What every tensor passes through.

    Attributes:
        registry: the backends.
        store: the networks.
        admission: the memory.
        clock: tells the time.
    """

    registry: Registry
    store: Store
    admission: Admission
    clock: Clock


class Packing(NamedTuple):
    """How a tensor's results leave.

    Attributes:
        results: the outputs, with the bands they are packed in.
        buffer_bytes: memory for messages on both sides while the tensor runs.
    """

    results: tuple[ResultSpec, ...]
    buffer_bytes: int


class Piece(NamedTuple):
    """The next bytes of one output."""

    output: int
    offset: int
    data: bytes


@dataclass
class Meter:
    """What a tensor took: seconds per phase, input rows, bytes of output."""

    clock: Clock
    receive: float = 0.0
    compute: float = 0.0
    send: float = 0.0
    bytes_out: int = 0
    rows: int = 0
    reserved: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def computed(self, bands: Iterable[Band]) -> Iterator[Band]:
        """The bands as they are computed, the time for each counted."""
        iterator = iter(bands)
        while True:
            start = self.clock()
            band = next(iterator, None)
            self.compute += self.clock() - start
            if band is None:
                return
            yield band


class Passage:
    """One tensor on its way; `start` admits it, `logged` ends it however far it came.

    Args:
        engine: what it passes through.
        request: its header.
        call: whose tensor it is.
        carrier: the RPC's name, for the log.

    Attributes:
        request: its header.
        meter: what it has taken so far.
        deadline: by the engine's clock, when its own time is over; None for never.
    """

    def __init__(self, engine: Engine, request: TensorRequest, call: Call, carrier: str) -> None:
        self.request = request
        self.meter = Meter(engine.clock)
        self._engine = engine
        self._call = call
        self._carrier = carrier
        self.deadline = engine.clock() + request.timeout_ms / 1000 if request.timeout_ms else None
        self._stack = ExitStack()
        self._backend = request.backend
        self._plan: SessionPlan | None = None
        self._session: Session | None = None
        self._packers: dict[str, tuple[int, BandPacker]] = {}
        self._offsets: list[int] = []

    def start(self, pack: Callable[[SessionPlan], Packing]) -> tuple[ResultSpec, ...]:
        """Plans the tensor, reserves its memory and opens its session.

        Args:
            pack: given the plan, says how the results leave, or raises.

        Returns:
            The outputs as they will be packed.

        Raises:
            NetworkNotFound, BackendUnavailable, InvalidRequest, ResourceExhausted: it cannot pass here.
        """
        request, engine = self.request, self._engine
        use = self._stack.enter_context(engine.store.use(self._call.owner, request.network))
        backend = engine.registry.resolve(request.backend)
        self._backend = backend.name
        prepared = use.prepared(backend, request.precision)
        plan = self._plan = prepared.plan(request.spec, request.out_dtype)
        results, buffer_bytes = pack(plan)
        wanted = plan.peak_bytes + buffer_bytes
        held = engine.admission.reserve(wanted, lambda: largest_holding(use.network, request.spec))
        self._stack.enter_context(held)
        self.meter.reserved = wanted
        self._packers = {result.name: (result.index, BandPacker(result.spec)) for result in results}
        self._offsets = [0] * len(results)
        if request.spec.samples:
            self._session = prepared.open(plan, self.check)
            self._stack.callback(self._session.close)
        return results

    def check(self) -> None:
        """Returns while the tensor is wanted; asked between blocks and between messages.

        Raises:
            Cancelled: the call was given up.
            DeadlineExceeded: the call's deadline, or the tensor's own time, has passed.
        """
        self._call.check()
        if self.deadline is not None and self._engine.clock() >= self.deadline:
            raise self.overdue()

    def overdue(self) -> DeadlineExceeded:
        """What a tensor is told whose own time is over."""
        return DeadlineExceeded(
            f"the tensor was not done within {self.request.timeout_ms} ms",
            reason=Reason.DEADLINE,
            metadata={"timeout_ms": str(self.request.timeout_ms)},
        )

    def take(self, bands: Iterable[Band], at_hand: AtHand = nothing_at_hand) -> Iterator[Piece]:
        """Takes the next rows and hands on the bytes that can now be computed: all of them, unless more
        rows are at hand already, which may be given to the backend first."""
        for band in bands:
            self.check()
            samples, _, rows = band.array.shape[:3]
            self.meter.rows += samples * rows
            if self._session is not None:
                yield from self._pieces(self._session.submit(band))
        if self._session is not None and not at_hand():
            yield from self._pieces(self._session.drain())
        for index, packer in self._packers.values():
            yield from self._numbered(index, packer.flush())
        self.check()

    def finish(self) -> Iterator[Piece]:
        """Says that the input has ended and hands on the rest."""
        if self._session is not None:
            yield from self._pieces(self._session.finish())
        for index, packer in self._packers.values():
            yield from self._numbered(index, packer.finish())
        self.check()

    def report(self) -> TensorReport:
        """How it went, once it has started."""
        meter = self.meter
        return TensorReport(
            backend=self._backend,
            algorithms=dict(self._plan.algorithms) if self._plan is not None else {},
            input_rows=meter.rows,
            total=self._engine.clock() - meter.started,
            receive=meter.receive,
            compute=meter.compute,
            send=meter.send,
            reserved_bytes=meter.reserved,
        )

    def close(self) -> None:
        """Gives back session, memory and network; more than once does no harm. A backend that has failed for
        good goes out of service before the next request asks for it."""
        self._session = None
        self._packers = {}
        try:
            self._stack.close()
        finally:
            self._engine.registry.review()

    def log(self, error: ConvServiceError | None) -> None:
        """Writes the tensor's line, with `error` or OK as its status."""
        if not log.isEnabledFor(logging.INFO):
            return
        request, report, plan = self.request, self.report(), self._plan
        results = () if plan is None else plan.results
        fields = {
            "call": self._carrier,
            "tensor_id": request.tensor_id,
            "network": request.network,
            "input": f"{request.spec.samples} x {request.spec.sample} {request.spec.dtype}",
            "outputs": "; ".join(
                f"{result.name} {result.spec.sample} {result.spec.dtype}" for result in results
            ),
            "backend": report.backend,
            "algorithms": ",".join(sorted(set(report.algorithms.values()))),
            "total_ms": _milliseconds(report.total),
            "receive_ms": _milliseconds(report.receive),
            "compute_ms": _milliseconds(report.compute),
            "send_ms": _milliseconds(report.send),
            "bytes_in": self.meter.rows * request.spec.row_bytes,
            "bytes_out": self.meter.bytes_out,
            "reserved_bytes": self.meter.reserved,
            "status": "OK" if error is None else code_name(to_status(error).code),
        }
        if error is not None:
            fields |= {"reason": error.reason, "error": error.message}
        log.info("tensor", extra={"fields": fields})

    def _pieces(self, bands: Iterable[Band]) -> Iterator[Piece]:
        for band in self.meter.computed(bands):
            index, packer = self._packers[band.output]
            yield from self._numbered(index, packer.add(band.array))

    def _numbered(self, index: int, payloads: Iterable[bytes]) -> Iterator[Piece]:
        for data in payloads:
            offset = self._offsets[index]
            self._offsets[index] += len(data)
            self.meter.bytes_out += len(data)
            yield Piece(index, offset, data)


def log_refused(carrier: str, header: pb.TensorHeader, error: ConvServiceError) -> None:
    """Writes the line of a tensor whose header could not be taken."""
    fields = {
        "call": carrier,
        "tensor_id": header.tensor_id,
        "network": header.network,
        "status": code_name(to_status(error).code),
        "reason": error.reason,
        "error": error.message,
    }
    log.info("tensor", extra={"fields": fields})


@contextmanager
def logged(passage: Passage) -> Generator[None]:
    """Writes the passage's line when the context ends: OK, or what was raised, or that it was given up."""
    error: ConvServiceError | None = None
    try:
        yield
    except GeneratorExit:
        error = Cancelled("the caller gave the call up", reason=Reason.CANCELLED)
        raise
    except ConvServiceError as exc:
        error = as_error(exc)
        raise
    except Exception as exc:
        error = as_error(exc)
        raise error from exc
    finally:
        try:
            passage.close()
        finally:
            passage.log(error)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
