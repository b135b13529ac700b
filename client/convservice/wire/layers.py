"""Layers, as objects and as messages.

Each layer has a writer and a reader here, and an entry in `_WRITERS` and `_READERS`; a reader is given the
layer's message and hands on the layer, whose constructor checks the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, Pads, Same
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
    Pool,
)
from convservice.nodes import Node
from convservice.tensors import Tensor
from convservice.v1 import conv_pb2 as pb
from convservice.wire.enums import ACTIVATIONS, PADDING_MODES, number_of, value_of
from convservice.wire.weights import reference_from_proto, reference_to_proto

Resolve = Callable[[Tensor], Tensor]
"""Turns a reference to a weight tensor into the tensor to use."""


def node_to_proto(node: Node) -> pb.Node:
    """A node with its layer.

    Raises:
        InvalidRequest: `UNKNOWN_LAYER`: the layer is none of the contract's.
    """
    for kind, (field, write) in _WRITERS.items():
        if isinstance(node.layer, kind):
            return pb.Node(id=node.id, inputs=node.inputs, **{field: write(node.layer)})
    raise InvalidRequest(f"{node.layer!r} cannot travel: no such layer", reason=Reason.UNKNOWN_LAYER)


def layer_from_proto(node: pb.Node, resolve: Resolve) -> Layer:
    """A node's layer.

    Raises:
        InvalidRequest: it is none that this version knows, or breaks a rule.
    """
    kind = node.WhichOneof("layer")
    if kind is None:
        raise InvalidRequest(
            "it has no layer that this version knows", reason=Reason.UNKNOWN_LAYER, field="layer"
        )
    return _READERS[kind](getattr(node, kind), resolve)


def _padding_to_proto(padding: Same | Pads | int) -> pb.Padding:
    if padding == "same":
        return pb.Padding(same=pb.SamePadding())
    pads = ((padding, padding),) if isinstance(padding, int) else padding
    axes = [pb.AxisPadding(before=before, after=after) for before, after in pads]
    return pb.Padding(explicit=pb.ExplicitPadding(axes=axes))


def _padding_from_proto(message: pb.Padding) -> str | int | Pads:
    if message.WhichOneof("kind") == "same":
        return "same"
    return tuple((axis.before, axis.after) for axis in message.explicit.axes) or 0


def _activation_to_proto(activation: Activation) -> pb.Activation:
    number = number_of(ACTIVATIONS, activation.function)
    slope = activation.negative_slope if activation.function == "leaky_relu" else None
    return pb.Activation(function=pb.ActivationFunction.ValueType(number), negative_slope=slope)


def _activation_from_proto(message: pb.Activation) -> Activation:
    function = value_of(ACTIVATIONS, message.function, "activation")
    if message.HasField("negative_slope"):
        return Activation(function, message.negative_slope)
    return Activation(function)


def _weights_to_proto(layer: Conv | LocallyConnected | ConvTranspose | Linear) -> dict[str, Any]:
    """The fields that every layer with weights has."""
    return {
        "weight": reference_to_proto(layer.filters),
        "bias": None if layer.thresholds is None else reference_to_proto(layer.thresholds),
        "activation": _activation_to_proto(layer.activation),
    }


def _weights_from_proto(message: Any, resolve: Resolve, what: str) -> dict[str, Any]:
    if not message.HasField("weight"):
        raise InvalidRequest(f"{what} needs a weight", reason=Reason.INVALID_NETWORK, field="weight")
    return {
        "bias": resolve(reference_from_proto(message.bias, "bias")) if message.HasField("bias") else None,
        "weight": resolve(reference_from_proto(message.weight, "weight")),
        "activation": _activation_from_proto(message.activation),
    }


def _steps_to_proto(layer: Conv | LocallyConnected | ConvTranspose) -> dict[str, Any]:
    """The fields that every layer with a kernel has."""
    return {
        "stride": layer.stride,
        "padding": _padding_to_proto(layer.padding),
        "dilation": layer.dilation,
        "groups": layer.groups,
    }


def _steps_from_proto(message: Any) -> dict[str, Any]:
    return {
        "stride": tuple(message.stride) or 1,
        "padding": _padding_from_proto(message.padding),
        "dilation": tuple(message.dilation) or 1,
        "groups": message.groups or 1,
    }


def _conv_to_proto(layer: Conv) -> pb.Conv:
    mode = pb.PaddingMode.ValueType(number_of(PADDING_MODES, layer.padding_mode))
    return pb.Conv(**_weights_to_proto(layer), **_steps_to_proto(layer), padding_mode=mode)


def _conv_from_proto(message: pb.Conv, resolve: Resolve) -> Conv:
    return Conv(
        **_weights_from_proto(message, resolve, "a convolution"),
        **_steps_from_proto(message),
        padding_mode=value_of(PADDING_MODES, message.padding_mode, "padding_mode"),
    )


def _local_to_proto(layer: LocallyConnected) -> pb.LocallyConnected:
    return pb.LocallyConnected(**_weights_to_proto(layer), **_steps_to_proto(layer))


def _local_from_proto(message: pb.LocallyConnected, resolve: Resolve) -> LocallyConnected:
    weights = _weights_from_proto(message, resolve, "a locally connected layer")
    return LocallyConnected(**weights, **_steps_from_proto(message))


def _transposed_to_proto(layer: ConvTranspose) -> pb.ConvTranspose:
    return pb.ConvTranspose(
        **_weights_to_proto(layer), **_steps_to_proto(layer), output_padding=layer.output_padding
    )


def _transposed_from_proto(message: pb.ConvTranspose, resolve: Resolve) -> ConvTranspose:
    weights = _weights_from_proto(message, resolve, "a transposed convolution")
    added = tuple(message.output_padding) or 0
    return ConvTranspose(**weights, **_steps_from_proto(message), output_padding=added)


def _linear_to_proto(layer: Linear) -> pb.Linear:
    return pb.Linear(**_weights_to_proto(layer))


def _linear_from_proto(message: pb.Linear, resolve: Resolve) -> Linear:
    return Linear(**_weights_from_proto(message, resolve, "a fully connected layer"))


def _pool_to_proto(layer: Pool) -> dict[str, Any]:
    """The fields that both kinds of pooling have."""
    return {
        "rank": layer.rank or 0,
        "kernel_size": _listed(layer.kernel_size),
        "stride": _listed(layer.stride),
        "padding": _padding_to_proto(layer.padding),
        "ceil_mode": layer.ceil_mode,
    }


def _pool_from_proto(message: pb.MaxPool | pb.AvgPool) -> dict[str, Any]:
    rank = message.rank
    if rank > MAX_RANK:
        raise InvalidRequest(
            f"pooling has 1 to {MAX_RANK} spatial axes, or 0 for any, not {rank}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": "rank", "value": str(rank)},
            field="rank",
        )
    padding = _padding_from_proto(message.padding)
    if not rank and isinstance(padding, tuple):
        before, after = padding[0]
        if len(padding) != 1 or before != after:
            raise InvalidRequest(
                f"padding for data of any rank is one number for all sides, not {padding}",
                reason=Reason.INVALID_PARAMETER,
                metadata={"name": "padding", "value": str(padding)},
                field="padding",
            )
        padding = before
    return {
        "kernel_size": _sizes("kernel_size", message.kernel_size, rank),
        "stride": _sizes("stride", message.stride, rank) if message.stride else None,
        "padding": padding,
        "ceil_mode": message.ceil_mode,
    }


def _sizes(name: str, sizes: Sequence[int], rank: int) -> int | tuple[int, ...]:
    """One number for data of any rank (0), or one for each of `rank` axes."""
    if len(sizes) != (rank or 1):
        raise InvalidRequest(
            f"{name} must have {rank or 1} entries for a rank of {rank}, not {len(sizes)}",
            reason=Reason.INVALID_PARAMETER,
            metadata={"name": name, "value": str(tuple(sizes)), "rank": str(rank)},
            field=name,
        )
    return tuple(sizes) if rank else sizes[0]


def _listed(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _max_pool_to_proto(layer: MaxPool) -> pb.MaxPool:
    return pb.MaxPool(**_pool_to_proto(layer), dilation=_listed(layer.dilation))


def _max_pool_from_proto(message: pb.MaxPool, _resolve: Resolve) -> MaxPool:
    dilation = _sizes("dilation", message.dilation, message.rank) if message.dilation else 1
    return MaxPool(**_pool_from_proto(message), dilation=dilation)


def _avg_pool_to_proto(layer: AvgPool) -> pb.AvgPool:
    return pb.AvgPool(**_pool_to_proto(layer), count_include_pad=layer.count_include_pad)


def _avg_pool_from_proto(message: pb.AvgPool, _resolve: Resolve) -> AvgPool:
    counts = message.count_include_pad if message.HasField("count_include_pad") else True
    return AvgPool(**_pool_from_proto(message), count_include_pad=counts)


_WRITERS: Mapping[type[Layer], tuple[str, Callable[[Any], Any]]] = {
    Conv: ("conv", _conv_to_proto),
    Activation: ("activation", _activation_to_proto),
    MaxPool: ("max_pool", _max_pool_to_proto),
    AvgPool: ("avg_pool", _avg_pool_to_proto),
    GlobalMaxPool: ("global_max_pool", lambda _layer: pb.GlobalMaxPool()),
    GlobalAvgPool: ("global_avg_pool", lambda _layer: pb.GlobalAvgPool()),
    LocallyConnected: ("locally_connected", _local_to_proto),
    ConvTranspose: ("conv_transpose", _transposed_to_proto),
    Add: ("add", lambda layer: pb.Add(activation=_activation_to_proto(layer.activation))),
    Flatten: ("flatten", lambda _layer: pb.Flatten()),
    Linear: ("linear", _linear_to_proto),
}

_READERS: Mapping[str, Callable[[Any, Resolve], Layer]] = {
    "conv": _conv_from_proto,
    "activation": lambda message, _resolve: _activation_from_proto(message),
    "max_pool": _max_pool_from_proto,
    "avg_pool": _avg_pool_from_proto,
    "global_max_pool": lambda _message, _resolve: GlobalMaxPool(),
    "global_avg_pool": lambda _message, _resolve: GlobalAvgPool(),
    "locally_connected": _local_from_proto,
    "conv_transpose": _transposed_from_proto,
    "add": lambda message, _resolve: Add(_activation_from_proto(message.activation)),
    "flatten": lambda _message, _resolve: Flatten(),
    "linear": _linear_from_proto,
}
