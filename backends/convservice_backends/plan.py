"""What a plan says of a tensor's passage: blocks, runs, rows held, bytes.

`planning` makes the plans; stages and sessions, on every backend, work by them.

    block   what is computed at once; cut at absolute multiples, planned without the height
    run     several neighbouring blocks, handed to an operator in one call
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from convservice.dtypes import DType
from convservice.geometry import MAX_SIZE, SampleShape
from convservice.layers import Layer
from convservice.network import INPUT, Node
from convservice_backends.interface import SessionPlan

RUN_BYTES = 2 << 20
"""Preferred bytes of input and output of one run: what fits a processor's cache."""


@dataclass(frozen=True)
class BlockPlan:
    """How one operator cuts its output, or a reducing one its input.

    Attributes:
        algorithm: its name.
        rows: output rows of a block; of a reducing operator, input rows that it takes in together.
        inner: sizes of a block along the other output axes.
        scratch_bytes: working memory of one worker, which the session lends.
        temporary_bytes: what one worker allocates beside it at any time.
        any_rows: whether any run of rows gives the same bits, so that `rows` is only where a run may begin;
            else every block is computed at its full size.
    """

    algorithm: str
    rows: int
    inner: tuple[int, ...]
    scratch_bytes: int
    temporary_bytes: int = 0
    any_rows: bool = False


@dataclass(frozen=True)
class Manner:
    """How a backend works, as far as plans depend on it.

    Attributes:
        workers: blocks computed at the same time.
        run_bytes: preferred bytes of input and output of one run.
        whole_bytes: samples of at most so many bytes may go whole.
        piece_bytes: preferred bytes of rows that are handed to branches at a time, so that none gets far
            ahead of another where they join again.
        float_rows: rows are held in float types alone: the network's own or its accumulator. Integers are
            widened as they come, and results are rounded as they leave.
    """

    workers: int = 1
    run_bytes: int = RUN_BYTES
    whole_bytes: int = RUN_BYTES
    piece_bytes: int = RUN_BYTES
    float_rows: bool = False

    def held(self, source: str, given: DType, own: DType) -> DType:
        """The dtype in which a node holds its input.

        Args:
            source: id of the node that it comes from.
            given: dtype of the network's input.
            own: the network's dtype.
        """
        if source != INPUT:
            return own
        return own.accumulator if self.float_rows and not given.is_float else given


Edge = tuple[str, int]
"""A node that takes a feature map, by its id, and at which of its inputs."""


@dataclass(frozen=True)
class PortPlan:
    """One input of a node.

    Attributes:
        source: id of the node that it comes from.
        shape: shape of the sample that comes.
        dtype: of the rows held.
        capacity: rows that can be held.
    """

    source: str
    shape: SampleShape
    dtype: DType
    capacity: int

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows held."""
        return self.capacity * self.shape.row_elements * self.dtype.itemsize


@dataclass(frozen=True)
class NodePlan:
    """How one node works on a sample.

    Attributes:
        node: the node.
        ports: its inputs.
        out: shape of its feature map.
        out_dtype: dtype of the rows it puts out.
        blocks: its blocks; of the sample's own height where that is lower than one block.
        run_rows: most output rows of a run (of a reducing node, input rows), a multiple of the block's.
        sums: shape (of one sample) and dtype of what a reducing node keeps from run to run; None for nothing.
        outputs: names of the network's outputs that it is.
        consumers: what takes its feature map.
        piece_rows: rows of its feature map that are handed to the consumers at a time.
        may_wait: whether it may collect rows for a larger run.
    """

    node: Node
    ports: tuple[PortPlan, ...]
    out: SampleShape
    out_dtype: DType
    blocks: BlockPlan
    run_rows: int
    sums: tuple[tuple[int, ...], DType] | None
    outputs: tuple[str, ...]
    consumers: tuple[Edge, ...]
    piece_rows: int = MAX_SIZE
    may_wait: bool = True

    @property
    def layer(self) -> Layer:
        """Its layer."""
        return self.node.layer

    @property
    def given(self) -> SampleShape:
        """Shape of the sample on its (first) input."""
        return self.ports[0].shape

    @property
    def out_rows(self) -> int:
        """Most rows that it puts out at a time."""
        return 1 if self.layer.reducing else self.run_rows

    @property
    def held_bytes(self) -> int:
        """Bytes of the input rows it holds, and of what it keeps from run to run."""
        return sum(port.held_bytes for port in self.ports) + self.sums_bytes

    @property
    def sums_bytes(self) -> int:
        """Bytes that a reducing node keeps of one sample from run to run."""
        return 0 if self.sums is None else math.prod(self.sums[0]) * self.sums[1].itemsize


@dataclass(frozen=True)
class NetworkPlan(SessionPlan):
    """A session's plan with the plan of every node that its outputs need, in topological order.

    Attributes:
        nodes: node id to its plan.
        consumers: what takes the network's input.
        piece_rows: rows of the input that are handed to them at a time.
        whole: samples are small and one block in every node: they are computed whole, several at a time.
        stack: samples computed together where `whole`.
        scratch_bytes: working memory of one worker.
        dtype: the network's dtype: that of every map between nodes.
    """

    nodes: Mapping[str, NodePlan]
    consumers: tuple[Edge, ...]
    piece_rows: int
    whole: bool
    stack: int
    scratch_bytes: int
    dtype: DType
