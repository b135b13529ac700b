"""The rows of every layer, held against its receptive fields: what is read, what is held, how large."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convservice.errors import InvalidRequest
from convservice.geometry import MAX_SIZE, PaddingMode, SampleShape, first_row_kept, real_position
from convservice.layers import (
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
from convservice.network import Network, Residual
from tests.strategies import Fitted, fitted

ONES = np.ones((1, 1, 3), np.float32)
REDUCING = (Flatten, GlobalAvgPool, GlobalMaxPool, Linear)


def read(case: Fitted, row: int) -> set[int]:
    """The real rows that the neurons of an output row read, by their receptive field."""
    layer, sample = case.layer, case.sample
    if sample.vector or isinstance(layer, Flatten):
        return set(range(sample.height))  # a vector is one row, and Flatten's one row holds everything
    field = layer.receptive_field((row, *[0] * len(sample.rest)), (1, *sample.shape))
    mode = layer.row_mode
    return {p for q in field.axes[0] if (p := real_position(q, sample.height, mode)) is not None}


def rows_read(case: Fitted) -> list[set[int]]:
    """The real rows read by every output row."""
    return [read(case, row) for row in range(case.layer.output_sample(case.sample).height)]


@given(fitted())
def test_the_rows_that_are_needed_are_those_that_are_read(case: Fitted) -> None:
    layer, sample = case.layer, case.sample
    reads = rows_read(case)
    before = (-MAX_SIZE, -MAX_SIZE)
    for row, seen in enumerate(reads):
        start, stop = layer.real_rows(row, row + 1, sample)
        assert seen <= set(range(start, stop))
        virtual = layer.input_rows(row, row + 1, sample)
        assert before[0] <= virtual[0]
        assert before[1] <= virtual[1]
        before = virtual
        if layer.row_mode is PaddingMode.ZEROS and seen:
            between = [p for p in range(*virtual) if 0 <= p < sample.height]
            assert (start, stop) == (between[0], between[-1] + 1)
    for first in range(len(reads)):
        for last in range(first + 1, min(len(reads), first + 4) + 1):
            start, stop = layer.real_rows(first, last, sample)
            assert set().union(*reads[first:last]) <= set(range(start, stop))


@given(fitted())
def test_the_rows_that_are_kept_are_those_that_are_read_later(case: Fitted) -> None:
    layer, sample = case.layer, case.sample
    reads, window = rows_read(case), layer.window(sample)
    most = 1
    for row in range(len(reads)):
        seen = layer.real_rows(row, row + 1, sample)[1]
        start, _ = layer.input_rows(row, row + 1, sample)
        keep = first_row_kept(start, window.after, seen, sample.rows, layer.row_mode)
        assert min((p for later in reads[row:] for p in later), default=sample.height) >= min(keep, seen)
        most = max(most, seen - keep)
    if layer.reducing and not isinstance(layer, Flatten):
        assert layer.rows_held(sample) == 1
    elif isinstance(layer, ConvTranspose):
        assert most <= layer.rows_held(sample) <= most + 1
    else:
        assert layer.rows_held(sample) == most


@given(fitted())
def test_an_unknown_height_lets_no_row_out_sooner(case: Fitted) -> None:
    layer, sample = case.layer, case.sample
    unknown = sample.with_rows(None)
    try:
        out = layer.output_sample(unknown)
    except InvalidRequest as exc:
        assert exc.reason == "HEIGHT_REQUIRED"  # noqa: PT017
        return
    known = layer.output_sample(sample)
    assert (out.channels, out.rest) == (known.channels, known.rest)
    assert out.rows in (None, known.rows)
    for row in range(known.height):
        wanted = layer.real_rows(row, row + 1, sample)
        stop = layer.real_rows(row, row + 1, unknown)[1]
        if stop < sample.height:  # what the far edge adds is known at the end
            assert stop >= wanted[1]
            assert all(p < stop for p in read(case, row))


@given(fitted())
def test_a_layer_knows_whether_it_needs_every_row(case: Fitted) -> None:
    layer = case.layer
    assert layer.reducing == isinstance(layer, REDUCING)
    if layer.reducing:
        assert layer.real_rows(0, 1, case.sample) == (0, case.sample.height)


@pytest.mark.parametrize("layer", [GlobalAvgPool(), GlobalMaxPool()])
def test_global_pooling_takes_any_height(layer: Layer) -> None:
    unknown = SampleShape(3, None, (4, 5))
    assert layer.output_sample(unknown) == SampleShape(3, 1, (1, 1))
    assert layer.real_rows(0, 1, unknown) == (0, MAX_SIZE)
    assert Network([layer]).plan((3, None, 4, 5))[0].delay_rows is None
    assert Network([layer]).plan((1, 3, 7, 4, 5))[0].delay_rows == 7


@pytest.mark.parametrize(
    ("layers", "position"),
    [
        ([Conv(ONES), Flatten()], r"layer 1 \(Flatten, id 'layer1'\): Flatten needs the height"),
        ([Flatten()], "Flatten needs the height"),
        ([MaxPool(1), MaxPool(2, padding="same")], r"layer 1 \(MaxPool.*'same' with stride 2"),
        ([LocallyConnected(np.ones((1, 1, 4, 2)))], "filters for 4 output rows and needs the height"),
    ],
)
def test_what_needs_the_height_says_which_layer_it_is(layers: list[Layer], position: str) -> None:
    with pytest.raises(InvalidRequest, match=position) as caught:
        Network(layers).plan((1, None))
    assert caught.value.reason == "HEIGHT_REQUIRED"


def test_after_global_pooling_the_height_is_known() -> None:
    network = Network([GlobalAvgPool(), Flatten(), Linear(np.ones((2, 3)))])
    plans = network.plan((3, None, 8), "float64")
    assert [plan.output_shape for plan in plans[1:]] == [SampleShape.of_vector(3), SampleShape.of_vector(2)]
    assert [plan.delay_rows for plan in plans] == [None] * 3


LARGE = st.integers(0, 40) | st.integers(0, MAX_SIZE) | st.sampled_from([MAX_SIZE - 1, MAX_SIZE])
STEPS = LARGE.filter(bool)


@st.composite
def huge(draw: st.DrawFn) -> Layer:
    """A layer along one axis with numbers as large as they may be."""
    weight = np.ones((1, 1, draw(st.integers(1, 3))), np.float32)
    pads = (draw(st.tuples(LARGE, LARGE)),)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return Conv(
            weight,
            stride=draw(STEPS),
            dilation=draw(STEPS),
            padding=draw(st.just("same") | st.just(pads)),
            padding_mode=draw(st.sampled_from(PaddingMode)),
        )
    if kind == 1:
        stride, dilation = draw(STEPS), draw(STEPS)
        added = draw(st.integers(0, max(stride, dilation) - 1))
        return ConvTranspose(weight, stride=stride, dilation=dilation, padding=pads, output_padding=added)
    options: dict[str, Any] = {"stride": draw(st.none() | STEPS), "ceil_mode": draw(st.booleans())}
    kernel = draw(STEPS)
    options["padding"] = draw(st.just("same") | st.integers(0, kernel - 1))
    if kind == 2:
        return MaxPool(kernel, **options, dilation=draw(STEPS))
    if kind == 3:
        return AvgPool(kernel, **options)
    return draw(st.sampled_from([GlobalAvgPool(), Flatten(), Add()]))


@given(huge(), STEPS, STEPS, st.none() | STEPS)
def test_numbers_as_large_as_they_may_be_are_planned_or_refused(
    layer: Layer, channels: int, width: int, height: int | None
) -> None:
    try:
        wide = SampleShape(channels, height, (width,)) if layer.rank is None else SampleShape(1, height)
        out = layer.output_sample(wide)
        layer.output_sample(SampleShape(1, height))
    except InvalidRequest:
        return
    assert all(1 <= size <= MAX_SIZE for size in (out.channels, *out.spatial) if size is not None)
    sample = SampleShape(1, height)
    held = layer.rows_held(sample)
    assert 1 <= held <= (height or 4 * MAX_SIZE * MAX_SIZE)
    if layer.fewest_inputs == 1:
        network = Network([layer])
        shapes = network.shapes(sample)
        for row in {0, (out.rows or MAX_SIZE) - 1}:
            needed = network.input_rows_needed("layer0", row + 1, shapes)
            assert 0 <= needed <= (height or MAX_SIZE)
        (plan,) = network.plan((1, 1, height))
        assert plan.rows_held == held


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Conv(ONES, padding=MAX_SIZE), (1, 5)),
        (ConvTranspose(ONES, stride=2**16), (1, 2**16)),
        (ConvTranspose(ONES, dilation=2**30), (1, 5)),
        (Flatten(), (1, 2**16, 2**8, 2**8)),
    ],
)
def test_an_output_too_large_to_count_is_refused(layer: Layer, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=f"a size is at most {MAX_SIZE}") as caught:
        layer.output_shape((1, *shape))
    assert caught.value.reason == "SIZE_OVERFLOW"
    assert int(caught.value.metadata["size"]) > MAX_SIZE


def test_an_output_that_padding_leaves_nothing_of_is_refused() -> None:
    layer = ConvTranspose(ONES, stride=2, padding=4)
    assert layer.output_shape((1, 4)) == (1, 1)
    with pytest.raises(InvalidRequest, match=r"would have size 7, of which padding \(4, 4\)") as caught:
        layer.output_shape((1, 3))
    assert caught.value.reason == "OUTPUT_EMPTY"


def test_a_residual_block_becomes_nodes_that_name_their_place() -> None:
    inner = Residual([MaxPool(1)], activation="relu")
    network = Network([Conv(ONES, padding=1), Residual([inner, AvgPool(1)], [MaxPool(1), AvgPool(1)])])
    assert [(node.id, node.inputs) for node in network.nodes] == [
        ("layer0", ("input",)),
        ("layer1.body0.body0", ("layer0",)),
        ("layer1.body0", ("layer1.body0.body0", "layer0")),
        ("layer1.body1", ("layer1.body0",)),
        ("layer1.shortcut0", ("layer0",)),
        ("layer1.shortcut1", ("layer1.shortcut0",)),
        ("layer1", ("layer1.body1", "layer1.shortcut1")),
    ]
    assert network.outputs == {"output": "layer1"}
    assert math.prod(network.output_shape((5, 1, 9))) == 45
    with pytest.raises(InvalidRequest, match="at least one layer in its body"):
        Residual([])
    with pytest.raises(InvalidRequest, match=r"layer0.body 1 is a str; a chain is made of layers and"):
        Network([Residual([MaxPool(1), "relu"])])  # type: ignore[list-item]
