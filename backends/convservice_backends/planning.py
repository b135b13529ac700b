"""Planning: how a tensor will pass through a network.

Given a network, a tensor's shape and what each operator says of its blocks, `plan_session` hands back one
`NodePlan` per node that is needed and the `SessionPlan` that the server reserves memory by. Pure
arithmetic: nothing is allocated, and nothing depends on the batch, the cut or the load, so that a neuron's
bits follow from its layer and its place in its own sample alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

from convservice.bands import TensorSpec
from convservice.delays import port_rows
from convservice.dtypes import DType
from convservice.geometry import MAX_SIZE, PaddingMode, SampleShape
from convservice.layers import Flatten, Layer, Linear, TransposedWindow
from convservice.network import INPUT, Network
from convservice.wire.headers import ResultSpec
from convservice_backends.joins import Joins
from convservice_backends.plan import BlockPlan, Edge, Manner, NetworkPlan, NodePlan, PortPlan

MANY = 1 << 20
"""Rows enough for what a window reads of each to be counted without its ends."""


class Planner(Protocol):
    """What planning asks of an operator."""

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Its blocks for a sample `given` and its feature map `out`; must not look at their rows."""
        ...


@runtime_checkable
class ReducingPlanner(Planner, Protocol):
    """What it asks of a reducing one beside that."""

    def sums(self, given: SampleShape, out: SampleShape) -> tuple[tuple[int, ...], DType] | None:
        """Shape (of one sample) and dtype of what is kept from one run to the next; None if nothing."""
        ...


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
    nodes = {name: planning.node(name, operators[name]) for name in planning.sources}
    nodes, piece_rows = planning.joined(nodes)
    block_rows = {name: 1 if plan.layer.reducing else plan.blocks.rows for name, plan in nodes.items()}
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
        consumers=tuple(planning.consumers[INPUT]),
        piece_rows=piece_rows,
        whole=whole,
        stack=stack,
        scratch_bytes=scratch,
        dtype=planning.dtype,
    )


def sources(network: Network) -> dict[str, tuple[str, ...]]:
    """The nodes that some output depends on, in topological order, with where each takes its inputs from.

    A `Linear` reads what its `Flatten` would have been given: the order of its weights says where each value
    belongs, so the flattened map need not be made, or held. It does so also where the flattened map is made
    for something else, so that its bits do not depend on that.
    """
    by_id = {node.id: node for node in network.nodes}
    found: dict[str, tuple[str, ...]] = {}
    for node in network.nodes:
        taken = list(node.inputs)
        if isinstance(node.layer, Linear):
            while taken[0] != INPUT and isinstance(by_id[taken[0]].layer, Flatten):
                taken = list(by_id[taken[0]].inputs)
        found[node.id] = tuple(taken)
    wanted = set(network.outputs.values())
    for name, taken_from in reversed(found.items()):
        if name in wanted:
            wanted.update(taken_from)
    return {name: taken_from for name, taken_from in found.items() if name in wanted}


class _Planning:
    """One tensor's shapes and dtypes on their way through one network."""

    def __init__(self, network: Network, spec: TensorSpec, out_dtype: DType | None, manner: Manner) -> None:
        self.network = network
        self.spec = spec
        self.manner = manner
        self.dtype = network.dtype(spec.dtype)
        self.result = out_dtype or self.dtype
        self.shapes = network.shapes(spec.sample)
        self.nodes = {node.id: node for node in network.nodes}
        self.sources = sources(network)
        self.consumers: dict[str, list[Edge]] = {INPUT: [], **{name: [] for name in self.sources}}
        for name, taken in self.sources.items():
            for port, source in enumerate(taken):
                self.consumers[source].append((name, port))
        self.outputs: dict[str, list[str]] = {}
        for name, target in network.outputs.items():
            self.outputs.setdefault(target, []).append(name)

    def node(self, name: str, operator: Planner) -> NodePlan:
        """The plan of one node, as if nothing waited at a join."""
        node, taken, out = self.nodes[name], self.sources[name], self.shapes[name]
        given = self.shapes[taken[0]]
        outputs, consumers = tuple(self.outputs.get(name, ())), tuple(self.consumers[name])
        dtypes = [self.manner.held(source, self.spec.dtype, self.dtype) for source in taken]
        same = all(dtype == self.dtype for dtype in dtypes)
        out_dtype = self._stored(bool(outputs), bool(consumers), same=same)
        blocks = operator.block_plan(given, out)
        given_bytes = sum(dtype.itemsize for dtype in dtypes) * given.row_elements
        out_bytes = out.row_elements * out_dtype.itemsize
        rows = given.rows if node.layer.reducing else out.rows
        if rows is not None and rows < blocks.rows:
            blocks = replace(blocks, rows=rows)
        if node.layer.reducing:
            block_bytes = given_bytes * blocks.rows
        else:
            # input rows of many blocks, less those that every run reads anyway
            window = node.layer.window(given)
            read = window.reach(blocks.rows + MANY) - window.reach(MANY)
            block_bytes = out_bytes * blocks.rows + given_bytes * read
        run_rows = _blocks_in_run(self.manner.run_bytes, block_bytes, blocks.rows, rows) * blocks.rows
        capacity = run_rows if node.layer.reducing else _rows_to_hold(node.layer, given, run_rows)
        if given.rows is not None:
            capacity = min(capacity, given.rows)
        return NodePlan(
            node=node,
            ports=tuple(
                PortPlan(source, given, dtype, capacity) for source, dtype in zip(taken, dtypes, strict=True)
            ),
            out=out,
            out_dtype=out_dtype,
            blocks=blocks,
            run_rows=run_rows,
            sums=operator.sums(given, out) if isinstance(operator, ReducingPlanner) else None,
            outputs=outputs,
            consumers=consumers,
        )

    def joined(self, nodes: Mapping[str, NodePlan]) -> tuple[dict[str, NodePlan], int]:
        """The plans with what waits where branches join, and the rows of the input handed on at a time."""
        joins = Joins(INPUT, self.sources)
        if not joins.ends:
            return dict(nodes), MAX_SIZE
        pieces = {
            name: self._piece(plan) if name in joins.forks else MAX_SIZE for name, plan in nodes.items()
        }
        pieces[INPUT] = max(1, self.manner.piece_bytes // self.spec.row_bytes)
        # Rows that a fork hands on may have reached one branch and not another; elsewhere nothing is left.
        handed = dict.fromkeys(self.shapes, 0) | {name: pieces[name] for name in joins.forks}
        computed = {name: plan.blocks.rows for name, plan in nodes.items() if not plan.layer.reducing}
        waiting = port_rows(self.network.nodes, self.shapes, computed, handed)
        found: dict[str, NodePlan] = {}
        for name, plan in nodes.items():
            ports = plan.ports
            if name in joins.ends:  # a quarter more, so that what waits is not moved with every row
                ports = tuple(
                    replace(port, capacity=_within(rows + -(-rows // 4), port.shape.rows))
                    for port, rows in zip(plan.ports, waiting[name], strict=True)
                )
            found[name] = replace(
                plan, ports=ports, piece_rows=pieces[name], may_wait=name not in joins.between
            )
        return found, pieces[INPUT] if INPUT in joins.forks else MAX_SIZE

    def _piece(self, plan: NodePlan) -> int:
        """Rows of a node's feature map that are handed to branches at a time."""
        row_bytes = plan.out.row_elements * self.dtype.itemsize
        return max(1, min(plan.out_rows, self.manner.piece_bytes // row_bytes))

    def _stored(self, is_output: bool, is_consumed: bool, *, same: bool) -> DType:
        """The dtype that a node's rows are kept in: where two are wanted, the one that both round from.

        Args:
            is_output: whether they are results.
            is_consumed: whether another node takes them.
            same: whether the rows it is given have the network's own dtype.
        """
        if self.manner.float_rows:
            exact = same and (not is_output or self.result == self.dtype)
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
        return all(
            plan.layer.reducing or plan.blocks.any_rows or plan.blocks.rows == plan.out.rows
            for plan in nodes.values()
        )

    def stack(self, nodes: Mapping[str, NodePlan]) -> int:
        """Samples computed together: those whose maps fit a run."""
        sample = self.spec.sample.elements * self.spec.dtype.itemsize
        sample += sum(
            plan.out.elements * plan.out_dtype.itemsize + plan.sums_bytes for plan in nodes.values()
        )
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
            total += stack * plan.sums_bytes
            for port in plan.ports:
                if port.source == INPUT and port.dtype != self.spec.dtype:
                    total += stack * self.spec.sample.elements * port.dtype.itemsize
        return total + sum(stack * plan.out.elements * self._copies_bytes(plan) for plan in nodes.values())

    def flowing_bytes(self, nodes: Mapping[str, NodePlan]) -> int:
        """Bytes of the rows held, of a run of every node, and of each copy of it that leaves."""
        return sum(
            plan.held_bytes + plan.out_rows * plan.out.row_elements * self._copies_bytes(plan)
            for plan in nodes.values()
        )

    def _copies_bytes(self, plan: NodePlan) -> int:
        """Bytes per element of a node's map: as it is kept, in each result, and as its consumers take it."""
        kept = plan.out_dtype
        rounded = 0 if kept == self.dtype else len(plan.consumers) * self.dtype.itemsize
        return kept.itemsize + len(plan.outputs) * self.result.itemsize + rounded


def _blocks_in_run(run_bytes: int, block_bytes: int, block_rows: int, rows: int | None) -> int:
    """Blocks of a run, of `run_bytes` at most where more than one; `rows` is all that there are."""
    most = max(1, run_bytes // block_bytes)
    return most if rows is None else min(most, -(-rows // block_rows))


def _rows_to_hold(layer: Layer, given: SampleShape, run_rows: int) -> int:
    """Input rows that a windowed layer holds for runs of so many output rows."""
    window = layer.window(given)
    capacity = max(1, window.reach(run_rows))
    if layer.row_mode is PaddingMode.REPLICATE:
        capacity += 1  # the edge, read again and again
    elif layer.row_mode is PaddingMode.REFLECT:
        capacity += window.before + window.after + 1
    elif isinstance(window, TransposedWindow) and given.rows is None:
        # rows that have come, and yet the output may end before those that they give
        cut_off = 1 + window.after - window.extent - window.output_padding
        capacity += max(0, -(-cut_off // window.stride)) + 2
    return capacity + -(-window.reach(1) // 4)  # so that a tall window's halo is not moved with every row


def _within(rows: int, height: int | None) -> int:
    return rows if height is None else min(rows, height)
