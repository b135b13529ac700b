"""tensor_core on the emulator: every tile and type against the reference, splits, staging, packed filters.

What the suite of backends tests of any algorithm is not repeated here; this is about what only this one has.
TF32 is held to two bounds: near the exact value, and nearer to what the rounded operands give, which tells a
misplaced element from rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.dtypes import FLOAT32, FLOAT64, DType, dtype_of
from convservice.errors import InternalError
from convservice.geometry import SampleShape
from convservice.layers import FUNCTIONS, Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda.algorithms.base import Case, Problem
from convservice_backends.cuda.algorithms.staging import AxisStaging, staged_axes
from convservice_backends.cuda.algorithms.tensor_core import TensorCore, rounded_tf32, tf32_roundoff
from convservice_backends.cuda.algorithms.tensor_core_forms import TILES
from convservice_backends.cuda.arguments import AxisArguments, ConvArguments
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

FLOAT16, BFLOAT16 = dtype_of("float16"), dtype_of("bfloat16")
EVERY_TILE = tuple(tile.name for tile in TILES)


class Recording(TensorCore):
    """tensor_core, which keeps its launches for a test to look at."""

    def __init__(
        self,
        case: Case,
        *,
        tile: str | None = None,
        folded: bool | None = None,
        ran: list[Launch] | None = None,
    ) -> None:
        super().__init__(case, tile=tile, folded=folded)
        self._ran = [] if ran is None else ran

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
        tile: str | None = None,
        *,
        folded: bool | None = None,
        cut: int | None = None,
        out_dtype: DType | None = None,
        announced: bool = True,
        launches: list[Launch] | None = None,
    ) -> Array:
        """The layer's feature map of x, computed `cut` output rows at a time."""
        given = dtype_of(x.dtype)
        sample = SampleShape(x.shape[1], x.shape[2], tuple(x.shape[3:]))
        whole = layer.output_sample(sample)
        case = Case(layer, given, sample.row_elements, Precision.FAST, INFO.architecture)
        assert TensorCore.fits(case)
        operator = ConvOperator(layer, given, sample, precision=Precision.FAST, info=INFO)
        operator.algorithm = Recording(case, tile=tile, folded=folded, ran=launches)
        told = whole if announced else whole.with_rows(None)
        plan = operator.block_plan(sample, told)
        weights = tuple(self.upload(part) for part in operator.weights())
        rows = DeviceArray.packed(self.upload(x), x.shape, given)
        shape = (x.shape[0], whole.channels, whole.height, *whole.rest)
        written = out_dtype or given
        out = DeviceArray.packed(self.stream.allocate(math.prod(shape) * written.itemsize), shape, written)
        step = cut or whole.height
        scratch = self.stream.allocate(operator.scratch_bytes(told, step, x.shape[0]))
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


@dataclass(frozen=True)
class Shape:
    """A layer and its input, by their sizes."""

    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def layer(self, rng: np.random.Generator, dtype: DType, **more: Any) -> Conv:
        bias = random_array(rng, self.weight[:1], dtype)
        return Conv(random_array(rng, self.weight, dtype), bias, **dict(self.options), **more)

    def with_filters(self, group_out: int) -> Shape:
        """The same with so many filters in every group: enough, and every tile may compute them."""
        groups = self.x[1] // self.weight[1]
        return replace(self, weight=(groups * group_out, *self.weight[1:]))


def shape(weight: tuple[int, ...], x: tuple[int, ...], **options: Any) -> Shape:
    return Shape(weight, x, tuple(options.items()))


SHAPES = {
    "1x1": shape((70, 16, 1, 1), (3, 16, 4, 7)),
    "1x1 odd map": shape((40, 24, 1, 1), (3, 24, 3, 7)),
    "1x1 stride": shape((9, 8, 1, 1), (2, 8, 5, 9), stride=2),
    "1x1 padded": shape((9, 8, 1, 1), (2, 8, 4, 4), padding=(1, 2), stride=2),
    "3x3": shape((40, 16, 3, 3), (2, 16, 6, 8), padding=1),
    "odd channels": shape((130, 13, 3, 3), (1, 13, 5, 7), padding=1),
    "3x3 dilated, strided, groups": shape(
        (10, 9, 3, 3), (2, 18, 11, 9), stride=(2, 1), dilation=(1, 2), groups=2, padding=((0, 2), (3, 1))
    ),
    "3x3x3": shape((4, 8, 3, 3, 3), (1, 8, 4, 5, 3), padding="same"),
    "1-D of 64": shape((3, 8, 64), (2, 8, 40), padding=40),
    "padding only": shape((2, 8, 2, 2), (1, 8, 2, 2), padding=3),
    "first layer": shape((33, 3, 7, 7), (1, 3, 14, 12), stride=2, padding=3),
    "one channel": shape((2, 1, 3, 3), (3, 1, 5, 6), padding=1),
    "few channels, 1-D": shape((34, 2, 9), (2, 2, 40), padding=4, stride=2, padding_mode="reflect"),
    "few channels, 3-D": shape((5, 3, 2, 2, 3), (2, 3, 3, 4, 6), padding=1, dilation=(1, 2, 1)),
    "few channels, wide": shape((3, 7, 2, 10), (1, 7, 4, 12), padding=1),
    "many channels": shape((3, 72, 2, 2), (1, 72, 3, 5), padding=1),
    "reflect": shape((3, 8, 3, 3), (2, 8, 5, 4), padding=2, padding_mode="reflect"),
    "replicate": shape((3, 3, 4, 3), (2, 3, 5, 4), padding=3, padding_mode="replicate"),
    "replicate 3-D": shape((3, 2, 2, 3, 2), (1, 2, 3, 4, 3), padding=2, padding_mode="replicate", stride=2),
}

TYPES = [(FLOAT16, FLOAT16), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tile", EVERY_TILE)
def test_every_tile_meets_the_bound(run: Runner, rng: np.random.Generator, name: str, tile: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT16), random_array(rng, sizes.x, FLOAT16)
    assert_expected(name, layer_reference(layer, x, FLOAT16, FLOAT32), run(layer, x, tile, out_dtype=FLOAT32))


@pytest.mark.parametrize("name", SHAPES)
def test_all_tiles_give_the_same_bits(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name].with_filters(66)
    layer, x = sizes.layer(rng, BFLOAT16), random_array(rng, sizes.x, BFLOAT16)
    want = run(layer, x, out_dtype=FLOAT32)
    ran: set[str] = set()
    for tile in EVERY_TILE:
        launches: list[Launch] = []
        got = run(layer, x, tile, out_dtype=FLOAT32, launches=launches)
        assert_same_bits({"map": want}, {"map": got}, f"{name}, tile {tile}")
        ran |= {name for name in EVERY_TILE if any(name in launch.kernel.name for launch in launches)}
    assert ran == set(EVERY_TILE)


ROWS = {
    "by eights": (shape((66, 72, 1, 1), (3, 72, 8, 2)), 1),
    "by fours": (shape((66, 40, 1, 1), (3, 40, 6, 2)), 1),
    "groups": (shape((132, 9, 1), (3, 18, 8), groups=2), 3),
    "3-D": (shape((66, 33, 1, 1, 1), (1, 33, 2, 5, 2)), 1),
    "split": (shape((66, 1032, 1, 1), (2, 1032, 4, 2)), 1),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_they_are_give_the_same_bits_as_staged(
    run: Runner, rng: np.random.Generator, name: str
) -> None:
    sizes, cut = ROWS[name]
    layer, x = sizes.layer(rng, FLOAT16, activation="relu"), random_array(rng, sizes.x, FLOAT16)
    staged: list[Launch] = []
    want = run(layer, x, cut=cut, out_dtype=FLOAT32, launches=staged)
    assert staged[0].kernel.file == "stage"
    assert_expected(name, layer_reference(layer, x, FLOAT16, FLOAT32), want)
    for tile, folded in itertools.product(EVERY_TILE, (False, True)):
        direct: list[Launch] = []
        got = run(layer, x, tile, folded=folded, out_dtype=FLOAT32, launches=direct)
        assert f"{tile}_rows" in direct[0].kernel.name or folded
        assert all(launch.kernel.file != "stage" for launch in direct)
        assert_same_bits({"map": want}, {"map": got}, f"{name}, tile {tile}, folded {folded}")


@pytest.mark.parametrize(("dtype", "out"), TYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", ["1x1", "3x3 dilated, strided, groups", "first layer", "replicate"])
def test_types_meet_the_bound(
    run: Runner, rng: np.random.Generator, name: str, dtype: DType, out: DType
) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, dtype, activation="relu"), random_array(rng, sizes.x, dtype)
    got = run(layer, x, out_dtype=out)
    assert_expected(name, layer_reference(layer, x, dtype, out), got)


@pytest.mark.parametrize("name", SHAPES)
def test_tf32_is_what_rounded_operands_give(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    rounded = Conv(rounded_tf32(layer.weight), layer.bias, **dict(sizes.options))
    expected = layer_reference(rounded, rounded_tf32(x), FLOAT32, FLOAT32)
    for tile in EVERY_TILE:
        assert_expected(f"{name}, {tile}", expected, run(layer, x, tile))


@pytest.mark.parametrize("name", ["1x1", "3x3", "first layer", "reflect"])
def test_tf32_keeps_its_bound(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SHAPES[name]
    layer, x = sizes.layer(rng, FLOAT32), random_array(rng, sizes.x, FLOAT32)
    exact = layer_reference(layer, x, FLOAT32, FLOAT64).value
    positive = Conv(np.abs(layer.weight), np.abs(layer.bias), **dict(sizes.options))  # type: ignore[arg-type]
    magnitude = layer_reference(positive, np.abs(x), FLOAT32, FLOAT64).value
    error = np.abs(run(layer, x).astype(np.float64) - exact)
    products = math.prod(sizes.weight[1:])
    assert (error <= tf32_roundoff(products) * magnitude + FLOAT32.roundoff * np.abs(exact)).all()
    assert (error > 2.0**-16 * magnitude).any()  # it is not float32 that was multiplied


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(
    "name", ["1x1 odd map", "3x3", "first layer", "reflect", "1-D of 64", "odd channels"]
)
def test_batch_and_cut_change_no_bit(run: Runner, rng: np.random.Generator, name: str, dtype: DType) -> None:
    sizes = SHAPES[name]
    layer = sizes.layer(rng, dtype, activation="tanh")
    x = random_array(rng, (3, *sizes.x[1:]), dtype)
    want = run(layer, x)
    for cut in (1, 2, 3):
        assert_same_bits({"map": want}, {"map": run(layer, x, cut=cut)}, f"{name}, {cut} rows at a time")
    alone = np.concatenate([run(layer, x[k : k + 1]) for k in range(3)])
    assert_same_bits({"map": want}, {"map": alone}, f"{name}, samples alone")


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", SHAPES)
def test_integers_are_exact(run: Runner, rng: np.random.Generator, name: str, dtype: DType) -> None:
    sizes = SHAPES[name]
    layer = Conv(
        small_integers(rng, sizes.weight, dtype),
        small_integers(rng, sizes.weight[:1], dtype),
        **dict(sizes.options),
    )
    x = small_integers(rng, sizes.x, dtype)
    expected = layer_reference(layer, x, dtype, FLOAT32)
    assert expected.exact
    assert_expected(name, expected, run(layer, x, out_dtype=FLOAT32))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("width", [8, 7], ids=["stored by fours", "stored singly"])
def test_every_activation(run: Runner, rng: np.random.Generator, function: str, width: int) -> None:
    weight, bias = random_array(rng, (5, 4, 1), FLOAT16), random_array(rng, (5,), FLOAT16)
    layer = Conv(weight, bias, activation=function)
    x = random_array(rng, (2, 4, width), FLOAT16)
    assert_expected(function, layer_reference(layer, x, FLOAT16, FLOAT16), run(layer, x))


SPLIT = {
    "3x3": shape((9, 128, 3, 3), (2, 128, 3, 4), padding=1),
    "1x1": shape((70, 1032, 1, 1), (2, 1032, 2, 3)),
    "groups": shape((4, 64, 1, 17), (1, 128, 2, 9), groups=2, padding=(0, 8)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split_sums(run: Runner, rng: np.random.Generator, name: str) -> None:
    sizes = SPLIT[name]
    layer = sizes.layer(rng, FLOAT16, activation="relu")
    x = random_array(rng, sizes.x, FLOAT16)
    launches: list[Launch] = []
    want = run(layer, x, folded=False, launches=launches, out_dtype=FLOAT32)
    assert [launch.kernel.file for launch in launches] == ["stage", "tensor_core", "reduce"]
    assert launches[1].grid[1] > 1
    assert_expected(name, layer_reference(layer, x, FLOAT16, FLOAT32), want)
    for cut, tile in itertools.product((None, 1, 2), EVERY_TILE):
        got = run(layer, x, tile, folded=False, cut=cut, out_dtype=FLOAT32)
        assert_same_bits({"map": want}, {"map": got}, f"{name}, tile {tile}, {cut} rows at a time")
    alone = np.concatenate([run(layer, x[k : k + 1], out_dtype=FLOAT32) for k in range(len(x))])
    assert_same_bits({"map": want}, {"map": alone}, f"{name}, samples alone")


@pytest.mark.parametrize("tile", [tile.name for tile in TILES if tile.folds])
def test_one_block_may_sum_all_parts(run: Runner, rng: np.random.Generator, tile: str) -> None:
    sizes = shape((70, 136, 3, 3), (2, 136, 3, 4), padding=1)
    layer, x = sizes.layer(rng, FLOAT16), random_array(rng, sizes.x, FLOAT16)
    want = run(layer, x, folded=False, out_dtype=FLOAT32)
    launches: list[Launch] = []
    got = run(layer, x, tile, folded=True, launches=launches, out_dtype=FLOAT32)
    assert [launch.kernel.file for launch in launches] == ["stage", "tensor_core"]
    assert launches[1].kernel.name.endswith(f"{tile}_fold")
    assert launches[1].grid[1] == 1
    assert_same_bits({"map": want}, {"map": got}, f"{tile}, folded")


def test_splits_do_not_depend_on_the_height(run: Runner, rng: np.random.Generator) -> None:
    sizes = SPLIT["3x3"]
    layer, x = sizes.layer(rng, FLOAT16), random_array(rng, sizes.x, FLOAT16)
    want = run(layer, x, folded=False, out_dtype=FLOAT32)
    launches: list[Launch] = []
    got = run(layer, x, folded=False, announced=False, launches=launches, out_dtype=FLOAT32)
    assert launches[1].grid[1] > 1
    assert_same_bits({"map": want}, {"map": got}, "unknown height")
    for height in (2, 40):
        other = np.resize(x, (*x.shape[:2], height, *x.shape[3:]))
        other[:, :, :2] = x[:, :, :2]
        found = run(layer, other, out_dtype=FLOAT32)
        assert_same_bits({"map": want[:, :, :1]}, {"map": found[:, :, :1]}, f"height {height}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", ["1x1", "3x3", "odd channels", "one channel", "reflect"])
def test_what_is_not_finite_stays_in_its_receptive_fields(
    run: Runner, rng: np.random.Generator, name: str, dtype: DType, bad: float
) -> None:
    sizes = SHAPES[name]
    weight = rounded_tf32(random_array(rng, sizes.weight, FLOAT32)).astype(dtype.numpy)
    x = rounded_tf32(random_array(rng, sizes.x, FLOAT32)).astype(dtype.numpy)
    x.reshape(-1)[:: x.size // 3] = bad
    layer = Conv(weight, **dict(sizes.options))
    expected = layer_reference(layer, x, dtype, FLOAT32)
    for tile in EVERY_TILE:
        assert_expected(f"{name}, {tile}", expected, run(layer, x, tile, out_dtype=FLOAT32))


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", ["3x3", "one channel", "1x1 padded", "replicate"])
def test_weights_that_are_not_finite_stay_in_their_filters(
    run: Runner, rng: np.random.Generator, name: str, dtype: DType
) -> None:
    sizes = SHAPES[name]
    weight = rounded_tf32(random_array(rng, sizes.weight, FLOAT32)).astype(dtype.numpy)
    weight[0].reshape(-1)[0] = np.inf  # on padding, which counts as 0, it gives NaN
    layer = Conv(weight, **dict(sizes.options))
    x = rounded_tf32(random_array(rng, sizes.x, FLOAT32)).astype(dtype.numpy)
    got = run(layer, x, out_dtype=FLOAT32)
    assert_expected(name, layer_reference(layer, x, dtype, FLOAT32), got)
    assert np.isfinite(got[:, 1:]).all()


def test_random_geometries(run: Runner, rng: np.random.Generator) -> None:
    computed = 0
    for _ in range(60):
        sizes = random_shape(rng)
        if sizes is None:
            continue
        dtype = (FLOAT16, BFLOAT16)[int(rng.integers(2))]
        layer, x = sizes.layer(rng, dtype), random_array(rng, sizes.x, dtype)
        cut = int(rng.integers(1, 5))
        got = run(layer, x, str(rng.choice(EVERY_TILE)), cut=cut, out_dtype=FLOAT32)
        assert_expected(f"{sizes}, cut {cut}", layer_reference(layer, x, dtype, FLOAT32), got)
        computed += 1
    assert computed > 20


def random_shape(rng: np.random.Generator) -> Shape | None:
    """A layer of any rank; None where its window is larger than its input."""
    rank, groups = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 3]))
    group_in = int(rng.choice([1, 2, 3, 8, 11, 33] if groups == 1 else [8, 9, 16]))
    kernel, dilation = rng.integers(1, 4, rank), rng.integers(1, 3, rank)
    spatial, padding = rng.integers(2, 9, rank), rng.integers(0, 4, (rank, 2))
    mode = str(rng.choice(["zeros", "zeros", "reflect", "replicate"]))
    if mode == "reflect":
        padding = np.minimum(padding, spatial[:, None] - 1)
    if ((kernel - 1) * dilation + 1 > spatial + padding.sum(axis=1)).any():
        return None
    filters = groups * int(rng.integers(1, 40))
    return shape(
        (filters, group_in, *kernel.tolist()),
        (int(rng.integers(1, 4)), groups * group_in, *spatial.tolist()),
        stride=rng.integers(1, 4, rank).tolist(),
        padding=padding.tolist(),
        dilation=dilation.tolist(),
        groups=groups,
        padding_mode=mode,
    )


@pytest.mark.parametrize("channels", [3, 9])
def test_a_block_stages_several_samples(run: Runner, rng: np.random.Generator, channels: int) -> None:
    sizes = shape((2, channels, 2, 2), (150, channels, 3, 3))
    layer, x = sizes.layer(rng, FLOAT16), random_array(rng, sizes.x, FLOAT16)
    launches: list[Launch] = []
    got = run(layer, x, launches=launches)
    assert launches[0].grid[2] < 150
    assert_expected("many samples", layer_reference(layer, x, FLOAT16, FLOAT16), got)


def test_too_little_working_memory_is_an_error_and_no_kernel_runs(rng: np.random.Generator) -> None:
    layer = Conv(random_array(rng, (4, 8, 3), FLOAT16))
    arguments = ConvArguments(samples=1, groups=1, group_in=8, group_out=4, taps=3, positions=6)
    arguments.axes[:] = [
        axis(count=1, high=1, kernel=1),
        axis(count=1, high=1, kernel=1),
        axis(count=6, high=8),
    ]
    algorithm = TensorCore(Case(layer, FLOAT16, 64, Precision.HIGH, 90))
    problem = Problem(arguments, SampleShape(4, 6, ()), FLOAT16, None, 4, ())
    with pytest.raises(InternalError, match="needs 256 bytes of working memory, it has 0"):
        next(algorithm.launches(problem))


# ---- staging, packing, rounding, choice


def axis(**sizes: int) -> AxisArguments:
    return AxisArguments(**{"count": 4, "low": 0, "high": 6, "kernel": 3, "stride": 1, "dilation": 1} | sizes)


@pytest.mark.parametrize(
    ("padding", "given", "want"),
    [
        (0, axis(start=-1), AxisStaging(0, 5)),
        (0, axis(start=2), AxisStaging(2, 4)),
        (0, axis(start=2, kernel=1, stride=3, count=2), AxisStaging(2, 2, 3)),
        (0, axis(start=-1, kernel=1, stride=3, count=2), AxisStaging(0, 3)),
        (0, axis(start=-8, count=2), AxisStaging(0, 0)),
        (1, axis(start=-5, count=1), AxisStaging(3, 3)),
        (1, axis(start=5, count=3), AxisStaging(1, 5)),
        (2, axis(start=-8, count=2), AxisStaging(0, 1)),
        (2, axis(start=7, count=2), AxisStaging(5, 1)),
    ],
)
def test_what_a_run_reads_is_staged(padding: int, given: AxisArguments, want: AxisStaging) -> None:
    arguments = ConvArguments(padding=padding)
    arguments.axes[2] = given
    assert staged_axes(arguments)[2] == want


def test_filters_are_packed_tap_by_tap_with_zeros_around_them(rng: np.random.Generator) -> None:
    weight = random_array(rng, (10, 9, 2, 2), FLOAT16)
    packed = TensorCore(Case(Conv(weight, groups=2), FLOAT16, 180, Precision.HIGH, 90)).pack()
    assert packed.shape == (2, 1, 2, 32, 32)
    terms = packed.transpose(0, 1, 3, 2, 4).reshape(2, 32, 4, 16)
    np.testing.assert_array_equal(terms[:, :5, :, :9], weight.reshape(2, 5, 9, 4).transpose(0, 1, 3, 2))
    assert np.count_nonzero(packed) == np.count_nonzero(weight)


def test_few_channels_are_packed_with_the_weights_of_the_innermost_axis(rng: np.random.Generator) -> None:
    weight = random_array(rng, (5, 3, 2, 7), FLOAT16)
    packed = TensorCore(Case(Conv(weight), FLOAT16, 60, Precision.HIGH, 90)).pack()
    terms = packed.transpose(0, 1, 3, 2, 4).reshape(32, -1)[:5, : 2 * 24].reshape(5, 2, 24)
    np.testing.assert_array_equal(terms[:, :, :21], weight.transpose(0, 2, 3, 1).reshape(5, 2, 21))
    assert np.count_nonzero(packed) == np.count_nonzero(weight)


def test_tf32_is_rounded_to_nearest_and_away_from_zero() -> None:
    given = np.array([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 1.5 + 2.0**-10, np.inf, -np.inf, 2**-140])
    want = np.array([1 + 2.0**-10, -1 - 2.0**-10, 1, 1.5 + 2.0**-10, np.inf, -np.inf, 0])
    want[-1] = rounded_tf32(np.array([2.0**-140], np.float32))[0]
    np.testing.assert_array_equal(rounded_tf32(given.astype(np.float32)), want.astype(np.float32))
    assert np.isnan(rounded_tf32(np.array([0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32))).all()


def test_what_fits() -> None:
    half = Case(Conv(np.zeros((4, 3, 3, 3), np.float16)), FLOAT16, 3 * 64, Precision.HIGH, 90)
    assert TensorCore.fits(half)
    assert TensorCore.fits(replace(half, architecture=75))
    assert not TensorCore.fits(replace(half, given=BFLOAT16, architecture=75))
    assert not TensorCore.fits(replace(half, given=FLOAT32))
    assert TensorCore.fits(replace(half, given=FLOAT32, precision=Precision.FAST))
    assert not TensorCore.fits(replace(half, given=FLOAT64, precision=Precision.FAST))
    assert not TensorCore.fits(replace(half, layer=Conv(np.zeros((4, 4, 3), np.float16), groups=2)))
    assert not TensorCore.fits(replace(half, row_elements=3 << 27))


def test_every_form_is_listed_once_with_what_it_needs() -> None:
    kernels = list(TensorCore.kernels())
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        assert kernel.minimum in {75, 80}, kernel.name
        if kernel.minimum == 75:
            assert kernel.dynamic_bytes + 3072 <= 64 << 10, kernel.name
