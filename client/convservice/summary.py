"""What a network has, as a table: a layer a row.

Given nodes and the shapes of their feature maps, `summary_of` counts: parameters (and what they would be if
no neuron shared any), neurons, connections, and how much of the network's input a neuron in the middle sees.
A `Summary` prints as text and shows itself as HTML in a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convservice.fields import network_field
from convservice.geometry import SampleShape
from convservice.layers import Activation, Layer
from convservice.nodes import INPUT, Node
from convservice.tables import html_table, plain_table

_COLUMNS = (
    "layer",
    "type",
    "output shape",
    "parameters ",
    "unshared ",
    "neurons ",
    "connections ",
    "receptive field",
    "connected to",
)


@dataclass(frozen=True)
class LayerSummary:
    """One row: what one layer has, for one sample.

    Attributes:
        id: the node's.
        type: the layer's, with its activation where it is not linear.
        output_shape: (C, *spatial), or (F,) of a vector.
        parameter_count: weights and thresholds; what neurons share counts once.
        unshared_parameter_count: what they would be if no two neurons shared any.
        neuron_count: neurons.
        connection_count: pairs of a neuron and a value of the layer's input, see `Layer.connection_count`.
        receptive_field: per spatial axis how many positions of the network's input lie from the first to the
            last that a neuron in the middle finally sees; of an input of vectors, how many elements.
        inputs: ids of the nodes that it is connected to.
    """

    id: str
    type: str
    output_shape: tuple[int, ...]
    parameter_count: int
    unshared_parameter_count: int
    neuron_count: int
    connection_count: int
    receptive_field: tuple[int, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What a network has, for one sample of an input.

    `str` of it is a table; a notebook shows it as HTML.

    Attributes:
        input_shape: (C, *spatial) of the input.
        rows: one for each layer.
        outputs: output name to node id.
        weight_bytes: bytes of all weights, each tensor once.
    """

    input_shape: tuple[int, ...]
    rows: tuple[LayerSummary, ...]
    outputs: Mapping[str, str]
    weight_bytes: int

    @property
    def parameter_count(self) -> int:
        """Weights and thresholds of all layers."""
        return sum(row.parameter_count for row in self.rows)

    @property
    def unshared_parameter_count(self) -> int:
        """What they would be if no two neurons shared any."""
        return sum(row.unshared_parameter_count for row in self.rows)

    @property
    def neuron_count(self) -> int:
        """Neurons of all layers."""
        return sum(row.neuron_count for row in self.rows)

    @property
    def connection_count(self) -> int:
        """Connections of all layers."""
        return sum(row.connection_count for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([plain_table(self._title, _COLUMNS, self._cells), "", *self._totals])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, _COLUMNS, self._cells, self._totals)

    @property
    def _title(self) -> str:
        return f"input {self.input_shape}"

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.id,
                row.type,
                str(row.output_shape),
                f"{row.parameter_count:,}",
                f"{row.unshared_parameter_count:,}",
                f"{row.neuron_count:,}",
                f"{row.connection_count:,}",
                " x ".join(map(str, row.receptive_field)),
                ", ".join(row.inputs),
            )
            for row in self.rows
        ]

    @property
    def _totals(self) -> list[str]:
        outputs = ", ".join(f"{name} (layer {node})" for name, node in self.outputs.items())
        parameters = f"parameters {self.parameter_count:,} ({self.weight_bytes:,} bytes)"
        return [
            f"{parameters}; {self.unshared_parameter_count:,} if no neuron shared any",
            f"neurons {self.neuron_count:,}, connections {self.connection_count:,}",
            f"outputs: {outputs}",
        ]


def summary_of(
    nodes: Sequence[Node], outputs: Mapping[str, str], shapes: Mapping[str, SampleShape]
) -> Summary:
    """Counts what each layer has.

    Args:
        nodes: the network's, in topological order.
        outputs: output name to node id.
        shapes: of every feature map, by node id, with `"input"`.
    """
    tensors = {tensor.digest: tensor for node in nodes for tensor in node.layer.tensors}
    return Summary(
        shapes[INPUT].shape,
        tuple(_row(nodes[: position + 1], shapes) for position in range(len(nodes))),
        dict(outputs),
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def _row(nodes: Sequence[Node], shapes: Mapping[str, SampleShape]) -> LayerSummary:
    """The row of the last of `nodes`; the others are what it may be connected to."""
    node = nodes[-1]
    layer, given, out = node.layer, (1, *shapes[node.inputs[0]].shape), shapes[node.id]
    middle = tuple(size // 2 for size in (out.shape if out.vector else out.shape[1:]))
    field = network_field(nodes, shapes, node.id, middle)
    bounds = field.inside or (field.channels,)
    return LayerSummary(
        node.id,
        type_of(layer),
        out.shape,
        layer.parameter_count,
        layer.unshared_parameter_count(given),
        layer.neuron_count(given),
        layer.connection_count(given) * len(node.inputs),
        tuple(stop - start for start, stop in bounds),
        node.inputs,
    )


def type_of(layer: Layer) -> str:
    """A layer's type, with its activation where it is not linear."""
    activation = layer if isinstance(layer, Activation) else getattr(layer, "activation", None)
    if isinstance(activation, Activation) and activation.function != "linear":
        return f"{layer.type_name} ({activation.function})"
    return layer.type_name
