"""Networks: layers wired as a small acyclic graph with named outputs.

Given layers, `Network` checks the wiring once and hands back what follows from it: the shapes of every
feature map, the rows each layer holds while a tensor streams through, the canonical form and the name
derived from it. A chain is the common case, a lone convolution a network of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from convservice.delays import input_rows_needed, port_rows
from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice.errors import InvalidRequest, Reason
from convservice.fields import NetworkField, network_field
from convservice.geometry import MAX_SIZE, SampleShape
from convservice.layers import Layer, split_shape
from convservice.nodes import (
    INPUT,
    MAX_NODES,
    Node,
    Residual,
    bad,
    check_wiring,
    input_rank,
    label,
    nodes_of,
)
from convservice.summary import Summary, summary_of
from convservice.tensors import Tensor

NAME_PREFIX = "networks/sha256-"

_DOMAIN = b"convservice.network.v1\0"

__all__ = ["INPUT", "MAX_NODES", "LayerPlan", "Network", "Node", "Residual"]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer of a network holds while a sample streams through it, row by row.

    Attributes:
        node: its id.
        input_shape: the sample it is given; where it has several inputs they are alike.
        output_shape: the sample it puts out.
        rows_held: most input rows it holds between two of its output rows: its halo; where it has several
            inputs, what their branches' different delays make it hold, over all inputs.
        bytes_held: the same in bytes.
        delay_rows: rows of the network's input that must have come before its first output row leaves; None
            where that is all of them and the height is not known.
        port_rows: most rows held of each input, in order.
    """

    node: str
    input_shape: SampleShape
    output_shape: SampleShape
    rows_held: int
    bytes_held: int
    delay_rows: int | None
    port_rows: tuple[int, ...]


class Network:
    """Layers wired as an acyclic graph.

    Args:
        layers: a chain of layers and `Residual` blocks, or nodes in topological order (each after all its
            inputs).
        outputs: output name to node id; without it the last node is the one output, `"output"`.

    Raises:
        InvalidRequest: `INVALID_NETWORK` for wiring that is not such a graph, naming the node.
    """

    def __init__(
        self,
        layers: Sequence[Layer | Residual | Node],
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        self.nodes: tuple[Node, ...] = nodes_of(layers)
        self.outputs: dict[str, str] = dict(outputs or {"output": self.nodes[-1].id if self.nodes else ""})
        check_wiring(self.nodes, self.outputs)
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        dtypes = {tensor.dtype for tensor in self.tensors}
        if len(dtypes) > 1:
            names = ", ".join(sorted(dtype.name for dtype in dtypes))
            raise InvalidRequest(
                f"all weights of a network must have one dtype, these have {names}",
                reason=Reason.DATA_TYPE_MISMATCH,
                metadata={"data_types": names},
            )

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weight tensors of all layers, each once, in the order of first use."""
        found: dict[int, Tensor] = {}
        for node in self.nodes:
            for tensor in node.layer.tensors:
                found.setdefault(id(tensor), tensor)
        return tuple(found.values())

    @cached_property
    def rank(self) -> int | None:
        """Number of spatial axes of its input, 0 for vectors; None where no layer fixes it."""
        return input_rank(self.nodes)

    @property
    def parameter_count(self) -> int:
        """Weights and thresholds of all layers."""
        return sum(node.layer.parameter_count for node in self.nodes)

    def dtype(self, given: DType) -> DType:
        """The network's dtype for an input of dtype `given`: that of every map between layers.

        It is that of the weights; without weights the input's if it is a float type, else float32.

        Raises:
            InvalidRequest: `DATA_TYPE_MISMATCH` when a float input differs from the weights.
        """
        if not self.tensors:
            return given if given.is_float else FLOAT32
        weights = self.tensors[0].dtype
        if given.is_float and given != weights:
            raise InvalidRequest(
                f"x is {given} and weight is {weights}; they must share a float dtype, or x be an integer",
                reason=Reason.DATA_TYPE_MISMATCH,
                metadata={"input": given.name, "weight": weights.name},
                field="data_type",
            )
        return weights

    def shapes(self, sample: SampleShape) -> dict[str, SampleShape]:
        """The shape of every feature map for one sample, by node id, with `"input"` for the sample.

        Raises:
            InvalidRequest: a layer cannot take its input; the message names it by position and type.
        """
        found = {INPUT: sample}
        for position, node in enumerate(self.nodes):
            try:
                found[node.id] = node.layer.joined_sample([found[source] for source in node.inputs])
            except InvalidRequest as exc:
                where = label(position, node)
                if len(node.inputs) > 1:
                    where += f" of {', '.join(map(repr, node.inputs))}"
                raise InvalidRequest(
                    f"{where}: {exc.message}",
                    reason=exc.reason,
                    metadata={**exc.metadata, "node": node.id, "position": str(position)},
                    field=exc.field,
                ) from exc
        return found

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """The shape of the result for an input (N, C, *spatial) or (C, *spatial).

        A dict by output name where the network has several outputs.
        """
        batch, sample = split_shape(input_shape, self.rank)
        shapes = self.shapes(sample)
        found = {name: (*batch, *shapes[target].shape) for name, target in self.outputs.items()}
        return found if len(found) > 1 else next(iter(found.values()))

    def receptive_field(
        self,
        index: int | Sequence[int],
        input_shape: Sequence[int],
        node: str | None = None,
        channel: int | None = None,
    ) -> NetworkField:
        """The input values that one neuron finally sees, through all layers before it.

        Args:
            index: the neuron's position in its feature map, one integer per spatial axis; in a vector its
                number.
            input_shape: (C, *spatial) or (N, C, *spatial).
            node: the id of the neuron's node; the network's output where it has but one.
            channel: the neuron's channel; without it the neurons of all channels at that position together.

        Raises:
            InvalidRequest: there is no such node or neuron, or a layer cannot take its input.
        """
        targets = sorted(set(self.outputs.values()))
        if node is None and len(targets) > 1:
            raise bad(f"the network has several outputs; give one of their nodes: {', '.join(targets)}")
        target = targets[0] if node is None else node
        if target not in {one.id for one in self.nodes}:
            known = ", ".join(one.id for one in self.nodes)
            raise bad(f"{target!r} is no node of the network; its nodes are {known}")
        shapes = self.shapes(split_shape(input_shape, self.rank)[1])
        return network_field(self.nodes, shapes, target, index, channel)

    def summary(self, input_shape: Sequence[int]) -> Summary:
        """What each layer has, for one sample of an input: shapes, parameters, neurons, connections, fields.

        Printed it is a table, in a notebook one in HTML.

        Args:
            input_shape: (C, *spatial) or (N, C, *spatial).

        Raises:
            InvalidRequest: a layer cannot take its input; the message names it by position and type.
        """
        shapes = self.shapes(split_shape(input_shape, self.rank)[1])
        return summary_of(self.nodes, self.outputs, shapes)

    def plan(self, input_shape: Sequence[int | None], dtype: Any = "float32") -> tuple[LayerPlan, ...]:
        """What each layer holds while a sample streams through, one row at a time.

        A backend computes several rows together and holds that much more; this is what the geometry
        alone demands, whoever computes it.

        Args:
            input_shape: (C, *spatial) or (N, C, *spatial); the first spatial size may be None.
            dtype: of the input.
        """
        if None in input_shape:
            at = list(input_shape).index(None)
            sizes = [size for size in input_shape if size is not None]
            rank = len(input_shape) - at if self.rank is None else self.rank
            known = split_shape((*sizes[:at], 1, *sizes[at:]), rank)[1].with_rows(None)
        else:
            known = split_shape([size for size in input_shape if size is not None], self.rank)[1]
        given = dtype_of(dtype)
        shapes, own = self.shapes(known), self.dtype(given)
        branches = port_rows(self.nodes, shapes)
        plans: list[LayerPlan] = []
        for node in self.nodes:
            sources = [shapes[source] for source in node.inputs]
            ports = branches.get(node.id) or (node.layer.rows_held(sources[0]),)
            held = sum(
                rows * shapes[source].row_elements * (given if source == INPUT else own).itemsize
                for source, rows in zip(node.inputs, ports, strict=True)
            )
            needed = self.input_rows_needed(node.id, 1, shapes)
            delay = None if known.rows is None and needed >= MAX_SIZE else needed
            plans.append(LayerPlan(node.id, sources[0], shapes[node.id], sum(ports), held, delay, ports))
        return tuple(plans)

    def input_rows_needed(
        self,
        node_id: str,
        rows: int,
        shapes: Mapping[str, SampleShape],
        blocks: Mapping[str, int] | None = None,
    ) -> int:
        """Rows of the network's input that must have come before the first `rows` rows of a node leave.

        Args:
            node_id: the node.
            rows: output rows asked for.
            shapes: what `shapes` handed back.
            blocks: rows that each node computes together, aligned to multiples; 1 where not named.

        Returns:
            The rows; `MAX_SIZE` where all are needed and the height is not known.
        """
        return input_rows_needed(self.nodes, node_id, rows, shapes, blocks)

    def canonical(self) -> bytes:
        """The canonical form that the contract specifies at `Network`: compact JSON with sorted keys."""
        form = {
            "nodes": [
                {"id": node.id, "inputs": list(node.inputs), "layer": node.layer.canonical()}
                for node in self.nodes
            ],
            "outputs": [{"name": name, "node": target} for name, target in self.outputs.items()],
        }
        return json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the canonical form: 32 bytes."""
        return hashlib.sha256(_DOMAIN + self.canonical()).digest()

    @property
    def name(self) -> str:
        """`networks/sha256-...`: the name under which every server knows this network."""
        return NAME_PREFIX + self.digest.hex()

    def __repr__(self) -> str:
        return f"Network([{', '.join(repr(node.layer) for node in self.nodes)}])"
