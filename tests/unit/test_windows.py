"""Windows, held against a model that enumerates what every neuron looks at."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from convservice.geometry import AxisWindow
from convservice.layers import TransposedWindow

SLIDING = st.builds(
    AxisWindow,
    kernel=st.integers(1, 5),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 3),
    before=st.integers(0, 4),
    after=st.integers(0, 4),
)
TRANSPOSED = st.builds(
    TransposedWindow,
    kernel=st.integers(1, 5),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 6),
    before=st.integers(0, 6),
    after=st.integers(0, 6),
    output_padding=st.integers(0, 5),
)
SIZES = st.integers(1, 12)


def scattered(window: TransposedWindow, size: int) -> list[set[int]]:
    """The positions that contribute to each neuron: every position is spread over the neurons it reaches."""
    length = (size - 1) * window.stride + window.extent + window.output_padding
    seen: list[set[int]] = [set() for _ in range(length)]
    for position in range(size):
        for k in range(window.kernel):
            seen[position * window.stride + k * window.dilation].add(position)
    return seen[window.before : max(window.before, length - window.after)]


@given(TRANSPOSED, SIZES)
def test_a_transposed_window_looks_at_what_is_spread_to_it(window: TransposedWindow, size: int) -> None:
    fields = scattered(window, size)
    assert window.output_size(size) == len(fields)
    for index, field in enumerate(fields):
        positions = window.positions(index)
        assert {p for p in positions if 0 <= p < size} == field
        start, stop = window.span(index, index + 1)
        assert all(start <= p < stop for p in positions)
        assert start == stop or window.dilation > 1 or (start, stop - 1) == (positions[0], positions[-1])


@given(TRANSPOSED, st.integers(0, 20), st.integers(1, 6))
def test_a_transposed_span_covers_its_neurons_and_never_goes_back(
    window: TransposedWindow, first: int, rows: int
) -> None:
    start, stop = window.span(first, first + rows)
    spans = [window.span(i, i + 1) for i in range(first, first + rows)]
    assert (start, stop) == (spans[0][0], spans[-1][1])
    assert sorted(spans) == spans == sorted(spans, key=lambda span: span[1])
    assert stop - start <= window.reach(rows)


@given(TRANSPOSED, st.integers(1, 6))
def test_the_reach_of_a_transposed_window_is_its_widest_span(window: TransposedWindow, rows: int) -> None:
    spans = [window.span(i, i + rows) for i in range(window.stride)]
    assert window.reach(rows) == max(stop - start for start, stop in spans)


@given(SLIDING, st.integers(0, 20), st.integers(1, 6))
def test_the_reach_of_a_sliding_window_is_its_span(window: AxisWindow, first: int, rows: int) -> None:
    start, stop = window.span(first, first + rows)
    assert stop - start == window.reach(rows)


@given(SLIDING, SIZES)
def test_rounding_up_adds_at_most_the_window_that_begins_on_an_element(window: AxisWindow, size: int) -> None:
    assume(window.after < window.extent)  # as pooling demands
    rounded = AxisWindow(
        window.kernel, window.stride, window.dilation, window.before, window.after, ceil_mode=True
    )
    end = size + window.after
    starts = np.arange(-window.before, end, window.stride)
    whole = [start for start in starts if start + window.extent <= end]
    # PyTorch's: windows that begin no later than one stride after the last whole one, and on an element or
    # before it.
    begun = [start for start in starts if start + window.extent <= end + window.stride - 1 and start < size]
    assert window.output_size(size) == len(whole)
    assert rounded.output_size(size) == len(begun)
