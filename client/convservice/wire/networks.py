"""Networks and weight tensors, as objects and as messages, with the rules of the contract checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from convservice.dtypes import DType, dtype_of_wire
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, MAX_SIZE
from convservice.layers import Activation, Conv, Layer
from convservice.network import Network, Node
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.enums import ACTIVATIONS, PADDING_MODES, number_of, value_of
from convservice.wire.headers import MAX_TENSOR_BYTES


def reference_to_proto(tensor: Tensor) -> pb.TensorReference:
    """A weight tensor's digest, type and shape."""
    return pb.TensorReference(
        digest=tensor.digest, data_type=pb.DataType.ValueType(tensor.dtype.wire), shape=tensor.shape
    )


def reference_from_proto(message: pb.TensorReference, name: str) -> Tensor:
    """A weight tensor known by its digest alone.

    Raises:
        InvalidRequest: a digest that is not 32 bytes, a type that is no float, a size below 1.
    """
    if len(message.digest) != 32:
        raise InvalidRequest(
            f"{name}: a digest has 32 bytes, not {len(message.digest)}",
            reason=Reason.INVALID_NETWORK,
            field=name,
        )
    dtype, shape = _weight_type(message.data_type, message.shape, name)
    return Tensor.reference(message.digest, dtype, shape)


def weight_to_proto(tensor: Tensor) -> pb.WeightTensor:
    """A weight tensor with its bytes."""
    data_type = pb.DataType.ValueType(tensor.dtype.wire)
    return pb.WeightTensor(data_type=data_type, shape=tensor.shape, data=bytes(tensor.packed()))


def weight_from_proto(message: pb.WeightTensor) -> Tensor:
    """A weight tensor with its own copy of the bytes.

    Raises:
        InvalidRequest: `PAYLOAD_SIZE` when the bytes are not those of the shape.
    """
    dtype, shape = _weight_type(message.data_type, message.shape, "weights")
    return weight_from_bytes(message.data, dtype, shape)


def weight_from_bytes(data: bytes | bytearray, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """A weight tensor with its own copy of packed bytes; `PAYLOAD_SIZE` when they are too many or few."""
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidRequest(
            f"a weight tensor of shape {shape} {dtype} has {expected} bytes, {len(data)} were sent",
            reason=Reason.PAYLOAD_SIZE,
            metadata={"expected": str(expected), "bytes": str(len(data))},
            field="data",
        )
    packed = np.frombuffer(data, dtype=dtype.packed).reshape(shape)
    return Tensor.adopt(np.array(packed, dtype=dtype.numpy, order="C", copy=True))


def _weight_type(number: int, shape: Sequence[int], name: str) -> tuple[DType, tuple[int, ...]]:
    dtype = dtype_of_wire(number, f"{name}.data_type")
    sizes = tuple(shape)
    if (
        not dtype.is_float
        or not 1 <= len(sizes) <= 2 + MAX_RANK
        or not all(1 <= s <= MAX_SIZE for s in sizes)
    ):
        raise InvalidRequest(
            f"{name}: a weight tensor has a float dtype and 1 to {2 + MAX_RANK} sizes from 1 to {MAX_SIZE},"
            f" not {dtype} and {sizes}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(sizes), "data_type": dtype.name},
            field=name,
        )
    if math.prod(sizes) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise InvalidRequest(
            f"{name}: a weight tensor of shape {sizes} is larger than {MAX_TENSOR_BYTES} bytes",
            reason=Reason.SIZE_OVERFLOW,
            field=name,
        )
    return dtype, sizes


def network_to_proto(network: Network) -> pb.Network:
    """A network's structure, with the digests of its weights."""
    return pb.Network(
        nodes=[_node_to_proto(node) for node in network.nodes],
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
            nodes.append(Node(node.id, _layer_from_proto(node, resolve), tuple(node.inputs)))
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


def _node_to_proto(node: Node) -> pb.Node:
    layer = node.layer
    if isinstance(layer, Conv):
        return pb.Node(id=node.id, inputs=node.inputs, conv=_conv_to_proto(layer))
    if isinstance(layer, Activation):
        return pb.Node(id=node.id, inputs=node.inputs, activation=_activation_to_proto(layer))
    raise InvalidRequest(f"{layer!r} cannot travel: no such layer", reason=Reason.UNKNOWN_LAYER)


def _layer_from_proto(node: pb.Node, resolve: Callable[[Tensor], Tensor]) -> Layer:
    kind = node.WhichOneof("layer")
    if kind == "conv":
        return _conv_from_proto(node.conv, resolve)
    if kind == "activation":
        return _activation_from_proto(node.activation)
    raise InvalidRequest(
        "it has no layer that this version knows", reason=Reason.UNKNOWN_LAYER, field="layer"
    )


def _conv_to_proto(layer: Conv) -> pb.Conv:
    if layer.padding == "same":
        padding = pb.Padding(same=pb.SamePadding())
    else:
        axes = [pb.AxisPadding(before=before, after=after) for before, after in layer.padding]
        padding = pb.Padding(explicit=pb.ExplicitPadding(axes=axes))
    return pb.Conv(
        weight=reference_to_proto(layer.filters),
        bias=None if layer.thresholds is None else reference_to_proto(layer.thresholds),
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=pb.PaddingMode.ValueType(number_of(PADDING_MODES, layer.padding_mode)),
        activation=_activation_to_proto(layer.activation),
    )


def _conv_from_proto(message: pb.Conv, resolve: Callable[[Tensor], Tensor]) -> Conv:
    if not message.HasField("weight"):
        raise InvalidRequest("a convolution needs a weight", reason=Reason.INVALID_NETWORK, field="weight")
    bias = resolve(reference_from_proto(message.bias, "bias")) if message.HasField("bias") else None
    padding: str | int | tuple[tuple[int, int], ...] = 0
    if message.padding.WhichOneof("kind") == "same":
        padding = "same"
    elif message.padding.explicit.axes:
        padding = tuple((axis.before, axis.after) for axis in message.padding.explicit.axes)
    return Conv(
        resolve(reference_from_proto(message.weight, "weight")),
        bias,
        stride=tuple(message.stride) or 1,
        padding=padding,
        dilation=tuple(message.dilation) or 1,
        groups=message.groups or 1,
        padding_mode=value_of(PADDING_MODES, message.padding_mode, "padding_mode"),
        activation=_activation_from_proto(message.activation),
    )


def _activation_to_proto(activation: Activation) -> pb.Activation:
    number = number_of(ACTIVATIONS, activation.function)
    slope = activation.negative_slope if activation.function == "leaky_relu" else None
    return pb.Activation(function=pb.ActivationFunction.ValueType(number), negative_slope=slope)


def _activation_from_proto(message: pb.Activation) -> Activation:
    function = value_of(ACTIVATIONS, message.function, "activation")
    if message.HasField("negative_slope"):
        return Activation(function, message.negative_slope)
    return Activation(function)
