"""One tensor's passage through one network, from its header to its report.

Given a tensor's header, `Passage` finds network and backend, plans, reserves the memory and opens a session;
given bands of input it hands on the outputs' bytes as soon as they are computed. It measures what it does,
and tells observers how the tensor ended, whatever came of it. The stream and the unary call are both made of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from convservice.bands import Band
from convservice.errors import Cancelled, ConvServiceError, DeadlineExceeded, Reason
from convservice.packing import BandPacker
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import ResultSpec, TensorReport, TensorRequest
from convservice_backends.interface import Session, SessionPlan
from convservice_backends.registry import Registry
from convservice_server.admission import Admission, largest_holding
from convservice_server.calls import Call, Clock
from convservice_server.faults import as_error
from convservice_server.lanes import Count
from convservice_server.observation import Observation
from convservice_server.records import Meter, TensorRecord
from convservice_server.store import Store

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
        observation: told of every tensor.
        bands: counts those that are taken and not computed yet.
    """

    registry: Registry
    store: Store
    admission: Admission
    clock: Clock
    observation: Observation
    bands: Count


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


class Passage:
    """One tensor on its way; `start` admits it, `logged` ends it however far it came.

    Args:
        engine: what it passes through.
        request: its header.
        call: whose tensor it is.

    Attributes:
        request: its header.
        meter: what it has taken so far.
        deadline: by the engine's clock, when its own time is over; None for never.
    """

    def __init__(self, engine: Engine, request: TensorRequest, call: Call) -> None:
        self.request = request
        self.meter = Meter(engine.clock)
        self._engine = engine
        self._call = call
        self.deadline = engine.clock() + request.timeout_ms / 1000 if request.timeout_ms else None
        self._stack = ExitStack()
        self._backend = request.backend
        self._resolved = ""
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
        start = self._engine.clock()
        try:
            return self._start(pack)
        finally:
            self.meter.queue.add(start, self._engine.clock())

    def _start(self, pack: Callable[[SessionPlan], Packing]) -> tuple[ResultSpec, ...]:
        request, engine = self.request, self._engine
        use = self._stack.enter_context(engine.store.use(self._call.owner, request.network))
        backend = engine.registry.resolve(request.backend)
        self._resolved = self._backend = backend.name
        prepared = use.prepared(backend, request.precision)
        plan = self._plan = prepared.plan(request.spec, request.out_dtype)
        results, buffer_bytes = pack(plan)
        wanted = plan.peak_bytes + buffer_bytes
        self._stack.enter_context(
            engine.admission.reserve(
                self._call.owner, wanted, lambda: largest_holding(use.network, request.spec)
            )
        )
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
                with self._engine.bands.one():
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
            receive=meter.receive.seconds,
            compute=meter.compute.seconds,
            send=meter.send.seconds,
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

    def ended(self, error: ConvServiceError | None) -> None:
        """Tells observers that the tensor has ended, with `error` or well."""
        request = self.request
        record = TensorRecord(
            self._call.record,
            request.tensor_id,
            request.network,
            self.meter,
            self._engine.clock(),
            error,
            request,
            self._plan,
            self._resolved,
        )
        self._engine.observation.tensor_ended(record)

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


def refused(engine: Engine, call: Call, header: pb.TensorHeader, error: ConvServiceError) -> None:
    """Tells observers of a tensor whose header could not be taken."""
    record = TensorRecord(call.record, header.tensor_id, header.network, None, engine.clock(), error)
    engine.observation.tensor_ended(record)


@contextmanager
def observed(passage: Passage) -> Generator[None]:
    """Closes a passage when the context ends, and says how it went: well, or what was raised, or that it was
    given up."""
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
            passage.ended(error)
            error = None  # in this frame, which its traceback holds, it would live until garbage is collected
