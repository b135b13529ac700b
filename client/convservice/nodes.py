"""Nodes: layers with the places that their inputs come from, and the rules of wiring.

`Network` is given a chain (layers, and residual blocks among them) or nodes; here a chain becomes nodes, and
nodes are checked to be an acyclic graph in topological order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convservice.errors import InvalidRequest, Reason
from convservice.layers import Activation, Add, Flatten, Layer

INPUT = "input"
"""The id under which nodes name the network's own input."""

MAX_NODES = 512

MAX_INPUTS = 64
"""Inputs of one node."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Node:
    """One layer of a network and where its inputs come from.

    Attributes:
        id: unique in the network; letters, digits, `_`, `-`, `.`, at most 64.
        layer: the operation.
        inputs: ids of earlier nodes, or `"input"`; as many as the layer takes, at most 64.
    """

    id: str
    layer: Layer
    inputs: tuple[str, ...] = (INPUT,)


class Residual:
    """A residual block, as one link of a chain: the sum of a body and a shortcut, then the activation.

        Network([
            Conv(w0, padding=1, activation="relu"),
            Residual([Conv(w1, padding=1, activation="relu"), Conv(w2, padding=1)], activation="relu"),
        ])

    It becomes nodes: at position 1 of the chain the body's are `layer1.body0`, `layer1.body1`, ..., the
    shortcut's `layer1.shortcut0`, ..., and their `Add` is `layer1`.

    Args:
        body: a chain of layers and residual blocks.
        shortcut: likewise; empty for the block's own input.
        activation: of the sum; a function's name or an `Activation`.

    Raises:
        InvalidRequest: `INVALID_NETWORK` for an empty body.
    """

    def __init__(
        self,
        body: Sequence[Layer | Residual],
        shortcut: Sequence[Layer | Residual] = (),
        *,
        activation: str | Activation | None = None,
    ) -> None:
        self.body = tuple(body)
        self.shortcut = tuple(shortcut)
        self.sum = Add(activation)
        if not self.body:
            raise bad("a residual block has at least one layer in its body")

    def __repr__(self) -> str:
        return f"Residual({list(self.body)}, {list(self.shortcut)}, {self.sum!r})"


def nodes_of(layers: Sequence[Any]) -> tuple[Node, ...]:
    """Nodes as they are, or those of a chain of layers and residual blocks.

    Raises:
        InvalidRequest: `INVALID_NETWORK` for anything else in a chain.
    """
    if all(isinstance(item, Node) for item in layers):
        return tuple(layers)
    found: list[Node] = []
    _append(found, layers, INPUT, "layer")
    return tuple(found)


def _append(found: list[Node], chain: Sequence[Any], source: str, prefix: str) -> str:
    """Appends a chain that begins at `source`; hands back the id of its end."""
    for position, item in enumerate(chain):
        name = f"{prefix}{position}"
        if isinstance(item, Residual):
            ends = (
                _append(found, item.body, source, f"{name}.body"),
                _append(found, item.shortcut, source, f"{name}.shortcut"),
            )
            found.append(Node(name, item.sum, ends))
        elif isinstance(item, Layer):
            found.append(Node(name, item, (source,)))
        else:
            kind = type(item).__name__
            where = "layer " if prefix == "layer" else f"{prefix} "
            raise bad(f"{where}{position} is a {kind}; a chain is made of layers and residual blocks alone")
        source = name
    return source


def label(position: int, node: Node) -> str:
    """How messages name a node."""
    return f"layer {position} ({node.layer.type_name}, id {node.id!r})"


def check_wiring(nodes: Sequence[Node], outputs: Mapping[str, str]) -> None:
    """Checks that nodes in this order are an acyclic graph, and that outputs name nodes of it.

    Raises:
        InvalidRequest: `INVALID_NETWORK`, naming the node by its position and type.
    """
    if not 1 <= len(nodes) <= MAX_NODES:
        raise bad(f"a network has 1 to {MAX_NODES} layers, not {len(nodes)}")
    known = {INPUT}
    for position, node in enumerate(nodes):
        _check_node(label(position, node), node, known)
        known.add(node.id)
    if len(outputs) > MAX_NODES:
        raise bad(f"a network has 1 to {MAX_NODES} outputs, not {len(outputs)}")
    for name, target in outputs.items():
        if not _NAME.fullmatch(name):
            raise bad(f"an output's name is 1 to 64 letters, digits, '_', '-' or '.', not {name!r}")
        if target not in known or target == INPUT:
            raise bad(f"output {name!r} names {target!r}, which is no node of the network")


def _check_node(where: str, node: Node, known: set[str]) -> None:
    if not _NAME.fullmatch(node.id):
        raise bad(f"{where}: an id is 1 to 64 letters, digits, '_', '-' or '.', not {node.id!r}")
    if node.id in known:
        raise bad(f"{where}: the id {node.id!r} is taken; ids are unique and never 'input'")
    for source in node.inputs:
        if source not in known:
            raise bad(f"{where}: its input {source!r} is no earlier node; nodes follow their inputs")
    count, fewest, most = len(node.inputs), node.layer.fewest_inputs, node.layer.most_inputs
    if count < fewest or count > (most or MAX_INPUTS):
        if most == fewest:
            wanted = f"{fewest} input{'s' if fewest > 1 else ''}"
        else:
            wanted = f"{fewest} to {most or MAX_INPUTS} inputs"
        raise bad(f"{where}: takes {wanted}, not {count}")


def input_rank(nodes: Iterable[Node]) -> int | None:
    """Spatial axes of the network's input, 0 for vectors: those of the first layer that fixes them among
    those whose data has as many; None where there is none."""
    alike = {INPUT}
    for node in nodes:
        if alike.isdisjoint(node.inputs):
            continue
        if node.layer.rank is not None:
            return node.layer.rank
        if not isinstance(node.layer, Flatten):
            alike.add(node.id)
    return None


def bad(message: str) -> InvalidRequest:
    """Wiring that is no such graph."""
    return InvalidRequest(message, reason=Reason.INVALID_NETWORK)
