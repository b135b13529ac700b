"""implicit_gemm on the emulator: every gather and tile against the reference and against the simplest kernel.

What the suite of backends tests of any algorithm is not repeated here; this is about what only this one has:
forms that must give the same bits, splits, packed filters, grids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import FUNCTIONS, Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms.base import Case, Problem
from convservice_backends.cuda.algorithms.direct import Direct
from convservice_backends.cuda.algorithms.gemm_tiles import (
    LARGE,
    MEDIUM,
    SMALL,
    WIDE,
    Gather,
    Product,
    Tile,
    choose_tile,
    gathers_of,
    tiles_of,
)
from convservice_backends.cuda.algorithms.implicit_gemm import ImplicitGemm
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.convolution import ConvOperator
from convservice_backends.cuda.device import Launch, Memory
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Rows, Run
from convservice_backends.reference import layer_reference
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from convservice_emulator.streams import Policy
from tests.helpers import assert_expected, assert_same_bits, nothing_wrong, random_array, small_integers

Array = NDArray[Any]

FLOAT16, BFLOAT16 = DTYPES[2], DTYPES[3]
EVERY_TILE = (LARGE, MEDIUM, WIDE, SMALL)


class Recording(ImplicitGemm):
    """implicit_gemm, with a tile where there is a kernel with it, and its launches for a test to look at."""

    def __init__(self, case: Case, tile: Tile | None = None, ran: list[Launch] | None = None) -> None:
        super().__init__(case, tile)
        self._ran: list[Launch] = [] if ran is None else ran

    def launches(self, problem: Problem) -> Iterator[Launch]:
        """Keeps them."""
        for launch in super().launches(problem):
            self._ran.append(launch)
            yield launch


class Runner:
    """Computes single layers on an emulated device, rows cut at will."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.stream = device.stream()

    def upload(self, array: Array) -> Memory:
        """The array's bytes in device memory."""
        data = np.ascontiguousarray(array)
        memory = self.stream.allocate(max(1, data.nbytes))
        self.stream.upload(data.reshape(-1).view(np.uint8), memory)
        return memory

    def __call__(
        self,
        layer: Conv,
        x: Array,
        tile: Tile | None = None,
        *,
        direct: bool = False,
        cut: int | None = None,
        out_dtype: DType | None = None,
        announced: bool = True,
        launches: list[Launch] | None = None,
    ) -> Array:
        """The layer's feature map of x, computed `cut` output rows at a time."""
        given = dtype_of(x.dtype)
        sample = SampleShape(x.shape[1], x.shape[2], tuple(x.shape[3:]))
        whole = layer.output_sample(sample)
        operator = ConvOperator(layer, given, sample, precision=Precision.HIGH, info=INFO)
        case = Case(layer, given, sample.row_elements, Precision.HIGH, INFO.architecture)
        operator.algorithm = Direct(case) if direct else Recording(case, tile, launches)
        told = whole if announced else whole.with_rows(None)
        plan = operator.block_plan(sample, told)
        weights = tuple(self.upload(part) for part in operator.weights())
        rows = DeviceArray.packed(self.upload(x), x.shape, given)
        shape = (x.shape[0], whole.channels, whole.height, *whole.rest)
        out = DeviceArray.packed(
            self.stream.allocate(math.prod(shape) * (out_dtype or given).itemsize), shape, out_dtype or given
        )
        step = cut or whole.height
        scratch_bytes = operator.scratch_bytes(told, step, x.shape[0])
        scratch = self.stream.allocate(scratch_bytes) if scratch_bytes else None
        workspace = DeviceWorkspace(self.stream, scratch, INFO, nothing_wrong)
        for first in range(0, whole.height, step):
            last = min(first + step, whole.height)
            run = Run((Rows(rows, 0),), x.shape[2], first, last, plan)
            operator.compute(run, out[:, :, first:last], workspace, weights)
        host = np.empty(shape, out.dtype.numpy)
        self.stream.download(out.memory, host.reshape(-1).view(np.uint8))
        self.stream.synchronize()
        return host


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    device = EmulatedDevice(Compiler(), INFO, Policy.EAGER, None)
    yield Runner(device)
    device.close()


def forms(launches: list[Launch]) -> set[str]:
    """The kernels that ran."""
    return {launch.kernel.name for launch in launches}


@dataclass(frozen=True)
class Shape:
    """A layer and its input, by their sizes."""

    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def layer(self, rng: np.random.Generator, dtype: DType, **more: Any) -> Conv:
        bias = random_array(rng, self.weight[:1], dtype)
        return Conv(random_array(rng, self.weight, dtype), bias, **dict(self.options), **more)


def shape(weight: tuple[int, ...], x: tuple[int, ...], **options: Any) -> Shape:
    return Shape(weight, x, tuple(options.items()))


SHAPES = {
    "1x1 aligned": (Gather.VECTORS, shape((70, 16, 1, 1), (3, 16, 4, 7))),
    "1x1 aligned, groups": (Gather.VECTORS, shape((12, 8, 1), (2, 24, 8), groups=3)),
    "1x1 3-D": (Gather.VECTORS, shape((5, 8, 1, 1, 1), (2, 8, 2, 3, 2))),
    "1x1 odd map": (Gather.TAPS, shape((70, 16, 1, 1), (3, 16, 3, 7))),
    "1x1 stride": (Gather.TAPS, shape((9, 8, 1, 1), (2, 8, 5, 9), stride=2)),
    "1x1 padded": (Gather.TAPS, shape((9, 8, 1, 1), (2, 8, 4, 4), padding=(1, 2))),
    "3x3": (Gather.TAPS, shape((40, 16, 3, 3), (2, 16, 6, 9), padding=1)),
    "3x3 dilated, strided, groups": (
        Gather.TAPS,
        shape(
            (6, 8, 3, 3), (2, 16, 11, 9), stride=(2, 1), dilation=(1, 2), groups=2, padding=((0, 2), (3, 1))
        ),
    ),
    "3x3x3": (Gather.TAPS, shape((4, 8, 3, 3, 3), (1, 8, 4, 5, 3), padding="same")),
    "1-D of 64": (Gather.TAPS, shape((3, 8, 64), (2, 8, 40), padding=40)),
    "padding only": (Gather.TAPS, shape((2, 8, 2, 2), (1, 8, 2, 2), padding=3)),
    "first layer": (Gather.SHORT, shape((64, 3, 7, 7), (1, 3, 14, 12), stride=2, padding=3)),
    "one channel": (Gather.SHORT, shape((2, 1, 3, 3), (3, 1, 5, 6), padding=1)),
    "groups of 5": (Gather.SHORT, shape((9, 5, 3), (2, 15, 30), groups=3, padding=2, dilation=2)),
    "short 3-D": (Gather.SHORT, shape((33, 3, 2, 3, 2), (1, 3, 4, 5, 6), stride=(1, 2, 1), padding=1)),
    "large kernel": (Gather.TABLE, shape((3, 2, 9, 8), (1, 2, 12, 11), padding=2)),
    "many terms": (Gather.TABLE, shape((3, 60, 3, 3), (1, 60, 5, 5), padding=1)),
    "reflect": (Gather.TABLE, shape((3, 8, 3, 3), (2, 8, 5, 4), padding=2, padding_mode="reflect")),
    "replicate": (Gather.TABLE, shape((3, 3, 4, 3), (2, 3, 5, 4), padding=3, padding_mode="replicate")),
    "replicate 3-D": (
        Gather.TABLE,
        shape((3, 2, 2, 3, 2), (1, 2, 3, 4, 3), padding=2, padding_mode="replicate", stride=2),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tile", EVERY_TILE, ids=lambda tile: tile.label)
def test_every_gather_and_tile_meets_the_bound(
    run: Runner, rng: np.random.Generator, name: str, tile: Tile
) -> None:
    gather, sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    launches: list[Launch] = []
    got = run(layer, x, tile, launches=launches)
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), got)
    assert all(gather.name.lower() in form for form in forms(launches)), forms(launches)


@pytest.mark.parametrize("name", SHAPES)
def test_all_tiles_give_the_same_bits(run: Runner, rng: np.random.Generator, name: str) -> None:
    _, sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    want = run(layer, x)
    ran: set[str] = set()
    for tile in EVERY_TILE:
        launches: list[Launch] = []
        got = run(layer, x, tile, launches=launches)
        assert_same_bits({"map": want}, {"map": got}, f"{name}, tile {tile.label}")
        ran |= forms(launches)
    assert len(ran) > 1


@pytest.mark.parametrize("name", ["1x1 aligned", "3x3", "first layer", "reflect", "1-D of 64", "groups of 5"])
def test_batch_and_cut_change_no_bit(run: Runner, rng: np.random.Generator, name: str) -> None:
    _, sizes = SHAPES[name]
    layer = sizes.layer(rng, FLOAT32, activation="tanh")
    x = random_array(rng, (3, *sizes.x[1:]), FLOAT32)
    want = run(layer, x)
    for cut in (1, 2, 3):
        assert_same_bits({"map": want}, {"map": run(layer, x, cut=cut)}, f"{name}, {cut} rows at a time")
    alone = np.concatenate([run(layer, x[k : k + 1]) for k in range(3)])
    assert_same_bits({"map": want}, {"map": alone}, f"{name}, samples alone")


def test_vectors_and_taps_give_the_same_bits(run: Runner, rng: np.random.Generator) -> None:
    layer = Conv(random_array(rng, (20, 16, 1, 1), FLOAT32))
    x = random_array(rng, (2, 16, 8, 2), FLOAT32)
    wide: list[Launch] = []
    want = run(layer, x, launches=wide)
    narrow: list[Launch] = []
    got = run(layer, x, cut=3, launches=narrow)
    assert any("vectors" in form for form in forms(wide))
    assert any("taps" in form for form in forms(narrow))
    assert_same_bits({"map": want}, {"map": got}, "rows that are not whole vectors")


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(FLOAT64, FLOAT64), (FLOAT16, FLOAT16), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32)],
    ids=lambda dtype: dtype.name,
)
@pytest.mark.parametrize("name", ["1x1 aligned", "3x3 dilated, strided, groups", "first layer", "replicate"])
def test_other_types_meet_the_bound(
    run: Runner, rng: np.random.Generator, name: str, dtype: DType, out: DType
) -> None:
    _, sizes = SHAPES[name]
    layer, x = sizes.layer(rng, dtype, activation="relu"), random_array(rng, sizes.x, dtype)
    got = run(layer, x, out_dtype=out)
    assert_expected(name, layer_reference(layer, x, dtype, out), got)


@pytest.mark.parametrize("name", SHAPES)
def test_integers_are_exact_and_as_direct_has_them(run: Runner, rng: np.random.Generator, name: str) -> None:
    _, sizes = SHAPES[name]
    weight = small_integers(rng, sizes.weight, FLOAT32)
    layer = Conv(weight, small_integers(rng, sizes.weight[:1], FLOAT32), **dict(sizes.options))
    x = small_integers(rng, sizes.x, FLOAT32)
    expected = layer_reference(layer, x, FLOAT32, FLOAT32)
    assert expected.exact
    got = run(layer, x)
    assert_expected(name, expected, got)
    np.testing.assert_array_equal(got, run(layer, x, direct=True))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("width", [8, 7], ids=["vectors stored", "single stored"])
def test_every_activation(run: Runner, rng: np.random.Generator, function: str, width: int) -> None:
    weight, bias = random_array(rng, (5, 4, 1), FLOAT32), random_array(rng, (5,), FLOAT32)
    layer = Conv(weight, bias, activation=function)
    x = random_array(rng, (2, 4, width), FLOAT32)
    assert_expected(function, layer_reference(layer, x, FLOAT32, FLOAT32), run(layer, x))


SPLIT = {
    "by taps": shape((9, 128, 3, 3), (2, 128, 3, 4), padding=1),
    "by channels": shape((5, 129, 3, 3), (2, 129, 3, 3), padding=1),
    "1x1": shape((5, 1032, 1, 1), (2, 1032, 2, 4)),
    "groups": shape((4, 64, 1, 17), (1, 128, 2, 9), groups=2, padding=(0, 8)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split_sums(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SPLIT[name]
    layer, x = sizes.layer(rng, FLOAT32, activation="relu"), random_array(rng, sizes.x, FLOAT32)
    launches: list[Launch] = []
    want = run(layer, x, launches=launches)
    assert [launch.kernel.file for launch in launches] == ["implicit_gemm", "reduce"]
    assert launches[0].grid[1] > 1
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), want)
    for cut in (1, 2):
        assert_same_bits({"map": want}, {"map": run(layer, x, cut=cut)}, f"{name}, {cut} rows at a time")
    for tile in EVERY_TILE:
        assert_same_bits({"map": want}, {"map": run(layer, x, tile)}, f"{name}, {tile.label}")
    alone = np.concatenate([run(layer, x[k : k + 1]) for k in range(len(x))])
    assert_same_bits({"map": want}, {"map": alone}, f"{name}, samples alone")


def test_split_sums_of_other_types(run: Runner, rng: np.random.Generator) -> None:
    for dtype, out in ((FLOAT64, FLOAT64), (FLOAT16, FLOAT16), (BFLOAT16, FLOAT32)):
        layer = SPLIT["1x1"].layer(rng, dtype)
        x = random_array(rng, SPLIT["1x1"].x, dtype)
        assert_expected(dtype.name, layer_reference(layer, x, dtype, out), run(layer, x, out_dtype=out))


def test_splits_do_not_depend_on_the_height(run: Runner, rng: np.random.Generator) -> None:
    sizes = SPLIT["by taps"]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    want = run(layer, x)
    launches: list[Launch] = []
    got = run(layer, x, announced=False, launches=launches)
    assert launches[0].grid[1] > 1
    assert_same_bits({"map": want}, {"map": got}, "unknown height")
    low = run(layer, x[:, :, :2])
    assert_same_bits({"map": want[:, :, :1]}, {"map": low[:, :, :1]}, "another height")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["1x1 aligned", "3x3", "groups of 5", "one channel", "reflect"])
def test_what_is_not_finite_stays_in_its_receptive_fields(
    run: Runner, rng: np.random.Generator, name: str, bad: float
) -> None:
    _, sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    x.reshape(-1)[:: x.size // 3] = bad
    expected = layer_reference(layer, x, FLOAT32, FLOAT32)
    for tile in EVERY_TILE:
        assert_expected(f"{name}, {tile.label}", expected, run(layer, x, tile))


@pytest.mark.parametrize("name", ["3x3", "one channel", "1x1 padded", "replicate"])
def test_weights_that_are_not_finite_stay_in_their_filters(
    run: Runner, rng: np.random.Generator, name: str
) -> None:
    _, sizes = SHAPES[name]
    weight = random_array(rng, sizes.weight, FLOAT32)
    weight[0].reshape(-1)[0] = np.inf  # on padding, which counts as 0, it gives NaN
    layer = Conv(weight, **dict(sizes.options))
    x = random_array(rng, sizes.x, FLOAT32)
    got = run(layer, x)
    assert_expected(name, layer_reference(layer, x, FLOAT32, FLOAT32), got)
    assert np.isfinite(got[:, 1:]).all()


def test_random_geometries(run: Runner, rng: np.random.Generator) -> None:
    for _ in range(40):
        rank = int(rng.integers(1, 4))
        groups = int(rng.choice([1, 1, 2, 3]))
        channels = groups * int(rng.choice([1, 2, 3, 8, 16]))
        kernel = [int(size) for size in rng.integers(1, 4, rank)]
        dilation = [int(step) for step in rng.integers(1, 3, rank)]
        spatial = [int(size) for size in rng.integers(2, 9, rank)]
        padding = [(int(a), int(b)) for a, b in rng.integers(0, 4, (rank, 2))]
        mode = str(rng.choice(["zeros", "zeros", "reflect", "replicate"]))
        if mode == "reflect":
            padding = [
                (min(a, size - 1), min(b, size - 1)) for (a, b), size in zip(padding, spatial, strict=True)
            ]
        layer = Conv(
            random_array(rng, (groups * int(rng.integers(1, 40)), channels // groups, *kernel), FLOAT32),
            stride=[int(step) for step in rng.integers(1, 4, rank)],
            padding=[
                (before, max(after, (k - 1) * d + 1 - size - before))
                for (before, after), k, d, size in zip(padding, kernel, dilation, spatial, strict=True)
            ]
            if mode != "reflect"
            else padding,
            dilation=dilation if mode != "reflect" else [1] * rank,
            groups=groups,
            padding_mode=mode,
        )
        if any(k > size + a + b for k, size, (a, b) in zip(kernel, spatial, padding, strict=True)):
            continue
        x = random_array(rng, (int(rng.integers(1, 4)), channels, *spatial), FLOAT32)
        got = run(layer, x)
        assert_expected(f"{layer!r}, x {x.shape}", layer_reference(layer, x, FLOAT32, FLOAT32), got)


def test_more_filter_tiles_than_a_grid_has_along_y(run: Runner, rng: np.random.Generator) -> None:
    groups = 70_000
    layer = Conv(small_integers(rng, (groups, 1, 1), FLOAT32), groups=groups)
    x = small_integers(rng, (1, groups, 1), FLOAT32)
    np.testing.assert_array_equal(run(layer, x, SMALL), x * layer.weight.reshape(1, -1, 1))


def test_scratch_is_what_the_parts_take() -> None:
    layer = Conv(np.zeros((7, 128, 3, 3), np.float32), padding=1)
    gemm = ImplicitGemm(Case(layer, FLOAT32, 128 * 5, Precision.HIGH, 90))
    whole = SampleShape(7, 6, (5,))
    splits, depth = gemm.splits_of(whole)
    assert (splits, depth) == (2, 576)
    assert gemm.scratch_bytes(whole, 4, 3) == splits * 3 * 7 * 4 * 5 * 4
    assert gemm.scratch_bytes(SampleShape(7, 6, (5000,)), 4, 3) == 0


def test_filters_are_packed_with_zeros_around_them(rng: np.random.Generator) -> None:
    weight = random_array(rng, (6, 3, 2, 2), FLOAT32)
    layer = Conv(weight, groups=2)
    packed = ImplicitGemm(Case(layer, FLOAT32, 100, Precision.HIGH, 90)).pack()
    filters, table = (
        packed[: 2 * 16 * 32].reshape(2, 16, 32),
        packed[2 * 16 * 32 :].view(np.int32).reshape(16, 4),
    )
    np.testing.assert_array_equal(filters[:, :12, :3], weight.reshape(2, 3, 12).transpose(0, 2, 1))
    assert np.count_nonzero(filters) == np.count_nonzero(weight)
    np.testing.assert_array_equal(table[5], (1, 0, 0, 1))
    assert (table[12:, 0] == -1).all()
    assert (table[:12, 0] >= 0).all()


def test_tiles_follow_how_full_the_device_gets() -> None:
    tiles = tiles_of(FLOAT32, Gather.TAPS)
    assert choose_tile(tiles, Product(512, 100_000, 1), 132) == LARGE
    assert choose_tile(tiles, Product(32, 100_000, 1), 132) == WIDE
    assert choose_tile(tiles, Product(64, 3136, 1), 132) != LARGE
    assert choose_tile(tiles, Product(8, 20, 1), 132) == SMALL


def test_rows_too_long_to_count_are_refused() -> None:
    case = Case(Conv(np.zeros((1, 2, 3, 3), np.float32)), FLOAT32, 2 << 26, Precision.HIGH, 90)
    assert ImplicitGemm.fits(case)
    assert not ImplicitGemm.fits(replace(case, row_elements=2 << 27))


def test_every_form_that_a_launch_may_take_is_listed() -> None:
    listed = {kernel.name for kernel in ImplicitGemm.kernels()}
    assert len(listed) == len(list(ImplicitGemm.kernels()))
    for given in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16):
        for gather in gathers_of(given):
            for tile in tiles_of(given, gather):
                assert f"implicit_gemm_{given.name}_{gather.name.lower()}_{tile.label}" in listed
