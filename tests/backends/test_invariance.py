"""The same bits for any cut, any number of workers, any company: on random floats, every backend.

`test_processors.py` runs this module again under other kernels of the BLAS library.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from convservice.dtypes import FLOAT32, FLOAT64, DType, dtype_of
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import SampleShape
from convservice.layers import (
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
from convservice.network import Network, Node
from convservice.wire.enums import Precision
from convservice_backends.interface import Backend, PreparedNetwork
from tests.helpers import (
    Array,
    assert_same_bits,
    chain,
    prepared,
    random_array,
    residual,
    run,
    spec_of,
    trunk_with_two_heads,
)


@dataclass(frozen=True)
class Setup:
    """A network, the shape and dtype of a batch for it, and what the caller allows."""

    network: Callable[[np.random.Generator], Network]
    shape: tuple[int, ...]
    dtype: DType = FLOAT32
    precision: Precision = Precision.HIGH

    def given(self, rng: np.random.Generator) -> Given:
        return Given(self.network(rng), random_array(rng, self.shape, self.dtype), self.precision)


class Given(NamedTuple):
    """A network, a batch for it, and what the caller allows."""

    network: Network
    x: Array
    precision: Precision

    def on(self, backend: Backend) -> PreparedNetwork:
        return prepared(backend, self.network, self.precision)


def conv(*weight: int, dtype: DType = FLOAT32, **options: object) -> Callable[[np.random.Generator], Network]:
    def make(rng: np.random.Generator) -> Network:
        layer = Conv(random_array(rng, weight, dtype), random_array(rng, weight[:1], dtype), **options)  # type: ignore[arg-type]
        return Network([layer])

    return make


def two_convolutions(rng: np.random.Generator) -> Network:
    """Of 3x3, stride 1 and channels enough for any algorithm."""
    layers = [((16, 2, 3, 3), "zeros"), ((20, 16, 3, 3), "reflect")]
    return Network(
        [Conv(random_array(rng, weight, FLOAT32), padding=1, padding_mode=mode) for weight, mode in layers]
    )


def pooled(rng: np.random.Generator) -> Network:
    """Windows of every kind behind a convolution."""
    return Network(
        [
            Conv(random_array(rng, (3, 2, 3, 3), FLOAT32), padding=1),
            MaxPool(3, stride=2, ceil_mode=True),
            AvgPool((9, 2), stride=1, padding=((4, 4), (0, 1)), count_include_pad=False),
            MaxPool(2, stride=1, dilation=3),
        ]
    )


def transposed(rng: np.random.Generator) -> Network:
    """Up to twice the size and a half again, by phases of unlike windows."""
    weight, bias = random_array(rng, (4, 3, 5, 4), FLOAT32), random_array(rng, (6,), FLOAT32)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    second = random_array(rng, (6, 2, 3, 3), FLOAT32)
    return Network(
        [
            ConvTranspose(weight, bias, **options, activation="silu"),
            ConvTranspose(second, stride=3, dilation=2, output_padding=1),
        ]
    )


def local(rng: np.random.Generator) -> Network:
    """A filter of its own at every position of a map of 120 x 40."""
    weight = random_array(rng, (6, 2, 120, 40, 3, 3), FLOAT32)
    bias = random_array(rng, (6, 120, 40), FLOAT32)
    return Network([LocallyConnected(weight, bias, padding=1, groups=2, activation="gelu")])


def means(rng: np.random.Generator) -> Network:
    """Global pooling both ways of a map with several blocks of rows."""
    nodes = [
        Node("map", Conv(random_array(rng, (3, 2, 3, 3), FLOAT32), padding=1)),
        Node("mean", GlobalAvgPool(), ("map",)),
        Node("largest", GlobalMaxPool(), ("map",)),
    ]
    return Network(nodes, {"mean": "mean", "largest": "largest"})


def classifier(rng: np.random.Generator) -> Network:
    """Scores of a map that is flattened, and of another too large for one block."""
    layers = [
        Conv(random_array(rng, (2, 1, 3, 3), FLOAT32), padding=1),
        Flatten(),
        Linear(random_array(rng, (9, 2 * 700 * 200), FLOAT32), activation="tanh"),
        Linear(random_array(rng, (5, 9), FLOAT32)),
    ]
    return Network(layers)


FAST = Precision.FAST

SETUPS = {
    "blocks of rows": Setup(conv(8, 3, 3, 3, padding=1), (2, 3, 230, 130)),
    "float64": Setup(conv(7, 3, 3, 3, dtype=FLOAT64, activation="gelu"), (2, 3, 190, 101), FLOAT64),
    "float16": Setup(
        conv(5, 4, 3, 3, dtype=dtype_of("float16"), stride=2), (2, 4, 300, 99), dtype_of("float16")
    ),
    "bfloat16": Setup(
        conv(5, 4, 3, 2, dtype=dtype_of("bfloat16"), activation="tanh"), (2, 4, 90, 61), dtype_of("bfloat16")
    ),
    "uint8": Setup(
        conv(6, 3, 5, 5, padding="same", padding_mode="reflect"), (2, 3, 120, 90), dtype_of("uint8")
    ),
    "parts of rows": Setup(conv(4, 6, 3, 3, padding=1, activation="silu"), (1, 6, 9, 7001)),
    "deep": Setup(conv(33, 130, 3, 3), (2, 130, 40, 23)),
    "deep float16": Setup(
        conv(16, 256, 3, 3, dtype=dtype_of("float16"), padding=1), (2, 256, 40, 8), dtype_of("float16")
    ),
    "depthwise": Setup(conv(16, 1, 3, 3, groups=16, padding="same", dilation=2), (2, 16, 120, 47)),
    "1-D": Setup(conv(5, 2, 9, stride=3, padding=4, padding_mode="replicate"), (2, 2, 5000)),
    "3-D": Setup(conv(4, 2, 3, 3, 3, padding=1, activation="sigmoid"), (2, 2, 40, 21, 33)),
    "one filter": Setup(conv(1, 3, 7, 7), (2, 3, 120, 77)),
    "small samples": Setup(conv(9, 4, 3, 3, padding=1), (37, 4, 7, 7)),
    "small kernels of one": Setup(conv(12, 16, 1, 1), (21, 16, 5, 11)),
    "chain": Setup(lambda rng: chain(rng, FLOAT32), (2, 2, 400, 60)),
    "small chain": Setup(lambda rng: chain(rng, FLOAT32), (19, 2, 12, 9)),
    "two heads": Setup(lambda rng: trunk_with_two_heads(rng, FLOAT32), (2, 2, 300, 80)),
    "large filters": Setup(conv(6, 20, 15, 15, padding=7), (2, 20, 40, 30)),
    "pooled": Setup(pooled, (2, 2, 330, 70)),
    "small pooled": Setup(pooled, (11, 2, 23, 14)),
    "transposed": Setup(transposed, (2, 4, 90, 30)),
    "small transposed": Setup(transposed, (9, 4, 5, 6)),
    "local": Setup(local, (2, 4, 120, 40)),
    "means": Setup(means, (2, 2, 400, 90)),
    "residual": Setup(lambda rng: residual(rng, FLOAT32), (2, 2, 330, 60)),
    "residual float16": Setup(
        lambda rng: residual(rng, dtype_of("float16")), (2, 2, 330, 40), dtype_of("float16")
    ),
    "small residual": Setup(lambda rng: residual(rng, FLOAT32), (13, 2, 12, 11)),
    "classifier": Setup(classifier, (2, 1, 700, 200)),
    "fast": Setup(conv(33, 20, 3, 3, padding=1, activation="tanh"), (2, 20, 60, 33), precision=FAST),
    "fast parts of rows": Setup(conv(17, 16, 3, 3, padding=(0, 1)), (1, 16, 7, 1501), precision=FAST),
    "fast small samples": Setup(conv(18, 16, 3, 3, padding=1), (21, 16, 7, 7), precision=FAST),
    "fast chain": Setup(two_convolutions, (2, 2, 90, 50), precision=FAST),
}


@pytest.fixture(params=SETUPS, ids=str)
def setup(request: pytest.FixtureRequest, rng: np.random.Generator) -> Given:
    """A network and a batch for it."""
    return SETUPS[request.param].given(rng)


def test_the_cut_into_bands_changes_nothing(backend: Backend, setup: Given) -> None:
    ready = setup.on(backend)
    whole = run(ready, setup.x)
    for rows in (1, 2, 3, 7, 64):
        assert_same_bits(whole, run(ready, setup.x, rows), f"bands of {rows} rows")


def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend: Backend, setup: Given) -> None:
    x, ready = setup.x, setup.on(backend)
    whole = run(ready, x)
    for sample in {0, len(x) // 2, len(x) - 1}:
        alone = run(ready, x[sample : sample + 1])
        there = {name: array[sample : sample + 1] for name, array in whole.items()}
        assert_same_bits(there, alone, f"sample {sample} alone")
    twice = run(ready, np.concatenate([x[1:], x]))
    assert_same_bits(whole, {name: array[len(x) - 1 :] for name, array in twice.items()}, "a larger batch")


def test_the_number_of_workers_changes_nothing(variants: tuple[Backend, ...], setup: Given) -> None:
    first = run(setup.on(variants[0]), setup.x)
    for backend in variants[1:]:
        workers = backend.describe().workers
        for rows in (None, 5):
            found = run(setup.on(backend), setup.x, rows)
            assert_same_bits(first, found, f"{workers} workers, bands of {rows} rows")


def test_others_at_the_same_time_change_nothing(backend: Backend, setup: Given) -> None:
    ready = setup.on(backend)
    whole = run(ready, setup.x)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(run, ready, setup.x, rows) for rows in (None, 3, 11, None)]
        for future in futures:
            assert_same_bits(whole, future.result(), "beside others")


def test_preparing_again_changes_nothing(backend: Backend, setup: Given) -> None:
    again = setup._replace(network=Network(setup.network.nodes, setup.network.outputs))
    assert_same_bits(run(setup.on(backend), setup.x), run(again.on(backend), setup.x), "prepared again")


def needs_height(network: Network, x: Array) -> bool:
    """Whether a layer of the network cannot do without the height."""
    try:
        network.shapes(spec_of(x, announced=False).sample)
    except InvalidRequest as error:
        return error.reason == Reason.HEIGHT_REQUIRED
    return False


def as_tall_as_a_block(prepared: PreparedNetwork, x: Array) -> bool:
    """Whether every map is at least one block high, so that its blocks do not depend on the height."""
    spec = spec_of(x)
    sample = SampleShape(x.shape[1], x.shape[2], tuple(x.shape[3:]))
    unknown = prepared.plan(spec_of(x, announced=False))
    shapes = prepared.network.shapes(sample)
    assert prepared.plan(spec).block_rows.keys() == unknown.block_rows.keys()
    return all(shapes[node].height >= rows for node, rows in unknown.block_rows.items())


def test_a_height_that_is_told_at_the_end_changes_nothing_in_tall_samples(
    backend: Backend, rng: np.random.Generator
) -> None:
    compared = 0
    for name, setup in SETUPS.items():
        network, x, precision = setup.given(rng)
        x = x[:1]
        if needs_height(network, x):
            continue
        ready = prepared(backend, network, precision)
        if not as_tall_as_a_block(ready, x):
            continue
        compared += 1
        whole = run(ready, x)
        for rows in (1, 5):
            found = run(ready, x, rows, announced=False)
            assert_same_bits(whole, found, f"{name}, {rows} rows, told at the end")
    assert compared >= 5


@pytest.mark.parametrize(
    ("weight", "width", "dtype"),
    [((8, 3, 3, 3), 90, "float32"), ((16, 256, 3, 3), 8, "float32"), ((16, 256, 3, 3), 8, "float16")],
    ids=["shallow", "deep", "deep float16"],
)
def test_rows_of_whole_blocks_do_not_depend_on_the_height(
    backend: Backend, weight: tuple[int, ...], width: int, dtype: str, rng: np.random.Generator
) -> None:
    network = conv(*weight, dtype=dtype_of(dtype))(rng)
    x = random_array(rng, (1, weight[1], 700 if width > 8 else 360, width), dtype_of(dtype))
    ready = prepared(backend, network)
    block = ready.plan(spec_of(x)).block_rows["layer0"]
    assert block < 300
    whole = run(ready, x)["output"]
    for height in (block + 2, 2 * block + 1, 333, x.shape[2] - 1):
        found = run(ready, x[:, :, :height])["output"]
        assert_same_bits({"o": whole[:, :, : found.shape[2]]}, {"o": found}, f"height {height}")


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("filters", [1, 6])
def test_the_layout_of_the_input_changes_nothing(
    backend: Backend, kernel: tuple[int, int], filters: int, rng: np.random.Generator
) -> None:
    network = Network([Conv(random_array(rng, (filters, 5, *kernel), FLOAT32))])
    x = random_array(rng, (2, 5, 23, 31), FLOAT32)
    ready = prepared(backend, network)
    expected = run(ready, x)
    channels_last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    for layout in (
        np.asfortranarray(x),
        channels_last,
        np.repeat(x, 2, axis=3)[..., ::2],
        x[:, :, ::-1][:, :, ::-1],
    ):
        assert_same_bits(expected, run(ready, layout), f"strides {layout.strides}")
