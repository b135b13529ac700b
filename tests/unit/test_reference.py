"""The oracle itself, checked against what is worked out by hand and against other people's convolutions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import correlate
from scipy.special import erf

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.layers import FUNCTIONS, Activation, Conv
from convservice.network import Network
from convservice_backends.reference import (
    Expected,
    activate,
    layer_reference,
    network_reference,
    rounded,
)
from tests.helpers import Array, random_array, small_integers, worked_example


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_worked_example(rank: int) -> None:
    x, weight, fm = worked_example(rank, FLOAT32, FLOAT32)
    found = layer_reference(Conv(weight), x, FLOAT32, FLOAT32)
    assert found.exact
    assert found.value.tolist() == fm.tolist()
    if rank == 2:
        assert fm.tolist() == [[[[12, 12, 17], [10, 17, 19], [9, 6, 14]]]]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("mode", "numpy_mode"), [("zeros", "constant"), ("reflect", "reflect"), ("replicate", "edge")]
)
def test_geometry_is_that_of_padding_and_correlating(
    rng: np.random.Generator, rank: int, mode: str, numpy_mode: str
) -> None:
    stride, dilation, padding = (2, 1, 2)[:rank], (1, 2, 1)[:rank], ((1, 2), (0, 3), (2, 1))[:rank]
    x, weight = (
        small_integers(rng, (2, 4, *(7, 6, 5)[:rank]), FLOAT64),
        rng.normal(size=(6, 2, *(3, 2, 2)[:rank])),
    )
    bias = rng.normal(size=6)
    layer = Conv(weight, bias, stride=stride, dilation=dilation, padding=padding, groups=2, padding_mode=mode)
    wide = np.zeros((6, 2, *((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))))
    taps = tuple(slice(None, None, d) for d in dilation)
    wide[(slice(None), slice(None), *taps)] = weight
    step = tuple(slice(None, None, s) for s in stride)
    pad: Any = np.pad
    padded: Array = pad(x, ((0, 0), (0, 0), *padding), mode=numpy_mode)

    def channel(n: int, o: int) -> Array:
        parts: list[Array] = [
            correlate(padded[n, o // 3 * 2 + c], wide[o, c], mode="valid") for c in range(2)
        ]
        return np.asarray((parts[0] + parts[1])[step] + bias[o])

    expected = np.array([[channel(n, o) for o in range(6)] for n in range(2)])
    found = layer_reference(layer, x, FLOAT64, FLOAT64)
    assert found.value == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert not found.exact


def test_sums_of_float64_are_exact_before_their_one_rounding(rng: np.random.Generator) -> None:
    x, weight = rng.normal(size=(1, 1, 9)), rng.normal(size=(1, 1, 9))
    x[0, 0, 1], weight[0, 0, 1] = -x[0, 0, 0], weight[0, 0, 0]  # products that cancel
    exact = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x.flat, weight.flat, strict=True))
    assert layer_reference(Conv(weight), x, FLOAT64, FLOAT64).value.item() == float(exact)


FINITE = st.floats(-1e6, 1e6)


@given(FINITE)
def test_activations_are_the_contracts_formulas(z: float) -> None:
    formulas = {
        "linear": z,
        "relu": max(z, 0.0),
        "leaky_relu": z if z > 0 else 0.25 * z,
        "sigmoid": 1 / (1 + math.exp(-max(z, -700.0))),
        "tanh": math.tanh(z),
        "gelu": z * (1 + float(erf(z / math.sqrt(2)))) / 2,
        "silu": z / (1 + math.exp(-max(z, -700.0))),
    }
    assert set(formulas) == set(FUNCTIONS)
    for function, expected in formulas.items():
        tolerance = 1e-15 * max(abs(expected), abs(z)) + 1e-290
        assert abs(activate(Activation(function, 0.25), z) - expected) <= tolerance, function


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_nan_through_every_activation(function: str) -> None:
    assert math.isnan(activate(Activation(function), math.nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(st.floats(width=32), max_size=20))
def test_rounding_once_is_what_numpy_does(dtype: DType, values: list[float]) -> None:
    given = np.array(values, np.float32)
    exact = given.astype(np.float64)
    if dtype.is_float:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            expected = given.astype(dtype.numpy)
        found = rounded(exact, dtype)
        assert found.dtype == dtype.numpy
        assert np.array_equal(found, expected) or [str(v) for v in found] == [str(v) for v in expected]
        return
    low, high = int(np.iinfo(dtype.numpy).min), int(np.iinfo(dtype.numpy).max)
    by_hand = [
        0 if math.isnan(v) else int(max(low, min(high, v))) if abs(v) > 1e6 else max(low, min(high, round(v)))
        for v in values
    ]
    assert rounded(exact, dtype).tolist() == by_hand


def test_halves_go_to_even_and_integers_saturate() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 1e9, -1e9, math.inf, -math.inf, math.nan])
    expected = [0, 2, 2, 0, -2, 127, 127, -128, 127, -128, 0]
    assert rounded(values, dtype_of("int8")).tolist() == expected
    assert rounded(np.array([2049.0, 2051.0, 65520.0]), dtype_of("float16")).tolist() == [
        2048,
        2052,
        math.inf,
    ]


def off_by(expected: Expected, steps: Array) -> Array:
    return rounded(expected.value, expected.dtype).astype(np.float64) + steps


def test_the_bound_lets_pass_what_rounds_otherwise_and_nothing_more(rng: np.random.Generator) -> None:
    x, weight = random_array(rng, (1, 3, 8), FLOAT32), random_array(rng, (2, 3, 3), FLOAT32)
    found = layer_reference(Conv(weight), x, FLOAT32, FLOAT32)
    assert (found.bound > 0).all()
    assert not found.wrong(off_by(found, found.bound * 0.9).astype(np.float32)).any()
    assert found.wrong(off_by(found, found.bound * 2.5).astype(np.float32)).all()
    got = off_by(found, np.zeros_like(found.value)).astype(np.float32)
    got[0, 1, 2] = np.nan
    assert np.argwhere(found.wrong(got)).tolist() == [[0, 1, 2]]


def test_integers_within_the_limit_must_be_exact(rng: np.random.Generator) -> None:
    x, weight = small_integers(rng, (1, 3, 8), FLOAT32), small_integers(rng, (2, 3, 3), FLOAT32)
    found = layer_reference(Conv(weight, activation="relu"), x, FLOAT32, FLOAT32)
    assert found.exact
    assert not found.wrong(found.value.astype(np.float32)).any()
    assert found.wrong(np.nextafter(found.value.astype(np.float32), np.float32(np.inf))).all()
    assert not layer_reference(Conv(weight, activation="tanh"), x, FLOAT32, FLOAT32).exact
    assert not layer_reference(Conv(weight), x / 2, FLOAT32, FLOAT32).exact
    assert not layer_reference(Conv(weight * 2**18), x, FLOAT32, FLOAT32).exact


def test_an_integer_result_may_be_either_side_of_a_half() -> None:
    x, weight = np.full((1, 1, 1), 0.1, np.float32), np.full((1, 1, 1), 25.0, np.float32)  # just above 2.5
    found = layer_reference(Conv(weight), x, FLOAT32, dtype_of("int8"))
    wrong = [bool(found.wrong(np.full((1, 1, 1), n, np.int8)).any()) for n in (1, 2, 3, 4)]
    assert wrong == [True, False, False, True]


def test_a_network_carries_the_error_of_its_layers(rng: np.random.Generator) -> None:
    first, second = (Conv(random_array(rng, (2, 2, 3), FLOAT32)) for _ in range(2))
    x = random_array(rng, (1, 2, 9), FLOAT32)
    whole = network_reference(Network([first, second]), x)["output"]
    middle = layer_reference(first, x, FLOAT32, FLOAT32)
    alone = layer_reference(second, middle.value, FLOAT32, FLOAT32)
    assert np.array_equal(whole.value, alone.value)
    assert (whole.error > alone.error).all()
    worst = layer_reference(second, middle.value + middle.bound, FLOAT32, FLOAT32)
    assert (np.abs(worst.value - whole.value) <= whole.error).all()


def test_a_network_of_integers_is_exact_to_its_end(rng: np.random.Generator) -> None:
    layers = [
        Conv(small_integers(rng, (2, 2, 3), FLOAT32)),
        Activation("relu"),
        Conv(small_integers(rng, (1, 2, 2), FLOAT32)),
    ]
    found = network_reference(Network(layers), small_integers(rng, (1, 2, 9), FLOAT32), dtype_of("int16"))[
        "output"
    ]
    assert found.exact
    assert found.dtype == dtype_of("int16")
