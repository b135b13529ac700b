"""Streaming is real: rows leave as soon as their input has come, whatever the cut and the height."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event

import numpy as np
import pytest

from convservice import Cancelled, Conv, ConvClient, InvalidRequest, Network
from convservice.bands import DataFormat, TensorSpec
from convservice.dtypes import FLOAT32
from convservice.geometry import SampleShape
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice.wire.enums import Precision
from convservice.wire.headers import TensorRequest
from convservice_backends.interface import Backend
from tests.helpers import (
    Array,
    assert_same_bits,
    chain,
    compute,
    deep_network,
    prepared,
    random_array,
    spec_of,
    trunk_with_two_heads,
)
from tests.raw_stream import RawStream, RawTensor, usage, wait_until_nothing_runs


@dataclass(frozen=True)
class Wire:
    """A server by hand, its client, and its backend in-process."""

    client: ConvClient
    stub: ConvServiceStub
    backend: Backend


@pytest.fixture
def wire(client: ConvClient, stub: ConvServiceStub, backend: Backend) -> Wire:
    return Wire(client, stub, backend)


def one_layer(rng: np.random.Generator) -> Network:
    return Network([Conv(random_array(rng, (4, 2, 5, 5), FLOAT32), padding=2)])


def three_layers(rng: np.random.Generator) -> Network:
    return chain(rng, FLOAT32)


@pytest.mark.parametrize("make", [one_layer, three_layers])
@pytest.mark.parametrize("band_rows", [1, 4])
def test_each_block_comes_back_on_exactly_the_rows_that_it_needs(
    wire: Wire,
    make: type,
    band_rows: int,
    rng: np.random.Generator,
) -> None:
    """The test sends the rows that the result's header names, rounded up to whole bands, then nothing until
    that block has arrived, and so on through the tensor: a server that wanted more would wait for ever."""
    network: Network = make(rng)
    wire.client.register(network)
    x = random_array(rng, (1, 2, 500, 900), FLOAT32)
    spec = TensorSpec(FLOAT32, SampleShape(2, 500, (900,)), 1, band_rows)
    shapes, node = network.shapes(spec.sample), network.outputs["output"]
    plan = wire.backend.prepare(network, Precision.HIGH).plan(spec)
    parts: list[Array] = []
    with RawStream(wire.stub) as stream:
        tensor = RawTensor(stream, TensorRequest(network.name, spec))
        (result,) = tensor.results()
        height, sent, done = result.spec.sample.height, 0, 0
        assert result.block_rows == plan.block_rows[node]
        assert height >= 4 * result.block_rows, "several blocks, or nothing is shown"
        while done < height:
            wanted = min(done + result.block_rows, height)
            needed = network.input_rows_needed(node, wanted, shapes, blocks=plan.block_rows)
            if done == 0:
                assert needed == result.first_block_input_rows < 500
            upto = min(-(-needed // band_rows) * band_rows, 500)
            tensor.send_rows(x[:, :, sent:upto])
            sent = max(sent, upto)
            while done < wanted:
                bands = tensor.next_bands()
                assert bands is not None
                parts.extend(band.array for band in bands)
                done = sum(part.shape[2] for part in parts)
        tensor.send_rows(x[:, :, sent:])
        tensor.end()
        assert tensor.next_bands() is None
        assert tensor.report is not None
        assert tensor.report.input_rows == 500
    assert_same_bits(
        compute(wire.backend, network, x), {"output": np.concatenate(parts, axis=2)}, "in blocks"
    )


@pytest.mark.parametrize("data_format", DataFormat)
@pytest.mark.parametrize(("band_rows", "payload_bytes"), [(1, 97), (3, 5000), (64, 1 << 20), (500, 12_345)])
def test_the_size_of_bands_and_messages_changes_nothing(
    wire: Wire,
    data_format: DataFormat,
    band_rows: int,
    payload_bytes: int,
    rng: np.random.Generator,
) -> None:
    network, x = trunk_with_two_heads(rng, FLOAT32), random_array(rng, (2, 2, 130, 41), FLOAT32)
    wire.client.register(network)
    spec = TensorSpec(FLOAT32, SampleShape(2, 130, (41,)), 2, band_rows, data_format)
    with RawStream(wire.stub) as stream:
        tensor = RawTensor(stream, TensorRequest(network.name, spec), payload_bytes)
        results = tensor.results(2)
        tensor.send_rows(x)
        tensor.end()
        found = tensor.collect(results)
    assert_same_bits(
        compute(wire.backend, network, x), found, f"bands of {band_rows}, messages of {payload_bytes}"
    )


def test_several_tensors_in_one_stream_one_of_them_given_up(
    client: ConvClient, stub: ConvServiceStub, backend: Backend, rng: np.random.Generator
) -> None:
    network, x = three_layers(rng), random_array(rng, (3, 2, 90, 30), FLOAT32)
    client.register(network)
    expected = compute(backend, network, x)
    with RawStream(stub) as stream:
        for number, rows in enumerate([90, 7, 1]):
            tensor = RawTensor(
                stream, TensorRequest(network.name, spec_of(x, rows), tensor_id=3 * number + 1)
            )
            results = tensor.results()
            tensor.send_rows(x)
            tensor.end()
            assert_same_bits(expected, tensor.collect(results), f"tensor {number}")
            given_up = RawTensor(
                stream, TensorRequest(network.name, spec_of(x, rows), tensor_id=3 * number + 2)
            )
            given_up.results()
            given_up.send_rows(x[:1, :, :5] if rows < 90 else x[:1])
            given_up.abort()
            assert type(given_up.fail()) is Cancelled
        assert stream.close() == []


def reserved(stub: ConvServiceStub) -> int:
    return usage(stub).reserved_bytes


def test_what_is_reserved_does_not_depend_on_the_height(
    client: ConvClient, stub: ConvServiceStub, rng: np.random.Generator
) -> None:
    network = three_layers(rng)
    client.register(network)
    x = random_array(rng, (1, 2, 400, 300), FLOAT32)
    wait_until_nothing_runs(stub)  # streams that other tests cancelled
    found = set[int]()
    for height in (1000, 16 * 1000, None):
        spec = TensorSpec(FLOAT32, SampleShape(2, height, (300,)), 1, 4)
        with RawStream(stub) as stream:
            tensor = RawTensor(stream, TensorRequest(network.name, spec))
            tensor.results()
            found.add(reserved(stub))
            tensor.send_rows(x)
            assert tensor.next_bands()
            found.add(reserved(stub))
            tensor.abort()
            assert type(tensor.fail()) is Cancelled
            assert reserved(stub) == 0
    assert len(found) == 1
    assert 0 < min(found) < 64 << 20


@pytest.mark.parametrize("make", [one_layer, three_layers])
@pytest.mark.parametrize("height", [5, 301])
def test_a_height_that_nobody_knows_beforehand(
    client: ConvClient, backend: Backend, make: type, height: int, rng: np.random.Generator
) -> None:
    network: Network = make(rng)
    x = random_array(rng, (1, 2, height, 60), FLOAT32)

    def lines() -> Iterator[Array]:
        for row in range(height):
            yield x[0, :, row : row + 1]

    found = list(client.stream(network, lines(), shape=(2, None, 60), dtype="float32", band_rows=1))
    assert [band.first_row for band in found] == list(np.cumsum([0, *(b.array.shape[1] for b in found)])[:-1])
    whole = np.concatenate([band.array for band in found], axis=1)
    expected = compute(backend, network, x, announced=False)["output"]
    assert_same_bits({"": expected[0]}, {"": whole}, "told at the end")


def test_what_only_the_end_shows_fails_the_stream_there(client: ConvClient, rng: np.random.Generator) -> None:
    lines = [random_array(rng, (2, 1, 60), FLOAT32) for _ in range(2)]
    network = Network([Conv(random_array(rng, (1, 2, 3, 3), FLOAT32))])
    with pytest.raises(InvalidRequest, match="the output would be empty") as caught:
        list(client.stream(network, lines, shape=(2, None, 60), dtype="float32"))
    assert caught.value.reason == "OUTPUT_EMPTY"


@pytest.mark.multiply_adds(600_000_000)
def test_ten_layers_over_many_rows(
    client: ConvClient, stub: ConvServiceStub, backend: Backend, rng: np.random.Generator
) -> None:
    """The client waits for the first results with three quarters of its rows: a server that wanted more
    before it gave any would wait as well. What the server reserves is a part of the maps."""
    network, height, width = deep_network(rng), 20_000, 64
    plan = prepared(backend, network).plan(TensorSpec(FLOAT32, SampleShape(1, height, (width,)), 1, 64))
    given = random_array(rng, (1, 50, width), FLOAT32)
    first_came, held = Event(), list[int]()

    def rows() -> Iterator[Array]:
        for row in range(0, height, 50):
            if row == height // 4:
                assert first_came.wait(120), "the first results did not come early"
            yield given

    done = 0
    for band in client.stream(network, rows(), shape=(1, height, width), dtype="float32", band_rows=64):
        if not first_came.is_set():
            held.append(reserved(stub))
            first_came.set()
        assert band.first_row == done
        done += band.array.shape[1]
    assert done == height
    maps = sum(shape.elements * 4 for shape in network.shapes(SampleShape(1, height, (width,))).values())
    assert plan.peak_bytes <= held[0] < maps / 2


def test_results_come_before_the_input_has_ended(client: ConvClient, rng: np.random.Generator) -> None:
    network = one_layer(rng)
    asked: list[int] = []

    def rows() -> Iterator[Array]:
        for row in range(20_000):
            asked.append(row)
            yield np.zeros((2, 1, 200), np.float32)

    bands = client.stream(network, rows(), shape=(2, 20_000, 200), dtype="float32", band_rows=1)
    first = next(bands)
    assert first.first_row == 0
    assert len(asked) < 20_000
    bands.close()
