"""winograd on the emulator: its own bound against the reference, and `direct` where something is not finite.

Bands flow through a whole session, so that rows are held in part and runs begin at any pair of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType
from convservice.layers import FUNCTIONS, Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms.base import Case
from convservice_backends.cuda.algorithms.winograd import (
    FILTER_TRANSFORM,
    LARGEST_WEIGHT,
    Winograd,
    error_bound,
)
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.reference import layer_reference
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from tests.helpers import assert_same_bits, random_array, small_integers, spec_of
from tests.helpers import run as run_prepared

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Runner:
    """Computes single layers: with large blocks of tiles, with small ones, and by `direct`."""

    large: CudaBackend
    small: CudaBackend
    simple: CudaBackend

    def __call__(self, layer: Conv, x: Array, backend: CudaBackend | None = None, **options: Any) -> Array:
        prepared = (backend or self.large).prepare(Network([layer]), Precision.FAST)
        if backend is not self.simple:
            assert set(prepared.plan(spec_of(x)).algorithms.values()) == {"winograd"}
        return next(iter(run_prepared(prepared, x, **options).values()))


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    compiler = Compiler()
    with ExitStack() as stack:

        def backend(algorithm: str, processors: int) -> CudaBackend:
            device = EmulatedDevice(compiler, replace(INFO, processors=processors))
            return stack.enter_context(closing(CudaBackend([device], {}, algorithm=algorithm)))

        yield Runner(backend("winograd", 1), backend("winograd", 1 << 20), backend("direct", 1))


@dataclass(frozen=True)
class Shape:
    """A layer and its input, by their sizes."""

    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: dict[str, Any]

    def layer(self, rng: np.random.Generator, **more: Any) -> Conv:
        bias = random_array(rng, self.weight[:1], FLOAT32)
        return Conv(random_array(rng, self.weight, FLOAT32), bias, **self.options, **more)


SHAPES = {
    "even": Shape((16, 16, 3, 3), (2, 16, 6, 8), {"padding": 1}),
    "odd": Shape((16, 16, 3, 3), (2, 16, 7, 9), {"padding": 1}),
    "valid": Shape((16, 16, 3, 3), (1, 16, 6, 7), {}),
    "tails": Shape((37, 19, 3, 3), (1, 19, 5, 6), {"padding": 1}),
    "several blocks": Shape((33, 16, 3, 3), (3, 16, 17, 18), {"padding": 1}),
    "wide padding": Shape((16, 16, 3, 3), (1, 16, 3, 4), {"padding": ((4, 1), (0, 5))}),
    "reflect": Shape((16, 17, 3, 3), (2, 17, 5, 6), {"padding": ((2, 1), (1, 2)), "padding_mode": "reflect"}),
    "replicate": Shape((16, 17, 3, 3), (2, 17, 4, 5), {"padding": (2, 3), "padding_mode": "replicate"}),
    "groups": Shape((40, 16, 3, 3), (1, 32, 5, 4), {"padding": 1, "groups": 2}),
    "one pixel": Shape((16, 16, 3, 3), (2, 16, 1, 1), {"padding": 1}),
}

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge"}


def padded(layer: Conv, x: Array, after: int = 0) -> Floats:
    """x with the layer's padding, and `after` more zeros along both axes, in float64."""
    pads = layer.padding
    assert not isinstance(pads, str)
    mode: Any = MODES[layer.padding_mode]
    whole = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads], mode=mode)
    return np.pad(whole, [(0, 0), (0, 0), (0, after), (0, after)])


def largest_of_tiles(layer: Conv, x: Array, size: tuple[int, ...]) -> Floats:
    """max|x| over the tile and the group of each output, shape (N, out_channels, *size)."""
    whole = np.abs(padded(layer, x, after=1))
    grouped = whole.reshape(len(x), layer.groups, -1, *whole.shape[2:]).max(axis=2)
    tiles = np.lib.stride_tricks.sliding_window_view(grouped, (4, 4), axis=(2, 3))[:, :, ::2, ::2]
    largest = tiles.max(axis=(4, 5)).repeat(2, axis=2).repeat(2, axis=3)[:, :, : size[0], : size[1]]
    return np.asarray(largest.repeat(layer.out_channels // layer.groups, axis=1))


def allowed(layer: Conv, x: Array, value: Floats) -> Floats:
    """How far a linear map may be from its exact value: the sum's own bound, the threshold's rounding."""
    norms = np.abs(layer.weight.astype(np.float64)).reshape(layer.out_channels, -1).sum(axis=1)
    largest = largest_of_tiles(layer, x, value.shape[2:])
    own = error_bound(layer.weight.shape[1], largest, norms[None, :, None, None])
    return own * (1 + FLOAT32.roundoff) + FLOAT32.roundoff * np.abs(value)


@pytest.mark.parametrize("name", SHAPES)
def test_its_own_bound(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng), random_array(rng, sizes.x, FLOAT32)
    value = layer_reference(layer, x, FLOAT32, FLOAT32).value
    got = run(layer, x)
    assert got.shape == value.shape
    error, most = np.abs(got - value), allowed(layer, x, value)
    assert (error <= most).all(), f"{name}: {np.max(error / most):.3g} of the bound"
    # A kernel that loses operands would be healed, slowly, by the sums of `direct`; these have other bits.
    touched = largest_of_tiles(layer, x, value.shape[2:]) > 0
    assert np.mean((got == run(layer, x, run.simple))[touched]) < 0.5
    # The bound is for the worst case; what is usual is the square root of it, and a wrong tile is far beyond.
    usual = 4e-6 * np.sqrt(sizes.weight[1]) * np.abs(x).max() * np.abs(layer.weight).max()
    assert error.max() <= 8 * usual, f"{name}: {error.max():.3g}, usual is {usual:.3g}"


def test_its_own_bound_beside_large_inputs(run: Runner, rng: np.random.Generator) -> None:
    sizes = SHAPES["several blocks"]
    layer, x = sizes.layer(rng), random_array(rng, sizes.x, FLOAT32)
    x *= np.exp2(rng.integers(-20, 20, size=x.shape)).astype(np.float32)
    value = layer_reference(layer, x, FLOAT32, FLOAT32).value
    assert (np.abs(run(layer, x) - value) <= allowed(layer, x, value)).all()


def test_sums_of_integers_are_exact_where_all_terms_are(run: Runner, rng: np.random.Generator) -> None:
    # Weights that are multiples of 4 have transforms that are integers.
    layer = Conv(4 * small_integers(rng, (20, 16, 3, 3), FLOAT32), padding=1)
    x = small_integers(rng, (2, 16, 7, 6), FLOAT32)
    np.testing.assert_array_equal(run(layer, x), layer_reference(layer, x, FLOAT32, FLOAT32).value)


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_batch_and_bands_change_no_bit(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer = sizes.layer(rng, activation="tanh")
    x = random_array(rng, (3, *sizes.x[1:]), FLOAT32)
    want = run(layer, x)
    assert_same_bits({"map": want}, {"map": run(layer, x, run.small)}, f"{name}, small blocks")
    for rows in (1, 2, 5):
        assert_same_bits({"map": want}, {"map": run(layer, x, rows=rows)}, f"{name}, {rows} rows at a time")
    alone = [run(layer, x[k : k + 1], run.small) for k in range(3)]
    assert_same_bits({"map": want}, {"map": np.concatenate(alone)}, f"{name}, samples alone")
    untold = [run(layer, x[k : k + 1], rows=1, announced=False) for k in range(3)]
    assert_same_bits({"map": want}, {"map": np.concatenate(untold)}, f"{name}, height not announced")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_activation(run: Runner, rng: np.random.Generator, function: str) -> None:
    sizes = SHAPES["odd"]
    weight, bias = random_array(rng, sizes.weight, FLOAT32), random_array(rng, sizes.weight[:1], FLOAT32)
    layer = Conv(weight / 16, bias, activation=function, **sizes.options)
    plain = Conv(weight / 16, bias, **sizes.options)
    x = random_array(rng, sizes.x, FLOAT32)
    before = layer_reference(plain, x, FLOAT32, FLOAT32).value
    expected = layer_reference(layer, x, FLOAT32, FLOAT32)
    steepest = 1.13  # of gelu; the others' are lower
    most = expected.bound + steepest * allowed(plain, x, before)
    assert (np.abs(run(layer, x) - expected.value) <= most).all()


def plant(x: Array, bad: float, places: int) -> None:
    """Puts `bad` at so many places, the corners among them."""
    x.flat[:: max(1, x.size // places)] = bad
    x[0, 0, 0, 0] = x[0, 1, 0, -1] = x[-1, 2, -1, 0] = x[-1, 3, -1, -1] = bad


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_finite_stays_in_its_receptive_fields(
    run: Runner, rng: np.random.Generator, name: str, bad: float
) -> None:
    sizes = SHAPES[name]
    layer = sizes.layer(rng)
    clean = random_array(rng, sizes.x, FLOAT32)
    x = clean.copy()
    plant(x, bad, 3)
    want, got = run(layer, x, run.simple), run(layer, x)
    outside = np.isfinite(want)
    assert not outside.all()
    np.testing.assert_array_equal(got[~outside], want[~outside])
    # What sees none of it is computed from finite inputs, by tile or product by product.
    value = layer_reference(layer, clean, FLOAT32, FLOAT32).value
    assert (np.abs(got - value)[outside] <= allowed(layer, clean, value)[outside]).all()
    assert_same_bits({"map": got}, {"map": run(layer, x, run.small, rows=2)}, f"{name}, cut")


def test_inputs_whose_transform_overflows(run: Runner, rng: np.random.Generator) -> None:
    layer = Conv(random_array(rng, (16, 16, 3, 3), FLOAT32) / 64, padding=1)
    x = random_array(rng, (1, 16, 9, 8), FLOAT32)
    x[0, 3, 4:6, 2:5] = np.finfo(np.float32).max
    want, got = run(layer, x, run.simple), run(layer, x)
    assert np.isfinite(want).all()
    assert np.isfinite(got).all()
    value = layer_reference(layer, x, FLOAT32, FLOAT32).value
    assert (np.abs(got - value) <= allowed(layer, x, value)).all()


def case_of(
    layer: Conv, given: DType = FLOAT32, precision: Precision = Precision.FAST, width: int = 8
) -> Case:
    """The layer, given rows of so many elements a channel."""
    return Case(layer, given, layer.in_channels * width, precision, INFO.architecture)


def test_it_takes_what_it_computes_well(rng: np.random.Generator) -> None:
    weight = random_array(rng, (16, 16, 3, 3), FLOAT32)
    assert Winograd.fits(case_of(Conv(weight)))
    assert Winograd.fits(case_of(Conv(np.concatenate([weight, weight]), groups=2)))
    assert not Winograd.fits(case_of(Conv(weight), precision=Precision.HIGH))
    assert not Winograd.fits(case_of(Conv(weight.astype(np.float64)), FLOAT64))
    assert not Winograd.fits(case_of(Conv(weight.astype(np.float16)), DTYPES[2]))
    assert not Winograd.fits(case_of(Conv(weight, stride=(1, 2))))
    assert not Winograd.fits(case_of(Conv(weight, dilation=2)))
    assert not Winograd.fits(case_of(Conv(weight[:, :, :2])))
    assert not Winograd.fits(case_of(Conv(weight[:15])))
    assert not Winograd.fits(case_of(Conv(weight[:, :15])))
    assert not Winograd.fits(case_of(Conv(weight[:, :, 0])))
    assert not Winograd.fits(case_of(Conv(weight), width=1 << 24))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * LARGEST_WEIGHT])
def test_it_takes_no_filters_whose_transform_is_not_finite(rng: np.random.Generator, bad: float) -> None:
    weight = random_array(rng, (16, 16, 3, 3), FLOAT32)
    weight[3, 5, 1, 2] = bad
    assert not Winograd.fits(case_of(Conv(weight)))


def test_packed_filters(rng: np.random.Generator) -> None:
    weight = random_array(rng, (2 * 35, 17, 3, 3), FLOAT32)
    packed = Winograd(case_of(Conv(weight, groups=2))).pack()
    transformed = packed[: 2 * 2 * 24 * 16 * 32].reshape(2, 2, 24, 4, 4, 32)
    g = FILTER_TRANSFORM @ weight[35 + 33, 16].astype(np.float64) @ FILTER_TRANSFORM.T
    np.testing.assert_array_equal(transformed[1, 1, 16, :, :, 1], g.astype(np.float32))
    assert not transformed[:, :, 17:].any()
    assert not transformed[:, 1, :, :, :, 3:].any()
    np.testing.assert_array_equal(packed[2 * 2 * 24 * 16 * 32 :], weight.ravel())
