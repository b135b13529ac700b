"""Where sizes, widths and batches meet limits: weights of one width used for another, working memory that is
planned for other launches than come, coordinates beyond 32 bits."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from convservice.bands import Band
from convservice.dtypes import DTYPES, FLOAT32, DType
from convservice.errors import InvalidRequest
from convservice.geometry import MAX_SIZE
from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda import pieces
from convservice_backends.cuda.algorithms import NAMES
from convservice_emulator.backend import EmulatorBackend
from tests.helpers import (
    Array,
    Collector,
    assert_same_bits,
    check_every_layer,
    every_map,
    nothing_wrong,
    random_array,
    run,
    spec_of,
)

FLOAT16 = DTYPES[2]

LAYERS: dict[str, tuple[tuple[int, ...], DType]] = {
    "direct": ((2, 3, 3, 3), FLOAT32),
    "depthwise": ((3, 3, 3, 3), FLOAT32),
    "implicit_gemm": ((40, 16, 3, 3), FLOAT32),
    "tensor_core": ((40, 16, 3, 3), FLOAT16),
    "winograd": ((32, 16, 3, 3), FLOAT32),
    "fourier": ((2, 1, 15, 15), FLOAT32),
}
"""Algorithm to the filters of a layer that it fits, and their dtype."""


@pytest.mark.parametrize("algorithm", NAMES)
def test_one_network_takes_rows_of_any_width(algorithm: str, rng: np.random.Generator) -> None:
    shape, dtype = LAYERS[algorithm]
    network = Network([Conv(random_array(rng, shape, dtype), padding="same")])
    backend = EmulatorBackend(algorithm=algorithm)
    kept = backend.prepare(network, Precision.FAST)
    for width in (40, 300, 40, 9):
        x = random_array(rng, (1, shape[1], 16, width), dtype)
        plan = kept.plan(spec_of(x))
        assert set(plan.algorithms.values()) == {algorithm}
        alone = run(backend.prepare(network, Precision.FAST), x)
        assert_same_bits(alone, run(kept, x), f"rows of {width} elements after others")


def in_pieces(backend: EmulatorBackend, network: Network, x: Array, samples: int) -> dict[str, Array]:
    """Sends `x` through, so many samples at a time."""
    prepared = backend.prepare(network, Precision.FAST)
    plan = prepared.plan(spec_of(x))
    collector = Collector(network.outputs)
    with closing(prepared.open(plan, nothing_wrong)) as session:
        for first in range(0, len(x), samples):
            for band in session.submit(Band(x[first : first + samples], first)):
                collector.take(band)
        for band in session.finish():
            collector.take(band)
    return collector.arrays(plan.results)


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "tensor_core", "winograd", "fourier"])
def test_launches_of_any_size_find_their_working_memory(
    algorithm: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Few samples at a time may take more rows each, and more working memory in all, than many."""
    shape, dtype = LAYERS[algorithm]
    shape = (8, 256, 3, 3) if algorithm in ("implicit_gemm", "tensor_core") else shape
    network = Network([Conv(random_array(rng, shape, dtype), padding="same")])
    x = random_array(rng, (13, shape[1], 7, 7), dtype)
    expected = run(EmulatorBackend(algorithm=algorithm).prepare(network, Precision.FAST), x)
    work = shape[0] * 7 * int(np.prod(shape[1:]))  # of one row of one sample
    for most, samples in itertools.product((25, 38, 51), (1, 5, 7, 13)):
        monkeypatch.setattr(pieces, "MOST_WORK", most * work)
        found = in_pieces(EmulatorBackend(algorithm=algorithm), network, x, samples)
        assert_same_bits(expected, found, f"{samples} samples at a time, launches of at most {most} rows")


FAR = 2**30
FAR_AWAY: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dilation": ((1, 3), {"dilation": (1, FAR), "padding": ((0, 0), (MAX_SIZE, 5)), "stride": (1, FAR // 2)}),
    "kernel of five": (
        (1, 5),
        {"dilation": (1, FAR), "padding": ((0, 0), (MAX_SIZE, MAX_SIZE)), "stride": (1, FAR)},
    ),
    "replicate": (
        (1, 2),
        {
            "dilation": (1, FAR),
            "padding": ((0, 0), (MAX_SIZE, 0)),
            "stride": (1, FAR),
            "padding_mode": "replicate",
        },
    ),
    "rows": ((3, 1), {"dilation": (FAR, 1), "padding": ((MAX_SIZE, MAX_SIZE), (0, 0)), "stride": (FAR, 1)}),
}


@pytest.mark.parametrize("name", FAR_AWAY)
@pytest.mark.parametrize("rows", [None, 1])
def test_windows_may_reach_as_far_as_numbers_go(
    name: str, rows: int | None, rng: np.random.Generator
) -> None:
    kernel, options = FAR_AWAY[name]
    network = every_map(Network([Conv(random_array(rng, (2, 1, *kernel), FLOAT32), **options)]))
    x: Array = random_array(rng, (1, 1, 6, 5), FLOAT32)
    found = run(EmulatorBackend().prepare(network, Precision.HIGH), x, rows)
    check_every_layer(network, x, found)


def test_rows_that_reflection_holds_count_as_rows_under_a_window() -> None:
    """Of 45 rows of 2^26 elements: kernels that count them with 32 bits leave them to one that does not."""
    padding: Any = ((20, 20), (1, 1))
    for mode, algorithm in (("zeros", "depthwise"), ("reflect", "direct")):
        layer = Conv(np.ones((1, 1, 3, 3), np.float32), padding=padding, padding_mode=mode)
        prepared = EmulatorBackend().prepare(Network([layer]), Precision.HIGH)
        spec = spec_of(np.broadcast_to(np.float32(0), (1, 1, 60, 1 << 26)))
        assert set(prepared.plan(spec).algorithms.values()) == {algorithm}


def test_a_row_of_too_many_positions_is_refused() -> None:
    layer = Conv(np.ones((1, 1, 1, 1, 1), np.float32), padding=((0, 0), (40_000, 0), (60_000, 0)))
    prepared = EmulatorBackend().prepare(Network([layer]), Precision.HIGH)
    with pytest.raises(InvalidRequest, match="at most 2147483647 positions on a device, not 2400"):
        prepared.plan(spec_of(np.zeros((1, 1, 2, 2, 2), np.float32)))
