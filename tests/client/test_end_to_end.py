"""The client and a whole server in this process: what users do, on each backend in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import convservice
from convservice import (
    Activation,
    BackendUnavailable,
    Conv,
    ConvClient,
    Flatten,
    GlobalAvgPool,
    InvalidRequest,
    Linear,
    MaxPool,
    Network,
    NetworkNotFound,
    Node,
    Residual,
    TensorReport,
)
from convservice.dtypes import FLOAT32
from convservice_backends.interface import Backend
from tests.helpers import EXAMPLE_INPUT, EXAMPLE_MAP, EXAMPLE_WEIGHT, every_layer


@pytest.fixture
def client(target: str) -> Iterator[ConvClient]:
    """A client of the server, with nothing said that need not be."""
    with convservice.connect(target) as found:
        yield found


def random(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape).astype("float32")


def test_the_worked_example_in_every_rank_of_x(client: ConvClient, backend: Backend) -> None:
    x, weight = np.array(EXAMPLE_INPUT, "float32"), np.array(EXAMPLE_WEIGHT, "float32")
    reports: list[TensorReport] = []
    for lead in (0, 1, 2):
        given = x.reshape((1,) * lead + x.shape)
        filters = weight if not lead else weight[None, None]
        found = client.conv2d(given, filters, on_report=reports.append)
        assert np.array_equal(found, np.array(EXAMPLE_MAP).reshape((1,) * lead + (3, 3)))
    assert len(reports) == 3
    assert all(report.backend == backend.name and report.algorithms for report in reports)
    assert np.array_equal(
        client.conv2d(x.astype("uint8"), weight, np.float32(1.0)), np.array(EXAMPLE_MAP) + 1
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("rows", [9, 9000])
def test_every_rank_and_format(
    client: ConvClient, rng: np.random.Generator, rank: int, data_format: str, samples: int, *, rows: int
) -> None:
    x = random(rng, samples, 4, rows, *[7, 5][: rank - 1])
    layer = Conv(random(rng, 6, 2, *[3, 3, 2][:rank]), random(rng, 6), padding=1, groups=2, activation="relu")
    given = np.moveaxis(x, 1, -1) if data_format == "channels_last" else x
    convolve = getattr(client, f"conv{rank}d")
    found = convolve(
        given,
        layer.weight,
        layer.bias,
        padding=1,
        groups=2,
        activation="relu",
        data_format=data_format,
    )
    found = np.moveaxis(found, -1, 1) if data_format == "channels_last" else found
    assert found.shape == layer.output_shape(x.shape)
    assert np.allclose(found, expected_maps(x, layer), atol=1e-4)


def expected_maps(x: Any, layer: Conv) -> Any:
    """The feature maps of a layer of two groups, padding 1 and a relu, from windows written out."""
    spatial = tuple(range(2, x.ndim))
    padded = np.pad(x, [(0, 0), (0, 0), *[(1, 1)] * len(spatial)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel, axis=spatial)
    halves = zip(np.split(windows, 2, axis=1), np.split(layer.weight, 2), strict=True)
    axes = [1, *range(-len(spatial), 0)]
    maps = [np.tensordot(window, weight, (axes, range(1, weight.ndim))) for window, weight in halves]
    sums = np.moveaxis(np.concatenate(maps, axis=-1), -1, 1)
    assert layer.bias is not None
    return np.maximum(sums + layer.bias.reshape(-1, *[1] * len(spatial)), 0)


def test_run_map_and_stream_agree(client: ConvClient, rng: np.random.Generator) -> None:
    network = Network(
        [Conv(random(rng, 4, 3, 3, 3), padding="same", activation="relu"), Conv(random(rng, 2, 4, 5, 5))]
    )
    x = random(rng, 3, 700, 300)
    whole = client.run(network, x)
    registered = client.register(network)
    assert np.array_equal(registered(x[:, :30]), client.run(network, x[:, :30]))
    assert all(np.array_equal(result, whole) for result in client.map(registered, [x] * 3))
    for height in (700, None):
        bands = (x[:, at : at + 64] for at in range(0, 700, 64))
        found = list(client.stream(network, bands, shape=(3, height, 300), dtype="float32"))
        assert np.array_equal(np.concatenate([band.array for band in found], axis=1), whole)


def test_several_outputs_come_by_name(client: ConvClient, rng: np.random.Generator) -> None:
    first = Node("edges", Conv(random(rng, 2, 1, 3, 3)))
    network = Network(
        [first, Node("positive", Activation("relu"), ("edges",))], {"raw": "edges", "on": "positive"}
    )
    for x in (random(rng, 1, 9, 9), random(rng, 1, 900, 900)):
        found = client.run(network, x)
        assert list(found) == ["raw", "on"]
        assert np.array_equal(found["on"], np.maximum(found["raw"], 0))
    bands = list(client.stream(network, [x], shape=x.shape, dtype="float32"))
    assert {band.output for band in bands} == {"raw", "on"}


@pytest.mark.parametrize("samples", [0, 1, 3, 3000])
def test_vectors_go_and_come_without_axes(client: ConvClient, rng: np.random.Generator, samples: int) -> None:
    network = Network([Activation("relu")])
    x = random(rng, samples, 500)
    for data_format in ("channels_first", "channels_last"):
        assert np.array_equal(client.run(network, x, data_format=data_format), np.maximum(x, 0))
    assert network.output_shape(x.shape) == x.shape


def test_vectors_are_mapped_and_streamed(client: ConvClient, rng: np.random.Generator) -> None:
    network = Network([Activation("relu")])
    x = random(rng, 6, 9)
    for found, given in zip(client.map(network, [x[:2], x[2:3], x[3:]]), (x[:2], x[2:3], x[3:]), strict=True):
        assert np.array_equal(found, np.maximum(given, 0))
    bands = list(client.stream(network, iter(x[:1]), shape=(9,), dtype="float32"))
    assert [(band.array.shape, band.sample, band.first_row) for band in bands] == [((9,), 0, 0)]
    with pytest.raises(InvalidRequest, match=r"it must be \(9,\), one vector"):
        list(client.stream(network, [x], shape=(9,), dtype="float32"))


def test_large_weights_and_names(client: ConvClient, rng: np.random.Generator) -> None:
    layer = Conv(random(rng, 300, 300, 3, 3))
    registered = client.register(layer)
    assert registered.name in client.networks()
    x = random(rng, 300, 4, 4)
    found = client.network(registered.name)
    assert np.array_equal(found(x), registered(x))
    client.unregister(found)
    with pytest.raises(NetworkNotFound):
        client.network(registered.name)
    assert found.output_shape(x.shape) == (300, 2, 2)


def test_a_backend_that_is_not_there(client: ConvClient, rng: np.random.Generator) -> None:
    assert any(backend.is_default for backend in client.info().backends)
    for x in (random(rng, 1, 9, 9), random(rng, 1, 900, 900)):
        with pytest.raises(BackendUnavailable, match="no-such"):
            client.conv2d(x, random(rng, 1, 1, 3, 3), backend="no-such")


def test_every_layer_in_one_call(client: ConvClient, rng: np.random.Generator) -> None:
    network = every_layer(FLOAT32)
    x = random(rng, 3, 2, 8, 9)
    registered = client.register(network)
    found = registered(x)
    assert {name: array.shape for name, array in found.items()} == network.output_shape(x.shape)
    assert network.output_shape(x.shape) == {"scores": (3, 3), "wide": (3, 2), "maps": (3, 5, 4, 4)}
    assert client.network(registered.name).output_shape(x.shape) == network.output_shape(x.shape)

    last = registered(np.moveaxis(x, 1, -1), data_format="channels_last")
    assert np.array_equal(np.moveaxis(last.pop("maps"), -1, 1), found["maps"])
    assert all(np.array_equal(array, found[name]) for name, array in last.items())
    for index, result in enumerate(client.map(network, x)):
        alone = client.run(network, x[index])
        assert {name: array.shape for name, array in alone.items()} == network.output_shape(x.shape[1:])
        assert all(np.array_equal(array, result[name]) for name, array in alone.items())
        assert all(np.array_equal(array, found[name][index]) for name, array in alone.items())
    assert {name: array.shape[0] for name, array in registered(x[:0]).items()} == dict.fromkeys(found, 0)

    bands = [x[0, :, row : row + 3] for row in range(0, 8, 3)]
    streamed = list(client.stream(network, bands, shape=x.shape[1:], dtype="float32"))
    for name in ("scores", "wide"):
        (band,) = [band for band in streamed if band.output == name]
        assert np.array_equal(band.array, found[name][0])
    maps = [band.array for band in streamed if band.output == "maps"]
    assert np.array_equal(np.concatenate(maps, axis=1), found["maps"][0])


def test_a_whole_image_becomes_scores_while_its_height_is_unknown(
    client: ConvClient, rng: np.random.Generator
) -> None:
    network = Network(
        [
            Conv(random(rng, 4, 3, 3, 3), padding=1, activation="relu"),
            Residual([Conv(random(rng, 4, 4, 5, 3), padding=(2, 1))], activation="relu"),
            MaxPool(2),
            GlobalAvgPool(),
            Flatten(),
            Linear(random(rng, 7, 4), random(rng, 7)),
        ]
    )
    x = random(rng, 3, 90, 9)
    whole = client.run(network, x)
    assert whole.shape == (7,)
    for height in (90, None):
        bands = (x[:, at : at + 7] for at in range(0, 90, 7))
        (band,) = client.stream(network, bands, shape=(3, height, 9), dtype="float32")
        assert np.array_equal(band.array, whole)
    with pytest.raises(InvalidRequest, match=r"layer 1 \(Flatten.*needs the height"):
        client.stream(Network([network.nodes[0].layer, Flatten()]), [], shape=(3, None, 9), dtype="float32")
