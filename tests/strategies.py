"""Hypothesis strategies: layers with every kind of geometry, inputs that fit them, tensors on the wire."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from hypothesis import assume, reject
from hypothesis import strategies as st

from convservice.bands import DataFormat, TensorSpec
from convservice.dtypes import DTYPES, FLOAT32, DType
from convservice.errors import InvalidRequest
from convservice.geometry import PaddingMode, SampleShape
from convservice.layers import (
    FUNCTIONS,
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
from tests.helpers import FLOATS, INTEGERS, Array, random_array, small_integers

Maker = Callable[[st.DrawFn, DType], tuple[Layer, SampleShape]]
"""Draws a layer with weights of a dtype, and the shape of a sample for it."""

SEEDS = st.integers(0, 2**32 - 1)
Weighted = TypeVar("Weighted", Conv, LocallyConnected)
FEW_PRODUCTS = 40_000
"""Products that one example may have: the reference is a plain loop."""


@dataclass(frozen=True)
class Case:
    """A convolution and an input that fits it."""

    layer: Conv
    x: Array
    integers: bool
    """Whether all values are small integers, so that the result must be exact."""


@st.composite
def geometries(draw: st.DrawFn, rank: int) -> dict[str, Any]:
    """Options of `Conv` for data of `rank` spatial axes, the kernel's sizes under `kernel`, the input's under
    `sizes`."""
    largest = {1: 12, 2: 7, 3: 4}[rank]
    kernel = draw(st.tuples(*[st.integers(1, 4 if rank < 3 else 3)] * rank))
    stride = draw(st.tuples(*[st.integers(1, 5)] * rank))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * rank))
    mode = draw(st.sampled_from(PaddingMode))
    sizes = draw(st.tuples(*[st.integers(1, largest)] * rank))
    kind = draw(st.sampled_from(["none", "pairs", "pairs", "same", "full kernel", "only padding"]))
    padding: Any = "valid"
    if kind == "same":
        padding = "same"
    elif kind == "pairs":
        padding = draw(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * rank))
    elif kind == "full kernel":
        kernel, dilation = sizes, (1,) * rank
    elif kind == "only padding":
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
        padding = tuple((r, r + 1) for r in reach)
        mode = PaddingMode.ZEROS if mode is PaddingMode.REFLECT else mode
    return {
        "kernel": kernel,
        "sizes": sizes,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "padding_mode": mode,
    }


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[DType, ...] = DTYPES,
    functions: tuple[str, ...] = FUNCTIONS,
    largest_batch: int = 3,
) -> Case:
    """A convolution of any geometry, 1-D to 3-D, groups and depthwise included, and an input for it."""
    rng = np.random.default_rng(draw(SEEDS))
    dtype = draw(st.sampled_from(dtypes))
    own = dtype if dtype.is_float else (draw(st.sampled_from(FLOATS)) if FLOATS else FLOAT32)
    options = draw(geometries(draw(st.integers(1, 3))))
    kernel, sizes = options.pop("kernel"), options.pop("sizes")
    groups = draw(st.integers(1, 3))
    channels, filters = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    integers = draw(st.booleans())
    values = small_integers if integers else random_array
    weight = values(rng, (filters, channels // groups, *kernel), own)
    bias = values(rng, (filters,), own) if draw(st.booleans()) else None
    activation = Activation(draw(st.sampled_from(functions)), draw(st.sampled_from([0.01, -2.0, 0.5])))
    layer = Conv(weight, bias, groups=groups, activation=activation, **options)
    samples = draw(st.sampled_from([1, 0, largest_batch]))
    x = values(rng, (samples, channels, *sizes), dtype)
    return Case(layer, x, integers)


def fits(case: Case) -> bool:
    """Whether the input fits the layer, and is small enough for the reference."""
    sample = SampleShape(case.x.shape[1], case.x.shape[2], tuple(case.x.shape[3:]))
    try:
        out = case.layer.output_sample(sample)
    except InvalidRequest:
        return False
    return math.prod((len(case.x), out.elements, *case.layer.filters.shape[1:])) <= FEW_PRODUCTS


@st.composite
def specs(draw: st.DrawFn, *, unknown_height: bool = False) -> TensorSpec:
    """A small tensor on the wire: any dtype, rank, batch, band height and data format."""
    rest = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    rows = None if unknown_height else draw(st.integers(1, 9))
    return TensorSpec(
        draw(st.sampled_from(DTYPES)),
        SampleShape(draw(st.integers(1, 3)), rows, rest),
        1 if unknown_height else draw(st.integers(0, 3)),
        draw(st.integers(1, 11)),
        draw(st.sampled_from(DataFormat)),
    )


ACTIVATIONS = st.builds(Activation, st.sampled_from(FUNCTIONS), st.sampled_from([0.01, -2.0, 0.5]))


@dataclass(frozen=True)
class Fitted:
    """A layer of any type, and the shape of a sample that fits it."""

    layer: Layer
    sample: SampleShape


@st.composite
def fitted(
    draw: st.DrawFn, *, kinds: tuple[type[Layer], ...] | None = None, dtypes: tuple[DType, ...] = FLOATS
) -> Fitted:
    """A layer of one of `kinds` (any, where not given) with every kind of geometry, and a sample for it."""
    kind = draw(st.sampled_from(kinds or tuple(_MAKERS)))
    layer, sample = _MAKERS[kind](draw, draw(st.sampled_from(dtypes)))
    try:
        out = layer.output_sample(sample)
    except InvalidRequest:
        reject()
    assume(out.elements <= 2000)
    return Fitted(layer, sample)


def _sample(draw: st.DrawFn, channels: int, rank: int) -> SampleShape:
    largest = {1: 12, 2: 7, 3: 4}[rank]
    rows, *rest = draw(st.tuples(*[st.integers(1, largest)] * rank))
    return SampleShape(channels, rows, tuple(rest))


def _pool_options(draw: st.DrawFn, rank: int, *, dilated: bool) -> dict[str, Any]:
    """Options of pooling: one number each, for any rank, or one for each of `rank` axes."""
    anywhere = draw(st.booleans())
    axes = 1 if anywhere else rank
    kernel = draw(st.tuples(*[st.integers(1, 4)] * axes))
    stride = draw(st.none() | st.tuples(*[st.integers(1, 3)] * axes))
    spread = draw(st.tuples(*[st.integers(1, 3)] * axes)) if dilated else (1,) * axes
    reaches = [(k - 1) * d for k, d in zip(kernel, spread, strict=True)]
    pads = tuple(draw(st.tuples(st.integers(0, reach), st.integers(0, reach))) for reach in reaches)
    options: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": pads}
    if dilated:
        options["dilation"] = spread
    if anywhere:
        options = {name: value and value[0] for name, value in options.items()}
        options["padding"] = pads[0][0]
    if draw(st.booleans()):
        options["padding"] = "same"
    return options | {"ceil_mode": draw(st.booleans())}


def _max_pool(draw: st.DrawFn, dtype: DType) -> tuple[Layer, SampleShape]:
    rank = draw(st.integers(1, 3))
    return MaxPool(**_pool_options(draw, rank, dilated=True)), _sample(draw, draw(st.integers(1, 3)), rank)


def _avg_pool(draw: st.DrawFn, dtype: DType) -> tuple[Layer, SampleShape]:
    rank = draw(st.integers(1, 3))
    counts = draw(st.booleans())
    options = _pool_options(draw, rank, dilated=False)
    return AvgPool(**options, count_include_pad=counts), _sample(draw, draw(st.integers(1, 3)), rank)


def _any_rank(layer: Layer) -> Maker:
    return lambda draw, dtype: (layer, _sample(draw, draw(st.integers(1, 3)), draw(st.integers(1, 3))))


def _conv(draw: st.DrawFn, dtype: DType) -> tuple[Layer, SampleShape]:
    options = draw(geometries(draw(st.integers(1, 3))))
    kernel, (rows, *rest) = options.pop("kernel"), options.pop("sizes")

    def make(weight: Array, bias: Array | None, **kept: Any) -> Conv:
        return Conv(weight, bias, **kept, **options)

    layer = _with_groups(draw, dtype, kernel, make)
    return layer, SampleShape(layer.in_channels, rows, tuple(rest))


def _local(draw: st.DrawFn, dtype: DType) -> tuple[Layer, SampleShape]:
    options = draw(geometries(draw(st.integers(1, 3))))
    kernel, (rows, *rest) = options.pop("kernel"), options.pop("sizes")
    del options["padding_mode"]
    one = SampleShape(1, rows, tuple(rest))
    try:
        out = Conv(np.ones((1, 1, *kernel)), **options).output_sample(one).shape[1:]
    except InvalidRequest:
        reject()
    assume(math.prod(out) <= 200)

    def make(weight: Array, bias: Array | None, **kept: Any) -> LocallyConnected:
        spread = np.moveaxis(
            np.broadcast_to(weight, (*out, *weight.shape)), range(len(out)), range(2, 2 + len(out))
        )
        everywhere = bias is not None and draw(st.booleans())
        if bias is not None and everywhere:
            bias = np.broadcast_to(bias.reshape(-1, *[1] * len(out)), (len(bias), *out))
        return LocallyConnected(spread, bias, **kept, **options)

    layer = _with_groups(draw, dtype, kernel, make)
    return layer, SampleShape(layer.in_channels, rows, tuple(rest))


def _with_groups(
    draw: st.DrawFn, dtype: DType, kernel: tuple[int, ...], make: Callable[..., Weighted]
) -> Weighted:
    rng = np.random.default_rng(draw(SEEDS))
    groups = draw(st.integers(1, 3))
    channels, filters = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    weight = random_array(rng, (filters, channels // groups, *kernel), dtype)
    bias = random_array(rng, (filters,), dtype) if draw(st.booleans()) else None
    return make(weight, bias, groups=groups, activation=draw(ACTIVATIONS))


def _transposed(draw: st.DrawFn, dtype: DType) -> tuple[Layer, SampleShape]:
    rng, rank = np.random.default_rng(draw(SEEDS)), draw(st.integers(1, 3))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * rank)) for _ in range(3))
    added = tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True))
    groups = draw(st.integers(1, 3))
    channels, filters = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    layer = ConvTranspose(
        random_array(rng, (channels, filters, *kernel), dtype),
        random_array(rng, (filters * groups,), dtype) if draw(st.booleans()) else None,
        stride=stride,
        padding=draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank)),
        output_padding=added,
        dilation=dilation,
        groups=groups,
        activation=draw(ACTIVATIONS),
    )
    return layer, _sample(draw, channels, rank)


def _linear(draw: st.DrawFn, dtype: DType) -> tuple[Layer, SampleShape]:
    rng = np.random.default_rng(draw(SEEDS))
    given, out = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    bias = random_array(rng, (out,), dtype) if draw(st.booleans()) else None
    layer = Linear(random_array(rng, (out, given), dtype), bias, activation=draw(ACTIVATIONS))
    return layer, SampleShape.of_vector(given)


_MAKERS: dict[type[Layer], Maker] = {
    Activation: lambda draw, dtype: _any_rank(draw(ACTIVATIONS))(draw, dtype),
    Add: lambda draw, dtype: _any_rank(Add(draw(ACTIVATIONS)))(draw, dtype),
    AvgPool: _avg_pool,
    Conv: _conv,
    ConvTranspose: _transposed,
    Flatten: _any_rank(Flatten()),
    GlobalAvgPool: _any_rank(GlobalAvgPool()),
    GlobalMaxPool: _any_rank(GlobalMaxPool()),
    Linear: _linear,
    LocallyConnected: _local,
    MaxPool: _max_pool,
}

__all__ = ["INTEGERS", "SEEDS", "Case", "Fitted", "cases", "fits", "fitted", "geometries", "specs"]
