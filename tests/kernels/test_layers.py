"""Layers beside the convolution on the emulator: every form, random geometries, what must not change bits.

Expected values are those of `benchmarks.gpu_exact`, in extended precision. What the suite of backends tests
of any backend is not repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.gpu_check import Wrong
from benchmarks.gpu_exact import exact
from benchmarks.gpu_layer_problems import LayerProblem, check_layer, compute, layer_problems
from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.errors import InvalidRequest
from convservice.geometry import MAX_SIZE
from convservice.layers import (
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
from convservice.network import Network
from convservice.nodes import Node
from convservice.wire.enums import Precision
from convservice_backends.cuda import pieces, reducing, summing, windowed
from convservice_backends.cuda.arguments import ADDENDS
from convservice_backends.cuda.backend import CudaBackend
from convservice_emulator.build import Compiler
from convservice_emulator.device import INFO, EmulatedDevice
from tests.helpers import assert_same_bits, random_array, run, small_integers, spec_of

Array = NDArray[Any]

FLOAT16 = DTYPES[2]
INF, NAN = np.inf, np.nan


@pytest.fixture(scope="module")
def device(compiler: Compiler) -> EmulatedDevice:
    return EmulatedDevice(compiler)


@pytest.fixture(scope="module")
def backend(device: EmulatedDevice) -> Iterator[CudaBackend]:
    with closing(CudaBackend([device], {})) as found:
        yield found


def computed(device: EmulatedDevice, layer: Layer, *inputs: Array, out: DType | None = None) -> Array:
    """A layer's feature map of whole samples."""
    return compute(layer, inputs, out or dtype_of(inputs[0].dtype), device.stream(), INFO)


def assert_exact(device: EmulatedDevice, layer: Layer, *inputs: Array) -> None:
    """Demands the exact values, and NaN and infinities where they belong."""
    with np.errstate(invalid="ignore"):
        wanted = exact(layer, inputs).value.astype(inputs[0].dtype)
    np.testing.assert_array_equal(computed(device, layer, *inputs), wanted)


@pytest.mark.parametrize("problem", tuple(layer_problems()), ids=str)
def test_every_form_meets_the_bound(device: EmulatedDevice, problem: LayerProblem) -> None:
    assert check_layer(problem, device.stream(), INFO) <= 1


def test_a_wrong_value_is_found(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_: object, elements: int) -> float:
        return 2.0 * elements

    monkeypatch.setattr(reducing.GlobalPoolOperator, "divisor", twice)
    problem = next(each for each in layer_problems() if each.recipe.name == "global average")
    with pytest.raises(Wrong, match="bound"):
        check_layer(problem, device.stream(), INFO)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, Array]:
    """A windowed layer of any geometry with small integers in weights and input."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * rank))

    sizes, kernel = each(1, {1: 14, 2: 8, 3: 5}[rank]), each(1, 4 if rank < 3 else 3)
    stride, dilation, groups = each(1, 4), each(1, 3), draw(st.integers(1, 2))
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank))
    kind = draw(st.sampled_from([MaxPool, AvgPool, ConvTranspose, LocallyConnected]))
    channels, filters = 2 * groups, draw(st.integers(1, 9))
    x = small_integers(rng, (draw(st.integers(1, 5)), channels, *sizes), FLOAT32)
    bias = small_integers(rng, (filters * groups,), FLOAT32)
    if kind in (MaxPool, AvgPool):
        options: dict[str, Any] = {"ceil_mode": draw(st.booleans()), "stride": stride, "padding": pads}
        if kind is MaxPool:
            return MaxPool(kernel, dilation=dilation, **options), x
        return AvgPool(kernel, count_include_pad=draw(st.booleans()), **options), x
    if kind is ConvTranspose:
        weight = small_integers(rng, (channels, filters, *kernel), FLOAT32)
        more = tuple(min(s, d) - 1 for s, d in zip(stride, dilation, strict=True))
        geometry: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": pads}
        return ConvTranspose(weight, bias, groups=groups, output_padding=more, **geometry), x
    shape = (filters * groups, 2, *kernel)
    conv = Conv(np.ones(shape, np.float32), stride=stride, dilation=dilation, padding=pads, groups=groups)
    out = conv.output_shape(x.shape)[2:]
    weight = small_integers(rng, (*shape[:2], *out, *kernel), FLOAT32)
    geometry = {"stride": stride, "dilation": dilation, "padding": pads}
    return LocallyConnected(weight, bias, groups=groups, **geometry), x


@given(data=st.data())
def test_any_geometry_is_exact_on_integers(device: EmulatedDevice, data: st.DataObject) -> None:
    try:
        layer, x = data.draw(layers())
        layer.output_shape(x.shape)
    except InvalidRequest:
        reject()  # an output of size zero, padding that a pooling window does not take
    if isinstance(layer, AvgPool):  # its quotients need not be whole
        wanted, found = exact(layer, [x]), computed(device, layer, x)
        assert (np.abs(found - wanted.value) <= wanted.bound(FLOAT32, FLOAT32)).all()
    else:
        assert_exact(device, layer, x)


def weighted(rng: np.random.Generator, dtype: DType) -> dict[str, Layer | list[Node]]:
    """Layers for an input of (4, 11, 9)."""

    def w(*shape: int) -> Array:
        return random_array(rng, shape, dtype)

    return {
        "max": MaxPool(3, stride=2, padding=1, ceil_mode=True),
        "average": AvgPool((3, 2), stride=(2, 1), padding=1, ceil_mode=True),
        "transposed": ConvTranspose(
            w(4, 5, 4, 3), w(10), stride=(3, 2), padding=1, groups=2, activation="gelu"
        ),
        "transposed, dilated": ConvTranspose(
            w(4, 3, 3, 3), stride=2, dilation=(3, 2), padding=((0, 4), (2, 1))
        ),
        "local": LocallyConnected(w(5, 4, 6, 5, 3, 3), w(5, 6, 5), stride=2, padding=1, activation="silu"),
        "global max": GlobalMaxPool(),
        "global average": GlobalAvgPool(),
        "linear": [
            Node("flat", Flatten()),
            Node("linear", Linear(w(6, 396), w(6), activation="tanh"), ("flat",)),
        ],
        "flatten": Flatten(),
        "add": [
            Node("conv", Conv(w(4, 4, 3, 3), w(4), padding=1)),
            Node("sum", Add("leaky_relu"), ("conv", "input", "conv")),
        ],
    }


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("name", tuple(weighted(np.random.default_rng(0), FLOAT32)))
def test_neither_the_cut_nor_the_batch_nor_the_size_of_launches_changes_bits(
    backend: CudaBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, dtype: DType
) -> None:
    layer = weighted(rng, dtype)[name]
    network = Network(layer if isinstance(layer, list) else [layer])
    x = random_array(rng, (9, 4, 11, 9), dtype)
    prepared = backend.prepare(network, Precision.HIGH)
    wanted = run(prepared, x)
    for rows in (1, 2, 5, 11):
        assert_same_bits(wanted, run(prepared, x, rows), f"{name} in bands of {rows} rows")
    alone = [run(prepared, x[sample : sample + 1]) for sample in range(len(x))]
    joined = {key: np.concatenate([each[key] for each in alone]) for key in wanted}
    assert_same_bits(wanted, joined, f"{name}, samples alone")
    monkeypatch.setattr(pieces, "MOST_WORK", 1)
    monkeypatch.setattr(pieces, "MOST_ALONG_Y", 1)
    monkeypatch.setattr(summing, "MOST_PARTS_BYTES", 1)
    anew = backend.prepare(network, Precision.HIGH)
    assert_same_bits(wanted, run(anew, x), f"{name} in small launches")


@pytest.mark.parametrize("rest", [(1,), (3,), (700,), (2100,), (3, 1500)], ids=str)
@pytest.mark.parametrize("kind", [GlobalMaxPool, GlobalAvgPool])
def test_global_pooling_of_any_cut_has_the_bits_of_the_whole(
    backend: CudaBackend, rng: np.random.Generator, kind: type[Any], rest: tuple[int, ...]
) -> None:
    x = random_array(rng, (2, 2, 23, *rest), FLOAT32)
    prepared = backend.prepare(Network([kind()]), Precision.HIGH)
    wanted = run(prepared, x)
    reference = exact(kind(), [x])
    assert (np.abs(wanted["output"] - reference.value) <= reference.bound(FLOAT32, FLOAT32)).all()
    for rows in (1, 4, 9):
        assert_same_bits(wanted, run(prepared, x, rows), f"bands of {rows} rows")
    alone = [run(prepared, sample[None], 5, announced=False)["output"] for sample in x]
    assert_same_bits(wanted, {"output": np.concatenate(alone)}, "of a height that is not announced")


@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("geometry", [(1, 2, 1), (2, 5, 1), (3, 2, 3), (4, 1, 2)], ids=str)
def test_a_height_that_is_told_at_the_end_adds_no_row(
    backend: CudaBackend, rng: np.random.Generator, padding: tuple[int, int], geometry: tuple[int, int, int]
) -> None:
    """The last outputs of a transposed convolution may look at nothing: no row of the input tells of them."""
    kernel, stride, dilation = geometry
    weight = random_array(rng, (1, 2, kernel), FLOAT32)
    layer = ConvTranspose(weight, stride=stride, dilation=dilation, padding=[padding])
    prepared = backend.prepare(Network([layer]), Precision.HIGH)
    for height in (5, 8):
        x = random_array(rng, (1, 1, height), FLOAT32)
        wanted = run(prepared, x)
        for rows in (1, 3):
            found = run(prepared, x, rows, announced=False)
            assert_same_bits(wanted, found, f"{height} rows in bands of {rows}")


@pytest.mark.parametrize("groups", [1, 2])
def test_the_same_filter_at_every_position_has_the_bits_of_a_convolution(
    device: EmulatedDevice, compiler: Compiler, rng: np.random.Generator, groups: int
) -> None:
    weight, bias = random_array(rng, (6, 4 // groups, 3, 2), FLOAT32), random_array(rng, (6,), FLOAT32)
    x = random_array(rng, (5, 4, 9, 7), FLOAT32)
    options: dict[str, Any] = {"stride": (2, 1), "padding": 1, "groups": groups, "activation": "gelu"}
    conv = Conv(weight, bias, **options)
    out = conv.output_shape(x.shape)[2:]
    tied = np.broadcast_to(weight[:, :, None, None], (*weight.shape[:2], *out, *weight.shape[2:]))
    with closing(CudaBackend([EmulatedDevice(compiler)], {}, algorithm="direct")) as direct:
        wanted = run(direct.prepare(Network([conv]), Precision.HIGH), x)
    found = computed(device, LocallyConnected(tied, bias, **options), x)
    assert_same_bits(wanted, {"output": found}, f"{groups} groups")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "layer",
    [
        MaxPool(2, stride=2, padding=1),
        MaxPool(2, stride=3, padding=((2, 2), (2, 2)), dilation=3),
        AvgPool(3, stride=2, padding=1),
        GlobalMaxPool(),
        GlobalAvgPool(),
        ConvTranspose(np.ones((2, 3, 3, 3), np.float32), stride=2),
        LocallyConnected(np.ones((3, 2, 3, 4, 2, 2), np.float32), stride=2),
        Linear(np.ones((5, 108), np.float32)),
        Add(),
    ],
    ids=repr,
)
def test_what_is_not_finite_reaches_whoever_looks_and_nobody_else(
    device: EmulatedDevice, layer: Layer, bad: float
) -> None:
    x = np.ones((2, 2, 6, 9), np.float32)
    x[0, 1, 3, 4], x[1, 0, 0, 0] = bad, -bad
    other = np.zeros_like(x)
    assert_exact(device, layer, *([x, other] if isinstance(layer, Add) else [x]))


def test_a_window_of_padding_alone_is_minus_infinity(device: EmulatedDevice) -> None:
    layer = MaxPool(2, stride=1, dilation=3, padding=2)
    assert (computed(device, layer, np.ones((1, 1, 1), np.float32)) == -INF).all()


def test_minus_infinity_everywhere_stays(device: EmulatedDevice) -> None:
    x = np.full((1, 2, 5, 6), -INF, np.float32)
    for layer in (MaxPool(3, padding=1), GlobalMaxPool()):
        assert (computed(device, layer, x) == -INF).all()


@pytest.mark.parametrize("count", [2, ADDENDS, ADDENDS + 1, 3 * ADDENDS])
def test_any_number_of_maps_is_added_in_order(
    backend: CudaBackend, rng: np.random.Generator, count: int
) -> None:
    x = random_array(rng, (2, 3, 5, 4), FLOAT32) * np.float32(1e4)
    ids = [f"n{index}" for index in range(count)]
    nodes = [Node(name, Conv(random_array(rng, (3, 1, 1, 1), FLOAT32), groups=3), ("input",)) for name in ids]
    network = Network([*nodes, Node("sum", Add(), tuple(ids))], {name: name for name in (*ids, "sum")})
    for rows in (None, 2):
        found = run(backend.prepare(network, Precision.HIGH), x, rows)
        wanted = found["n0"]
        for name in ids[1:]:
            wanted = wanted + found[name]
        np.testing.assert_array_equal(found["sum"], wanted)


@pytest.mark.parametrize("own", [FLOAT16, FLOAT32, FLOAT64], ids=str)
def test_integers_are_added_to_what_is_computed_of_them(
    backend: CudaBackend, rng: np.random.Generator, own: DType
) -> None:
    """An input of integers is held in the type of the sums, what a layer made of it in the network's own."""
    x = rng.integers(-120, 120, (2, 2, 5, 4)).astype(np.int8)
    weight = small_integers(rng, (2, 2, 1, 1), own)
    nodes = [Node("conv", Conv(weight)), Node("sum", Add("relu"), ("input", "conv", "input", "conv"))]
    found = run(backend.prepare(Network(nodes), Precision.HIGH), x, 2)["output"]
    product = np.einsum("ncij,oc->noij", x.astype(np.int64), weight[:, :, 0, 0].astype(np.int64))
    exactly = np.maximum(2 * (x + product), 0)
    np.testing.assert_array_equal(found, exactly.astype(own.numpy))


@pytest.mark.parametrize("name", ["transposed", "local", "linear", "add", "global average"])
def test_a_session_stays_within_its_plan(compiler: Compiler, rng: np.random.Generator, name: str) -> None:
    device = EmulatedDevice(compiler)
    layer = weighted(rng, FLOAT32)[name]
    network = Network(layer if isinstance(layer, list) else [layer])
    x = random_array(rng, (9, 4, 11, 9), FLOAT32)
    with closing(CudaBackend([device], {})) as backend:
        for rows in (None, 2):
            prepared = backend.prepare(network, Precision.HIGH)
            promised = prepared.plan(spec_of(x, rows)).device_bytes
            device.peak()
            run(prepared, x, rows)
            assert device.peak() <= promised


FAR = 1 << 30
ONES = np.ones((2, 3, 1, 2), np.float32)
FAR_AWAY: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "dilated": (
        MaxPool((1, 3), stride=(1, FAR // 2), dilation=(1, FAR), padding=((0, 0), (MAX_SIZE, FAR))),
        (3, 5),
    ),
    "rows": (
        MaxPool((3, 1), stride=(FAR, 1), dilation=(FAR, 1), padding=((MAX_SIZE, MAX_SIZE), (0, 0))),
        (6, 5),
    ),
    "far steps back": (
        ConvTranspose(ONES, stride=(1, FAR - 9), padding=((0, 0), (FAR - 12, 0))),
        (3, 2),
    ),
    "far weights back": (
        ConvTranspose(ONES, stride=(1, 3), dilation=(1, 1 << 28), padding=((0, 0), ((1 << 28) - 3, 0))),
        (3, 4),
    ),
    "unshared": (
        LocallyConnected(
            np.ones((2, 2, 3, 2, 1, 2), np.float32),
            stride=(1, FAR),
            dilation=(1, FAR),
            padding=((0, 0), (FAR, FAR)),
        ),
        (3, 5),
    ),
}


@pytest.mark.parametrize("name", FAR_AWAY)
def test_windows_may_reach_as_far_as_numbers_go(
    device: EmulatedDevice, rng: np.random.Generator, name: str
) -> None:
    layer, sizes = FAR_AWAY[name]
    assert_exact(device, layer, small_integers(rng, (2, 2, *sizes), FLOAT32))


def test_positions_that_kernels_cannot_count_are_refused(backend: CudaBackend) -> None:
    layer = ConvTranspose(np.ones((1, 1, 1, 2), np.float32), stride=(1, 1 << 15))
    prepared = backend.prepare(Network([layer]), Precision.HIGH)
    with pytest.raises(
        InvalidRequest, match=f"at most {windowed.TransposedOperator.most_positions} positions"
    ):
        prepared.plan(spec_of(np.broadcast_to(np.float32(0), (1, 1, 2, 1 << 14))))
    wide = spec_of(np.broadcast_to(np.float32(0), (1, 1, 2, 1 << 16, (1 << 14) + 1)))
    with pytest.raises(InvalidRequest, match=f"at most {summing.MOST_TERMS} positions"):
        backend.prepare(Network([GlobalMaxPool()]), Precision.HIGH).plan(wide)
