"""The canonical form of networks, read back.

`Network.canonical` and `Layer.canonical` state a network as JSON values; given those values and the tensors
that they name, this hands back the network. The members of a layer's form are the arguments of its class, so
that a new layer needs one line here: its type.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

from convservice.errors import InvalidRequest, Reason
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import Network
from convservice.nodes import Node
from convservice.tensors import Tensor

Resolve = Callable[[str], Tensor]
"""Given a digest in hexadecimal, hands back its tensor, or raises."""


def _itself(*, activation: Activation) -> Activation:
    """An activation as a layer: its one member states all of it."""
    return activation


LAYERS: dict[str, Callable[..., Layer]] = {
    "activation": _itself,
    "add": Add,
    "avg_pool": AvgPool,
    "conv": Conv,
    "conv_transpose": ConvTranspose,
    "flatten": Flatten,
    "global_avg_pool": GlobalAvgPool,
    "global_max_pool": GlobalMaxPool,
    "linear": Linear,
    "locally_connected": LocallyConnected,
    "max_pool": MaxPool,
}
"""Type in a canonical form to what makes the layer of the form's other members."""

_TENSORS = ("weight", "bias")


def network_from_canonical(form: Any, resolve: Resolve) -> Network:
    """The network that a canonical form states.

    Args:
        form: what `json.loads` made of `Network.canonical()`.
        resolve: turns the digest of a weight tensor into the tensor.

    Raises:
        InvalidRequest: it is no such form, or breaks a rule of layers or networks; it names the layer.
    """
    stated = _members(form, "a network")
    nodes: list[Node] = []
    for position, item in enumerate(_items(stated.get("nodes"), "nodes")):
        node = _members(item, f"layer {position}")
        node_id = _text(node.get("id"), f"the id of layer {position}")
        inputs = tuple(
            _text(source, f"an input of {node_id!r}") for source in _items(node.get("inputs"), "inputs")
        )
        try:
            nodes.append(Node(node_id, layer_from_canonical(node.get("layer"), resolve), inputs))
        except InvalidRequest as exc:
            raise InvalidRequest(
                f"layer {position} (id {node_id!r}): {exc.message}",
                reason=exc.reason,
                metadata={**exc.metadata, "node": node_id, "position": str(position)},
                field=exc.field,
            ) from exc
    outputs: dict[str, str] = {}
    for item in _items(stated.get("outputs"), "outputs"):
        output = _members(item, "an output")
        outputs[_text(output.get("name"), "an output's name")] = _text(output.get("node"), "an output's node")
    return Network(nodes, outputs)


def layer_from_canonical(form: Any, resolve: Resolve) -> Layer:
    """The layer that a canonical form states.

    Raises:
        InvalidRequest: `UNKNOWN_LAYER` for a type that this version does not know; what the layer's class
            raises for values that break its rules.
    """
    options = dict(_members(form, "a layer"))
    kind = options.pop("type", None)
    if "activation" in options:
        options["activation"] = _activation(options["activation"])
    make = LAYERS.get(kind) if isinstance(kind, str) else None
    if make is None:
        raise InvalidRequest(
            f"its type is {kind!r}; this version knows {', '.join(LAYERS)}",
            reason=Reason.UNKNOWN_LAYER,
            metadata={"type": repr(kind)},
        )
    for name in _TENSORS:
        if options.get(name) is not None:
            options[name] = resolve(_text(options[name], f"the digest of its {name}"))
    try:
        return make(**options)
    except TypeError as exc:  # a member that is missing, not known, or of another kind
        raise _bad(f"what is stated of a layer of type {kind!r} is not what makes one: {exc}") from exc


def _activation(form: Any) -> Activation:
    stated = _members(form, "an activation")
    function = _text(stated.get("function"), "an activation's function")
    if "negative_slope" not in stated:
        return Activation(function)
    try:
        (slope,) = struct.unpack(">d", bytes.fromhex(_text(stated["negative_slope"], "a slope")))
    except (ValueError, struct.error) as exc:
        raise _bad("a negative_slope is the 8 bytes of a float64 in hexadecimal") from exc
    return Activation(function, slope)


def _members(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{what} is stated as an object, not as {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _items(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise _bad(f"{what} are stated as a list, not as {type(value).__name__}")
    return cast("Sequence[Any]", value)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _bad(f"{what} is a text, not {type(value).__name__}")
    return value


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=Reason.INVALID_NETWORK)
