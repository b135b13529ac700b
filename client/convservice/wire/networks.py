"""Networks, as objects and as messages, with the rules of the contract checked."""

from __future__ import annotations

from collections.abc import Callable

from convservice.errors import InvalidRequest, Reason
from convservice.network import Network
from convservice.nodes import Node
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.layers import layer_from_proto, node_to_proto
from convservice.wire.weights import weight_to_proto


def network_to_proto(network: Network) -> pb.Network:
    """A network's structure, with the digests of its weights."""
    return pb.Network(
        nodes=[node_to_proto(node) for node in network.nodes],
        outputs=[pb.NetworkOutput(name=name, node=node) for name, node in network.outputs.items()],
    )


def inline_to_proto(network: Network) -> pb.InlineNetwork:
    """A network with the bytes of its weights."""
    weights = [weight_to_proto(tensor) for tensor in network.tensors]
    return pb.InlineNetwork(network=network_to_proto(network), weights=weights)


def network_from_proto(message: pb.Network, resolve: Callable[[Tensor], Tensor] = lambda t: t) -> Network:
    """A network; `resolve` turns each reference to a weight tensor into the tensor to use.

    Raises:
        InvalidRequest: the structure breaks a rule, naming the node.
    """
    nodes: list[Node] = []
    for position, node in enumerate(message.nodes):
        try:
            nodes.append(Node(node.id, layer_from_proto(node, resolve), tuple(node.inputs)))
        except InvalidRequest as exc:
            raise InvalidRequest(
                f"layer {position} (id {node.id!r}): {exc.message}",
                reason=exc.reason,
                metadata={**exc.metadata, "node": node.id, "position": str(position)},
                field=exc.field,
            ) from exc
    outputs: dict[str, str] = {}
    for output in message.outputs:
        if output.name in outputs:
            raise InvalidRequest(f"two outputs are named {output.name!r}", reason=Reason.INVALID_NETWORK)
        outputs[output.name] = output.node
    if not outputs:
        raise InvalidRequest("a network has at least one output", reason=Reason.INVALID_NETWORK)
    return Network(nodes, outputs)
