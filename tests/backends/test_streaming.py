"""Rows flow: results leave as soon as their input is there, memory does not depend on the height, a height
may be unknown, and work that is no longer wanted stops between two blocks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from convservice.bands import Band, TensorSpec
from convservice.dtypes import FLOAT32, DType, dtype_of
from convservice.errors import Cancelled, InvalidRequest
from convservice.geometry import SampleShape
from convservice.layers import (
    FUNCTIONS,
    Activation,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import MAX_NODES, Network
from convservice.wire.enums import Precision
from convservice_backends.interface import Backend, Session, SessionPlan
from convservice_backends.reference import Expected, layer_reference
from tests.helpers import (
    Array,
    TellsDevicePeak,
    assert_expected,
    bands_of,
    chain,
    check_every_layer,
    compute,
    every_map,
    nothing_wrong,
    prepared,
    random_array,
    residual,
    run,
    spec_of,
    trunk_with_two_heads,
)


def networks(rng: np.random.Generator) -> dict[str, Network]:
    """Networks with two input channels, by name."""
    return {
        "one layer": Network([Conv(random_array(rng, (4, 2, 5, 5), FLOAT32), padding=2)]),
        "stride": Network([Conv(random_array(rng, (4, 2, 2, 2), FLOAT32), stride=(7, 1))]),
        "reflect": Network(
            [Conv(random_array(rng, (4, 2, 5, 5), FLOAT32), padding=4, padding_mode="reflect")]
        ),
        "replicate": Network(
            [Conv(random_array(rng, (4, 2, 3, 3), FLOAT32), padding=5, padding_mode="replicate")]
        ),
        "chain": chain(rng, FLOAT32),
        "two heads": trunk_with_two_heads(rng, FLOAT32),
    }


NAMES = ("one layer", "stride", "reflect", "replicate", "chain", "two heads")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 4])
def test_every_block_leaves_exactly_when_its_rows_have_come(
    backend: Backend, name: str, rows: int, rng: np.random.Generator
) -> None:
    network = networks(rng)[name]
    x = random_array(rng, (1, 2, 900, 600), FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    plan = prepared.plan(spec_of(x, rows))
    shapes = network.shapes(spec_of(x).sample)
    arrived: dict[str, list[tuple[int, int]]] = {output: [] for output in network.outputs}

    def watch(sent: int, band: Band) -> None:
        arrived[band.output].append((band.first_row + band.array.shape[2], sent))

    run(prepared, x, rows, watch=watch)
    for result in plan.results:
        node = network.outputs[result.name]
        assert result.first_block_input_rows == network.input_rows_needed(node, 1, shapes, plan.block_rows)
        for done, sent in arrived[result.name]:
            needed = network.input_rows_needed(node, done, shapes, plan.block_rows)
            assert needed <= sent, "no row leaves before its input"
            assert sent - rows < needed or sent == 900, (
                f"row {done} waited: {sent} rows had come, {needed} do"
            )
        first = arrived[result.name][0]
        assert first[1] == min(-(-result.first_block_input_rows // rows) * rows, 900)


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_planned_does_not_depend_on_the_height(
    backend: Backend, name: str, rng: np.random.Generator
) -> None:
    network = networks(rng)[name]
    prepared = backend.prepare(network, Precision.HIGH)
    peaks = set[int]()
    for height in (100_000, 16 * 100_000, None):
        spec = TensorSpec(FLOAT32, SampleShape(2, height, (150,)), 1, 4)
        peaks.add(prepared.plan(spec).peak_bytes)
    assert len(peaks) == 1


def test_a_plan_of_terabytes_is_only_arithmetic(backend: Backend) -> None:
    prepared = backend.prepare(Network([Conv(np.ones((1, 1, 3, 3), np.float32))]), Precision.HIGH)
    tracemalloc.start()
    try:
        plan = prepared.plan(TensorSpec(FLOAT32, SampleShape(1, 2**31 - 1, (2**31 - 1,)), 2**10, 1))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert plan.peak_bytes >= 3 * 4 * (2**31 - 1)


def drained(session: Session, bands: Iterator[Band]) -> Iterator[int]:
    """Sends bands and the end, and hands on the rows of every band that comes back."""
    for given in bands:
        for found in (session.submit(given), session.drain()):
            yield from (band.array.shape[2] for band in found)
    yield from (band.array.shape[2] for band in session.finish())


def memory_taken(
    backend: Backend, network: Network, x: Array, rows: int | None, out_dtype: DType | None
) -> tuple[int, int | None, SessionPlan]:
    """The most memory that a session took beyond what there was, of the host and, if a backend tells, of any
    device; and its plan."""
    ready = prepared(backend, network)
    plan = ready.plan(spec_of(x, rows), out_dtype)
    ready.open(plan, nothing_wrong).close()  # the first may put weights in place: not a session's memory
    device_peak(backend)
    tracemalloc.start()
    try:
        session = ready.open(plan, nothing_wrong)
        sum(drained(session, bands_of(x, rows)))
        session.close()
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return taken, device_peak(backend), plan


def device_peak(backend: Backend) -> int | None:
    """The most memory of a device since this was last asked; None where the backend does not tell."""
    return backend.device_peak() if isinstance(backend, TellsDevicePeak) else None


OBJECTS = 256 << 10
"""Bytes allowed for Python's own objects beside the arrays that a plan counts."""


LAYERED = (
    "residual",
    "residual, every map, float16",
    "small residual",
    "pooling",
    "transposed",
    "unshared",
    "flattened",
    "flattened, every map",
    "many channels",
    "many channels, flattened",
)


def layered(rng: np.random.Generator, name: str) -> tuple[Network, Array]:
    """A network of other layers than convolutions, with an input for it."""
    shape: tuple[int, ...]
    shape, dtype = (1, 2, 400, 500), FLOAT32
    match name.split(",", maxsplit=1)[0]:
        case "residual":
            dtype = dtype_of("float16") if "float16" in name else dtype
            network = residual(rng, dtype)
        case "small residual":
            network, shape = residual(rng, FLOAT32), (40, 2, 14, 14)
        case "pooling":
            layers = [MaxPool(5, stride=1, padding=2), AvgPool(41, stride=2), MaxPool(2), GlobalAvgPool()]
            network, shape = Network(layers), (1, 2, 700, 600)
        case "transposed":
            weight = random_array(rng, (2, 3, 5, 4), FLOAT32)
            network = Network([ConvTranspose(weight, stride=(3, 2), padding=1, activation="gelu")])
        case "many channels":
            last = Flatten() if "flattened" in name else Activation("relu")
            network, shape = Network([MaxPool(1, stride=5), last]), (1, 20_000, 13)
        case "unshared":
            weight = random_array(rng, (3, 2, 396, 496, 5, 5), FLOAT32)
            network = Network([LocallyConnected(weight, activation="sigmoid")])
        case _:
            weight = random_array(rng, (3, 2 * 700 * 600), FLOAT32)
            network, shape = Network([Activation("relu"), Flatten(), Linear(weight)]), (1, 2, 700, 600)
    return every_map(network) if "every map" in name else network, random_array(rng, shape, dtype)


def heavy(rng: np.random.Generator, name: str) -> tuple[Network, Array]:
    """A network whose session takes megabytes, with an input for it."""
    half, tall, small = dtype_of("float16"), (1, 2, 400, 500), (150, 2, 14, 14)
    network, shape, dtype = chain(rng, FLOAT32), tall, FLOAT32
    match name:
        case "one layer":
            network = Network([Conv(random_array(rng, (16, 3, 5, 5), FLOAT32), padding=2)])
            shape = (1, 3, 300, 400)
        case "few columns":
            network, shape = Network([Conv(random_array(rng, (64, 64, 3, 3), FLOAT32))]), (1, 64, 100, 60)
        case "float16":
            network, dtype = chain(rng, half), half
        case "tall windows on wide rows":
            network = Network([Conv(random_array(rng, (1, 1, 65, 1), FLOAT32))])
            shape = (1, 1, 200, 30_000)
        case "two heads":
            network, shape = trunk_with_two_heads(rng, FLOAT32), (2, 2, 250, 500)
        case "every map" | "every map, float16":
            dtype = half if "float16" in name else dtype
            network = every_map(chain(rng, dtype))
        case "small samples":
            shape = small
        case "small samples, every map":
            network, shape, dtype = every_map(trunk_with_two_heads(rng, half)), small, half
        case _ if name in LAYERED:
            return layered(rng, name)
        case _ if name in FUNCTIONS:
            network = Network([Activation(name), Activation(name)])
        case _ if name.startswith("fused "):
            weight = random_array(rng, (32, 3, 1, 1), FLOAT32)
            network = Network([Conv(weight, activation=name.removeprefix("fused "))])
            shape = (1, 3, 200, 400)
        case _:
            assert name == "chain"
    return network, random_array(rng, shape, dtype)


HEAVY = (
    "one layer",
    "few columns",
    "tall windows on wide rows",
    *LAYERED,
    "chain",
    "float16",
    "two heads",
    "every map",
    "every map, float16",
    "small samples",
    "small samples, every map",
    *FUNCTIONS,
    *(f"fused {function}" for function in FUNCTIONS),
)


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize("out_dtype", [None, dtype_of("uint8")], ids=str)
def test_a_session_takes_no_more_memory_than_planned(
    variants: tuple[Backend, ...], name: str, out_dtype: DType | None, rng: np.random.Generator
) -> None:
    network, x = heavy(rng, name)
    for backend in (variants[0], variants[-1]):
        for rows in (None, 14) if len(x) > 2 else (16, 3):
            taken, of_device, plan = memory_taken(backend, network, x, rows, out_dtype)
            where = f"{backend.describe().workers} workers, bands of {rows} rows"
            assert taken <= plan.peak_bytes + OBJECTS, where
            assert of_device is None or 0 < of_device <= plan.device_bytes, where


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize("height", [13, 170])
def test_a_height_that_is_told_at_the_end(
    backend: Backend, name: str, rows: int | None, height: int, rng: np.random.Generator
) -> None:
    network, x = every_map(networks(rng)[name]), random_array(rng, (1, 2, height, 11), FLOAT32)
    found = compute(backend, network, x, rows=rows, announced=False)
    assert {array.shape for array in found.values()} == {
        array.shape for array in compute(backend, network, x).values()
    }
    check_every_layer(network, x, found)


def test_an_unknown_height_leaves_the_results_height_unknown(
    backend: Backend, rng: np.random.Generator
) -> None:
    prepared = backend.prepare(chain(rng, FLOAT32), Precision.HIGH)
    plan = prepared.plan(TensorSpec(FLOAT32, SampleShape(2, None, (11,)), 1, 4))
    assert [result.spec.sample.rows for result in plan.results] == [None]


@pytest.mark.parametrize(
    ("options", "height", "reason"),
    [
        ({}, 2, "OUTPUT_EMPTY"),
        ({"padding": 1, "dilation": 9}, 3, "OUTPUT_EMPTY"),
        ({"padding": ((2, 2), (0, 0)), "padding_mode": "reflect"}, 2, "PADDING_TOO_LARGE"),
        ({"padding": ((0, 3), (0, 0)), "padding_mode": "reflect"}, 3, "PADDING_TOO_LARGE"),
    ],
)
def test_what_only_the_end_shows_is_refused_at_the_end(
    backend: Backend, options: dict[str, object], height: int, reason: str, rng: np.random.Generator
) -> None:
    layer = Conv(random_array(rng, (2, 2, 3, 3), FLOAT32), **options)  # type: ignore[arg-type]
    x = random_array(rng, (1, 2, height, 20), FLOAT32)
    prepared = backend.prepare(Network([layer]), Precision.HIGH)
    session = prepared.open(prepared.plan(spec_of(x, announced=False)), nothing_wrong)
    try:
        early = list(session.submit(Band(x)))
        assert early == []
        with pytest.raises(InvalidRequest) as caught:
            list(session.finish())
        assert caught.value.reason == reason
    finally:
        session.close()


def test_no_rows_at_all_are_refused_at_the_end(backend: Backend, rng: np.random.Generator) -> None:
    prepared = backend.prepare(
        Network([Conv(random_array(rng, (1, 1, 3), FLOAT32), padding=5)]), Precision.HIGH
    )
    session = prepared.open(prepared.plan(TensorSpec(FLOAT32, SampleShape(1, None), 1, 4)), nothing_wrong)
    with pytest.raises(InvalidRequest):
        list(session.finish())
    session.close()


def test_same_padding_with_a_stride_needs_the_height(backend: Backend) -> None:
    network = Network([Activation("relu"), Conv(np.ones((1, 1, 3, 3), np.float32), stride=2, padding="same")])
    prepared = backend.prepare(network, Precision.HIGH)
    with pytest.raises(InvalidRequest, match=r"layer 1 .*padding 'same' with stride 2") as caught:
        prepared.plan(TensorSpec(FLOAT32, SampleShape(1, None, (9,)), 1, 1))
    assert caught.value.reason == "HEIGHT_REQUIRED"


def test_an_input_that_does_not_fit_is_refused_when_planned(backend: Backend) -> None:
    prepared = backend.prepare(Network([Conv(np.ones((1, 2, 3, 3), np.float32))]), Precision.HIGH)
    for spec, reason in (
        (TensorSpec(FLOAT32, SampleShape(3, 9, (9,)), 1, 9), "CHANNEL_MISMATCH"),
        (TensorSpec(FLOAT32, SampleShape(2, 9), 1, 9), "INVALID_SHAPE"),
        (TensorSpec(FLOAT32, SampleShape(2, 2, (9,)), 1, 9), "OUTPUT_EMPTY"),
        (TensorSpec(dtype_of("float64"), SampleShape(2, 9, (9,)), 1, 9), "DATA_TYPE_MISMATCH"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            prepared.plan(spec)
        assert caught.value.reason == reason


@pytest.mark.parametrize("whole", [True, False], ids=["at once", "in bands"])
def test_work_that_is_no_longer_wanted_stops_within_a_block(
    variants: tuple[Backend, ...], whole: bool, rng: np.random.Generator
) -> None:
    network = Network([Conv(random_array(rng, (32, 16, 3, 3), FLOAT32), padding=1)])
    x = random_array(rng, (1, 16, 600, 100), FLOAT32)
    for backend in variants:
        prepared = backend.prepare(network, Precision.HIGH)
        calls = [0]

        def check(calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] > 1:
                raise Cancelled("not wanted")

        session = prepared.open(prepared.plan(spec_of(x, None if whole else 8)), check)
        came: list[int] = []
        with pytest.raises(Cancelled):
            came.extend(drained(session, bands_of(x, None if whole else 8)))
        session.close()
        session.close()
        assert sum(came) < 600
        assert calls[0] <= 2 + backend.describe().workers


def test_a_session_that_is_given_up_harms_no_other(backend: Backend, rng: np.random.Generator) -> None:
    network, x = chain(rng, FLOAT32), random_array(rng, (1, 2, 300, 40), FLOAT32)
    prepared = backend.prepare(network, Precision.HIGH)
    expected = run(prepared, x)["output"]
    session = prepared.open(prepared.plan(spec_of(x, 50)), nothing_wrong)
    list(session.submit(Band(x[:, :, :50])))
    session.close()
    assert np.array_equal(run(prepared, x)["output"], expected)


@pytest.mark.timeout(60)
def test_a_deep_chain_of_rows_flows(backend: Backend, rng: np.random.Generator) -> None:
    network = Network([Activation("leaky_relu", 0.999)] * MAX_NODES)
    x = random_array(rng, (1, 1, 3000, 60), FLOAT32)
    found = compute(backend, network, x, rows=1500)["output"]
    assert found.shape == x.shape
    assert np.array_equal(found[x > 0], x[x > 0])


WIDE: dict[str, dict[str, Any]] = {
    "zeros": {"padding": ((2, 3), (1, 1)), "dilation": (2, 1)},
    "reflect": {"padding": ((4, 4), (1, 1)), "padding_mode": "reflect"},
    "replicate": {"padding": ((6, 2), (1, 1)), "padding_mode": "replicate", "stride": (2, 1)},
    "stride": {"padding": ((0, 0), (1, 1)), "stride": (5, 1)},
    "stride and padding": {"padding": ((9, 9), (1, 1)), "stride": (4, 1)},
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("announced", [True, False])
def test_rows_larger_than_what_is_computed_at_once(
    backend: Backend, name: str, announced: bool, rng: np.random.Generator
) -> None:
    """A row of more than a megabyte: blocks are parts of rows, and no more rows are held than must be."""
    width = 300_000
    layer = Conv(random_array(rng, (1, 1, 3, 3), FLOAT32), **WIDE[name])
    x = random_array(rng, (1, 1, 23, width), FLOAT32)
    network = Network([layer, Activation("relu")])
    found = compute(backend, network, x, rows=1, announced=announced)["output"]
    for first in (0, width - 12):
        part = layer_reference(layer, x[..., first : first + 12], FLOAT32, FLOAT32)
        inside = slice(0, 11) if first == 0 else slice(1, 12)  # the other edge is none in the whole input
        value, error = np.maximum(part.value[..., inside], 0), part.error[..., inside]
        expected = Expected(value, error, exact=False, dtype=FLOAT32)
        assert_expected(name, expected, np.ascontiguousarray(found[..., first : first + 12][..., inside]))


def test_a_sum_that_is_longer_than_a_block_is_right(backend: Backend, rng: np.random.Generator) -> None:
    layer = Conv(random_array(rng, (2, 3000, 3), FLOAT32), padding=1)
    x = random_array(rng, (1, 3000, 4), FLOAT32)
    found = compute(backend, Network([layer]), x)["output"]
    assert_expected("9000 products", layer_reference(layer, x, FLOAT32, FLOAT32), found)


@pytest.mark.parametrize("shape", [(1, 200_000, 100_000), (1, None, 100_000), (1, 400_000_000)])
def test_a_stride_far_beyond_the_window_holds_a_window(
    backend: Backend, shape: tuple[int, int | None, *tuple[int, ...]]
) -> None:
    """Rows between two windows are dropped as they come, however far apart the windows are."""
    channels, rows, *rest = shape
    window = (3,) * (1 + len(rest))
    layer = Conv(np.ones((1, 1, *window), np.float32), stride=(1000, *(100_000 for _ in rest)))
    spec = TensorSpec(FLOAT32, SampleShape(channels, rows, tuple(rest)), 1, 1)
    plan = backend.prepare(Network([layer]), Precision.HIGH).plan(spec)
    assert plan.peak_bytes < 64 << 20
