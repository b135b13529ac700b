"""Hypothesis strategies: layers with every kind of geometry, inputs that fit them, tensors on the wire."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from convservice.bands import DataFormat, TensorSpec
from convservice.dtypes import DTYPES, FLOAT32, DType
from convservice.errors import InvalidRequest
from convservice.geometry import PaddingMode, SampleShape
from convservice.layers import FUNCTIONS, Activation, Conv
from tests.helpers import FLOATS, INTEGERS, Array, random_array, small_integers

SEEDS = st.integers(0, 2**32 - 1)
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


__all__ = ["INTEGERS", "SEEDS", "Case", "cases", "fits", "geometries", "specs"]
