"""A neuron taken apart, against sums over plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice import Activation, Conv, InvalidRequest, SampleShape
from convservice.cli.local import check, convolve
from convservice.cli.neuron import activated, neuron_view
from convservice.dtypes import dtype_of
from convservice.layers import FUNCTIONS
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT
from convservice_backends.reference import layer_reference

LAYERS: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({}, (2, 3, 4), (3, 9)),
    ({"padding": ((2, 0),), "stride": 2, "dilation": 2}, (2, 3, 3), (3, 9)),
    ({"padding": "same", "padding_mode": "replicate"}, (4, 2, 3, 2), (2, 5, 6)),
    ({"padding": ((1, 2), (0, 3)), "stride": (2, 1), "groups": 2}, (4, 3, 3, 3), (6, 7, 5)),
    ({"padding": 2, "padding_mode": "reflect", "dilation": (1, 2)}, (1, 1, 3, 3), (1, 6, 7)),
    ({"padding": 1, "stride": 2}, (2, 2, 3, 2, 1), (2, 4, 5, 3)),
]


@pytest.fixture(params=LAYERS, ids=lambda case: str(case[0]))
def case(request: pytest.FixtureRequest, rng: np.random.Generator) -> tuple[Conv, NDArray[Any]]:
    options: dict[str, Any]
    weight_shape: tuple[int, ...]
    sample_shape: tuple[int, ...]
    options, weight_shape, sample_shape = request.param
    weight = rng.integers(-9, 9, weight_shape).astype(np.float32)
    bias = rng.integers(-9, 9, weight_shape[0]).astype(np.float32)
    return Conv(weight, bias, **options), rng.integers(-9, 9, sample_shape).astype(np.float32)


def padded_by_hand(layer: Conv, sample: NDArray[Any]) -> NDArray[Any]:
    mode: Any = {"zeros": "constant", "reflect": "reflect", "replicate": "edge"}[layer.padding_mode]
    windows = layer.windows(SampleShape(sample.shape[0], sample.shape[1], sample.shape[2:]))
    return np.pad(sample, [(0, 0), *((window.before, window.after) for window in windows)], mode=mode)


def sum_by_hand(layer: Conv, sample: NDArray[Any], channel: int, index: tuple[int, ...]) -> float:
    """The sum of one neuron's products, a loop per axis."""
    padded = padded_by_hand(layer, sample)
    depth = layer.weight.shape[1]
    first = channel // (layer.out_channels // layer.groups) * depth
    total = 0.0
    for c, *at in itertools.product(range(depth), *(range(size) for size in layer.kernel)):
        place = tuple(
            i * s + k * d for i, s, k, d in zip(index, layer.stride, at, layer.dilation, strict=True)
        )
        total += float(padded[(first + c, *place)]) * float(layer.weight[(channel, c, *at)])
    return total


def test_every_neuron_sums_what_plain_loops_sum(case: tuple[Conv, NDArray[Any]]) -> None:
    layer, sample = case
    channels, *sizes = layer.output_shape(sample.shape)
    for channel, *index in itertools.product(range(channels), *(range(size) for size in sizes)):
        view = neuron_view(layer, sample, index, channel)
        assert layer.bias is not None
        assert view.total == sum_by_hand(layer, sample, channel, tuple(index))
        assert view.expected == view.total + layer.bias[channel]
        assert view.products is not None
        assert view.weights is not None
        assert view.products.shape == view.values.shape == view.weights.shape == layer.weight.shape[1:]
        assert view.inside.shape == layer.kernel


def test_the_local_convolution_sums_what_plain_loops_sum(case: tuple[Conv, NDArray[Any]]) -> None:
    layer, sample = case
    sums = convolve(layer, np.stack([sample, -sample]))
    assert sums.shape == layer.output_shape((2, *sample.shape))
    for channel, *index in itertools.product(*(range(size) for size in sums.shape[1:])):
        expected = sum_by_hand(layer, sample, channel, tuple(index))
        assert sums[(0, channel, *index)] == expected
        assert sums[(1, channel, *index)] == -expected


def test_the_nine_neurons_of_the_worked_example() -> None:
    layer = Conv(WEIGHT[None, None])
    for i, j in itertools.product(range(3), range(3)):
        view = neuron_view(layer, INPUT[None], (i, j))
        assert view.axes == (range(i, i + 3), range(j, j + 3))
        assert view.inside.all()
        assert view.expected == FEATURE_MAP[i, j]


def test_values_in_the_padding_are_told_apart() -> None:
    layer = Conv(WEIGHT[None, None], padding=1, padding_mode="replicate")
    view = neuron_view(layer, INPUT[None], (0, 0))
    assert view.inside.tolist() == [[False, False, False], [False, True, True], [False, True, True]]
    assert view.values[0].tolist() == [[3, 3, 3], [3, 3, 3], [0, 0, 0]]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_at_zero_and_far_out(function: str) -> None:
    activation = Activation(function, negative_slope=0.25)
    assert activated(activation, 0.0) == (0.5 if function == "sigmoid" else 0.0)
    assert activated(activation, 40.0) == (1.0 if function in {"sigmoid", "tanh"} else 40.0)
    low = {"linear": -800.0, "leaky_relu": -200.0, "tanh": -1.0}.get(function, 0.0)
    assert activated(activation, -800.0) == pytest.approx(low, abs=1e-300)
    assert math.isnan(activated(activation, math.nan))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bound_is_the_references(function: str, dtype: str, rng: np.random.Generator) -> None:
    weight, bias = rng.uniform(-3, 3, (2, 3, 2, 2)), rng.uniform(-1, 1, 2)
    layer = Conv(weight.astype(dtype), bias.astype(dtype), activation=Activation(function, negative_slope=-2))
    x = rng.uniform(-2, 2, (3, 4, 5)).astype(dtype)
    own = dtype_of(x.dtype)
    expected = layer_reference(layer, x[None], own, own)
    for channel, *index in np.ndindex(expected.value.shape[1:]):
        view = neuron_view(layer, x, index, channel)
        assert view.expected == pytest.approx(expected.value[(0, channel, *index)], rel=1e-12)
        assert view.bound == pytest.approx(expected.bound[(0, channel, *index)], rel=1e-9)


def test_a_neuron_that_is_not_there() -> None:
    layer = Conv(WEIGHT[None, None])
    with pytest.raises(InvalidRequest, match=r"neuron \(3, 0\) is outside the feature map of size \(3, 3\)"):
        neuron_view(layer, INPUT[None], (3, 0))
    with pytest.raises(InvalidRequest, match=r"neuron \(0, -1\) is outside the feature map of size \(3, 3\)"):
        neuron_view(layer, INPUT[None], (0, -1))
    with pytest.raises(InvalidRequest, match="channel must be from 0 to 0, not 1"):
        neuron_view(layer, INPUT[None], (0, 0), 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_check_accepts_rounding_and_nothing_more(dtype: str, rng: np.random.Generator) -> None:
    layer = Conv(rng.uniform(-1, 1, (4, 3, 3, 3)).astype(dtype), padding=1)
    x = rng.uniform(-1, 1, (2, 3, 8, 8)).astype(dtype)
    right = convolve(layer, x).astype(dtype)
    found = check(layer, x, right)
    assert found.equal
    assert found.share_of_bound <= 1
    wrong = right.copy()
    wrong[1, 2, 3, 4] += 1
    found = check(layer, x, wrong)
    assert not found.equal
    assert found.largest_error == pytest.approx(1, rel=1e-2)
