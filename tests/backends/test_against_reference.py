"""Every backend against the plain-loop reference: every geometry, dtype and layout, layer by layer and end to
end, within the documented bound and exactly where integers allow it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.layers import FUNCTIONS, Activation, Conv
from convservice.network import Network, Node
from convservice.wire.enums import Precision
from convservice_backends import session
from convservice_backends.interface import Backend
from convservice_backends.reference import Expected, layer_reference, network_reference
from tests.helpers import (
    FLOATS,
    INTEGERS,
    Array,
    assert_expected,
    assert_same_bits,
    chain,
    check_every_layer,
    compute,
    every_map,
    fast_reference,
    random_array,
    run,
    small_integers,
    spec_of,
    trunk_with_two_heads,
)
from tests.strategies import Case, cases, fits


def check(backend: Backend, case: Case, rows: int | None, out_dtype: DType | None = None) -> None:
    found = compute(backend, Network([case.layer]), case.x, rows=rows, out_dtype=out_dtype)
    check_every_layer(Network([case.layer]), case.x, {"layer0": found["output"]}, out_dtype)


@settings(max_examples=4 * settings().max_examples)
@given(cases(), st.sampled_from([None, 1, 2, 3]))
def test_a_convolution_of_any_geometry(backend: Backend, case: Case, rows: int | None) -> None:
    assume(fits(case))
    check(backend, case, rows)


@given(cases(functions=("linear", "relu", "tanh")), st.sampled_from(DTYPES))
def test_a_result_of_any_dtype(backend: Backend, case: Case, out_dtype: DType) -> None:
    assume(fits(case))
    check(backend, case, None, out_dtype)


@given(cases(functions=("linear", "relu")))
def test_integers_are_exact(backend: Backend, case: Case) -> None:
    assume(case.integers and fits(case))
    own = Network([case.layer]).dtype(dtype_of(case.x.dtype))
    expected = layer_reference(case.layer, case.x, own, own)
    assert expected.exact
    found = compute(backend, Network([case.layer]), case.x)["output"]
    assert_expected(repr(case.layer), expected, found)


@pytest.mark.parametrize("depth", [64, 1024])
def test_integers_are_exact_up_to_the_limit(backend: Backend, depth: int, rng: np.random.Generator) -> None:
    reach = int(np.sqrt(2**20 / depth)) - 1  # depth products of at most reach**2 are just below 2**20
    x = rng.integers(-reach, reach, (2, depth, 3), endpoint=True).astype(np.float32)
    weight = rng.integers(-reach, reach, (5, depth, 1), endpoint=True).astype(np.float32)
    weight[0], x[0, :, 0] = reach, reach
    expected = layer_reference(Conv(weight), x, FLOAT32, FLOAT32)
    assert expected.exact
    assert_expected("near 2**20", expected, compute(backend, Network([Conv(weight)]), x)["output"])


@pytest.mark.parametrize("band_rows", [None, 4])
@pytest.mark.parametrize("out_dtype", [None, dtype_of("int8")], ids=str)
def test_the_packages_own_driver_gives_the_same(
    backend: Backend, band_rows: int | None, out_dtype: DType | None, rng: np.random.Generator
) -> None:
    network, x = trunk_with_two_heads(rng, FLOAT32), random_array(rng, (3, 2, 30, 7), FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    found = session.run(prepared, x, band_rows=band_rows, out_dtype=out_dtype)
    assert_same_bits(compute(backend, network, x, out_dtype=out_dtype), found, "session.run")


@pytest.mark.parametrize("kind", [chain, trunk_with_two_heads])
@pytest.mark.parametrize("height", [9, 40])
def test_a_network_layer_by_layer_and_end_to_end(
    backend: Backend, kind: type, height: int, float_dtype: DType, rng: np.random.Generator
) -> None:
    network, x = kind(rng, float_dtype), random_array(rng, (2, 2, height, 7), float_dtype)
    maps = compute(backend, every_map(network), x, rows=4)
    check_every_layer(network, x, maps)
    ends = compute(backend, network, x, rows=4)
    for name, expected in network_reference(network, x).items():
        assert_expected(f"end to end, {name}", expected, ends[name])
        assert np.array_equal(ends[name], maps[network.outputs[name]]), "other outputs change nothing"


def test_a_map_that_is_an_output_and_goes_on_is_rounded_once_each_way(backend: Backend) -> None:
    """In a float16 network 4097 is 4096 to the next layer, and 4097 as a float32 or int16 result."""
    half = dtype_of("float16")
    x = np.full((1, 1, 6), 4.0, half.numpy)
    first = Conv(np.array([[[1024.0, 0.25]]]).astype(half.numpy), padding=((0, 1),), padding_mode="replicate")
    network = Network(
        [Node("first", first), Node("second", Activation("linear"), ("first",))],
        {"first": "first", "second": "second"},
    )
    for out_dtype in (FLOAT32, dtype_of("int16")):
        found = compute(backend, network, x, out_dtype=out_dtype)
        assert found["first"].tolist() == [[[4097] * 6]]
        assert found["second"].tolist() == [[[4096] * 6]]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_fused_and_alone(
    backend: Backend, function: str, float_dtype: DType, rng: np.random.Generator
) -> None:
    """Over the function's whole range: near 0, where it saturates and where exp leaves its range."""
    activation = Activation(function, 0.3)
    spread = np.concatenate([rng.normal(size=150) * scale for scale in (1e-6, 0.1, 3.0, 30.0, 1000.0)])
    x = spread.reshape(1, 5, 150).astype(float_dtype.numpy)
    alone = compute(backend, Network([activation]), x)["output"]
    assert_expected(f"{function} alone", layer_reference(activation, x, float_dtype, float_dtype), alone)
    fused = Conv(np.eye(5)[:, :, None].astype(float_dtype.numpy), activation=activation)
    found = compute(backend, Network([fused]), x)["output"]
    assert_expected(f"{function} fused", layer_reference(fused, x, float_dtype, float_dtype), found)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_an_activation_alone_takes_integers_as_float32(
    backend: Backend, dtype: DType, rng: np.random.Generator
) -> None:
    x = random_array(rng, (2, 3, 8), dtype)
    found = compute(backend, Network([Activation("relu")]), x)["output"]
    assert found.dtype == np.float32
    assert np.array_equal(found, np.maximum(x, 0))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("own", FLOATS, ids=str)
def test_integers_at_the_ends_of_their_range(
    backend: Backend, dtype: DType, own: DType, rng: np.random.Generator
) -> None:
    info = np.iinfo(dtype.numpy)
    x = rng.choice(np.array([info.min, info.max, 0, 1], dtype.numpy), (1, 2, 6, 6))
    layer = Conv(small_integers(rng, (2, 2, 3, 3), own))
    found = compute(backend, Network([layer]), x, out_dtype=FLOAT64)["output"]
    assert_expected(repr(layer), layer_reference(layer, x, own, FLOAT64), found)


@pytest.mark.parametrize("out_dtype", INTEGERS, ids=str)
def test_an_integer_result_is_rounded_half_to_even_and_saturated(backend: Backend, out_dtype: DType) -> None:
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5, 127.5, -128.5, 3e4, -4e4, 7e4, 1e30, -1e30]
    x = np.array([[[*values, np.inf, -np.inf, np.nan]]], np.float32)
    found = compute(backend, Network([Conv(np.ones((1, 1, 1), np.float32))]), x, out_dtype=out_dtype)[
        "output"
    ]
    info = np.iinfo(out_dtype.numpy)
    by_hand = [max(info.min, min(info.max, round(value))) for value in values]
    assert found[0, 0].tolist() == [*by_hand, info.max, info.min, 0]


@pytest.mark.parametrize("size", ["products", "results", "sums"])
@pytest.mark.parametrize("rows", [None, 2])
def test_at_the_ends_of_the_range_of_numbers(
    backend: Backend, float_dtype: DType, size: str, rows: int | None, rng: np.random.Generator
) -> None:
    """Products and results below the normal numbers, and sums just below the largest number."""
    lowest = int(np.log2(float_dtype.smallest_normal))
    highest = 1 - lowest  # IEEE formats and bfloat16 reach as far up as down
    exponents = {"products": (lowest // 2 - 2, lowest // 2 - 2), "results": (lowest, -1)}
    at_x, at_weight = exponents.get(size, (highest // 2 - 2, highest // 2 - 4))
    x = np.ldexp(rng.uniform(-1, 1, (2, 3, 9, 8)), at_x).astype(float_dtype.numpy)
    weight = np.ldexp(rng.uniform(-1, 1, (4, 3, 3, 3)), at_weight).astype(float_dtype.numpy)
    network = Network([Conv(weight, padding=1, activation="leaky_relu")])
    found = compute(backend, network, x, rows=rows)["output"]
    assert np.isfinite(found).all()
    check_every_layer(network, x, {"layer0": found})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_at_the_ends_of_the_range(backend: Backend, float_dtype: DType, function: str) -> None:
    """No intermediate value may leave a range that the result does not leave."""
    large = np.ldexp(0.9, 2 - int(np.log2(float_dtype.smallest_normal)))
    values = [large, large / 2, 1.0, float_dtype.smallest_normal, 0.0]
    x = np.array([[[*values, *(-value for value in values)]]]).astype(float_dtype.numpy)
    network = Network([Activation(function)])
    found = compute(backend, network, x)["output"]
    assert np.isfinite(found).all()
    check_every_layer(network, x, {"layer0": found})


@pytest.mark.parametrize("rows", [None, 1])
def test_what_is_too_large_for_a_dtype_is_infinite_without_a_warning(
    backend: Backend, float_dtype: DType, rows: int | None
) -> None:
    large = np.ldexp(1.0, 1 - int(np.log2(float_dtype.smallest_normal)))
    x = np.full((1, 1, 7, 5), large, float_dtype.numpy)
    layers = [Conv(np.full((1, 1, 1, 1), 3, float_dtype.numpy)), Activation("relu")]
    found = compute(backend, every_map(Network(layers)), x, rows=rows)
    assert np.isposinf(found["layer0"]).all()
    assert np.isposinf(found["layer1"]).all()


@pytest.mark.parametrize("kernel", [(7,), (4, 6), (3, 4, 2)])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_a_kernel_as_large_as_the_input(
    backend: Backend, kernel: tuple[int, ...], batch: int, rng: np.random.Generator
) -> None:
    layer = Conv(random_array(rng, (3, 2, *kernel), FLOAT32), random_array(rng, (3,), FLOAT32))
    x = random_array(rng, (batch, 2, *kernel), FLOAT32)
    found = compute(backend, Network([layer]), x)["output"]
    assert found.shape == (batch, 3, *(1 for _ in kernel))
    check_every_layer(Network([layer]), x, {"layer0": found})


def test_windows_of_padding_only_give_the_threshold(backend: Backend, rng: np.random.Generator) -> None:
    layer = Conv(
        random_array(rng, (2, 3, 2, 2), FLOAT32), np.array([0.5, -2.0], np.float32), padding=((5, 4), (3, 6))
    )
    x = random_array(rng, (1, 3, 3, 3), FLOAT32)
    for rows in (None, 1):
        found = compute(backend, Network([layer]), x, rows=rows)["output"]
        assert (found[0, 0, :3] == 0.5).all()
        assert (found[0, 1, :, -4:] == -2.0).all()
        check_every_layer(Network([layer]), x, {"layer0": found})


def test_depthwise(backend: Backend, float_dtype: DType, rng: np.random.Generator) -> None:
    layer = Conv(random_array(rng, (8, 1, 3, 3), float_dtype), groups=8, padding="same", stride=2)
    x = random_array(rng, (2, 8, 9, 10), float_dtype)
    check_every_layer(Network([layer]), x, {"layer0": compute(backend, Network([layer]), x)["output"]})


def as_given(x: Array, how: str) -> Array:
    """The same values in another layout of memory."""
    if how == "read-only":
        x = x.copy()
        x.flags.writeable = False
        return x
    if how == "fortran":
        return np.asfortranarray(x)
    if how == "reversed":
        return x[..., ::-1].copy()[..., ::-1]
    wider = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wider[..., ::2] = x
    return wider[..., ::2]


@pytest.mark.parametrize("how", ["read-only", "fortran", "reversed", "every other"])
@pytest.mark.parametrize("rows", [None, 3])
def test_any_layout_of_memory_gives_the_same_and_is_not_changed(
    backend: Backend, how: str, rows: int | None, rng: np.random.Generator
) -> None:
    pointwise = Network([Conv(random_array(rng, (5, 2, 1, 1), FLOAT32))])
    x = random_array(rng, (2, 2, 12, 7), FLOAT32)
    given = as_given(x, how)
    for network in (chain(rng, FLOAT32), pointwise):
        found = compute(backend, network, given, rows=rows)["output"]
        assert np.array_equal(found, compute(backend, network, x)["output"])
        assert np.array_equal(given, x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", ["linear", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("rows", [None, 2])
def test_nan_and_infinity_stay_inside_the_receptive_field(
    backend: Backend, value: float, function: str, rows: int | None, rng: np.random.Generator
) -> None:
    layer = Conv(
        random_array(rng, (3, 2, 3, 3), FLOAT32), padding=1, stride=(1, 2), groups=1, activation=function
    )
    x = random_array(rng, (2, 2, 14, 11), FLOAT32)
    x[1, 0, 6, 4] = value
    found = compute(backend, Network([layer]), x, rows=rows)["output"]
    expected = layer_reference(layer, x, FLOAT32, FLOAT32)
    assert np.isfinite(expected.value[0]).all()
    assert_expected(repr(layer), expected, found)


def fast(backend: Backend, layer: Conv, x: Array, rows: int | None) -> tuple[Array, Expected]:
    """What a backend computes under `Precision.FAST`, and what it should."""
    prepared = backend.prepare(Network([layer]), Precision.FAST)
    algorithm = prepared.plan(spec_of(x, rows)).algorithms["layer0"]
    return run(prepared, x, rows)["output"], fast_reference(layer, x, algorithm)


@given(cases(functions=("linear", "relu")), st.sampled_from([None, 2]))
def test_fast_keeps_its_bound_in_any_geometry(backend: Backend, case: Case, rows: int | None) -> None:
    assume(fits(case))
    found, expected = fast(backend, case.layer, case.x, rows)
    assert_expected(repr(case.layer), expected, found)


FAST_LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "many channels": ((18, 20, 3, 3), (2, 20, 5, 6), {"padding": 1}),
    "groups": ((34, 16, 3, 3), (1, 32, 5, 4), {"groups": 2, "padding": (2, 1), "padding_mode": "reflect"}),
    "no padding": ((16, 17, 3, 3), (1, 17, 8, 5), {"activation": "relu"}),
    "stride": ((18, 20, 3, 3), (1, 20, 9, 8), {"stride": 2}),
    "pointwise": ((24, 40, 1, 1), (2, 40, 6, 7), {}),
    "line": ((20, 24, 5), (2, 24, 30), {"padding": 2, "padding_mode": "replicate"}),
}
"""Shape of the filter bank, of the input, options: with channels enough for what computes fast."""


@pytest.mark.parametrize("name", FAST_LAYERS)
@pytest.mark.parametrize("rows", [None, 3])
def test_fast_keeps_its_bound_in_large_layers(
    backend: Backend, name: str, rows: int | None, rng: np.random.Generator
) -> None:
    weight, shape, options = FAST_LAYERS[name]
    layer = Conv(random_array(rng, weight, FLOAT32), random_array(rng, weight[:1], FLOAT32), **options)
    found, expected = fast(backend, layer, random_array(rng, shape, FLOAT32), rows)
    assert_expected(name, expected, found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fast_keeps_nan_and_infinity_inside_the_receptive_field(
    backend: Backend, value: float, rng: np.random.Generator
) -> None:
    layer = Conv(random_array(rng, (18, 17, 3, 3), FLOAT32), padding=1)
    x = random_array(rng, (2, 17, 7, 5), FLOAT32)
    x[1, 4, 2, 3] = value
    found, expected = fast(backend, layer, x, 3)
    assert np.isfinite(found[0]).all()
    assert_expected(repr(layer), expected, found)
