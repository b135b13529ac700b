"""fourier on the emulator: the promise on results against the reference, whatever lies in a tile beside it.

Bands flow through a whole session, so that rows are held in part and runs are cut between rows of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType
from convservice.geometry import SampleShape
from convservice.layers import FUNCTIONS, Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import choose
from convservice_backends.cuda.algorithms.base import Case
from convservice_backends.cuda.algorithms.fourier import BATCH_BYTES, FEWEST_TILES, Fourier, error_factors
from convservice_backends.cuda.algorithms.fourier_tiles import MOST_FILTER_BYTES, Tile, cheapest_tile
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.reference import layer_reference
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from convservice_emulator.recording import record_layer
from tests.helpers import FLOATS, assert_same_bits, random_array, small_integers, spec_of
from tests.helpers import run as run_prepared

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Runner:
    """Computes single layers: by transforms, and by `direct`."""

    transforms: CudaBackend
    simple: CudaBackend

    def __call__(self, layer: Conv, x: Array, *, simple: bool = False, **options: Any) -> Array:
        prepared = (self.simple if simple else self.transforms).prepare(Network([layer]), Precision.HIGH)
        if not simple:
            assert set(prepared.plan(spec_of(x)).algorithms.values()) == {"fourier"}
        return next(iter(run_prepared(prepared, x, **options).values()))


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    compiler = Compiler()
    with ExitStack() as stack:

        def backend(algorithm: str) -> CudaBackend:
            device = EmulatedDevice(compiler, INFO)
            return stack.enter_context(closing(CudaBackend([device], {}, algorithm=algorithm)))

        yield Runner(backend("fourier"), backend("direct"))


@dataclass(frozen=True)
class Shape:
    """A layer and its input, by their sizes."""

    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: dict[str, Any]

    def layer(self, rng: np.random.Generator, dtype: DType = FLOAT32, **more: Any) -> Conv:
        bias = random_array(rng, self.weight[:1], dtype)
        return Conv(random_array(rng, self.weight, dtype), bias, **self.options, **more)


REFLECT: dict[str, Any] = {"padding": ((3, 2), (5, 1)), "padding_mode": "reflect"}
REPLICATE: dict[str, Any] = {"padding": ((3, 2), (9, 12)), "padding_mode": "replicate"}

SHAPES = {
    "one tile": Shape((2, 2, 5, 5), (2, 2, 9, 11), {"padding": 2}),
    "several tiles": Shape((1, 1, 31, 27), (1, 1, 37, 41), {"padding": "same"}),
    "filters and channels": Shape((9, 3, 5, 6), (2, 3, 7, 8), {"padding": "same"}),
    "valid": Shape((1, 1, 31, 31), (1, 1, 66, 40), {}),
    "wide padding": Shape((1, 1, 7, 9), (1, 1, 6, 4), {"padding": ((4, 61), (0, 9))}),
    "reflect": Shape((1, 2, 9, 11), (2, 2, 60, 8), REFLECT),
    "replicate": Shape((2, 1, 9, 11), (1, 1, 5, 60), REPLICATE),
    "groups": Shape((10, 2, 5, 5), (2, 4, 6, 5), {"padding": 2, "groups": 2}),
    "depthwise": Shape((3, 1, 11, 11), (1, 3, 12, 9), {"padding": 5, "groups": 3}),
    "one row": Shape((2, 2, 1, 31), (1, 2, 3, 80), {"padding": (0, 15)}),
    "1-D": Shape((3, 2, 31), (2, 2, 700), {"padding": 15}),
    "long filter": Shape((1, 1, 300), (1, 1, 900), {"padding": "same"}),
    "one element": Shape((2, 2, 5, 5), (3, 2, 1, 1), {"padding": 2}),
}


def check(run: Runner, layer: Conv, x: Array, name: str = "", out: DType | None = None) -> Array:
    """Computes a layer and holds it to the promise."""
    given = next(dtype for dtype in DTYPES if dtype.numpy == x.dtype)
    expected = layer_reference(layer, x, given, out or given)
    got = run(layer, x, out_dtype=out)
    wrong = expected.wrong(got)
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} wrong, at first {np.argwhere(wrong)[0]}"
    return got


@pytest.mark.parametrize("name", SHAPES)
def test_the_promise(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng), random_array(rng, sizes.x, FLOAT32)
    got = check(run, layer, x, name)
    # The promise allows far more than these err by: the sum is rounded, then its threshold added.
    value = layer_reference(layer, x, FLOAT32, FLOAT32).value
    assert layer.bias is not None
    most = FLOAT32.roundoff * 1.01 * (2 * np.abs(value).max() + np.abs(layer.bias).max())
    assert np.abs(got - value).max() <= most


@pytest.mark.parametrize("seed", range(10))
def test_any_geometry(run: Runner, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = tuple(int(size) for size in rng.integers(5, 32, size=1 + seed % 2))
    spatial = [int(rng.integers(size, size + 20)) for size in kernel]
    groups = int(rng.integers(1, 3))
    mode = ("zeros", "reflect", "replicate")[seed % 3]
    pads = tuple((int(rng.integers(0, size)), int(rng.integers(0, size))) for size in kernel)
    weight = random_array(rng, (groups, 1 if len(kernel) == 2 else 3, *kernel), FLOAT32)
    layer = Conv(weight, padding=pads, padding_mode=mode, groups=groups)
    x = random_array(rng, (1, layer.in_channels, *spatial), FLOAT32)
    check(run, layer, x, f"{kernel} on {spatial}, {pads}, {mode}")


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype != FLOAT64], ids=str)
@pytest.mark.parametrize("widened", [False, True])
def test_every_type(run: Runner, rng: np.random.Generator, dtype: DType, widened: bool) -> None:
    for name in ("filters and channels", "1-D"):
        sizes = SHAPES[name]
        layer, x = sizes.layer(rng, dtype), random_array(rng, sizes.x, dtype)
        check(run, layer, x, name, FLOAT32 if widened else dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_activation(run: Runner, rng: np.random.Generator, function: str) -> None:
    sizes = SHAPES["one tile"]
    layer = sizes.layer(rng, activation=function)
    check(run, layer, random_array(rng, sizes.x, FLOAT32) / 8)


@pytest.mark.parametrize("name", SHAPES)
def test_sums_of_integers_are_exact(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    weight = small_integers(rng, sizes.weight, FLOAT32)
    x = rng.integers(0, 256, size=sizes.x).astype(np.float32)
    layer = Conv(weight, small_integers(rng, sizes.weight[:1], FLOAT32), **sizes.options)
    expected = layer_reference(layer, x, FLOAT32, FLOAT32)
    np.testing.assert_array_equal(run(layer, x), expected.value)


def test_sums_of_large_integers_are_rounded_once(run: Runner, rng: np.random.Generator) -> None:
    # 2**24 times a value and a second one: where they are 1 and odd, halfway between two float32 numbers.
    weight = np.zeros((1, 1, 5, 5), np.float32)
    weight[0, 0, 1, 2], weight[0, 0, 3, 3] = 1 << 24, 1
    x = rng.choice(np.arange(1, 10, 2), size=(1, 1, 40, 40), p=(0.6, 0.1, 0.1, 0.1, 0.1)).astype(np.float32)
    exact = layer_reference(Conv(weight), x, FLOAT32, FLOAT32).value
    rounded = exact.astype(np.float32)
    assert (np.abs(exact - rounded) == 1).sum() > 500
    np.testing.assert_array_equal(run(Conv(weight), x), rounded)


def test_small_integers_beside_large_ones(run: Runner, rng: np.random.Generator) -> None:
    # The transform's error is larger than 1/2, so that the nearest integer says nothing.
    x = small_integers(rng, (1, 1, 30, 34), FLOAT32)
    x[0, 0, :3, :4] = 1 << 80
    layer = Conv(small_integers(rng, (2, 1, 9, 9), FLOAT32))
    got = check(run, layer, x)
    exact = layer_reference(layer, x, FLOAT32, FLOAT32).value
    far = np.s_[:, :, 3:, 4:]
    np.testing.assert_array_equal(got[far], exact[far])


@pytest.mark.parametrize(
    ("large", "small"), [(1e30, 1e-30), (1.0, 1e-30), (1e3, 0.0), (1.0, 1e-44), (1e-38, 1e-44)]
)
def test_what_is_small_beside_what_is_large(
    run: Runner, rng: np.random.Generator, large: float, small: float
) -> None:
    x = (rng.normal(size=(1, 1, 30, 34)) * small).astype(np.float32)
    x[0, 0, :3, :4] = large * rng.uniform(0.5, 1, size=(3, 4))
    weight = random_array(rng, (2, 1, 9, 9), FLOAT32)
    got = check(run, Conv(weight, padding=4), x)
    if not small:
        assert not got[0, :, 8:, 9:].any(), "what sees zeros alone is 0"


@pytest.mark.parametrize("kernel", [(9, 7), (31,)])
def test_single_inputs_among_zeros(run: Runner, rng: np.random.Generator, kernel: tuple[int, ...]) -> None:
    x = np.zeros((1, 2, *(3 * size + 8 for size in kernel)), np.float32)
    x[0, 0].flat[0] = 1e20
    for channel in range(2):
        x[(0, channel, *(size * (2 + channel) for size in kernel))] = 1e-20
    layer = Conv(np.abs(random_array(rng, (3, 2, *kernel), FLOAT32)) + 1)
    got = check(run, layer, x)
    seen = layer_reference(layer, x, FLOAT32, FLOAT32).value != 0
    assert 0 < seen.sum() < seen.size
    np.testing.assert_array_equal(got != 0, seen)


def test_all_scales_at_once(run: Runner, rng: np.random.Generator) -> None:
    x = random_array(rng, (1, 2, 24, 25), FLOAT32)
    x *= np.exp2(rng.integers(-90, 90, size=x.shape)).astype(np.float32)
    weight = random_array(rng, (2, 2, 7, 7), FLOAT32)
    weight *= np.exp2(rng.integers(-20, 20, size=weight.shape)).astype(np.float32)
    check(run, Conv(weight, padding=3), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_finite_stays_in_its_receptive_fields(
    run: Runner, rng: np.random.Generator, name: str, bad: float
) -> None:
    sizes = SHAPES[name]
    layer = sizes.layer(rng)
    clean = random_array(rng, sizes.x, FLOAT32)
    x = clean.copy()
    x.reshape(*x.shape[:2], -1)[0, -1, 0] = bad
    want, got = run(layer, x, simple=True), run(layer, x)
    outside = np.isfinite(want)
    assert not outside.all()
    np.testing.assert_array_equal(got[~outside], want[~outside])
    wrong = layer_reference(layer, clean, FLOAT32, FLOAT32).wrong(got)
    assert not wrong[outside].any()
    if len(x) > 1:
        assert_same_bits({"map": run(layer, clean)[1:]}, {"map": got[1:]}, "other samples")
    assert_same_bits({"map": got}, {"map": run(layer, x, rows=2)}, f"{name}, cut")


def test_weights_of_zero_times_what_is_not_finite(run: Runner, rng: np.random.Generator) -> None:
    weight = np.zeros((1, 1, 5, 5), np.float32)
    weight[0, 0, 2, 2] = 1
    x = random_array(rng, (1, 1, 12, 12), FLOAT32)
    x[0, 0, 6, 6] = np.inf
    got = run(Conv(weight, padding=2), x)
    assert np.isnan(got).sum() == 24
    assert got[0, 0, 6, 6] == np.inf


def test_sums_beyond_the_largest_number(run: Runner) -> None:
    x = np.full((1, 1, 12, 12), np.finfo(np.float32).max, np.float32)
    got = run(Conv(np.ones((1, 1, 5, 5), np.float32)), x)
    assert np.isposinf(got).all()


@pytest.mark.parametrize("name", SHAPES)
def test_batch_and_bands_change_no_bit(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer = sizes.layer(rng, activation="tanh")
    x = random_array(rng, (3, *sizes.x[1:]), FLOAT32)
    x[1, 0, 0] *= np.float32(1e25)  # some are computed product by product
    want = run(layer, x)
    for rows in (1, 7, 50):
        assert_same_bits({"map": want}, {"map": run(layer, x, rows=rows)}, f"{name}, {rows} rows at a time")
    alone = [run(layer, x[k : k + 1]) for k in range(3)]
    assert_same_bits({"map": want}, {"map": np.concatenate(alone)}, f"{name}, samples alone")
    untold = [run(layer, x[k : k + 1], rows=3, announced=False) for k in range(3)]
    assert_same_bits({"map": want}, {"map": np.concatenate(untold)}, f"{name}, height not announced")


def case_of(
    layer: Conv,
    given: DType = FLOAT32,
    width: int = 500,
    architecture: int = INFO.architecture,
    precision: Precision = Precision.HIGH,
) -> Case:
    """The layer, given rows of so many elements a channel."""
    row = layer.in_channels * width
    return Case(layer, given, row, precision, architecture, row_positions=width)


def zeros(*shape: int, **options: Any) -> Conv:
    return Conv(np.zeros(shape, np.float32), **options)


def test_it_takes_what_it_can_compute() -> None:
    assert Fourier.fits(case_of(zeros(4, 3, 9, 9)))
    assert Fourier.fits(case_of(zeros(4, 3, 129, 129)))
    assert Fourier.fits(case_of(zeros(4, 3, 4000)))
    assert not Fourier.fits(case_of(zeros(4, 3, 130, 9)))
    assert not Fourier.fits(case_of(zeros(4, 3, 9, 9, 9)))
    assert not Fourier.fits(case_of(zeros(4, 3, 9, 9, stride=(2, 1))))
    assert not Fourier.fits(case_of(zeros(4, 3, 9, 9, dilation=2)))
    assert not Fourier.fits(case_of(zeros(4, 3, 9, 9), FLOAT64))
    assert not Fourier.fits(case_of(zeros(1, 1, 31, 31), width=24_000_000)), (
        "2^31 positions in a row of tiles"
    )
    assert not Fourier.fits(case_of(zeros(100, 100, 9, 9))), "too much memory for the transformed filters"
    for bad in (np.nan, np.inf):
        assert not Fourier.fits(case_of(Conv(np.full((1, 1, 9, 9), bad, np.float32))))


@pytest.mark.parametrize("kernel", [(5, 5), (33, 40), (100, 1)])
def test_the_memory_of_transformed_filters_is_bounded(kernel: tuple[int, int]) -> None:
    for pairs in (1, 30, 200, 1000):
        tile = cheapest_tile(case_of(zeros(pairs, 1, *kernel)))
        assert 16 * pairs * tile.frequencies <= MOST_FILTER_BYTES
        down, across = tile.outputs(kernel)
        assert 2 * down >= tile.rows
        assert 2 * across >= tile.columns


def test_it_is_chosen_for_large_filters_alone_and_where_float64_is_fast() -> None:
    def chosen(layer: Conv, given: DType = FLOAT32, **more: Any) -> str:
        return choose(case_of(layer, given, **more)).name

    assert chosen(zeros(64, 64, 31, 31)) == "fourier"
    assert chosen(zeros(64, 64, 31, 31), architecture=80) == "fourier"
    assert chosen(zeros(64, 64, 31, 31), architecture=89) != "fourier"
    assert chosen(zeros(64, 64, 31, 31), width=10) != "fourier", "most of a tile would lie beside the map"
    assert chosen(zeros(64, 64, 3, 3)) != "fourier"
    assert chosen(zeros(64, 64, 5, 5)) != "fourier"
    assert chosen(zeros(64, 64, 1, 5)) != "fourier"
    assert chosen(zeros(64, 64, 15, 15)) == "fourier"
    assert chosen(zeros(64, 64, 15, 15), precision=Precision.FAST) == "tensor_core", "TF32 is faster"
    assert chosen(zeros(1, 1, 9, 9)) == "depthwise", "few products of one channel"
    assert chosen(zeros(1, 1, 31, 31), width=2000) == "fourier"
    half = next(dtype for dtype in FLOATS if dtype.name == "float16")
    assert chosen(Conv(np.zeros((64, 64, 9, 9), half.numpy)), half) != "fourier"
    assert choose(case_of(zeros(4, 4, 5, 5)), "fourier").name == "fourier"


def test_few_launches_transform_a_map_of_one_channel() -> None:
    algorithm = Fourier(case_of(zeros(1, 1, 31, 31), width=2000))
    sample = SampleShape(1, 2000, (2000,))
    assert algorithm.batch(sample) >= 16
    assert algorithm.batch(sample) == algorithm.batch(SampleShape(1, None, (2000,)))
    assert algorithm.scratch_bytes(sample, 1, 1) <= BATCH_BYTES
    small = Fourier(case_of(zeros(1, 1, 31, 31), width=100))
    assert small.batch(SampleShape(1, 100, (100,))) == FEWEST_TILES


def test_the_error_factors_bound_what_transforms_err_by(rng: np.random.Generator) -> None:
    tile, channels, kernel = Tile(64, 128), 3, 15
    filters = rng.normal(size=(2, channels, kernel, kernel)) * np.exp2(rng.integers(-9, 9, size=kernel))
    x = rng.normal(size=(channels, tile.rows, tile.columns)).astype(np.float32).astype(np.float64)
    factors = error_factors(filters.reshape(2, channels, -1), tile.elements)
    sums = np.einsum(
        "chw,fchw->fhw",
        np.fft.rfft2(x),
        np.fft.rfft2(filters, s=(tile.rows, tile.columns)).conj(),
    )
    transformed = np.fft.irfft2(sums)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.longdouble), (kernel, kernel), axis=(1, 2))
    for f in range(2):
        exact = np.einsum("cijhw,chw->ij", windows, filters[f].astype(np.longdouble))
        error = np.abs(transformed[f, : exact.shape[0], : exact.shape[1]] - exact).max()
        most = factors[f] * np.linalg.norm(x)
        assert 0 < error <= most
        assert most <= 1e6 * error, "a bound so far off would have everything computed twice"


def test_packed_filters(rng: np.random.Generator) -> None:
    weight = random_array(rng, (4, 2, 5, 7), FLOAT32)
    weight[2] = np.rint(weight[2] * 9)
    algorithm = Fourier(case_of(Conv(weight, groups=2)), Tile(64, 128))
    packed = algorithm.pack()
    spectra = packed[: 2 * 8 * 64 * 65].view(np.complex128).reshape(4, 2, 64, 65)
    frequency = np.exp(-2j * np.pi * (3 * np.arange(5)[:, None] / 64 + 11 * np.arange(7) / 128))
    np.testing.assert_allclose(spectra[3, 1, 3, 11], (weight[3, 1] * frequency).sum(), rtol=1e-12)
    rest = packed[2 * 8 * 64 * 65 :]
    np.testing.assert_array_equal(rest[4:8], [0, 0, 1, 0])
    np.testing.assert_array_equal(rest[8:], weight.ravel())


@pytest.mark.parametrize("name", ["filters and channels", "several tiles", "1-D"])
def test_the_working_memory_is_what_it_says(rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng), random_array(rng, sizes.x, FLOAT32)
    launches = record_layer(Compiler(), layer, x, algorithm="fourier")  # memory of exactly that size, watched
    case = Case(layer, FLOAT32, math.prod(x.shape[3:]) * x.shape[1], Precision.HIGH, INFO.architecture)
    algorithm = Fourier(case)
    sample = layer.output_sample(SampleShape(x.shape[1], x.shape[2], x.shape[3:]))
    wanted = algorithm.scratch_bytes(sample, 1, 1)
    assert any(buffer.before.nbytes == wanted for launch in launches for buffer in launch.buffers)
    assert wanted == algorithm.scratch_bytes(replace(sample, rows=None), 10_000, 8), "for any run"
    assert (launches[-1].buffers[-1].after == launches[-1].buffers[-1].before).any()


def test_batches_are_bounded() -> None:
    algorithm = Fourier(case_of(zeros(1, 30, 9, 9), width=100_000))
    sample = SampleShape(1, 100, (100_000,))
    assert 0.9 * BATCH_BYTES < algorithm.scratch_bytes(sample, 100, 1) < 1.1 * BATCH_BYTES
