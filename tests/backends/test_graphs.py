"""Graphs on every backend: branches with different delays, rows that flow through them, what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convservice.bands import TensorSpec
from convservice.dtypes import FLOAT32, dtype_of
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import SampleShape
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    Layer,
    Linear,
    MaxPool,
)
from convservice.network import INPUT, MAX_NODES, Network, Node
from convservice_backends.interface import Backend
from convservice_backends.reference import network_reference
from tests.helpers import (
    assert_expected,
    check_every_layer,
    compute,
    deep_network,
    every_map,
    prepared,
    random_array,
    residual,
    run,
    small_integers,
    spec_of,
)
from tests.strategies import SEEDS

SAME_ROWS = ("convolution", "reflect", "largest", "mean", "activation", "transposed", "down and up", "sum")


SENT = st.tuples(st.sampled_from([4, 10, 24]), st.sampled_from([None, 1, 2, 7]), st.booleans())
"""Height, rows in a band, and whether the height is told beforehand."""


@st.composite
def graphs(draw: st.DrawFn) -> Network:
    """Nodes that keep the rows and columns of an even height: any of them can be added to any other."""
    rng = np.random.default_rng(draw(SEEDS))
    nodes: list[Node] = []
    for position in range(draw(st.integers(2, 9))):
        earlier = [INPUT, *(node.id for node in nodes if not node.id.endswith("half"))]
        source, name = draw(st.sampled_from(earlier[-4:])), f"n{position}"
        kind = draw(st.sampled_from(SAME_ROWS))
        if kind == "sum":
            sources = draw(st.lists(st.sampled_from(earlier), min_size=2, max_size=4))
            nodes.append(Node(name, Add(draw(st.sampled_from(["linear", "relu"]))), tuple(sources)))
        elif kind == "down and up":
            up = random_array(rng, (2, 2, 2, 1), FLOAT32) / 2
            nodes.append(Node(f"{name}half", MaxPool((2, 1)), (source,)))
            nodes.append(Node(name, ConvTranspose(up, stride=(2, 1)), (f"{name}half",)))
        else:
            nodes.append(Node(name, _row_keeping(draw, rng, kind), (source,)))
    whole = [node.id for node in nodes if not node.id.endswith("half")]
    ends = draw(st.lists(st.sampled_from(whole), min_size=1, max_size=2, unique=True))
    return Network(nodes, {f"o{number}": end for number, end in enumerate([*ends, nodes[-1].id])})


def _row_keeping(draw: st.DrawFn, rng: np.random.Generator, kind: str) -> Layer:
    extent = draw(st.integers(1, 6))
    before = draw(st.integers(0, extent - 1))
    padding = ((before, extent - 1 - before), (0, 0))
    weight = random_array(rng, (2, 2, extent, 1), FLOAT32) / np.float32(extent)
    match kind:
        case "convolution":
            return Conv(weight, padding=padding)
        case "reflect":
            return Conv(weight, padding=padding, padding_mode="reflect" if extent <= 4 else "replicate")
        case "largest":
            return MaxPool((extent, 1), stride=1, padding=padding)
        case "mean":
            return AvgPool((extent, 1), stride=1, padding=padding, count_include_pad=False)
        case "transposed":
            return ConvTranspose(weight, padding=padding)
        case _:
            return Activation("leaky_relu", 0.5)


@given(graphs(), SEEDS, SENT)
def test_branches_of_any_delay_meet(
    backend: Backend, network: Network, seed: int, sent: tuple[int, int | None, bool]
) -> None:
    height, rows, announced = sent
    x = random_array(np.random.default_rng(seed), (1, 2, height, 2), FLOAT32)
    maps = compute(backend, every_map(network), x, rows=rows, announced=announced)
    check_every_layer(network, x, maps)
    ends = compute(backend, network, x, rows=rows, announced=announced)
    for name, target in network.outputs.items():
        assert np.array_equal(ends[name], maps[target]), "other outputs change nothing"


@settings(max_examples=settings().max_examples // 4)
@given(graphs(), st.sampled_from([3, 40]))
def test_branches_flow_in_rows_of_which_few_are_held(backend: Backend, network: Network, rows: int) -> None:
    """A session that held a row too few would fail; what it holds does not depend on the height, but for the
    few rows that a transposed layer keeps back while the end, which may cut them off, is not known."""
    width = 20_000
    x = np.broadcast_to(np.float32(1), (1, 2, 36, width))
    ready = prepared(backend, network)
    tall, taller, unknown = (
        ready.plan(TensorSpec(FLOAT32, SampleShape(2, height, (width,)), 1, rows)).peak_bytes
        for height in (100_000, 1_000_000, None)
    )
    assert tall == taller <= unknown < 2 * tall
    assert ready.plan(spec_of(x, rows)).peak_bytes <= tall
    found = run(ready, x, rows)
    assert all(array.shape == x.shape for array in found.values())


@pytest.mark.parametrize("height", [16, 50])
@pytest.mark.parametrize("rows", [None, 3])
def test_residual_blocks_end_to_end(
    backend: Backend, height: int, rows: int | None, rng: np.random.Generator
) -> None:
    for dtype in (FLOAT32, dtype_of("bfloat16")):
        network, x = residual(rng, dtype), random_array(rng, (2, 2, height, 6), dtype)
        check_every_layer(network, x, compute(backend, every_map(network), x, rows=rows))
        found = compute(backend, network, x, rows=rows)
        for name, expected in network_reference(network, x).items():
            assert_expected(f"end to end, {name}", expected, found[name])


@pytest.mark.parametrize("x_dtype", ["float32", "uint8"])
def test_the_input_itself_is_added(backend: Backend, x_dtype: str, rng: np.random.Generator) -> None:
    """Twice, beside a convolution that sees it last."""
    weight = small_integers(rng, (3, 3, 9, 1), FLOAT32)
    nodes = [
        Node("late", Conv(weight, padding=((4, 4), (0, 0)))),
        Node("sum", Add("relu"), ("input", "late", "input")),
        Node("twice", Add(), ("sum", "sum")),
    ]
    x = small_integers(rng, (2, 3, 40, 5), dtype_of(x_dtype))
    for rows in (None, 1, 6):
        maps = compute(backend, every_map(Network(nodes)), x, rows=rows)
        check_every_layer(Network(nodes), x, maps)


def test_branches_of_different_rates(backend: Backend, rng: np.random.Generator) -> None:
    """Both have 30 rows at the end, at this height alone: it bounds what waits, and must be told."""
    weight = random_array(rng, (2, 2, 31, 1), FLOAT32)
    nodes = [
        Node("half", MaxPool((2, 1), stride=(2, 1))),
        Node("cropped", Conv(weight)),
        Node("sum", Add(), ("half", "cropped")),
    ]
    network, x = Network(nodes), random_array(rng, (1, 2, 60, 4), FLOAT32)
    for rows in (None, 1):
        check_every_layer(network, x, compute(backend, every_map(network), x, rows=rows))
    with pytest.raises(InvalidRequest) as caught:
        compute(backend, network, x, announced=False)
    assert caught.value.reason == Reason.HEIGHT_REQUIRED


def test_branches_of_unlike_heights_are_refused_at_the_end(
    backend: Backend, rng: np.random.Generator
) -> None:
    nodes = [
        Node("cropped", Conv(random_array(rng, (2, 2, 3, 1), FLOAT32))),
        Node("sum", Add(), ("input", "cropped")),
    ]
    with pytest.raises(InvalidRequest) as caught:
        compute(backend, Network(nodes), random_array(rng, (1, 2, 9, 4), FLOAT32), announced=False)
    assert caught.value.reason == Reason.INVALID_SHAPE


def test_heads_of_every_kind_on_one_trunk(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [
        Node("trunk", Conv(random_array(rng, (4, 2, 3, 3), FLOAT32), padding=1, activation="relu")),
        Node("flat", Flatten(), ("trunk",)),
        Node("scores", Linear(random_array(rng, (5, 4 * 12 * 9), FLOAT32)), ("flat",)),
        Node("mean", GlobalAvgPool(), ("trunk",)),
        Node("map", ConvTranspose(random_array(rng, (4, 1, 2, 2), FLOAT32), stride=2), ("trunk",)),
    ]
    network = Network(nodes, {name: name for name in ("scores", "mean", "map", "trunk")})
    x = random_array(rng, (3, 2, 12, 9), FLOAT32)
    for rows in (None, 2):
        found = compute(backend, network, x, rows=rows)
        for name, expected in network_reference(network, x).items():
            assert_expected(name, expected, found[name])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("count", "shape"), [(MAX_NODES, (1, 1, 30, 4)), (30, (1, 1, 530, 1000))])
def test_many_sums_one_behind_the_other(backend: Backend, count: int, shape: tuple[int, ...]) -> None:
    """Each adds a hundredth of the sum before to that sum; small samples go whole, large ones flow."""
    nodes = [Node("n0", Activation("linear"))]
    for position in range(1, count - 1, 2):
        before = f"n{position - 1}"
        nodes.append(Node(f"n{position}", Activation("leaky_relu", 0.01), (before,)))
        nodes.append(Node(f"n{position + 1}", Add(), (f"n{position}", before)))
    x = np.full(shape, -1.0, np.float32)
    found = compute(backend, Network(nodes), x, rows=100)["output"]
    expected = -(1.01 ** (len(nodes) // 2))
    assert found.min() == found.max()
    assert found.max() == pytest.approx(expected, rel=1e-4)


@pytest.mark.multiply_adds(700_000_000)
def test_ten_layers_over_many_rows_hold_what_their_bands_need(
    backend: Backend, rng: np.random.Generator
) -> None:
    """20,000 rows: the first results come early, and the plan is that of an image ten times as tall."""
    network, height, width = deep_network(rng), 20_000, 32
    ready = prepared(backend, network)
    whole = ready.plan(TensorSpec(FLOAT32, SampleShape(1, height, (width,)), 1, 64))
    assert (
        whole.peak_bytes
        == ready.plan(TensorSpec(FLOAT32, SampleShape(1, 10 * height, (width,)), 1, 64)).peak_bytes
    )
    came: list[tuple[int, int]] = []
    x = np.broadcast_to(random_array(rng, (1, 1, 1, width), FLOAT32), (1, 1, height, width))
    found = run(ready, x, 64, watch=lambda sent, band: came.append((sent, band.first_row)))["output"]
    assert found.shape == x.shape
    first = whole.results[0].first_block_input_rows
    assert came[0][0] == -(-first // 64) * 64 <= height // 4, "the first rows come early"


def test_a_transposed_layer_does_not_run_ahead_of_an_end_that_may_be_near(
    backend: Backend, rng: np.random.Generator
) -> None:
    """With a stride beyond the window, or rows cut off at the end, how many rows a row gives is known only
    when the next one has come, or none has."""
    everything: list[dict[str, Any]] = [
        {"stride": 3},
        {"stride": 2, "padding": ((0, 1),)},
        {"stride": 4, "output_padding": 2},
        {"padding": ((1, 6),)},
    ]
    for options in everything:
        layer = ConvTranspose(random_array(rng, (2, 2, 2), FLOAT32), **options)
        nodes = [
            Node("up", layer),
            Node("late", Conv(random_array(rng, (2, 2, 5), FLOAT32), padding=2), ("up",)),
            Node("sum", Add(), ("up", "late")),
        ]
        for height in (1, 2, 9, 30):
            if layer.window(SampleShape(2, height)).output_size(height) < 1:
                continue
            x = random_array(rng, (1, 2, height), FLOAT32)
            maps = compute(backend, every_map(Network(nodes)), x, rows=1, announced=False)
            check_every_layer(Network(nodes), x, maps)
