"""What several test modules need: the worked example, bands cut at will, comparison with the reference, what
a backend may tell of its work.

Nothing here knows a backend by name or reaches over a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytest
from numpy.typing import NDArray

from convservice.bands import Band, TensorSpec
from convservice.dtypes import DTYPES, FLOAT32, FLOAT64, DType, dtype_of
from convservice.geometry import SampleShape
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import INPUT, Network, Node, Residual
from convservice.wire.enums import Precision
from convservice.wire.headers import ResultSpec
from convservice_backends.cuda.algorithms.tensor_core import tf32_roundoff
from convservice_backends.cuda.algorithms.winograd import error_bound
from convservice_backends.interface import Backend, PreparedNetwork, Session
from convservice_backends.reference import Expected, layer_reference

Array = NDArray[Any]
Floats = NDArray[np.float64]

FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_float)
INTEGERS = tuple(dtype for dtype in DTYPES if not dtype.is_float)

EXAMPLE_INPUT = ((3, 3, 2, 1, 0), (0, 0, 1, 3, 1), (3, 1, 2, 2, 3), (2, 0, 0, 2, 2), (2, 0, 0, 0, 1))
EXAMPLE_WEIGHT = ((0, 1, 2), (2, 2, 0), (0, 1, 2))
EXAMPLE_MAP = ((12, 12, 17), (10, 17, 19), (9, 6, 14))


def worked_example(rank: int, x_dtype: DType, weight_dtype: DType) -> tuple[Array, Array, Array]:
    """The worked example as (x, weight, feature map), each with its leading sizes of 1, in 1-D to 3-D.

    1-D has the example's middle row under the filter's middle row; 3-D has the example as the second of
    three planes, under a filter of two planes whose first is zero.
    """
    x, weight, fm = np.array(EXAMPLE_INPUT), np.array(EXAMPLE_WEIGHT), np.array(EXAMPLE_MAP)
    if rank == 1:
        x, weight = x[2], weight[1]
        fm = np.array([x[i : i + 3] @ weight for i in range(3)])
    elif rank == 3:
        x = np.stack([np.full_like(x, 3), x, x[::-1]])
        weight = np.stack([np.zeros_like(weight), weight])
        flipped = x[2]
        last = [[(flipped[i : i + 3, j : j + 3] * weight[1]).sum() for j in range(3)] for i in range(3)]
        fm = np.stack([fm, np.array(last)])
    return (
        x[None, None].astype(x_dtype.numpy),
        weight[None, None].astype(weight_dtype.numpy),
        fm[None, None].astype(weight_dtype.numpy),
    )


def random_array(rng: np.random.Generator, shape: Sequence[int], dtype: DType) -> Array:
    """Normally distributed numbers of a float dtype, or the whole range of an integer one."""
    if dtype.is_float:
        return rng.normal(size=shape).astype(dtype.numpy)
    info = np.iinfo(dtype.numpy)
    return rng.integers(info.min, info.max, size=shape, endpoint=True, dtype=dtype.numpy)


def small_integers(rng: np.random.Generator, shape: Sequence[int], dtype: DType) -> Array:
    """Integers from -4 to 4 (0 to 4 where unsigned) in any dtype: sums of their products are exact."""
    low = 0 if dtype.name.startswith("u") else -4
    return rng.integers(low, 4, size=shape, endpoint=True).astype(dtype.numpy)


def nothing_wrong() -> None:
    """The `Check` of a session that is never cancelled."""


def every_map(network: Network) -> Network:
    """The same network with the feature map of every node among its outputs, under the node's id."""
    return Network(network.nodes, {node.id: node.id for node in network.nodes})


def spec_of(x: Array, band_rows: int | None = None, *, announced: bool = True) -> TensorSpec:
    """The tensor that `x`, shape (N, channels, *spatial), vectors (N, features), is."""
    if x.ndim == 2:
        return TensorSpec(dtype_of(x.dtype), SampleShape.of_vector(x.shape[1]), x.shape[0], 1)
    sample = SampleShape(x.shape[1], x.shape[2] if announced else None, tuple(x.shape[3:]))
    return TensorSpec(dtype_of(x.dtype), sample, x.shape[0], band_rows or x.shape[2])


def bands_of(x: Array, rows: int | None) -> Iterator[Band]:
    """`x` as bands of `rows` rows of one sample; all of it as one band where not given."""
    if x.ndim == 2:
        x = x[..., None]  # vectors flow as one row
    if rows is None:
        yield Band(x)
        return
    for sample in range(x.shape[0]):
        for first in range(0, x.shape[2], rows):
            yield Band(x[sample : sample + 1, :, first : first + rows], sample, first)


class Collector:
    """Puts bands together again, and demands that they come in order, without gaps or overlaps."""

    def __init__(self, outputs: Iterable[str]) -> None:
        self._samples: dict[str, list[list[Array]]] = {name: [] for name in outputs}

    def take(self, band: Band) -> None:
        """Keeps a copy: the session may use the array again."""
        samples = self._samples[band.output]
        copies = [np.array(sample, copy=True) for sample in band.array]
        if band.first_row == 0:
            assert band.sample == len(samples), f"sample {band.sample} begins after {len(samples)} others"
            samples.extend([copy] for copy in copies)
        else:
            rows = sum(part.shape[1] for part in samples[-1])
            assert (band.sample, band.first_row, len(copies)) == (len(samples) - 1, rows, 1), "rows in order"
            samples[-1].append(copies[0])

    def arrays(self, results: Iterable[ResultSpec]) -> dict[str, Array]:
        """Output name to (N, channels, *spatial), vectors (N, features)."""
        found: dict[str, Array] = {}
        for result in results:
            sample = result.spec.sample
            whole = [np.concatenate(parts, axis=1) for parts in self._samples[result.name]]
            none = (0, sample.channels, sample.rows or 0, *sample.rest)
            array = np.stack(whole) if whole else np.empty(none, result.spec.dtype.numpy)
            found[result.name] = array[..., 0] if sample.vector else array
        return found


def run(
    prepared: PreparedNetwork,
    x: Array,
    rows: int | None = None,
    *,
    out_dtype: DType | None = None,
    announced: bool = True,
    watch: Callable[[int, Band], None] | None = None,
) -> dict[str, Array]:
    """Sends `x` through a prepared network in-process, in bands of `rows` rows.

    Args:
        prepared: the network.
        x: (N, channels, *spatial).
        rows: rows in a band; everything at once where not given.
        out_dtype: of the results.
        announced: whether the height is told beforehand.
        watch: given how many input rows (over all samples) had been handed over when a band came, and it.
    """
    plan = prepared.plan(spec_of(x, rows, announced=announced), out_dtype)
    collector = Collector(prepared.network.outputs)
    session = prepared.open(plan, nothing_wrong)
    try:
        for sent, band in _driven(session, x, rows):
            if watch is not None:
                watch(sent, band)
            collector.take(band)
    finally:
        session.close()
    return collector.arrays(plan.results)


def _driven(session: Session, x: Array, rows: int | None) -> Iterator[tuple[int, Band]]:
    sent = 0
    for given in bands_of(x, rows):
        sent += given.array.shape[0] * given.array.shape[2]
        for bands in (session.submit(given), session.drain()):
            for band in bands:
                yield sent, band
    for band in session.finish():
        yield sent, band


def prepared(backend: Backend, network: Network, precision: Precision = Precision.HIGH) -> PreparedNetwork:
    """A network on a backend."""
    return backend.prepare(network, precision)


def compute(
    backend: Backend, network: Network, x: Array, *, precision: Precision = Precision.HIGH, **options: Any
) -> dict[str, Array]:
    """Prepares `network` and sends `x` through it; see `run`."""
    return run(prepared(backend, network, precision), x, **options)


def check_every_layer(
    network: Network, x: Array, maps: Mapping[str, Array], out: DType | None = None
) -> None:
    """Demands of every node's map what the reference says for the very input that the node received.

    Args:
        network: the network; its output dtype must not have narrowed the maps given here.
        x: its input.
        maps: node id to feature map.
        out: dtype of the maps where it is not the network's own; for networks of one layer.
    """
    own = network.dtype(dtype_of(x.dtype))
    for node in network.nodes:
        given = [x if source == "input" else maps[source] for source in node.inputs]
        expected = layer_reference(node.layer, given, own, out or own)
        assert_expected(f"node {node.id}, {node.layer!r}, x {x.shape} {x.dtype}", expected, maps[node.id])


def fast_reference(layer: Conv, x: Array, algorithm: str) -> Expected:
    """What a convolution under `Precision.FAST` should give, linear or with a relu, by what computes it.

    An algorithm that breaks the bound of `Precision.HIGH` documents its own, and is in `FAST_ERRORS`; all
    others keep that of `HIGH`.
    """
    own = Network([layer]).dtype(dtype_of(x.dtype))
    expected = layer_reference(layer, x, own, own)
    if own != FLOAT32 or algorithm not in FAST_ERRORS:
        return expected
    error = expected.error + FAST_ERRORS[algorithm](layer, x)
    return Expected(expected.value, error, exact=False, dtype=own)


def _winograd_error(layer: Conv, x: Array) -> Floats:
    """The largest of all inputs stands for the largest of each tile: looser."""
    norms = np.abs(layer.weight.astype(np.float64)).reshape(layer.out_channels, -1).sum(axis=1)
    largest = np.abs(x[np.isfinite(x)].astype(np.float64)).max(initial=0.0)
    bound = error_bound(layer.weight.shape[1], np.asarray(largest), norms)
    return np.asarray(bound.reshape(1, -1, *(1 for _ in layer.kernel)))


def _tf32_error(layer: Conv, x: Array) -> Floats:
    """A share of the sum of |x||w| and |bias|."""
    bias = None if layer.bias is None else np.abs(layer.bias)
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    absolute = Conv(np.abs(layer.weight), bias, padding_mode=layer.padding_mode, **geometry)
    magnitude = layer_reference(absolute, np.abs(x.astype(np.float64)), FLOAT64, FLOAT64).value
    return np.asarray(tf32_roundoff(math.prod(layer.weight.shape[1:])) * magnitude)


FAST_ERRORS: Mapping[str, Callable[[Conv, Array], Floats]] = {
    "winograd": _winograd_error,
    "tensor_core": _tf32_error,
}
"""What an algorithm may add to the error of float32 sums under `Precision.FAST`."""


def assert_expected(name: str, expected: Expected, actual: Array) -> None:
    """Demands shape, dtype and every element; says where and by how much it is wrong."""
    assert actual.shape == expected.value.shape, f"{name}: {actual.shape}, expected {expected.value.shape}"
    assert dtype_of(actual.dtype) == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    places = np.argwhere(expected.wrong(actual))
    if len(places):
        lines = [f"{name}: {len(places)} of {actual.size} elements are wrong"]
        for place in places[:5]:
            at = tuple(int(i) for i in place)
            allowed = "exactly" if expected.exact else f"within {expected.bound[at]:.3g}"
            lines.append(f"  at {at}: {actual[at]!r}, expected {expected.value[at]!r} {allowed}")
        raise AssertionError("\n".join(lines))


def assert_same_bits(expected: Mapping[str, Array], actual: Mapping[str, Array], how: str) -> None:
    """Demands equality bit for bit of every output."""
    assert expected.keys() == actual.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), how
        as_bits = np.dtype(f"u{want.dtype.itemsize}")
        differ = np.argwhere(
            np.ascontiguousarray(got).view(as_bits) != np.ascontiguousarray(want).view(as_bits)
        )
        if len(differ):
            at = tuple(int(i) for i in differ[0])
            raise AssertionError(
                f"{how}: output {name!r} differs in {len(differ)} of {want.size} elements, first at {at}:"
                f" {got[at]!r}, {want[at]!r}"
            )


def chain(rng: np.random.Generator, dtype: DType) -> Network:
    """Three convolutions, the middle one with a stride, dilation and reflection: rows overlap everywhere."""
    return Network(
        [
            Conv(random_array(rng, (4, 2, 3, 3), dtype), random_array(rng, (4,), dtype), padding=1),
            Conv(
                random_array(rng, (6, 2, 3, 2), dtype),
                stride=(2, 1),
                dilation=(2, 1),
                groups=2,
                padding=((2, 3), (1, 0)),
                padding_mode="reflect",
                activation="relu",
            ),
            Conv(random_array(rng, (3, 6, 2, 3), dtype), padding="same", padding_mode="replicate"),
        ]
    )


def residual(rng: np.random.Generator, dtype: DType) -> Network:
    """Branches of different delay, one behind the other, between windows of every kind, and two heads: the
    maps, and scores. For two channels of at least 2 rows and columns."""

    def weight(*shape: int) -> Array:
        return random_array(rng, shape, dtype)

    body = [Conv(weight(4, 4, 5, 3), padding=(2, 1), activation="relu"), Conv(weight(4, 4, 3, 3), padding=1)]
    nodes = Network(
        [
            Conv(weight(4, 2, 3, 3), weight(4), padding=1),
            Residual(body, activation="relu"),
            MaxPool(3, stride=2, padding=1),
            Residual([MaxPool(7, stride=1, padding=3)], [AvgPool(3, stride=1, padding=1)]),
            ConvTranspose(weight(4, 3, 4, 3), weight(3), stride=(2, 1), padding=1, activation="leaky_relu"),
        ]
    ).nodes
    return Network(
        [
            *nodes,
            Node("mean", GlobalAvgPool(), (nodes[-1].id,)),
            Node("largest", GlobalMaxPool(), (nodes[-1].id,)),
            Node("both", Add(), ("mean", "largest")),
            Node("again", Activation("tanh"), ("both",)),
        ],
        {"maps": nodes[-1].id, "scores": "again"},
    )


def deep_network(rng: np.random.Generator) -> Network:
    """Ten layers of all windowed kinds, with a shortcut over the middle ones."""

    def weight(*shape: int) -> Array:
        return random_array(rng, shape, FLOAT32) / np.float32(np.prod(shape[1:])) ** np.float32(0.5)

    layers: dict[str, tuple[Any, tuple[str, ...]]] = {
        "a": (Conv(weight(6, 1, 5, 5), padding=2, activation="relu"), (INPUT,)),
        "b": (MaxPool(3, stride=2, padding=1), ("a",)),
        "c": (Conv(weight(6, 6, 3, 3), padding=1, activation="relu"), ("b",)),
        "d": (Conv(weight(6, 6, 3, 3), padding=(4, 1), dilation=(4, 1)), ("c",)),
        "e": (Add("relu"), ("d", "b")),
        "f": (AvgPool(5, stride=1, padding=2), ("e",)),
        "g": (Conv(weight(6, 1, 3, 3), padding=1, groups=6), ("f",)),
        "h": (Activation("tanh"), ("g",)),
        "i": (ConvTranspose(weight(6, 2, 4, 4), stride=2, padding=1), ("h",)),
        "j": (Conv(weight(1, 2, 7, 1), padding=(3, 0)), ("i",)),
    }
    return Network([Node(name, layer, sources) for name, (layer, sources) in layers.items()])


def every_layer(dtype: DType) -> Network:
    """A small network of every layer there is, on maps (2, 8, 9): residual blocks, three outputs."""
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> Array:
        return random_array(rng, shape, dtype)

    body = (Conv(weight(4, 4, 3, 3), weight(4), padding=1, activation="relu"), Activation("gelu"))
    nodes = Network(
        [
            Conv(weight(4, 1, 3, 3), weight(4), padding="same", groups=2, padding_mode="reflect"),
            MaxPool(2, ceil_mode=True),
            Residual(body, [AvgPool(3, stride=1, padding=1)], activation="leaky_relu"),
            ConvTranspose(weight(4, 3, 3, 3), weight(3), stride=2, padding=1, output_padding=1),
            MaxPool((3, 2), stride=(2, 2), padding=((1, 1), (0, 1)), dilation=(1, 1)),
            LocallyConnected(weight(5, 3, 4, 4, 1, 2), weight(5, 4, 4), activation="tanh"),
        ]
    ).nodes
    last = nodes[-1].id
    return Network(
        [
            *nodes,
            Node("mean", GlobalAvgPool(), (last,)),
            Node("largest", GlobalMaxPool(), (last,)),
            Node("both", Add(), ("mean", "largest")),
            Node("flat", Flatten(), ("both",)),
            Node("scores", Linear(weight(3, 5), weight(3), activation="sigmoid"), ("flat",)),
            Node("all", Flatten(), (last,)),
            Node("wide", Linear(weight(2, 80)), ("all",)),
        ],
        {"scores": "scores", "wide": "wide", "maps": last},
    )


def trunk_with_two_heads(rng: np.random.Generator, dtype: DType) -> Network:
    """One convolution whose map two others take, one of them of lower height; both are outputs."""
    return Network(
        [
            Node("trunk", Conv(random_array(rng, (4, 2, 3, 3), dtype), padding=1, activation="relu")),
            Node("wide", Conv(random_array(rng, (2, 4, 5, 5), dtype), padding=2), ("trunk",)),
            Node("low", Conv(random_array(rng, (3, 4, 2, 2), dtype), stride=3), ("trunk",)),
        ],
        {"wide": "wide", "low": "low"},
    )


@runtime_checkable
class CountsWork(Protocol):
    """A backend for tests of a limited size.

    Attributes:
        name: its name.
        most_multiply_adds: what one test may ask of it.
        multiply_adds: all that it, and others of its kind in this process, ever did.
    """

    @property
    def name(self) -> str: ...
    @property
    def most_multiply_adds(self) -> int: ...
    @property
    def multiply_adds(self) -> int: ...


@contextmanager
def held_to_means(backend: object, wanted: int | None) -> Generator[None]:
    """Holds what is done inside to what a backend is for, if that one counts work.

    A test that wants more than the most is skipped; one that does more than it wanted, or than the most where
    it did not say, fails.

    Args:
        backend: the backend.
        wanted: multiply-adds that the test says it asks for; None where it says nothing.
    """
    if not isinstance(backend, CountsWork):
        yield
        return
    most, before = backend.most_multiply_adds, backend.multiply_adds
    if wanted is not None and wanted > most:
        which = f"backend {backend.name!r} is for tests of at most {most}"
        pytest.skip(f"it takes {wanted} multiply-adds; {which}")
    yield
    done, allowed = backend.multiply_adds - before, most if wanted is None else wanted
    if done > allowed:
        pytest.fail(
            f"it took {done} multiply-adds of backend {backend.name!r}, and may take {allowed}: make it"
            " smaller, or say so with pytest.mark.multiply_adds"
        )


@runtime_checkable
class TellsDevicePeak(Protocol):
    """A backend that knows what its sessions took of its devices."""

    def device_peak(self) -> int:
        """Most memory that sessions held at a time on any one device since this was last asked."""
        ...
