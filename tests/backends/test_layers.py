"""Every layer on every backend against the plain-loop reference: any geometry and dtype, cut anywhere, exact
on integers; and what single layers promise beside that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from convservice.dtypes import DTYPES, FLOAT32, DType, dtype_of
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
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import Network, Node
from convservice_backends.interface import Backend
from convservice_backends.reference import Expected, layer_reference
from tests.helpers import (
    INTEGERS,
    Array,
    assert_expected,
    assert_same_bits,
    check_every_layer,
    compute,
    every_map,
    random_array,
    small_integers,
)
from tests.strategies import SEEDS, Fitted, fitted

ANYTHING = (AvgPool, ConvTranspose, Flatten, GlobalAvgPool, GlobalMaxPool, Linear, LocallyConnected, MaxPool)
"""What has no test module of its own."""


def network_of(layer: Layer) -> Network:
    """A network of one layer; a sum is that of its input, of that halved, and of its input once more."""
    if not isinstance(layer, Add):
        return Network([layer])
    half = Node("half", Activation("leaky_relu", 0.5))
    return Network([half, Node("sum", layer, ("input", "half", "input"))])


def input_for(case: Fitted, seed: int, dtype: DType, samples: int) -> Array:
    """An input of `dtype`, or of the layer's own where that is another float type."""
    tensors = case.layer.tensors
    own = tensors[0].dtype if tensors and dtype.is_float else dtype
    return random_array(np.random.default_rng(seed), (samples, *case.sample.shape), own)


@settings(max_examples=8 * settings().max_examples)
@given(
    fitted(kinds=(*ANYTHING, Add)),
    SEEDS,
    st.sampled_from(DTYPES),
    st.tuples(st.sampled_from([1, 0, 3]), st.sampled_from([None, 1, 2, 3])),
)
def test_a_layer_of_any_geometry(
    backend: Backend, case: Fitted, seed: int, dtype: DType, sent: tuple[int, int | None]
) -> None:
    samples, rows = sent
    network, x = network_of(case.layer), input_for(case, seed, dtype, samples)
    check_every_layer(network, x, compute(backend, every_map(network), x, rows=rows))


@given(fitted(kinds=(*ANYTHING, Add)), SEEDS, st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_a_result_of_any_dtype(
    backend: Backend, case: Fitted, seed: int, dtype: DType, out_dtype: DType
) -> None:
    assume(not isinstance(case.layer, Add))
    network, x = Network([case.layer]), input_for(case, seed, dtype, 2)
    found = compute(backend, network, x, out_dtype=out_dtype)["output"]
    check_every_layer(network, x, {"layer0": found}, out_dtype)


@settings(max_examples=2 * settings().max_examples)
@given(fitted(kinds=(*ANYTHING, Add)), SEEDS, st.sampled_from([1, 2, 5]))
def test_a_height_that_is_told_at_the_end(backend: Backend, case: Fitted, seed: int, rows: int) -> None:
    network, x = network_of(case.layer), input_for(case, seed, FLOAT32, 1)
    assume(not case.sample.vector)
    if needs_height(network, case.sample):
        with pytest.raises(InvalidRequest) as caught:
            compute(backend, network, x, rows=rows, announced=False)
        assert caught.value.reason == Reason.HEIGHT_REQUIRED
        return
    found = compute(backend, every_map(network), x, rows=rows, announced=False)
    check_every_layer(network, x, found)


def needs_height(network: Network, sample: SampleShape) -> bool:
    """Whether a layer says so by itself, without a backend."""
    try:
        network.shapes(sample.with_rows(None))
    except InvalidRequest:
        return True
    return False


def integer_networks(rng: np.random.Generator, own: DType) -> dict[str, tuple[Network, tuple[int, ...]]]:
    """Networks with small integers for weights, and the shapes of their inputs."""

    def weight(*shape: int) -> Array:
        return small_integers(rng, shape, own)

    return {
        "ConvTranspose": (
            Network([ConvTranspose(weight(4, 3, 3, 2), weight(6), stride=(2, 3), groups=2, padding=1)]),
            (2, 4, 9, 7),
        ),
        "LocallyConnected": (
            Network([LocallyConnected(weight(4, 1, 5, 6, 3, 2), weight(4, 5, 6), stride=(2, 1), groups=2)]),
            (2, 2, 11, 7),
        ),
        "Linear": (Network([Linear(weight(7, 300), weight(7), activation="relu")]), (3, 300)),
        "Flatten, Linear": (Network([Flatten(), Linear(weight(7, 3 * 5 * 4), weight(7))]), (3, 3, 5, 4)),
        "Add": (Network([Node("twice", Add("relu"), ("input", "input"))]), (2, 3, 8, 5)),
        "MaxPool": (Network([MaxPool(3, stride=2, padding=1)]), (2, 3, 9, 8)),
        "GlobalMaxPool": (Network([GlobalMaxPool()]), (2, 3, 9, 8)),
    }


@pytest.mark.parametrize("name", integer_networks(np.random.default_rng(), FLOAT32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(backend: Backend, name: str, dtype: DType, rng: np.random.Generator) -> None:
    network, shape = integer_networks(rng, dtype if dtype.is_float else FLOAT32)[name]
    x = small_integers(rng, shape, dtype)
    values: list[Array] = [x]
    for node in network.nodes:
        own = network.dtype(dtype)
        expected = layer_reference(node.layer, values * len(node.inputs), own, own)
        assert expected.exact
        values = [expected.value]
    found = compute(backend, network, x)["output"]
    assert_expected(name, Expected(values[0], np.zeros(()), exact=True, dtype=network.dtype(dtype)), found)


@given(fitted(kinds=(Conv,)), SEEDS, st.booleans())
def test_a_tied_locally_connected_layer_is_a_convolution(
    backend: Backend, case: Fitted, seed: int, integers: bool
) -> None:
    """Every position has the same filter: then sharing it changes nothing."""
    conv = case.layer
    assert isinstance(conv, Conv)
    assume(conv.padding_mode == "zeros" and conv.padding != "same")
    rng, own = np.random.default_rng(seed), conv.filters.dtype
    values = small_integers if integers else random_array
    function = "relu" if integers else conv.activation
    weight, bias = values(rng, conv.weight.shape, own), values(rng, (conv.out_channels,), own)
    options: dict[str, Any] = {
        name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")
    }
    out = conv.output_sample(case.sample).shape[1:]
    places = (slice(None), slice(None), *(None for _ in out))
    spread = np.broadcast_to(weight[places], (*weight.shape[:2], *out, *conv.kernel))
    x = values(rng, (2, *case.sample.shape), own)
    shared = Conv(weight, bias, activation=function, **options)
    tied = LocallyConnected(spread, bias, activation=function, **options)
    expected = layer_reference(shared, x, own, own)
    assert expected.exact or not integers
    ours = compute(backend, Network([tied]), x)["output"]
    assert_expected(repr(tied), expected, ours)
    if integers:
        assert np.array_equal(ours, compute(backend, Network([shared]), x)["output"])


@pytest.mark.parametrize("layer", [MaxPool(3, stride=1, padding=1), GlobalMaxPool()], ids=str)
@pytest.mark.parametrize("rows", [None, 1])
def test_the_largest_of_infinities_and_nan(
    backend: Backend, layer: Layer, rows: int | None, float_dtype: DType
) -> None:
    x = np.full((4, 1, 5, 6), -np.inf)
    x[1, 0, 2, 3] = np.nan
    x[2, 0, 2, 3], x[2, 0, 4, 5] = np.inf, 1.0
    x[3] = -0.0
    given = x.astype(float_dtype.numpy)
    found = compute(backend, Network([layer]), given, rows=rows)["output"]
    check_every_layer(Network([layer]), given, {"layer0": found})
    assert (found[0] == -np.inf).all()
    assert np.isnan(found[1]).any()


@pytest.mark.parametrize("rows", [None, 1])
def test_a_mean_keeps_nan_and_infinity_to_their_windows(
    backend: Backend, rows: int | None, rng: np.random.Generator
) -> None:
    x = random_array(rng, (3, 2, 14, 15), FLOAT32)
    x[0, 0, 6, 4], x[1, 1, 6, 4] = np.nan, np.inf
    for layer in (AvgPool(3, stride=1, padding=1), AvgPool(9, stride=2, padding=4), GlobalAvgPool()):
        found = compute(backend, Network([layer]), x, rows=rows)["output"]
        check_every_layer(Network([layer]), x, {"layer0": found})
        assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize(
    "layer", [MaxPool(2), AvgPool(2), GlobalMaxPool(), GlobalAvgPool(), Flatten()], ids=str
)
def test_integers_at_the_ends_of_their_range_without_weights(
    backend: Backend, dtype: DType, layer: Layer, rng: np.random.Generator
) -> None:
    info = np.iinfo(dtype.numpy)
    x = rng.choice(np.array([info.min, info.max, 0, 1], dtype.numpy), (2, 3, 6, 6))
    found = compute(backend, Network([layer]), x)["output"]
    assert found.dtype == np.float32
    check_every_layer(Network([layer]), x, {"layer0": found})


def test_windows_that_see_neither_all_rows_nor_only_real_ones(
    backend: Backend, rng: np.random.Generator
) -> None:
    """A stride beyond the window, a window beyond the height, and a window of padding alone."""
    x = random_array(rng, (1, 2, 11, 10), FLOAT32)
    layers = [
        MaxPool(2, stride=5),
        AvgPool(2, stride=(4, 3)),
        MaxPool(15, stride=3, padding=7),
        AvgPool(15, stride=2, padding=(7, 9), count_include_pad=False),
        MaxPool(2, dilation=12, padding=12, stride=1),
        ConvTranspose(random_array(rng, (2, 1, 2, 2), FLOAT32), stride=5, output_padding=4),
    ]
    for layer in layers:
        for rows in (None, 1, 4):
            found = compute(backend, Network([layer]), x, rows=rows, announced=rows is None)
            check_every_layer(Network([layer]), x, {"layer0": found["output"]})


@pytest.mark.multiply_adds(2 * 700**2 * 699**2)  # where each window's values are looked at
def test_a_very_large_window_costs_little_more_than_a_small_one(
    backend: Backend, rng: np.random.Generator
) -> None:
    """2e11 values under the windows: out of reach if each were looked at for each window."""
    x = small_integers(rng, (1, 1, 700, 700), FLOAT32)
    x[0, 0, 350, 350] = 1000.0
    largest, mean = (
        compute(backend, Network([kind(699, stride=1, padding=349)]), x)["output"]
        for kind in (MaxPool, AvgPool)
    )
    assert (largest[0, 0, 1:, 1:] == 1000).all()
    middle = x[0, 0, 1:, 1:].astype(np.float64).sum() / 699**2  # the window of the neuron at (350, 350)
    assert mean[0, 0, 350, 350] == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize("kind", [MaxPool, AvgPool])
def test_a_window_that_is_mostly_padding_costs_little(
    backend: Backend, kind: type[MaxPool | AvgPool], rng: np.random.Generator
) -> None:
    """Under it lie half a million positions with next to nothing on them: as calls of their own they would
    take minutes."""
    x = small_integers(rng, (1, 2, 3, 2), FLOAT32)
    layer = kind((1 << 19, 1), stride=(1 << 18, 1), padding=(1 << 18, 0))
    found = compute(backend, Network([layer]), x)["output"]
    expected = x.max(axis=2) if kind is MaxPool else x.sum(axis=2) / (1 << 19)
    assert found.shape == (1, 2, 1, 2)
    assert np.array_equal(found[:, :, 0], expected)


@pytest.mark.parametrize("layer", [GlobalMaxPool(), GlobalAvgPool()], ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 5, 5, 30), (300, 7, 7), (700, 1, 4), (5000, 2), (33, 3, 501)], ids=str
)
@pytest.mark.parametrize("rows", [None, 1])
def test_global_pooling_of_many_low_maps(
    backend: Backend, layer: Layer, shape: tuple[int, ...], rows: int | None, rng: np.random.Generator
) -> None:
    """A map lower than the rows that are taken in together has more channels reduced at once."""
    x = small_integers(rng, (2, *shape), FLOAT32)
    found = compute(backend, Network([layer]), x, rows=rows)["output"]
    check_every_layer(Network([layer]), x, {"layer0": found})


@pytest.mark.parametrize("rows", [None, 3])
def test_a_flattened_map_that_is_an_output_as_well_changes_no_bit(
    backend: Backend, float_dtype: DType, rows: int | None, rng: np.random.Generator
) -> None:
    nodes = [
        Node("flat", Flatten()),
        Node("scores", Linear(random_array(rng, (9, 2 * 30 * 7), float_dtype)), ("flat",)),
    ]
    x = random_array(rng, (3, 2, 30, 7), float_dtype)
    alone = compute(backend, Network(nodes), x, rows=rows)
    both = compute(backend, Network(nodes, {"output": "scores", "flat": "flat"}), x, rows=rows)
    assert_same_bits(alone, {"output": both["output"]}, "beside the flattened map")
    assert np.array_equal(both["flat"], x.reshape(3, -1))


def test_a_vector_larger_than_is_held(backend: Backend, rng: np.random.Generator) -> None:
    """A flattened map of 1.2 million values, whose rows are taken in as they come."""
    x = small_integers(rng, (1, 2, 600, 1000), FLOAT32)
    weight = small_integers(rng, (2, x.size), FLOAT32)
    network = Network([Flatten(), Linear(weight)])
    expected = weight.astype(np.int64) @ x.reshape(-1).astype(np.int64)
    for rows in (None, 7):
        assert compute(backend, network, x, rows=rows)["output"].tolist() == [expected.tolist()]


def test_a_batch_of_vectors_is_many_products_of_one(backend: Backend, rng: np.random.Generator) -> None:
    network = Network([Linear(random_array(rng, (300, 700), FLOAT32), activation="tanh")])
    x = random_array(rng, (70, 700), FLOAT32)
    whole = compute(backend, network, x)["output"]
    for sample in (0, 33, 69):
        alone = compute(backend, network, x[sample : sample + 1])["output"]
        assert_same_bits({"o": whole[sample : sample + 1]}, {"o": alone}, f"sample {sample} alone")


@pytest.mark.parametrize("out_dtype", [None, dtype_of("uint8")], ids=str)
def test_strides_large_beyond_reason(
    backend: Backend, out_dtype: DType | None, rng: np.random.Generator
) -> None:
    """A transposed convolution of which most neurons meet no weight."""
    weight = small_integers(rng, (1, 1, 2, 2), FLOAT32)
    layer = ConvTranspose(weight, np.full(1, 3, np.float32), stride=(400, 300))
    x = np.ones((1, 1, 2, 3), np.float32)
    found = compute(backend, Network([layer]), x, out_dtype=out_dtype)["output"]
    expected = np.full((1, 1, 402, 602), 3.0)
    for row in range(2):
        for column in range(3):
            expected[0, 0, 400 * row : 400 * row + 2, 300 * column : 300 * column + 2] += weight[0, 0]
    assert np.array_equal(found, np.clip(expected, 0, 255) if out_dtype else expected)


def test_every_kind_of_layer_is_tried() -> None:
    assert {*ANYTHING, Add, Activation, Conv} == set(_all_kinds(Layer))


def _all_kinds(kind: Any) -> list[type[Layer]]:
    below: list[Any] = kind.__subclasses__()
    return [kind] if not below else [leaf for child in below for leaf in _all_kinds(child)]
