from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given

from convservice.errors import InvalidRequest
from convservice.geometry import SampleShape, real_position
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
    activation_of,
    split_shape,
)
from tests.helpers import EXAMPLE_INPUT, EXAMPLE_WEIGHT
from tests.strategies import Case, cases, fits

WEIGHT = np.ones((4, 2, 3, 3), np.float32)


def sample_of(case: Case) -> SampleShape:
    return SampleShape(case.x.shape[1], case.x.shape[2], tuple(case.x.shape[3:]))


def test_a_convolution_says_what_it_is() -> None:
    layer = Conv(WEIGHT, np.zeros(4, np.float32), stride=(2, 1), padding=((1, 0), (2, 3)), activation="relu")
    assert (layer.rank, layer.kernel, layer.out_channels, layer.in_channels) == (2, (3, 3), 4, 2)
    assert layer.parameter_count == 4 * 2 * 3 * 3 + 4
    assert layer.output_shape((5, 2, 8, 9)) == (5, 4, 4, 12)
    assert layer.output_shape((2, 8, 9)) == (4, 4, 12)
    assert layer.neuron_count((5, 2, 8, 9)) == 4 * 4 * 12
    assert "stride=(2, 1)" in repr(layer)


def test_weights_are_copied_and_read_only() -> None:
    weight = np.ones((1, 1, 3), np.float32)
    layer = Conv(weight, np.zeros(1, np.float32))
    digest = layer.filters.digest
    weight[:] = 7
    assert layer.weight.tolist() == [[[1, 1, 1]]]
    assert layer.filters.digest == digest
    with pytest.raises(ValueError, match="read-only"):
        layer.weight[0] = 2
    assert layer.bias is not None
    with pytest.raises(ValueError, match="read-only"):
        layer.bias[0] = 2


def test_weights_of_any_layout_and_byte_order_are_the_same_layer() -> None:
    plain = np.arange(72, dtype=np.float32).reshape(4, 2, 3, 3)
    wider = np.zeros((4, 2, 3, 6), np.float32)
    wider[..., ::2] = plain
    for weight in (np.asfortranarray(plain), plain.astype(">f4"), wider[..., ::2]):
        assert Conv(weight).filters.digest == Conv(plain).filters.digest


@given(cases())
def test_the_shape_of_the_output_is_that_of_its_windows(case: Case) -> None:
    assume(fits(case))
    layer, sample = case.layer, sample_of(case)
    out = layer.output_sample(sample)
    assert layer.output_shape(case.x.shape) == (case.x.shape[0], out.channels, out.height, *out.rest)
    spatial = (out.height, *out.rest)
    for window, size, count in zip(
        layer.windows(sample), (sample.height, *sample.rest), spatial, strict=True
    ):
        assert window.positions(count - 1)[-1] < size + window.after <= window.positions(count)[-1]
    if layer.padding == "same":
        sizes = zip((sample.height, *sample.rest), layer.stride, strict=True)
        assert spatial == tuple(math.ceil(size / stride) for size, stride in sizes)


@given(cases())
def test_a_receptive_field_is_what_the_formula_reads(case: Case) -> None:
    assume(fits(case))
    assume(len(case.x) > 0)
    layer, sample = case.layer, sample_of(case)
    out = layer.output_sample(sample)
    spatial, sizes = (out.height, *out.rest), (sample.height, *sample.rest)
    for index in {tuple(0 for _ in spatial), tuple(n - 1 for n in spatial), tuple(n // 2 for n in spatial)}:
        field = layer.receptive_field(index, case.x.shape)
        assert (field.sizes, field.mode) == (sizes, layer.padding_mode)
        for axis, (i, positions) in enumerate(zip(index, field.axes, strict=True)):
            window = layer.windows(sample)[axis]
            expected = [
                i * layer.stride[axis] + k * layer.dilation[axis] - window.before
                for k in range(layer.kernel[axis])
            ]
            assert list(positions) == expected
        for (low, high), positions, size in zip(field.inside, field.axes, sizes, strict=True):
            read = [real_position(p, size, layer.padding_mode) for p in positions]
            assert all(p is None or low <= p < high for p in read)


@given(cases())
def test_rows_needed_never_decrease(case: Case) -> None:
    assume(fits(case))
    layer, sample = case.layer, sample_of(case)
    height = layer.output_sample(sample).height
    for rows in (sample, sample.with_rows(None)):
        if rows.rows is None and layer.padding == "same" and layer.stride[0] > 1:
            continue
        spans = [layer.input_rows(row, row + 1, rows) for row in range(height)]
        assert spans == sorted(spans)
        assert [stop for _, stop in spans] == sorted(stop for _, stop in spans)
        assert layer.input_rows(0, height, rows) == (spans[0][0], spans[-1][1])


def test_the_worked_example_looks_where_the_chapter_says() -> None:
    layer = Conv(np.array(EXAMPLE_WEIGHT, np.float32)[None, None])
    shape = np.array(EXAMPLE_INPUT).shape
    field = layer.receptive_field((1, 0), (1, *shape))
    assert field.axes == (range(1, 4), range(3))
    assert field.inside == ((1, 4), (0, 3))
    assert layer.output_shape((1, 5, 5)) == (1, 3, 3)
    assert (layer.neuron_count((1, 5, 5)), layer.parameter_count) == (9, 9)


@pytest.mark.parametrize(
    ("options", "reason", "message"),
    [
        ({"stride": 0}, "INVALID_PARAMETER", "stride must be an integer from 1"),
        ({"stride": -1}, "INVALID_PARAMETER", "stride must be an integer from 1"),
        ({"stride": (1, 2, 3)}, "INVALID_PARAMETER", "one for each of the 2 spatial axes"),
        ({"stride": float("nan")}, "INVALID_PARAMETER", "stride must be an integer"),
        ({"dilation": 0}, "INVALID_PARAMETER", "dilation must be an integer from 1"),
        ({"padding": -1}, "INVALID_PARAMETER", "padding must be an integer from 0"),
        ({"padding": "full"}, "INVALID_PARAMETER", "padding must be 'same', 'valid'"),
        ({"groups": 0}, "INVALID_PARAMETER", "groups must be an integer from 1"),
        ({"groups": 3}, "CHANNEL_MISMATCH", "weight has 4 filters, groups is 3"),
        (
            {"padding_mode": "circular"},
            "INVALID_PARAMETER",
            "padding_mode must be one of zeros, reflect, replicate",
        ),
        ({"activation": "softmax"}, "INVALID_PARAMETER", "activation must be one of linear, relu"),
        ({"bias": np.zeros(3, np.float32)}, "INVALID_SHAPE", r"bias must have shape \(4,\)"),
        ({"bias": np.zeros(4, np.float64)}, "DATA_TYPE_MISMATCH", "dtype float32, not float64; convert it"),
    ],
)
def test_options_that_break_a_rule_are_refused(options: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Conv(WEIGHT, **options)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.zeros((3, 3), np.float32), "INVALID_SHAPE"),
        (np.zeros((1, 1, 1, 1, 1, 1), np.float32), "INVALID_SHAPE"),
        (np.zeros((1, 1, 0, 3), np.float32), "INVALID_SHAPE"),
        (np.zeros((1, 1, 3, 3), np.int8), "DATA_TYPE_MISMATCH"),
        (np.zeros((1, 1, 3, 3), np.int64), "UNKNOWN_DATA_TYPE"),
    ],
)
def test_weights_that_break_a_rule_are_refused(weight: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Conv(weight)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("shape", "reason", "message"),
    [
        (
            (3, 8, 8),
            "CHANNEL_MISMATCH",
            "weight has 2 input channels per group, the input has 3 channels in 1 group",
        ),
        ((2, 2, 2), "OUTPUT_EMPTY", "axis 0 has size 2, 2 with padding, and the filter spans 3"),
        ((2, 8), "INVALID_SHAPE", "2 axes"),
        ((1, 1, 2, 8, 8), "INVALID_SHAPE", "5 axes"),
        ((2, 0, 8), "INVALID_SHAPE", "at least 1"),
        ((2, -1, 8), "INVALID_PARAMETER", "shape must be an integer from 0"),
        ((2, float("nan"), 8), "INVALID_PARAMETER", "not nan"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape: Any, reason: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Conv(WEIGHT).output_shape(shape)
    assert caught.value.reason == reason


def test_reflection_must_be_narrower_than_the_input() -> None:
    with pytest.raises(InvalidRequest, match="spatial axis 1 has size 4") as caught:
        Conv(WEIGHT, padding=(1, 4), padding_mode="reflect").output_shape((2, 9, 4))
    assert caught.value.reason == "PADDING_TOO_LARGE"


@pytest.mark.parametrize("index", [(0,), (0, 0, 0), (6, 0), (-1, 0), (0.5, 0)])
def test_a_neuron_outside_the_feature_map_is_refused(index: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Conv(WEIGHT).receptive_field(index, (2, 8, 8))
    assert caught.value.reason == "INVALID_PARAMETER"


def test_a_neuron_of_a_1d_map_is_named_by_one_integer() -> None:
    layer = Conv(np.ones((1, 1, 3), np.float32), padding=1)
    assert layer.receptive_field(0, (1, 5)).axes == (range(-1, 2),)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_keeps_the_shape(function: str) -> None:
    layer = activation_of(function)
    assert layer == Activation(function)
    assert layer.rank is None
    assert layer.output_shape((2, 3, 4)) == (2, 3, 4)
    assert layer.receptive_field((2, 1), (1, 3, 4, 5)).axes == (range(2, 3), range(1, 2))
    assert layer.parameter_count == 0


@pytest.mark.parametrize("slope", [math.nan, math.inf, "0.1", True, None])
def test_a_slope_is_a_finite_number(slope: Any) -> None:
    with pytest.raises(InvalidRequest, match="negative_slope must be a finite number"):
        Activation("leaky_relu", slope)


def test_no_activation_is_the_linear_one() -> None:
    assert activation_of(None) == Activation("linear")
    assert activation_of(Activation("relu")) == Activation("relu")


def test_a_shape_is_split_by_its_rank() -> None:
    assert split_shape((3, 4), 1) == ((), SampleShape(3, 4))
    assert split_shape((0, 3, 4), 1) == ((0,), SampleShape(3, 4))
    assert split_shape((3, 4, 5), 2) == ((), SampleShape(3, 4, (5,)))


@pytest.mark.parametrize(
    ("layer", "given", "wanted"),
    [
        (MaxPool(3, stride=2), (2, 5, 7, 7), (2, 5, 3, 3)),
        (MaxPool(2, ceil_mode=True), (4, 5, 7, 9), (4, 5, 4, 5)),
        (MaxPool((2, 3), padding="same", stride=1, dilation=2), (1, 7, 9), (1, 7, 9)),
        (MaxPool(2), (4, 5, 8), (4, 5, 4)),
        (AvgPool(3, padding=1), (2, 1, 7, 7, 7), (2, 1, 3, 3, 3)),
        (AvgPool((3,), padding=((0, 2),), count_include_pad=False), (6, 10), (6, 4)),
        (GlobalAvgPool(), (2, 3, 4, 5), (2, 3, 1, 1)),
        (GlobalMaxPool(), (2, 3, 4), (2, 3, 1)),
        (LocallyConnected(np.ones((4, 1, 5, 6, 3, 2), np.float32), groups=2), (2, 7, 7), (4, 5, 6)),
        (LocallyConnected(np.ones((4, 2, 4, 3), np.float32), padding="same", stride=2), (2, 8), (4, 4)),
        (
            ConvTranspose(np.ones((2, 3, 3, 3), np.float32), stride=2, output_padding=1),
            (2, 4, 5),
            (3, 10, 12),
        ),
        (ConvTranspose(np.ones((4, 1, 2), np.float32), groups=2, padding=((1, 0),)), (7, 4, 6), (7, 2, 6)),
        (Flatten(), (9, 2, 3, 4), (9, 24)),
        (Flatten(), (9, 24), (9, 24)),
        (Linear(np.ones((10, 24), np.float32)), (9, 24), (9, 10)),
        (Linear(np.ones((10, 24), np.float32)), (24,), (10,)),
        (Add("relu"), (9, 2, 3, 4), (9, 2, 3, 4)),
        (Activation("relu"), (9, 24), (9, 24)),
    ],
)
def test_every_layer_knows_the_shape_of_its_output(layer: Layer, given: Any, wanted: Any) -> None:
    assert layer.output_shape(given) == wanted
    sample = layer.output_sample(split_shape(given, layer.rank)[1])
    assert layer.neuron_count(given) == sample.elements == math.prod(sample.shape)
    assert type(layer).__name__ == layer.type_name
    assert repr(layer).startswith(layer.type_name)
