"""What an operator is, and what a session lends it.

An operator is one layer prepared on one backend: weights in place, algorithm chosen; immutable, shared by
all sessions. It is given a run (rows that it may read, the output rows wanted) and writes those output
rows, block by block, bias and activation included. What it needs to work with, it borrows from the
session's `Workspace`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from convservice.errors import BackendUnavailable, Reason
from convservice.geometry import SampleShape
from convservice.layers import Layer
from convservice.network import Network
from convservice.nodes import label
from convservice_backends.interface import Check
from convservice_backends.plan import BlockPlan


@dataclass(frozen=True)
class Run:
    """Rows to compute, and the rows to compute them from.

    Attributes:
        rows: the backend's own array (samples, channels, rows held, *rest); at most one sample where the
            rows held are only a part of it.
        first_row: index in the sample of the first row held.
        height: rows of the sample; None while it is not known.
        first: first output row wanted, a multiple of the block's rows.
        last: one past the last.
        blocks: how the output is cut.
    """

    rows: Any
    first_row: int
    height: int | None
    first: int
    last: int
    blocks: BlockPlan


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
    """One layer prepared on one backend, which borrows a workspace from its sessions."""

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Its blocks for a sample and its feature map; the same for every height."""
        ...

    def compute(self, run: Run, out: Any, workspace: Lent_contra) -> None:
        """Writes output rows first <= i < last to `out`, (samples, out_channels, last - first, *rest),
        rounded once to its dtype."""
        ...


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


__all__ = ["Check", "Operator", "Run", "Task", "Workspace", "require_layers"]
