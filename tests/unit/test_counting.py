"""Parameters, neurons and connections of every layer, against counting one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convservice import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    InvalidRequest,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.counting import window_pairs
from convservice.geometry import MAX_SIZE
from tests.strategies import geometries

SMALL = st.integers(1, 6)


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


@given(st.integers(0, 12), st.integers(1, 12), SMALL, SMALL, SMALL, st.integers(0, 12))
def test_pairs_are_those_counted_one_by_one(  # noqa: PLR0917 - as they are drawn
    neurons: int, size: int, kernel: int, stride: int, dilation: int, before: int
) -> None:
    counted = sum(
        0 <= i * stride - before + k * dilation < size for i in range(neurons) for k in range(kernel)
    )
    options = {"kernel": kernel, "stride": stride, "dilation": dilation, "before": before}
    assert window_pairs(neurons, size, **options) == counted


@pytest.mark.timeout(10)
def test_a_huge_axis_is_counted_at_once() -> None:
    layer = Conv(ones(1, 1, 3), padding=1)
    assert layer.connection_count((1, MAX_SIZE)) == 3 * MAX_SIZE - 2
    assert MaxPool(2**30, stride=1).connection_count((1, 1, 2**31 - 1)) == 2**30 * 2**30
    assert GlobalAvgPool().connection_count((1, 2, 2**31 - 1)) == 2 * (2**31 - 1)
    up = ConvTranspose(ones(1, 1, 3), stride=2, padding=1)
    assert up.connection_count((1, 2**30)) == 3 * 2**30 - 2


def counted(layer: Layer, sample: tuple[int, ...]) -> int:
    """Connections of a layer whose neurons look through windows, from each neuron's own receptive field."""
    channels, *sizes = layer.output_shape((1, *sample))[1:]
    seen = [
        math.prod(
            sum(0 <= p < size for p in axis) for axis, size in zip(field.axes, field.sizes, strict=True)
        )
        for index in itertools.product(*(range(size) for size in sizes))
        for field in [layer.receptive_field(index, (1, *sample))]
    ]
    return sum(seen) * sum(len(layer.seen_channels(channel)) for channel in range(channels))


@given(st.integers(1, 3).flatmap(geometries), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2))
def test_a_convolutions_connections(
    options: dict[str, Any], groups: int, per_group: int, filters: int
) -> None:
    kernel, sizes = options.pop("kernel"), options.pop("sizes")
    layer = Conv(ones(groups * filters, per_group, *kernel), groups=groups, **options)
    sample = (groups * per_group, *sizes)
    try:
        layer.output_shape(sample)
    except InvalidRequest:
        return
    assert layer.connection_count(sample) == counted(layer, sample)


POOLS = st.fixed_dictionaries(
    {"stride": st.integers(1, 4), "padding": st.integers(0, 2), "ceil_mode": st.booleans()}
)


@given(st.integers(3, 4), POOLS, st.integers(1, 3), st.tuples(st.integers(4, 9), st.integers(4, 9)))
def test_a_poolings_connections(
    kernel: int, options: dict[str, Any], dilation: int, sizes: tuple[int, int]
) -> None:
    for layer in (MaxPool(kernel, dilation=dilation, **options), AvgPool(kernel, **options)):
        try:
            layer.output_shape((1, 3, *sizes))
        except InvalidRequest:
            continue
        assert layer.connection_count((1, 3, *sizes)) == counted(layer, (3, *sizes))


TRANSPOSED = st.fixed_dictionaries(
    {"stride": st.integers(1, 4), "dilation": st.integers(1, 3), "padding": st.integers(0, 2)}
)


@given(st.integers(1, 4), TRANSPOSED, st.integers(1, 6), st.booleans())
def test_a_transposed_convolutions_connections(
    kernel: int, options: dict[str, Any], size: int, padded: bool
) -> None:
    added = int(padded and max(options["stride"], options["dilation"]) > 1)
    layer = ConvTranspose(ones(4, 3, kernel, 2), groups=2, output_padding=added, **options)
    try:
        layer.output_shape((4, size, 3))
    except InvalidRequest:
        return
    assert layer.connection_count((4, size, 3)) == counted(layer, (4, size, 3))


def test_layers_that_look_at_everything_or_at_their_own_place() -> None:
    assert Linear(ones(5, 12)).connection_count((12,)) == 60
    assert Flatten().connection_count((1, 3, 4, 5)) == Flatten().neuron_count((1, 3, 4, 5)) == 60
    assert Activation("relu").connection_count((1, 3, 4, 5)) == 60
    assert Add().connection_count((1, 3, 4, 5)) == 60, "to each input"
    for pool in (GlobalMaxPool(), GlobalAvgPool()):
        assert (pool.connection_count((1, 3, 4, 5)), pool.neuron_count((1, 3, 4, 5))) == (60, 3)
        assert pool.parameter_count == pool.unshared_parameter_count((1, 3, 4, 5)) == 0


@pytest.mark.parametrize("thresholds", [False, True])
def test_shared_weights_beside_weights_of_their_own(thresholds: bool) -> None:
    """The chapter's contrast: the same geometry, with a filter for all positions and with one for each."""
    geometry: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    shared = Conv(ones(4, 3, 5, 5), ones(4) if thresholds else None, **geometry)
    _, *sizes = shared.output_shape((6, 20, 13))
    own = LocallyConnected(ones(4, 3, *sizes, 5, 5), ones(4, *sizes) if thresholds else None, **geometry)
    shape = (6, 20, 13)
    assert own.output_shape(shape) == shared.output_shape(shape)
    assert (
        shared.unshared_parameter_count(shape) == own.parameter_count == own.unshared_parameter_count(shape)
    )
    assert shared.parameter_count == 4 * 3 * 25 + 4 * thresholds
    assert own.parameter_count == math.prod(sizes) * shared.parameter_count
    assert shared.connection_count(shape) == own.connection_count(shape)


def test_without_sharing_a_transposed_convolution_has_filters_for_every_input_position() -> None:
    layer = ConvTranspose(ones(2, 3, 4, 4), ones(3), stride=2)
    assert layer.unshared_parameter_count((2, 5, 6)) == 2 * 5 * 6 * 3 * 16 + layer.neuron_count((2, 5, 6))


def test_full_connectivity_shares_nothing() -> None:
    layer = Linear(ones(5, 12), ones(5))
    assert layer.unshared_parameter_count((12,)) == layer.parameter_count == 65
