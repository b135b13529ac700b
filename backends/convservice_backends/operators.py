"""What an operator is, and what a session lends it.

An operator is one layer prepared on one backend: weights in place, algorithm chosen; immutable, shared by
all sessions. A windowed one is given a run (rows that it may read, the output rows wanted) and writes those
output rows, block by block, bias and activation included. A reducing one takes in runs of input rows and
writes its one output row when the sample has ended. What they need to work with, they borrow from the
session's `Workspace`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from convservice.dtypes import DType
from convservice.errors import BackendUnavailable, InternalError, Reason
from convservice.geometry import SampleShape
from convservice.layers import Layer
from convservice.network import Network
from convservice.nodes import label
from convservice_backends.interface import Check
from convservice_backends.plan import BlockPlan


@dataclass(frozen=True)
class Rows:
    """What a node holds of one of its inputs.

    Attributes:
        array: the backend's own array (samples, channels, rows held, *rest); at most one sample where the
            rows held are only a part of it.
        first: index in the sample of the first row held.
    """

    array: Any
    first: int


@dataclass(frozen=True)
class Run:
    """Rows to work on, and the rows to read.

    Attributes:
        ports: what is held of each of the node's inputs, in their order.
        height: rows of the sample on every port; None while it is not known.
        first: first output row wanted, or for a reducing operator first input row to take in; a multiple of
            the block's rows.
        last: one past the last.
        blocks: how the output, or for a reducing operator the input, is cut.
    """

    ports: tuple[Rows, ...]
    height: int | None
    first: int
    last: int
    blocks: BlockPlan

    @property
    def rows(self) -> Any:
        """What is held of the first input."""
        return self.ports[0].array

    @property
    def known_height(self) -> int:
        """The height, for a layer that is never without."""
        if self.height is None:
            raise InternalError("a layer that needs the height was not given it", reason=Reason.INTERNAL)
        return self.height

    @property
    def first_row(self) -> int:
        """Index in the sample of the first row held of the first input."""
        return self.ports[0].first


Task = Callable[[int], None]
"""One block's work, given the number of the worker that does it."""


class Workspace(Protocol):
    """What a session lends to operators."""

    @property
    def workers(self) -> int:
        """Tasks that can be done at the same time."""
        ...

    def scratch(self, worker: int) -> Any:
        """The working memory of one worker: a byte array of the plan's `scratch_bytes`."""
        ...

    def run(self, tasks: Sequence[Task], work: float) -> None:
        """Does all tasks, on several workers where `work` (multiply-adds in all) is worth it, with the
        session's `Check` between any two of one worker."""
        ...


Lent_contra = TypeVar("Lent_contra", contravariant=True)


class Operator(Protocol[Lent_contra]):
    """One windowed layer prepared on one backend, which borrows a workspace from its sessions."""

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Its blocks for a sample and its feature map; the same for every height."""
        ...

    def compute(self, run: Run, out: Any, workspace: Lent_contra) -> None:
        """Writes output rows first <= i < last to `out`, (samples, out_channels, last - first, *rest),
        rounded once to its dtype."""
        ...


class ReducingOperator(Protocol[Lent_contra]):
    """One reducing layer prepared on one backend: it takes in a sample's rows and puts out one row."""

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """The input rows that are taken in together, and its working memory; the same for every height."""
        ...

    def sums(self, given: SampleShape, out: SampleShape) -> tuple[tuple[int, ...], DType] | None:
        """Shape (without the samples) and dtype of what is kept from one run to the next; None if nothing."""
        ...

    def accumulate(self, run: Run, sums: Any, out: Any, workspace: Lent_contra) -> None:
        """Takes in input rows first <= i < last. Runs of a sample come in order, without gaps, and are cut at
        multiples of the block's rows; bits do not depend on where. Row 0 begins a sample: what `sums` and
        `out`, (samples, out_channels, 1, *ones), held before means nothing then."""
        ...

    def finish(self, height: int, given: SampleShape, sums: Any, out: Any, workspace: Lent_contra) -> None:
        """Writes the output row to `out`, rounded once to its dtype: all `height` rows are taken in."""
        ...


AnyOperator = Operator[Any] | ReducingOperator[Any]


def require_layers(network: Network, known: tuple[type[Layer], ...], backend: str) -> None:
    """Refuses a network with a layer that a backend has no operator for.

    Raises:
        BackendUnavailable: naming the layer by its position and type.
    """
    for position, node in enumerate(network.nodes):
        if not isinstance(node.layer, known):
            raise BackendUnavailable(
                f"{label(position, node)}: backend {backend!r} has no {node.layer.type_name} layer",
                reason=Reason.BACKEND_UNAVAILABLE,
                metadata={"layer": node.layer.type_name, "node": node.id, "position": str(position)},
            )


__all__ = [
    "AnyOperator",
    "Check",
    "Operator",
    "ReducingOperator",
    "Rows",
    "Run",
    "Task",
    "Workspace",
    "require_layers",
]
