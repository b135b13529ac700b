from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from convservice.errors import InvalidRequest
from convservice.geometry import (
    MAX_SIZE,
    AxisWindow,
    PaddingMode,
    SampleShape,
    check_padding,
    first_row_kept,
    real_position,
    real_span,
    same_padding,
)
from convservice.parameters import integer, padding_of, per_axis

MODES = st.sampled_from(PaddingMode)
WINDOWS = st.builds(
    AxisWindow, st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 7), st.integers(0, 7)
)


def reads(window: AxisWindow, index: int, size: int, mode: PaddingMode) -> list[int]:
    """The real positions that neuron `index` reads, by enumeration."""
    positions = [index * window.stride - window.before + k * window.dilation for k in range(window.kernel)]
    found = [real_position(p, size, mode) for p in positions]
    return [p for p in found if p is not None]


def fitting(window: AxisWindow, size: int, mode: PaddingMode) -> int:
    """The number of neurons of a window that fits; rejects the example otherwise."""
    assume(mode is not PaddingMode.REFLECT or max(window.before, window.after) < size)
    count = window.output_size(size)
    assume(count >= 1)
    return count


@given(st.integers(-8, 16), st.integers(1, 9), MODES)
def test_padding_reads_what_numpy_pads(position: int, size: int, mode: PaddingMode) -> None:
    assume(mode is not PaddingMode.REFLECT or -size < position < 2 * size - 1)
    before, after = max(-position, 0), max(position - size + 1, 0)
    padded: Any
    if mode is PaddingMode.ZEROS:
        padded = np.pad(np.arange(size), (before, after), constant_values=-1)
    else:
        padded = np.pad(
            np.arange(size), (before, after), mode="reflect" if mode is PaddingMode.REFLECT else "edge"
        )
    found = real_position(position, size, mode)
    assert (-1 if found is None else found) == padded[position + before]


@given(WINDOWS, st.integers(1, 12))
def test_output_size_counts_the_windows_that_fit(window: AxisWindow, size: int) -> None:
    last_start = size + window.after - window.extent
    starts = range(-window.before, last_start + 1, window.stride)
    assert window.output_size(size) == len(starts)


@given(WINDOWS, st.integers(0, 9), st.integers(1, 5))
def test_a_span_covers_the_positions_of_its_neurons(window: AxisWindow, first: int, count: int) -> None:
    positions = [p for i in range(first, first + count) for p in window.positions(i)]
    assert window.span(first, first + count) == (min(positions), max(positions) + 1)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_same_padding_makes_the_output_the_rounded_up_quotient(
    size: int, kernel: int, stride: int, dilation: int
) -> None:
    before, after = same_padding(size, kernel, stride, dilation)
    window = AxisWindow(kernel, stride, dilation, before, after)
    assert window.output_size(size) == math.ceil(size / stride)
    assert after - before in (0, 1)
    if before + after:  # no less padding would do
        assert AxisWindow(kernel, stride, dilation, before, after - 1).output_size(size) < math.ceil(
            size / stride
        )


@given(st.integers(1, 6), st.integers(1, 4))
def test_same_padding_without_a_height_is_that_of_every_height(kernel: int, dilation: int) -> None:
    assert same_padding(None, kernel, 1, dilation) == same_padding(17, kernel, 1, dilation)


def test_same_padding_with_a_stride_needs_the_height() -> None:
    with pytest.raises(InvalidRequest, match="stride 2 on the first axis needs the height") as caught:
        same_padding(None, 3, 2, 1)
    assert caught.value.reason == "HEIGHT_REQUIRED"


@given(WINDOWS, st.integers(1, 12), MODES, st.data())
def test_real_span_holds_all_that_is_read(
    window: AxisWindow, size: int, mode: PaddingMode, data: st.DataObject
) -> None:
    count = fitting(window, size, mode)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first + 1, count))
    start, stop = window.span(first, last)
    low, high = real_span(start, stop, size, mode)
    assert 0 <= low <= high <= size
    read = [p for i in range(first, last) for p in reads(window, i, size, mode)]
    assert all(low <= p < high for p in read)


@given(st.integers(-6, 12), st.integers(1, 12), st.integers(1, 12), MODES)
def test_real_span_of_a_range_that_overlaps_the_input_is_the_smallest(
    start: int, count: int, size: int, mode: PaddingMode
) -> None:
    stop = start + count
    assume(start < size and stop > 0)
    assume(mode is not PaddingMode.REFLECT or (-size < start and stop < 2 * size))
    found = [real_position(p, size, mode) for p in range(start, stop)]
    read = [p for p in found if p is not None]
    assert real_span(start, stop, size, mode) == (min(read), max(read) + 1)


@given(WINDOWS, st.integers(1, 12), MODES)
def test_more_output_rows_never_need_fewer_input_rows(
    window: AxisWindow, size: int, mode: PaddingMode
) -> None:
    count = fitting(window, size, mode)
    needed = [real_span(*window.span(0, last), size, mode)[1] for last in range(1, count + 1)]
    assert needed == sorted(needed)


@given(WINDOWS, st.integers(1, 12), MODES)
def test_rows_in_the_middle_need_the_same_with_and_without_a_height(
    window: AxisWindow, size: int, mode: PaddingMode
) -> None:
    count = fitting(window, size, mode)
    for row in range(count):
        start, stop = window.span(row, row + 1)
        if stop <= size:
            assert real_span(start, stop, size, mode) == real_span(start, stop, None, mode)


@given(WINDOWS, st.integers(1, 14), MODES, st.booleans())
def test_no_row_is_dropped_that_a_later_neuron_reads(
    window: AxisWindow, size: int, mode: PaddingMode, announced: bool
) -> None:
    count = fitting(window, size, mode)
    for done in range(count):
        later = [p for i in range(done, count) for p in reads(window, i, size, mode)]
        start = window.span(done, done + 1)[0]
        for seen in range(size + 1):
            height = size if announced else None
            kept = first_row_kept(start, window.after, seen, height, mode)
            assert all(p >= kept for p in later if p < seen)


@given(WINDOWS, st.integers(0, 9), MODES)
def test_kept_rows_move_on_with_the_neurons_and_with_the_rows_seen(
    window: AxisWindow, done: int, mode: PaddingMode
) -> None:
    starts = [window.span(row, row + 1)[0] for row in (done, done + 1)]
    for seen in range(12):
        here = first_row_kept(starts[0], window.after, seen, None, mode)
        assert first_row_kept(starts[1], window.after, seen, None, mode) >= here
        assert first_row_kept(starts[0], window.after, seen + 1, None, mode) >= here


@pytest.mark.parametrize(("before", "after", "size"), [(3, 0, 3), (0, 1, 1), (9, 9, 5)])
def test_a_reflection_is_narrower_than_its_input(before: int, after: int, size: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"axis 0 has size {size}.*\({before}, {after}\)") as caught:
        check_padding(before, after, size, PaddingMode.REFLECT, "axis 0")
    assert caught.value.reason == "PADDING_TOO_LARGE"
    check_padding(before, after, size, PaddingMode.REPLICATE, "axis 0")
    check_padding(size - 1, size - 1, size, PaddingMode.REFLECT, "axis 0")


@pytest.mark.parametrize("value", [0, -1, MAX_SIZE + 1, 1.5, float("nan"), "2", None, True, [1], 2**80])
def test_what_is_no_integer_in_range_is_refused_with_its_name(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"stride must be an integer from 1 to \d+, not ") as caught:
        integer("stride", value, 1)
    assert (caught.value.reason, caught.value.field) == ("INVALID_PARAMETER", "stride")


def test_numpy_integers_are_integers() -> None:
    assert integer("stride", np.int16(3), 1) == 3
    assert per_axis("stride", np.array([1, 2]), 2, 1) == (1, 2)
    assert per_axis("stride", np.array(2), 2, 1) == (2, 2)
    assert padding_of(np.array(2), 2) == ((2, 2), (2, 2))
    assert padding_of(np.array([[1, 2], [3, 4]]), 2) == ((1, 2), (3, 4))


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), "ab", (1, 0), (1, 2.5), ((1, 1), (1, 1))])
def test_per_axis_takes_one_or_one_for_each_axis(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="stride must be"):
        per_axis("stride", value, 2, 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        (((0, 1), (2, 3)), ((0, 1), (2, 3))),
        ("valid", ((0, 0), (0, 0))),
        ("same", "same"),
    ],
)
def test_padding_has_one_form(value: Any, expected: Any) -> None:
    assert padding_of(value, 2) == expected


@pytest.mark.parametrize("value", ["full", -1, (1, -2), ((0, 1), (0, -1)), ((1, 2, 3), (1, 2, 3)), None, 1.0])
def test_other_padding_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="padding") as caught:
        padding_of(value, 2)
    assert (caught.value.reason, caught.value.field) == ("INVALID_PARAMETER", "padding")


def test_a_sample_shape_knows_its_sizes() -> None:
    sample = SampleShape(3, 4, (5, 6))
    assert (sample.rank, sample.row_elements, sample.elements, sample.spatial) == (3, 90, 360, (4, 5, 6))
    assert str(sample.with_rows(None)) == "(3, ?, 5, 6)"
    with pytest.raises(InvalidRequest, match="height of the input is not known") as caught:
        _ = sample.with_rows(None).elements
    assert caught.value.reason == "HEIGHT_REQUIRED"
