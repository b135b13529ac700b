"""Small layers beside the convolution that together launch every form of every kernel of theirs.

`layer_problems` hands on a list of layers with the shapes of their inputs, for rows of every type;
`check_layer` has one computed on a device and compares it with what it should give, in extended precision.
`forms` are the kernels that they launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_arrays import NumpyArrays
from benchmarks.gpu_check import within
from benchmarks.gpu_exact import exact
from convservice.dtypes import DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import (
    Add,
    AvgPool,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms.base import float_types
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import DeviceInfo, Stream
from convservice_backends.cuda.dry import DryDevice
from convservice_backends.cuda.operators import compute_whole, operator_for
from convservice_backends.cuda.source import Kernel

Array = NDArray[Any]
Weights = Callable[..., Array]
"""Given sizes, hands on so many random weights."""


@dataclass(frozen=True)
class Recipe:
    """A layer of any type.

    Attributes:
        name: what it is.
        kernel: file of the kernel that it is for.
        shapes: (N, channels, *spatial) of each input; a fully connected layer's before it is flattened.
        make: the layer, given what makes its weights.
    """

    name: str
    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[Weights], Layer]


def _of(name: str, kernel: str, shape: tuple[int, ...], make: Callable[[Weights], Layer]) -> Recipe:
    return Recipe(name, kernel, (shape,), make)


RECIPES = (
    _of("max 3x3 stride 2", "pool", (2, 3, 9, 11), lambda _: MaxPool(3, stride=2, padding=1)),
    _of(
        "max dilated, rounded up",
        "pool",
        (2, 3, 9, 11),
        lambda _: MaxPool((2, 3), stride=(3, 2), dilation=(3, 2), padding=((1, 0), (2, 1)), ceil_mode=True),
    ),
    _of("max 1-D", "pool", (2, 3, 200), lambda _: MaxPool(4, stride=1, padding=2)),
    _of("average 2x2", "pool", (2, 3, 8, 10), lambda _: AvgPool(2)),
    _of(
        "average rounded up, padding counted",
        "pool",
        (2, 3, 9, 11),
        lambda _: AvgPool(3, stride=2, padding=1, ceil_mode=True),
    ),
    _of(
        "average 3-D, padding not counted",
        "pool",
        (1, 2, 4, 5, 6),
        lambda _: AvgPool((2, 3, 2), stride=(1, 2, 2), padding=1, count_include_pad=False),
    ),
    _of(
        "transposed 4x4 stride 2",
        "transposed",
        (2, 3, 5, 6),
        lambda w: ConvTranspose(w(3, 11, 4, 4), w(11), stride=2, padding=1, activation="relu"),
    ),
    _of(
        "transposed depthwise",
        "transposed",
        (2, 3, 5, 6),
        lambda w: ConvTranspose(w(3, 1, 3, 2), w(3), stride=(2, 3), groups=3, output_padding=1),
    ),
    _of(
        "transposed, dilated by more than it steps",
        "transposed",
        (1, 4, 6, 7),
        lambda w: ConvTranspose(
            w(4, 3, 3, 3), stride=(2, 4), dilation=(3, 6), groups=2, padding=((2, 0), (1, 5))
        ),
    ),
    _of(
        "transposed 3-D",
        "transposed",
        (1, 2, 3, 4, 3),
        lambda w: ConvTranspose(w(2, 9, 2, 3, 2), w(9), stride=(3, 1, 2)),
    ),
    _of("transposed 1-D", "transposed", (2, 3, 90), lambda w: ConvTranspose(w(3, 2, 5), stride=4)),
    _of(
        "local 3x3",
        "local",
        (6, 4, 7, 9),
        lambda w: LocallyConnected(w(6, 2, 7, 9, 3, 3), w(6), padding=1, groups=2, activation="relu"),
    ),
    _of(
        "local with thresholds at every position",
        "local",
        (1, 3, 60),
        lambda w: LocallyConnected(w(5, 3, 29, 3), w(5, 29), stride=2),
    ),
    _of(
        "local 3-D",
        "local",
        (2, 2, 3, 4, 5),
        lambda w: LocallyConnected(w(3, 2, 2, 3, 2, 2, 2, 2), dilation=(1, 1, 3)),
    ),
    _of("global max", "global_pool", (2, 3, 9, 11), lambda _: GlobalMaxPool()),
    _of("global max of long rows", "global_pool", (1, 2, 2, 5000), lambda _: GlobalMaxPool()),
    _of("global average", "global_pool", (2, 3, 70, 31), lambda _: GlobalAvgPool()),
    _of("global average of long rows", "global_pool", (1, 2, 3, 5000), lambda _: GlobalAvgPool()),
    _of("linear, one sample", "linear", (1, 5, 9, 11), lambda w: Linear(w(6, 495), w(6), activation="relu")),
    _of("linear, eleven samples", "linear", (11, 130, 5, 4), lambda w: Linear(w(7, 2600), w(7))),
    _of("linear of a vector", "linear", (3, 70, 1), lambda w: Linear(w(4, 70))),
    _of("linear of long rows", "linear", (1, 2, 3, 3000), lambda w: Linear(w(3, 18000), w(3))),
    _of("flattened", "copy", (2, 3, 9, 11), lambda _: Flatten()),
    Recipe("sum of two", "add", ((2, 3, 9, 11),) * 2, lambda _: Add("relu")),
    Recipe("sum of twenty", "add", ((2, 3, 5, 7),) * 20, lambda _: Add()),
)


@dataclass(frozen=True)
class LayerProblem:
    """A layer for rows of one type.

    Attributes:
        recipe: the layer, whatever the type.
        given: dtype of rows and weights.
        out: dtype of the feature map.
    """

    recipe: Recipe
    given: DType
    out: DType

    def __str__(self) -> str:
        types = self.given.name if self.given == self.out else f"{self.given} to {self.out}"
        return f"{self.recipe.kernel}, {self.recipe.name}, {types}"

    def made(self) -> tuple[Layer, list[Array]]:
        """The layer and its inputs, random, the same every time."""
        rng = np.random.default_rng(7)

        def random(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(self.given.numpy)

        layer = self.recipe.make(random)
        return layer, [random(*shape) for shape in self.recipe.shapes]


def layer_problems() -> Iterator[LayerProblem]:
    """Every layer for every pair of types."""
    for given, out in float_types():
        for recipe in RECIPES:
            yield LayerProblem(recipe, given, out)


def compute(layer: Layer, inputs: Sequence[Array], out: DType, stream: Stream, info: DeviceInfo) -> Array:
    """What a device makes of whole samples, in memory of exactly the sizes that it takes."""
    arrays = NumpyArrays(stream)
    given = [dtype_of(x.dtype) for x in inputs]
    first = inputs[0]
    sample = SampleShape(first.shape[1], first.shape[2], first.shape[3:])
    flat = SampleShape.of_vector(sample.elements) if isinstance(layer, Linear) else sample
    whole = layer.output_sample(flat)
    operator = operator_for(layer, given, sample, precision=Precision.HIGH, info=info)
    weights = tuple(arrays.held(array).memory for array in operator.weights())
    rows = [
        DeviceArray.packed(arrays.held(x).memory, x.shape, dtype)
        for x, dtype in zip(inputs, given, strict=True)
    ]
    held = arrays.empty((len(first), whole.channels, whole.height, *whole.rest), out)
    target = DeviceArray.packed(held.memory, held.array.shape, out)
    compute_whole(operator, rows, target, stream, info=info, weights=weights)
    return np.asarray(arrays.read(held))


def check_layer(problem: LayerProblem, stream: Stream, info: DeviceInfo) -> float:
    """Runs a problem; the largest error as a share of the bound.

    Raises:
        Wrong: the bound is broken.
    """
    layer, inputs = problem.made()
    found = compute(layer, inputs, problem.out, stream, info)
    wanted = exact(layer, inputs)
    error = np.abs(found.astype(wanted.value.dtype) - wanted.value)
    return within(float((error / wanted.bound(problem.given.accumulator, problem.out)).max()))


def forms(info: DeviceInfo) -> set[Kernel]:
    """The kernels that the problems launch, without a device."""
    device = DryDevice(info)
    for problem in layer_problems():
        compute(*problem.made(), problem.out, device.stream(), info)
    return set(device.launched)
