"""Networks: layers wired as a small acyclic graph with named outputs.

Given layers, `Network` checks the wiring once and hands back what follows from it: the shapes of every
feature map, the rows each layer holds while a tensor streams through, the canonical form and the name
derived from it. A chain is the common case, a lone convolution a network of one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE, SampleShape, first_row_kept
from convservice.layers import Layer, split_shape
from convservice.tensors import Tensor

INPUT = "input"
"""The id under which nodes name the network's own input."""

MAX_NODES = 512
NAME_PREFIX = "networks/sha256-"

_DOMAIN = b"convservice.network.v1\0"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Node:
    """One layer of a network and where its input comes from.

    Attributes:
        id: unique in the network; letters, digits, `_`, `-`, `.`, at most 64.
        layer: the operation.
        inputs: ids of earlier nodes, or `"input"`.
    """

    id: str
    layer: Layer
    inputs: tuple[str, ...] = (INPUT,)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer of a network holds while a sample streams through it, row by row.

    Attributes:
        node: its id.
        input_shape: the sample it is given.
        output_shape: the sample it puts out.
        rows_held: most input rows it holds between two of its output rows: its halo.
        bytes_held: the same in bytes.
        delay_rows: rows of the network's input that must have come before its first output row leaves.
    """

    node: str
    input_shape: SampleShape
    output_shape: SampleShape
    rows_held: int
    bytes_held: int
    delay_rows: int


class Network:
    """Layers wired as an acyclic graph.

    Args:
        layers: a chain of layers, or nodes in topological order (each after all its inputs).
        outputs: output name to node id; without it the last node is the one output, `"output"`.

    Raises:
        InvalidRequest: `INVALID_NETWORK` for wiring that is not such a graph, naming the node.
    """

    def __init__(
        self, layers: Sequence[Layer] | Sequence[Node], outputs: Mapping[str, str] | None = None
    ) -> None:
        self.nodes: tuple[Node, ...] = _nodes(layers)
        self.outputs: dict[str, str] = dict(outputs or {"output": self.nodes[-1].id if self.nodes else ""})
        self._check()

    def _check(self) -> None:
        if not 1 <= len(self.nodes) <= MAX_NODES:
            raise _bad(f"a network has 1 to {MAX_NODES} layers, not {len(self.nodes)}")
        known = {INPUT}
        for position, node in enumerate(self.nodes):
            where = self._label(position)
            if not _NAME.fullmatch(node.id):
                raise _bad(f"{where}: an id is 1 to 64 letters, digits, '_', '-' or '.', not {node.id!r}")
            if node.id in known:
                raise _bad(f"{where}: the id {node.id!r} is taken; ids are unique and never 'input'")
            for source in node.inputs:
                if source not in known:
                    raise _bad(f"{where}: its input {source!r} is no earlier node; nodes follow their inputs")
            if len(node.inputs) != 1:
                raise _bad(f"{where}: takes 1 input, not {len(node.inputs)}")
            known.add(node.id)
        if len(self.outputs) > MAX_NODES:
            raise _bad(f"a network has 1 to {MAX_NODES} outputs, not {len(self.outputs)}")
        for name, target in self.outputs.items():
            if not _NAME.fullmatch(name):
                raise _bad(f"an output's name is 1 to 64 letters, digits, '_', '-' or '.', not {name!r}")
            if target not in known or target == INPUT:
                raise _bad(f"output {name!r} names {target!r}, which is no node of the network")
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

    def _label(self, position: int) -> str:
        node = self.nodes[position]
        return f"layer {position} ({node.layer.type_name}, id {node.id!r})"

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weight tensors of all layers, each once, in the order of first use."""
        found: dict[int, Tensor] = {}
        for node in self.nodes:
            for tensor in node.layer.tensors:
                found.setdefault(id(tensor), tensor)
        return tuple(found.values())

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def rank(self) -> int | None:
        """Number of spatial axes of its data; None where no layer fixes it."""
        return next((node.layer.rank for node in self.nodes if node.layer.rank is not None), None)

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
                found[node.id] = node.layer.output_sample(found[node.inputs[0]])
            except InvalidRequest as exc:
                if len(self.nodes) == 1:
                    raise
                raise InvalidRequest(
                    f"{self._label(position)}: {exc.message}",
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
        found: dict[str, tuple[int, ...]] = {}
        for name, target in self.outputs.items():
            shape = shapes[target]
            found[name] = (*batch, shape.channels, shape.height, *shape.rest)
        return found if len(found) > 1 else next(iter(found.values()))

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
            known = split_shape((*sizes[:at], 1, *sizes[at:]), self.rank)[1].with_rows(None)
        else:
            known = split_shape([size for size in input_shape if size is not None], self.rank)[1]
        given = dtype_of(dtype)
        shapes, own = self.shapes(known), self.dtype(given)
        plans: list[LayerPlan] = []
        for node in self.nodes:
            source = node.inputs[0]
            held = rows_held(node.layer, shapes[source])
            itemsize = (given if source == INPUT else own).itemsize
            plans.append(
                LayerPlan(
                    node.id,
                    shapes[source],
                    shapes[node.id],
                    held,
                    held * shapes[source].row_elements * itemsize,
                    self.input_rows_needed(node.id, 1, shapes),
                )
            )
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
        """
        while node_id != INPUT:
            node = self._by_id[node_id]
            step = (blocks or {}).get(node_id, 1)
            rows = -(-rows // step) * step
            height = shapes[node_id].rows
            if height is not None:
                rows = min(rows, height)
            node_id = node.inputs[0]
            rows = node.layer.real_rows(0, rows, shapes[node_id])[1] if rows else 0
        return rows

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


def rows_held(layer: Layer, sample: SampleShape) -> int:
    """Most input rows that a layer holds between two of its output rows, whatever the height."""
    window, height = layer.window(sample), sample.rows
    extent, after = window.extent, window.after
    # What is held is linear in the row between the places where a window's first position passes these.
    turns = [0, -extent, 1 - extent, (1 - extent) // 2, 1 + after - extent, -after]
    if height is not None:
        turns += [height - extent, height, height - 1, height - 1 - after, 1 - height]
    last = MAX_SIZE if height is None else window.output_size(height) - 1
    near = {(turn + window.before) // window.stride + offset for turn in turns for offset in range(-1, 3)}
    held = 1
    for row in {0, last, *(row for row in near if 0 <= row <= last)}:
        start, _ = window.span(row, row + 1)
        seen = layer.real_rows(row, row + 1, sample)[1]
        held = max(held, seen - first_row_kept(start, after, seen, height, layer.row_mode))
    return held


def _nodes(layers: Sequence[Layer] | Sequence[Node]) -> tuple[Node, ...]:
    if all(isinstance(item, Node) for item in layers):
        return tuple(item for item in layers if isinstance(item, Node))
    nodes: list[Node] = []
    for position, item in enumerate(layers):
        if not isinstance(item, Layer):
            raise _bad(f"layer {position} is a {type(item).__name__}; a chain is made of layers alone")
        nodes.append(Node(f"layer{position}", item, (nodes[-1].id if nodes else INPUT,)))
    return tuple(nodes)


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.INVALID_NETWORK)
