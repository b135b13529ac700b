"""How a tensor will pass through a network: blocks, runs, rows held, bytes.

Given a network, a tensor's shape and what each operator says of its blocks, `plan_session` hands back one
`NodePlan` per node that is needed and the `SessionPlan` that the server reserves memory by. Pure
arithmetic: nothing is allocated, and nothing depends on the batch, the cut or the load, so that a neuron's
bits follow from its layer and its place in its own sample alone.

    block   what is computed at once; cut at absolute multiples, planned without the height
    run     several neighbouring blocks, handed to an operator in one call
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from convservice.bands import TensorSpec
from convservice.dtypes import DType
from convservice.geometry import PaddingMode, SampleShape
from convservice.layers import Layer
from convservice.network import INPUT, Network, Node
from convservice.wire.headers import ResultSpec
from convservice_backends.interface import SessionPlan

RUN_BYTES = 2 << 20
"""Preferred bytes of input and output of one run: what fits a processor's cache."""


@dataclass(frozen=True)
class BlockPlan:
    """How one operator cuts its output.

    Attributes:
        algorithm: its name.
        rows: output rows of a block.
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
        float_rows: rows are held in float types alone: the network's own or its accumulator. Integers are
            widened as they come, and results are rounded as they leave.
    """

    workers: int = 1
    run_bytes: int = RUN_BYTES
    whole_bytes: int = RUN_BYTES
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


class Planner(Protocol):
    """What planning asks of an operator."""

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Its blocks for a sample `given` and its feature map `out`; must not look at their rows."""
        ...


@dataclass(frozen=True)
class NodePlan:
    """How one node works on a sample.

    Attributes:
        node: the node.
        given: shape of the sample it is given.
        out: shape of its feature map.
        given_dtype: dtype of the rows it holds.
        out_dtype: dtype of the rows it puts out.
        blocks: its blocks; of the sample's own height where that is lower than one block.
        run_rows: most output rows of a run, a multiple of the block's.
        capacity: input rows it can hold.
        outputs: names of the network's outputs that it is.
        consumers: ids of the nodes that take its feature map.
    """

    node: Node
    given: SampleShape
    out: SampleShape
    given_dtype: DType
    out_dtype: DType
    blocks: BlockPlan
    run_rows: int
    capacity: int
    outputs: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def layer(self) -> Layer:
        """Its layer."""
        return self.node.layer

    @property
    def held_bytes(self) -> int:
        """Bytes of the input rows it holds."""
        return self.capacity * self.given.row_elements * self.given_dtype.itemsize


@dataclass(frozen=True)
class NetworkPlan(SessionPlan):
    """A session's plan with the plan of every node that its outputs need, in topological order.

    Attributes:
        nodes: node id to its plan.
        whole: samples are small and one block in every node: they are computed whole, several at a time.
        stack: samples computed together where `whole`.
        scratch_bytes: working memory of one worker.
        dtype: the network's dtype: that of every map between nodes.
    """

    nodes: Mapping[str, NodePlan]
    whole: bool
    stack: int
    scratch_bytes: int
    dtype: DType


def plan_session(
    network: Network,
    operators: Mapping[str, Planner],
    spec: TensorSpec,
    out_dtype: DType | None,
    manner: Manner,
) -> NetworkPlan:
    """Plans the passage of a tensor.

    Args:
        network: the network.
        operators: node id to its operator.
        spec: the tensor.
        out_dtype: dtype of the results; None for the network's own.
        manner: how the backend works.

    Raises:
        InvalidRequest: the tensor does not fit the network.
    """
    planning = _Planning(network, spec, out_dtype, manner)
    needed = _needed(network)
    consumers: dict[str, list[str]] = {}
    for node in needed:
        consumers.setdefault(node.inputs[0], []).append(node.id)
    nodes = {
        node.id: planning.node(node, tuple(consumers.get(node.id, ())), operators[node.id]) for node in needed
    }
    block_rows = {name: plan.blocks.rows for name, plan in nodes.items()}
    whole = planning.is_whole(nodes)
    stack = planning.stack(nodes) if whole else 1
    scratch = max(plan.blocks.scratch_bytes for plan in nodes.values())
    temporary = max(plan.blocks.temporary_bytes for plan in nodes.values())
    held = planning.stacked_bytes(nodes, stack) if whole else planning.flowing_bytes(nodes)
    return NetworkPlan(
        spec=spec,
        out_dtype=planning.result,
        results=planning.results(block_rows, whole),
        algorithms={name: plan.blocks.algorithm for name, plan in nodes.items()},
        block_rows=block_rows,
        peak_bytes=spec.band_bytes + held + manner.workers * (scratch + temporary),
        nodes=nodes,
        whole=whole,
        stack=stack,
        scratch_bytes=scratch,
        dtype=planning.dtype,
    )


def _needed(network: Network) -> list[Node]:
    """The nodes that some output depends on."""
    wanted = set(network.outputs.values())
    for node in reversed(network.nodes):
        if node.id in wanted:
            wanted.update(node.inputs)
    return [node for node in network.nodes if node.id in wanted]


class _Planning:
    """One tensor's shapes and dtypes on their way through one network."""

    def __init__(self, network: Network, spec: TensorSpec, out_dtype: DType | None, manner: Manner) -> None:
        self.network = network
        self.spec = spec
        self.manner = manner
        self.dtype = network.dtype(spec.dtype)
        self.result = out_dtype or self.dtype
        self.shapes = network.shapes(spec.sample)
        self.outputs: dict[str, list[str]] = {}
        for name, target in network.outputs.items():
            self.outputs.setdefault(target, []).append(name)

    def node(self, node: Node, consumers: tuple[str, ...], operator: Planner) -> NodePlan:
        """The plan of one node."""
        source = node.inputs[0]
        given, out = self.shapes[source], self.shapes[node.id]
        outputs = tuple(self.outputs.get(node.id, ()))
        given_dtype = self.manner.held(source, self.spec.dtype, self.dtype)
        out_dtype = self._stored(given_dtype, bool(outputs), bool(consumers))
        blocks = operator.block_plan(given, out)
        if out.rows is not None and out.rows < blocks.rows:
            blocks = replace(blocks, rows=out.rows)
        window = node.layer.window(given)
        row_bytes = out.row_elements * out_dtype.itemsize
        row_bytes += (window.reach(2) - window.reach(1)) * given.row_elements * given_dtype.itemsize
        blocks_in_run = max(1, self.manner.run_bytes // (row_bytes * blocks.rows))
        if out.rows is not None:
            blocks_in_run = min(blocks_in_run, -(-out.rows // blocks.rows))
        run_rows = blocks_in_run * blocks.rows
        capacity = window.reach(run_rows)
        if node.layer.row_mode is PaddingMode.REPLICATE:
            capacity += 1  # the edge, read again and again
        elif node.layer.row_mode is PaddingMode.REFLECT:
            capacity += window.before + window.after + 1
        capacity += -(-window.extent // 4)  # so that the halo of a tall window is not moved with every row
        if given.rows is not None:
            capacity = min(capacity, given.rows)
        return NodePlan(
            node=node,
            given=given,
            out=out,
            given_dtype=given_dtype,
            out_dtype=out_dtype,
            blocks=blocks,
            run_rows=run_rows,
            capacity=capacity,
            outputs=outputs,
            consumers=consumers,
        )

    def _stored(self, given: DType, is_output: bool, is_consumed: bool) -> DType:
        """The dtype that a node's rows are kept in: where two are wanted, the one that both round from."""
        if self.manner.float_rows:
            exact = given == self.dtype and (not is_output or self.result == self.dtype)
            return self.dtype if exact else self.dtype.accumulator
        if not is_output:
            return self.dtype
        if not is_consumed or self.result == self.dtype:
            return self.result
        return self.dtype.accumulator

    def is_whole(self, nodes: Mapping[str, NodePlan]) -> bool:
        """Whether a sample may be computed at once in every node, and is small enough to be collected."""
        rows = self.spec.sample.rows
        if rows is None or rows * self.spec.row_bytes > self.manner.whole_bytes:
            return False
        return all(plan.blocks.any_rows or plan.blocks.rows == plan.out.rows for plan in nodes.values())

    def stack(self, nodes: Mapping[str, NodePlan]) -> int:
        """Samples computed together: those whose maps fit a run."""
        sample = self.spec.sample.elements * self.spec.dtype.itemsize
        sample += sum(plan.out.elements * plan.out_dtype.itemsize for plan in nodes.values())
        return max(1, min(self.spec.samples, self.manner.run_bytes // sample))

    def results(self, block_rows: Mapping[str, int], whole: bool) -> tuple[ResultSpec, ...]:
        """What is announced of every output."""
        spec, found = self.spec, list[ResultSpec]()
        needed: dict[str, int] = {}
        for index, (name, target) in enumerate(self.network.outputs.items()):
            if target not in needed:
                first = self.network.input_rows_needed(target, 1, self.shapes, block_rows)
                needed[target] = spec.sample.height if whole else first
            rows = block_rows[target]
            result = TensorSpec(self.result, self.shapes[target], spec.samples, rows, spec.data_format)
            found.append(ResultSpec(index, name, result, rows, needed[target]))
        return tuple(found)

    def stacked_bytes(self, nodes: Mapping[str, NodePlan], stack: int) -> int:
        """Bytes of `stack` whole samples, of one more being collected, and of all their maps."""
        total = (stack + 1) * self.spec.sample.elements * self.spec.dtype.itemsize
        for plan in nodes.values():
            if INPUT in plan.node.inputs and plan.given_dtype != self.spec.dtype:
                total += stack * self.spec.sample.elements * plan.given_dtype.itemsize
        return total + sum(stack * plan.out.elements * self._copies_bytes(plan) for plan in nodes.values())

    def flowing_bytes(self, nodes: Mapping[str, NodePlan]) -> int:
        """Bytes of the rows held, of a run of every node, and of each copy of it that leaves."""
        return sum(
            plan.held_bytes + plan.run_rows * plan.out.row_elements * self._copies_bytes(plan)
            for plan in nodes.values()
        )

    def _copies_bytes(self, plan: NodePlan) -> int:
        """Bytes per element of a node's map: as it is kept, in each result, and as its consumers take it."""
        kept = plan.out_dtype
        rounded = 0 if kept == self.dtype else len(plan.consumers) * self.dtype.itemsize
        return kept.itemsize + len(plan.outputs) * self.result.itemsize + rounded
