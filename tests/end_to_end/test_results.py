"""The right answers over the wire: the worked example everywhere, else the bits of the backend in-process."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import convservice
from convservice import Activation, Conv, ConvClient, Network
from convservice.dtypes import DTYPES, FLOAT32, DType, dtype_of
from convservice_backends.interface import Backend
from tests.helpers import (
    Array,
    assert_same_bits,
    chain,
    check_every_layer,
    compute,
    random_array,
    small_integers,
    trunk_with_two_heads,
    worked_example,
)
from tests.strategies import Case, cases, fits

FORMATS = ("channels_first", "channels_last")


def formatted(x: Array, data_format: str) -> Array:
    """(N, C, *spatial) in the order of a data format."""
    return np.moveaxis(x, 1, -1) if data_format == "channels_last" else x


def channels_first(x: Array, data_format: str) -> Array:
    """(N, C, *spatial) from the order of a data format."""
    return np.moveaxis(x, -1, 1) if data_format == "channels_last" else x


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("data_format", FORMATS)
def test_the_worked_example(
    client: ConvClient, rank: int, data_format: str, input_dtype: DType, weight_dtype: DType
) -> None:
    x, weight, fm = worked_example(rank, input_dtype, weight_dtype)
    convolve: Any = {1: client.conv1d, 2: client.conv2d, 3: client.conv3d}[rank]
    found = convolve(formatted(x, data_format), weight, data_format=data_format)
    assert found.dtype == weight_dtype.numpy
    assert channels_first(found, data_format).tolist() == fm.tolist()
    bare = convolve(x[0, 0], weight[0, 0])
    assert bare.tolist() == fm[0, 0].tolist()
    # The same as a stream of tensors, and as a stream of rows.
    network = Network([Conv(weight)])
    for streamed in client.map(network, [x, x[0]]):
        assert streamed.reshape(fm.shape).tolist() == fm.tolist()
    rows = [x[0, :, i : i + 1] for i in range(x.shape[2])]
    bands = list(client.stream(network, rows, shape=x.shape[1:], dtype=x.dtype, band_rows=1))
    assert np.concatenate([band.array for band in bands], axis=1).tolist() == fm[0].tolist()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_the_worked_example_in_every_result_dtype(client: ConvClient, out_dtype: DType) -> None:
    x, weight, fm = worked_example(2, FLOAT32, FLOAT32)
    found = client.conv2d(x, weight, out_dtype=out_dtype.numpy)
    assert found.dtype == out_dtype.numpy
    assert found.tolist() == fm.tolist()


def test_the_worked_example_awaited(target: str) -> None:
    x, weight, fm = worked_example(2, FLOAT32, FLOAT32)
    network = Network([Conv(weight)])

    async def everything() -> list[Array]:
        async with convservice.connect_async(target, timeout=60) as client:
            found = [await client.conv2d(x, weight), await client.run(network, x)]
            found += [fm async for fm in client.map(network, [x, x])]
            bands = client.stream(network, [x[0]], shape=x.shape[1:], dtype="float32")
            found.append(np.concatenate([band.array async for band in bands], axis=1)[None])
            return found

    found = asyncio.run(everything())
    assert [each.tolist() for each in found] == [fm.tolist()] * 5


@given(cases(), st.sampled_from(FORMATS), st.sampled_from([None, *DTYPES]))
def test_any_convolution_has_the_bits_of_the_backend_in_process(
    client: ConvClient, backend: Backend, case: Case, data_format: str, out_dtype: DType | None
) -> None:
    assume(fits(case))
    network = Network([case.layer])
    expected = compute(backend, network, case.x, out_dtype=out_dtype)["output"]
    given, wanted = formatted(case.x, data_format), None if out_dtype is None else out_dtype.numpy
    alone = client.run(network, given, data_format=data_format, out_dtype=wanted)
    assert_same_bits({"": expected}, {"": channels_first(alone, data_format)}, "unary")
    (streamed,) = client.map(network, [given], data_format=data_format, out_dtype=wanted)
    assert_same_bits({"": expected}, {"": channels_first(streamed, data_format)}, "streamed")


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 2, 13, 11), (2, 2, 400, 500)])
def test_networks_small_and_large(
    client: ConvClient, backend: Backend, data_format: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x = random_array(rng, shape, FLOAT32)
    for network in (chain(rng, FLOAT32), trunk_with_two_heads(rng, FLOAT32)):
        found: Any = client.run(network, formatted(x, data_format), data_format=data_format)
        if len(network.outputs) == 1:
            found = {"output": found}
        arrays = {name: channels_first(found[name], data_format) for name in network.outputs}
        assert_same_bits(compute(backend, network, x), arrays, "over the wire")


@pytest.mark.parametrize("how", ["read-only", "fortran", "big-endian", "every other", "a list"])
def test_any_kind_of_array_may_be_given(client: ConvClient, how: str, rng: np.random.Generator) -> None:
    x, weight = small_integers(rng, (2, 3, 9, 8), FLOAT32), small_integers(rng, (4, 3, 3, 3), FLOAT32)
    expected = client.conv2d(x, weight)

    def given(array: Array) -> Any:
        wider = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wider[..., ::2] = array
        kept = array.copy()
        kept.flags.writeable = False
        return {
            "read-only": kept,
            "fortran": np.asfortranarray(array),
            "big-endian": array.astype(array.dtype.newbyteorder(">")),
            "every other": wider[..., ::2],
            "a list": array.astype(np.float64).tolist(),
        }[how]

    x_given, weight_given = given(x), given(weight)
    before = np.array(x_given, copy=True)
    found = client.conv2d(x_given, weight_given)
    assert np.array_equal(found, expected)
    assert found.flags.writeable
    assert np.array_equal(before, np.array(x_given))


def test_a_sample_and_a_batch_of_none(client: ConvClient) -> None:
    weight = np.ones((4, 3, 3, 3), np.float32)
    assert client.conv2d(np.ones((3, 8, 7), np.float32), weight).shape == (4, 6, 5)
    assert client.conv2d(np.ones((0, 3, 8, 7), np.float32), weight).shape == (0, 4, 6, 5)
    assert client.run(Network([Conv(weight)]), np.ones((0, 3, 8, 7), np.float32)).shape == (0, 4, 6, 5)


def test_a_registered_network_is_called_by_name(client: ConvClient, rng: np.random.Generator) -> None:
    network, x = chain(rng, FLOAT32), random_array(rng, (1, 2, 20, 9), FLOAT32)
    registered = client.register(network)
    expected = client.run(network, x)
    assert registered.name == network.name
    assert registered.name in client.networks()
    assert np.array_equal(registered(x), expected)
    assert np.array_equal(client.network(network.name)(x), expected)
    client.unregister(network)
    assert network.name not in client.networks()
    assert np.array_equal(client.run(network, x), expected), "it is sent again where it is missing"


def test_weights_larger_than_a_message(
    client: ConvClient, backend: Backend, rng: np.random.Generator
) -> None:
    layer = Conv(random_array(rng, (300, 512, 3, 3), FLOAT32), activation="relu")
    x = random_array(rng, (1, 512, 5, 4), FLOAT32)
    found = client.run(layer, x)
    assert_same_bits(compute(backend, Network([layer]), x), {"output": found}, "weights put in chunks")


def test_integers_travel_as_they_are(client: ConvClient, rng: np.random.Generator) -> None:
    layer = Conv(random_array(rng, (2, 3, 3, 3), FLOAT32), padding="same", padding_mode="replicate")
    x = random_array(rng, (1, 3, 30, 20), dtype_of("uint8"))
    found = client.run(layer, x)
    check_every_layer(Network([layer]), x, {"layer0": found})
    assert client.run(layer, x, out_dtype="uint8").dtype == np.uint8


def test_the_report_names_backend_and_algorithms(client: ConvClient, backend: Backend) -> None:
    reports: list[convservice.TensorReport] = []
    network = Network([Conv(np.ones((1, 1, 3, 3), np.float32)), Activation("relu")])
    client.run(network, np.ones((1, 1, 9, 9), np.float32), on_report=reports.append)
    assert [report.backend for report in reports] == [backend.name]
    assert set(reports[0].algorithms) == {"layer0", "layer1"}
    assert reports[0].input_rows == 9
    assert reports[0].reserved_bytes > 0
