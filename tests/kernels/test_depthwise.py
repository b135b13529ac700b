"""depthwise on the emulator: every form against the reference, and bit for bit against the simplest kernel.

Bands flow through a whole session, so that rows are held in part and runs begin anywhere. What the suite of
backends tests of any algorithm is not repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.layers import FUNCTIONS, Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms import depthwise
from convservice_backends.cuda.algorithms.base import Case
from convservice_backends.cuda.algorithms.depthwise import Depthwise, form_of
from convservice_backends.cuda.backend import CudaBackend
from convservice_backends.reference import layer_reference
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from tests.helpers import assert_expected, assert_same_bits, compute, random_array, small_integers

Array = NDArray[Any]

FLOAT16, BFLOAT16 = DTYPES[2], DTYPES[3]
PAIRS = [
    (FLOAT32, FLOAT32),
    (FLOAT64, FLOAT64),
    (FLOAT16, FLOAT16),
    (FLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (BFLOAT16, FLOAT32),
]


@dataclass(frozen=True)
class Runner:
    """Computes single layers by one algorithm, and by `direct`."""

    tested: CudaBackend
    simple: CudaBackend

    def __call__(self, layer: Conv, x: Array, **options: Any) -> Array:
        return next(iter(compute(self.tested, Network([layer]), x, **options).values()))

    def direct(self, layer: Conv, x: Array, **options: Any) -> Array:
        return next(iter(compute(self.simple, Network([layer]), x, **options).values()))


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    compiler = Compiler()
    with (
        closing(CudaBackend([EmulatedDevice(compiler)], {}, algorithm="depthwise")) as tested,
        closing(CudaBackend([EmulatedDevice(compiler)], {}, algorithm="direct")) as simple,
    ):
        yield Runner(tested, simple)


def case_of(layer: Conv, given: DType = FLOAT32, width: int = 16) -> Case:
    """The layer, given rows of so many elements a channel."""
    return Case(layer, given, layer.in_channels * width, Precision.HIGH, INFO.architecture)


@dataclass(frozen=True)
class Shape:
    """A layer and its input, by their sizes, and the form that is to compute it."""

    form: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: dict[str, Any]

    def layer(self, rng: np.random.Generator, dtype: DType, **more: Any) -> Conv:
        bias = random_array(rng, self.weight[:1], dtype)
        return Conv(random_array(rng, self.weight, dtype), bias, **self.options, **more)


def shape(form: str, weight: tuple[int, ...], x: tuple[int, ...], **options: Any) -> Shape:
    groups = x[1] // weight[1]
    return Shape(form, weight, x, options | {"groups": groups})


SHAPES = {
    "3x3 aligned": shape("3x3_stride1", (3, 1, 3, 3), (2, 3, 11, 24), padding=1),
    "3x3 odd width": shape("3x3_stride1", (3, 1, 3, 3), (2, 3, 9, 21), padding=1),
    "3x3 valid": shape("3x3_stride1", (3, 1, 3, 3), (2, 3, 9, 16)),
    "3x3 reflect": shape("3x3_stride1", (3, 1, 3, 3), (1, 3, 9, 16), padding=1, padding_mode="reflect"),
    "3x3 replicate": shape("3x3_stride1", (3, 1, 3, 3), (1, 3, 6, 8), padding=1, padding_mode="replicate"),
    "3x3 wide padding": shape("3x3_stride1", (3, 1, 3, 3), (1, 3, 6, 8), padding=((5, 3), (1, 9))),
    "3x3 wide replicate": shape(
        "3x3_stride1", (3, 1, 3, 3), (1, 3, 6, 8), padding=((5, 3), (1, 9)), padding_mode="replicate"
    ),
    "3x3 one pixel": shape("3x3_stride1", (3, 1, 3, 3), (2, 3, 1, 1), padding=1),
    "3x3 large map": shape("3x3_stride1", (2, 1, 3, 3), (1, 2, 50, 52), padding=1),
    "3x3 multiplier": shape("3x3_stride1", (6, 1, 3, 3), (2, 3, 7, 8), padding=1),
    "3x3 groups of 2": shape("3x3_stride1", (6, 2, 3, 3), (2, 6, 7, 8), padding=1),
    "3x3 stride 2": shape("3x3_stride2", (3, 1, 3, 3), (2, 3, 13, 24), padding=1, stride=2),
    "3x3 stride 2 same": shape("3x3_stride2", (3, 1, 3, 3), (2, 3, 12, 16), padding="same", stride=2),
    "3x3 stride 2 reflect": shape(
        "3x3_stride2", (3, 1, 3, 3), (2, 3, 9, 16), padding=1, padding_mode="reflect", stride=2
    ),
    "four filters": shape("3x3_stride1_filters4", (8, 4, 3, 3), (2, 8, 7, 16), padding=1),
    "four filters of 12": shape("3x3_stride1_filters4", (24, 3, 3, 3), (1, 6, 7, 9), padding=1),
    "four filters stride 2": shape("3x3_stride2_filters4", (8, 2, 3, 3), (2, 4, 9, 16), padding=1, stride=2),
    "5x5": shape("5x5_stride1", (2, 1, 5, 5), (2, 2, 9, 16), padding=2),
    "5x5 odd width": shape("5x5_stride1", (2, 1, 5, 5), (1, 2, 9, 15), padding=(1, 3)),
    "5x5 replicate": shape("5x5_stride1", (2, 1, 5, 5), (1, 2, 9, 16), padding=2, padding_mode="replicate"),
    "5x5 stride 2": shape("5x5_stride2", (2, 1, 5, 5), (2, 2, 12, 24), padding=2, stride=2),
    "7x7": shape("7x7_stride1", (2, 1, 7, 7), (2, 2, 9, 16), padding=3),
    "7x7 reflect": shape("7x7_stride1", (2, 1, 7, 7), (1, 2, 9, 13), padding=3, padding_mode="reflect"),
    "1-D": shape("general", (4, 2, 5), (2, 4, 19), padding=2),
    "1-D reflect": shape("general", (2, 1, 4), (2, 2, 9), padding=3, padding_mode="reflect"),
    "1-D stride": shape("general", (2, 1, 4), (2, 2, 23), padding=3, stride=3),
    "1x1": shape("general", (3, 1, 1, 1), (2, 3, 5, 7)),
    "2x4 dilated": shape("general", (4, 1, 2, 4), (1, 2, 9, 15), padding=3, stride=2, dilation=(1, 3)),
    "stride is dilation": shape("general", (2, 1, 3, 3), (1, 2, 9, 15), padding=2, stride=2, dilation=2),
    "9x3 replicate": shape("general", (2, 1, 9, 3), (1, 2, 6, 9), padding=4, padding_mode="replicate"),
    "3-D": shape("general", (2, 1, 2, 3, 3), (2, 2, 5, 4, 7), padding=1, stride=(1, 2, 1)),
    "3-D reflect": shape("general", (2, 1, 3, 2, 3), (1, 2, 4, 3, 5), padding=2, padding_mode="reflect"),
    "padding only": shape("general", (2, 1, 2, 2), (1, 2, 2, 2), padding=4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_form_meets_the_bound_with_the_bits_of_direct(
    run: Runner, rng: np.random.Generator, name: str
) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    assert Depthwise.fits(case_of(layer))
    assert form_of(case_of(layer)).label == sizes.form
    got = run(layer, x)
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), got)
    assert_same_bits({"map": run.direct(layer, x)}, {"map": got}, name)


@pytest.mark.parametrize(("given", "out"), PAIRS, ids=str)
@pytest.mark.parametrize(
    "name",
    ["3x3 aligned", "3x3 stride 2", "four filters", "four filters stride 2", "5x5", "7x7", "2x4 dilated"],
)
def test_every_type_has_the_bits_of_direct(
    run: Runner, rng: np.random.Generator, name: str, given: DType, out: DType
) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, given, activation="relu"), random_array(rng, sizes.x, given)
    got = run(layer, x, out_dtype=out)
    assert dtype_of(got.dtype) == out
    assert_expected(name, layer_reference(layer, x, given, out), got)
    assert_same_bits({"map": run.direct(layer, x, out_dtype=out)}, {"map": got}, name)


@pytest.mark.parametrize("name", SHAPES)
def test_integers_are_exact(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    bias = small_integers(rng, sizes.weight[:1], FLOAT32)
    layer = Conv(small_integers(rng, sizes.weight, FLOAT32), bias, **sizes.options)
    x = small_integers(rng, sizes.x, FLOAT32)
    expected = layer_reference(layer, x, FLOAT32, FLOAT32)
    assert expected.exact
    assert_expected(name, expected, run(layer, x))


@pytest.mark.parametrize("name", SHAPES)
def test_batch_and_bands_change_no_bit(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer = sizes.layer(rng, FLOAT32, activation="tanh")
    x = random_array(rng, (3, *sizes.x[1:]), FLOAT32)
    want = run(layer, x)
    for rows in (1, 2, 5):
        assert_same_bits({"map": want}, {"map": run(layer, x, rows=rows)}, f"{name}, {rows} rows at a time")
    alone = np.concatenate([run(layer, x[k : k + 1]) for k in range(3)])
    assert_same_bits({"map": want}, {"map": alone}, f"{name}, samples alone")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["3x3 aligned", "four filters", "1-D"])
def test_every_activation(run: Runner, rng: np.random.Generator, name: str, function: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32, activation=function), random_array(rng, sizes.x, FLOAT32)
    got = run(layer, x)
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), got)
    assert_same_bits({"map": run.direct(layer, x)}, {"map": got}, f"{name}, {function}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_finite_stays_in_its_receptive_fields(
    run: Runner, rng: np.random.Generator, name: str, bad: float
) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    x.flat[:: max(1, x.size // 3)] = bad
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), run(layer, x))


@pytest.mark.parametrize("name", SHAPES)
def test_weights_that_are_not_finite_stay_in_their_filters(
    run: Runner, rng: np.random.Generator, name: str
) -> None:
    sizes = SHAPES[name]
    weight = random_array(rng, sizes.weight, FLOAT32)
    weight[0].flat[0], weight[-1].flat[-1] = np.inf, np.nan
    layer, x = Conv(weight, **sizes.options), random_array(rng, sizes.x, FLOAT32)
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), run(layer, x))


@pytest.mark.parametrize("name", ["3x3 aligned", "four filters", "3x3 large map", "3-D"])
def test_more_planes_than_a_grid_has_blocks(
    run: Runner, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, (40, *sizes.x[1:]), FLOAT32)
    want = run(layer, x)
    monkeypatch.setattr(depthwise, "MOST_ALONG_Y", 1)
    assert_same_bits({"map": want}, {"map": run(layer, x)}, name)


@pytest.mark.parametrize(
    ("fits", "weight", "groups", "given"),
    [
        (True, (512, 1, 3, 3), 512, FLOAT32),
        (True, (64, 1, 31, 31), 64, FLOAT32),
        (True, (128, 4, 3, 3), 32, FLOAT32),
        (True, (512, 16, 3, 3), 32, FLOAT32),
        (False, (1024, 32, 3, 3), 32, FLOAT32),
        (True, (64, 3, 3, 3), 1, FLOAT32),
        (False, (64, 3, 7, 7), 1, FLOAT32),
        (False, (64, 3, 3, 3), 1, FLOAT16),
        (True, (128, 4, 3, 3), 32, FLOAT16),
        (False, (512, 16, 3, 3), 32, FLOAT16),
        (False, (64, 64, 1, 1), 1, FLOAT32),
        (False, (2, 512, 1, 1), 1, FLOAT32),
    ],
)
def test_it_takes_groups_of_few_channels(
    fits: bool, weight: tuple[int, ...], groups: int, given: DType
) -> None:
    layer = Conv(np.ones(weight, given.numpy), groups=groups)
    assert Depthwise.fits(case_of(layer, given)) is fits


def test_it_leaves_rows_beyond_32_bits_to_others() -> None:
    layer = Conv(np.ones((2, 1, 3, 3), np.float32), groups=2)
    assert Depthwise.fits(case_of(layer, width=1 << 26))
    assert not Depthwise.fits(case_of(layer, width=1 << 28))
    far = Conv(np.ones((2, 1, 3, 3), np.float32), groups=2, stride=(1, 1 << 28))
    assert not Depthwise.fits(case_of(far))
