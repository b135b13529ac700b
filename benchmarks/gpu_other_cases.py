"""The layers beside the convolution that the GPU benchmark measures, and the same by PyTorch.

An `OtherCase` is one layer by its sizes; `CASES` lists them. `peer` computes the same layer on tensors of
PyTorch, of any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from convservice.layers import (
    Add,
    AvgPool,
    ConvTranspose,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)

Weights = Callable[..., NDArray[Any]]
"""Given sizes, hands on so many random weights."""


@dataclass(frozen=True)
class OtherCase:
    """A layer by its sizes.

    Attributes:
        name: as the table has it.
        sample: (channels, *spatial) of each input; a fully connected layer's before it is flattened.
        make: the layer, given what makes its weights.
        inputs: how many feature maps it takes.
    """

    name: str
    sample: tuple[int, ...]
    make: Callable[[Weights], Layer]
    inputs: int = 1


CASES = (
    OtherCase("max pool 3x3 stride 2, ResNet-50", (64, 112, 112), lambda _: MaxPool(3, stride=2, padding=1)),
    OtherCase("max pool 2x2, VGG-16", (64, 224, 224), lambda _: MaxPool(2)),
    OtherCase("average pool 2x2, DenseNet", (256, 56, 56), lambda _: AvgPool(2)),
    OtherCase(
        "average pool 3x3 stride 1, Inception", (192, 35, 35), lambda _: AvgPool(3, stride=1, padding=1)
    ),
    OtherCase("global average pool, ResNet-50", (2048, 7, 7), lambda _: GlobalAvgPool()),
    OtherCase("global max pool of a large map", (64, 512, 512), lambda _: GlobalMaxPool()),
    OtherCase(
        "transposed 4x4 stride 2, DCGAN",
        (512, 8, 8),
        lambda w: ConvTranspose(w(512, 256, 4, 4), stride=2, padding=1),
    ),
    OtherCase(
        "transposed 2x2 stride 2, U-Net", (256, 56, 56), lambda w: ConvTranspose(w(256, 128, 2, 2), stride=2)
    ),
    OtherCase(
        "transposed 3x3 stride 2", (64, 64, 64), lambda w: ConvTranspose(w(64, 32, 3, 3), stride=2, padding=1)
    ),
    OtherCase("linear, ResNet-50", (2048, 1, 1), lambda w: Linear(w(1000, 2048), w(1000))),
    OtherCase("linear, VGG-16", (512, 7, 7), lambda w: Linear(w(4096, 25088), w(4096))),
    OtherCase("locally connected 3x3", (64, 28, 28), lambda w: LocallyConnected(w(64, 64, 26, 26, 3, 3))),
    OtherCase("sum of two, ResNet-50", (256, 56, 56), lambda _: Add("relu"), inputs=2),
    OtherCase("tiny transposed", (3, 5, 6), lambda w: ConvTranspose(w(3, 2, 3, 3), stride=2)),
    OtherCase("tiny linear", (3, 5, 6), lambda w: Linear(w(4, 90), w(4))),
    OtherCase("tiny locally connected", (3, 5, 6), lambda w: LocallyConnected(w(4, 3, 3, 4, 3, 3))),
    OtherCase("tiny max pool", (3, 5, 6), lambda _: MaxPool(2)),
)

TINY = "tiny"
"""What cases that try the program begin with."""


def peer(layer: Layer, torch: Any, x: Any, *others: Any) -> Any:
    """A 2-D layer by PyTorch.

    Args:
        layer: with the padding and dilation that one of `CASES` has.
        torch: the module.
        x: its first input.
        others: its weights, or its other inputs.
    """
    functional = torch.nn.functional
    match layer:
        case MaxPool():
            return functional.max_pool2d(x, layer.kernel_size, layer.stride, layer.padding)
        case AvgPool():
            return functional.avg_pool2d(x, layer.kernel_size, layer.stride, layer.padding)
        case GlobalMaxPool():
            return x.amax((2, 3), keepdim=True)
        case GlobalAvgPool():
            return x.mean((2, 3), keepdim=True)
        case ConvTranspose():
            return functional.conv_transpose2d(x, *others, stride=layer.stride, padding=layer.padding[0][0])
        case Linear():
            return functional.linear(x.flatten(1), *others)[..., None]
        case LocallyConnected():
            fields = functional.unfold(x, layer.kernel, stride=layer.stride)
            fields = fields.reshape(len(x), x.shape[1], -1, fields.shape[-1])
            weight = others[0].flatten(2, 3).flatten(3)  # (out, in, positions, taps)
            found = torch.einsum("nikp,oipk->nop", fields, weight)
            return found.unflatten(2, layer.output_spatial)
        case Add():
            return torch.relu(x + others[0])
        case _:
            raise TypeError(f"there is no peer of a {layer.type_name}")
