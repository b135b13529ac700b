"""What a backend is, to the server and to anybody who adds one.

A backend prepares a network once (weights in place, algorithms chosen), plans a tensor (blocks, bytes) and
opens a session for it. A session is given bands of input and hands on bands of the outputs as soon as
their blocks are computed. A backend knows arithmetic only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from convservice.bands import Band, TensorSpec
from convservice.dtypes import DType
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice.wire.headers import ResultSpec

Check = Callable[[], None]
"""Called between blocks; raises `Cancelled` or `DeadlineExceeded` when the work is no longer wanted."""


@dataclass(frozen=True)
class Description:
    """What a backend computes on.

    Attributes:
        device: the processor's or device's name; bits are promised per model.
        versions: libraries that its bits depend on, name to version.
        workers: blocks it computes at the same time.
    """

    device: str
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    workers: int = 1


@dataclass(frozen=True)
class SessionPlan:
    """How a tensor will pass through a prepared network.

    Attributes:
        spec: the input tensor.
        out_dtype: the dtype of every result.
        results: one per output of the network, in order; `spec.band_rows` is the backend's choice.
        algorithms: node id to the name of the algorithm.
        block_rows: node id to output rows computed together.
        peak_bytes: most memory of the host that the session takes at any time: rows held, blocks, scratch,
            one band each way.
        device_bytes: most memory of each device that it takes, where the backend computes on devices.
    """

    spec: TensorSpec
    out_dtype: DType
    results: tuple[ResultSpec, ...]
    algorithms: Mapping[str, str]
    block_rows: Mapping[str, int]
    peak_bytes: int
    device_bytes: int = field(default=0, kw_only=True)


class Session(Protocol):
    """One tensor's passage through one network. Used by one thread at a time."""

    def submit(self, band: Band) -> Iterator[Band]:
        """Takes the next rows of the input, in order, and hands on what can now be computed.

        The work is done as the iterator is consumed, a block at a time; consume it whole before the next
        call. Bands come per output in order of samples and rows; their arrays may be reused by the session
        after the next step of the iterator.

        Raises:
            Cancelled, DeadlineExceeded: from the `Check` the session was opened with.
        """
        ...

    def drain(self) -> Iterator[Band]:
        """Hands on, waiting where it must, all that follows from the input given so far.

        A backend that computes while it takes the next rows may hold results back in `submit`, as many as its
        plan has room for; whoever has no next rows at hand drains. Nothing where all was handed on at once.
        """
        ...

    def finish(self) -> Iterator[Band]:
        """Says that the input has ended and hands on the rest.

        Raises:
            InvalidRequest: what only the end could show (an output of size zero, a reflection wider than
                the height), when the height was not announced.
        """
        ...

    def close(self) -> None:
        """Gives the session's memory back; safe at any time, and more than once."""
        ...


class PreparedNetwork(Protocol):
    """A network in place on a backend: immutable, shared by all sessions."""

    @property
    def network(self) -> Network:
        """The network."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the prepared weights take beside the network's own."""
        ...

    def plan(self, spec: TensorSpec, out_dtype: DType | None = None) -> SessionPlan:
        """How a tensor will pass; pure arithmetic on shapes, allocates nothing.

        Raises:
            InvalidRequest: the tensor does not fit the network.
        """
        ...

    def open(self, plan: SessionPlan, check: Check) -> Session:
        """Opens a session; allocates what the plan says."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Where arithmetic runs. Its constructor takes no arguments that are required, imports what is heavy,
    and raises `BackendUnavailable` with the reason when it cannot work here."""

    name: ClassVar[str]

    @property
    def failure(self) -> str:
        """Why it cannot be used any more, such as a device that failed for good; empty while it works."""
        ...

    def describe(self) -> Description:
        """What it computes on."""
        ...

    def prepare(self, network: Network, precision: Precision) -> PreparedNetwork:
        """Puts a network's weights in place and chooses its algorithms."""
        ...

    def close(self) -> None:
        """Stops its workers; no session may be open."""
        ...


@runtime_checkable
class TellsDeviceMemory(Protocol):
    """A backend that can say what is taken of its devices' memory, for those who watch it."""

    def device_memory(self) -> Sequence[tuple[int, int]]:
        """Per device: bytes that tensors and weights take, and the most that may be taken. It asks no device,
        so that it answers at once."""
        ...
