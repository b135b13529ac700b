"""Every layer beside PyTorch, which is given the same numbers, over random geometries."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from convservice.errors import InvalidRequest
from convservice.layers import (
    FUNCTIONS,
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import Network, Node
from convservice_backends.interface import Backend
from tests.helpers import Array, compute

pytestmark = pytest.mark.torch

try:
    torch: Any = import_module("torch")
    functional: Any = import_module("torch.nn.functional")
except ImportError:  # the tests here are not taken in by any run that has no PyTorch
    torch = functional = None

SEEDS = st.integers(0, 2**32 - 1)
RANKS = st.integers(1, 3)
MANY = settings(max_examples=max(200, settings().max_examples))


def close(found: Array, exact: Any, magnitude: Any, products: int) -> None:
    """Demands the promised bound of float32 results, beside PyTorch's in float64.

    Args:
        found: the result.
        exact: what PyTorch makes of the same numbers in float64.
        magnitude: what it makes of their magnitudes.
        products: in a sum.
    """
    expected, sums = exact.numpy(), magnitude.numpy()
    assert found.shape == expected.shape
    unit = 2.0**-24
    bound = (products + 3) * unit * sums + unit * np.abs(expected) + (products + 1) * 2.0**-126
    wrong = np.abs(found - expected) > bound
    assert not wrong.any(), np.argwhere(wrong)[:3]


def double(array: Array) -> Any:
    return torch.from_numpy(array.astype(np.float64))


def per_axis(draw: Callable[[Any], Any], rank: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(rank))


def run(backend: Backend, layer: Layer, x: Array) -> Array:
    """The layer's result; a geometry without one is not taken."""
    network = Network([layer])
    try:
        network.output_shape(x.shape)
    except InvalidRequest:
        assume(False)
    return compute(backend, network, x)["output"]


def values(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(size=shape).astype(np.float32)


@MANY
@given(SEEDS, RANKS, st.data())
def test_convolution(backend: Backend, seed: int, rank: int, data: st.DataObject) -> None:
    rng, draw = np.random.default_rng(seed), data.draw
    groups, kernel = draw(st.integers(1, 3)), per_axis(draw, rank, 1, 3)
    weight = values(rng, 2 * groups, 2, *kernel)
    bias = values(rng, 2 * groups)
    x = values(rng, 2, 2 * groups, *per_axis(draw, rank, 1, 7))
    options: dict[str, Any] = {
        "stride": per_axis(draw, rank, 1, 3),
        "padding": per_axis(draw, rank, 0, 2),
        "dilation": per_axis(draw, rank, 1, 2),
        "groups": groups,
    }
    reach = [(size - 1) * step for size, step in zip(kernel, options["dilation"], strict=True)]
    if draw(st.booleans()) and not any(total % 2 for total in reach):  # PyTorch warns where it pads unevenly
        options |= {"padding": "same", "stride": (1,) * rank}
    found = run(backend, Conv(weight, bias, **options), x)
    convolve = getattr(functional, f"conv{rank}d")
    exact = convolve(double(x), double(weight), double(bias), **options)
    magnitude = convolve(double(abs(x)), double(abs(weight)), double(abs(bias)), **options)
    close(found, exact, magnitude, weight[0].size)


@MANY
@given(SEEDS, RANKS, st.data())
def test_transposed_convolution(backend: Backend, seed: int, rank: int, data: st.DataObject) -> None:
    rng, draw = np.random.default_rng(seed), data.draw
    groups, kernel = draw(st.integers(1, 3)), per_axis(draw, rank, 1, 3)
    weight, bias = values(rng, 2 * groups, 3, *kernel), values(rng, 3 * groups)
    x = values(rng, 2, 2 * groups, *per_axis(draw, rank, 1, 5))
    stride, dilation = per_axis(draw, rank, 1, 4), per_axis(draw, rank, 1, 3)
    added = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    options: dict[str, Any] = {
        "stride": stride,
        "padding": per_axis(draw, rank, 0, 2),
        "output_padding": added,
        "groups": groups,
        "dilation": dilation,
    }
    found = run(backend, ConvTranspose(weight, bias, **options), x)
    convolve = getattr(functional, f"conv_transpose{rank}d")
    exact = convolve(double(x), double(weight), double(bias), **options)
    magnitude = convolve(double(abs(x)), double(abs(weight)), double(abs(bias)), **options)
    close(found, exact, magnitude, 2 * int(np.prod(kernel)))


@MANY
@given(SEEDS, RANKS, st.booleans(), st.data())
def test_max_pooling(backend: Backend, seed: int, rank: int, ceil_mode: bool, data: st.DataObject) -> None:
    rng, draw = np.random.default_rng(seed), data.draw
    kernel = per_axis(draw, rank, 1, 4)
    options: dict[str, Any] = {
        "stride": per_axis(draw, rank, 1, 4),
        "padding": tuple(draw(st.integers(0, size // 2)) for size in kernel),
        "dilation": per_axis(draw, rank, 1, 3),
        "ceil_mode": ceil_mode,
    }
    x = values(rng, 2, 3, *per_axis(draw, rank, 1, 9))
    x.ravel()[rng.integers(x.size)] = data.draw(st.sampled_from([0.0, -np.inf, np.nan]))
    found = run(backend, MaxPool(kernel, **options), x)
    exact = getattr(functional, f"max_pool{rank}d")(torch.from_numpy(x), kernel, **options)
    assert np.array_equal(found, exact.numpy(), equal_nan=True)


@MANY
@given(SEEDS, RANKS, st.data())
def test_average_pooling(backend: Backend, seed: int, rank: int, data: st.DataObject) -> None:
    rng, draw = np.random.default_rng(seed), data.draw
    kernel = per_axis(draw, rank, 1, 4)
    options: dict[str, Any] = {
        "stride": per_axis(draw, rank, 1, 4),
        "padding": tuple(draw(st.integers(0, size // 2)) for size in kernel),
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
    }
    x = values(rng, 2, 3, *per_axis(draw, rank, 1, 9))
    found = run(backend, AvgPool(kernel, **options), x)
    average = getattr(functional, f"avg_pool{rank}d")
    try:
        exact = average(double(x), kernel, **options)
    except RuntimeError:  # of a window larger than the volume, which it takes with ceil_mode in 1-D and 2-D
        assume(False)
    close(found, exact, average(double(abs(x)), kernel, **options), 64)


@given(SEEDS, RANKS, st.data())
def test_pooling_of_whole_maps(backend: Backend, seed: int, rank: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x = values(rng, 2, 3, *per_axis(data.draw, rank, 1, 9))
    largest = getattr(functional, f"adaptive_max_pool{rank}d")(torch.from_numpy(x), 1)
    assert np.array_equal(run(backend, GlobalMaxPool(), x), largest.numpy())
    average = getattr(functional, f"adaptive_avg_pool{rank}d")
    close(run(backend, GlobalAvgPool(), x), average(double(x), 1), average(double(abs(x)), 1), x[0, 0].size)


@MANY
@given(SEEDS, st.integers(1, 2), st.data())
def test_weights_of_their_own(backend: Backend, seed: int, groups: int, data: st.DataObject) -> None:
    """PyTorch has no such layer: its windows laid out (`unfold`), each with filters of its own."""
    rng, draw = np.random.default_rng(seed), data.draw
    kernel = per_axis(draw, 2, 1, 3)
    options: dict[str, Any] = {
        "stride": per_axis(draw, 2, 1, 3),
        "padding": per_axis(draw, 2, 0, 2),
        "dilation": per_axis(draw, 2, 1, 2),
    }
    x = values(rng, 2, 2 * groups, *per_axis(draw, 2, 1, 7))
    shared = Conv(np.ones((3 * groups, 2, *kernel), np.float32), groups=groups, **options)
    try:
        _, *sizes = shared.output_shape(x.shape[1:])
    except InvalidRequest:
        assume(False)
        raise
    weight, bias = values(rng, 3 * groups, 2, *sizes, *kernel), values(rng, 3 * groups, *sizes)
    found = run(backend, LocallyConnected(weight, bias, groups=groups, **options), x)

    def unshared(given: Array, filters: Array, thresholds: Array) -> Any:
        columns = functional.unfold(double(given), kernel, **options)
        columns = columns.reshape(2, groups, 2, kernel[0] * kernel[1], *sizes)
        own = double(filters).reshape(groups, 3, 2, *sizes, -1)
        return torch.einsum("ngckij,gocijk->ngoij", columns, own).reshape(2, -1, *sizes) + double(thresholds)

    exact, magnitude = unshared(x, weight, bias), unshared(abs(x), abs(weight), abs(bias))
    close(found, exact, magnitude, 2 * kernel[0] * kernel[1])


@given(SEEDS, st.integers(1, 40), st.integers(1, 9))
def test_full_connectivity(backend: Backend, seed: int, given_features: int, features: int) -> None:
    rng = np.random.default_rng(seed)
    x = values(rng, 3, given_features)
    weight, bias = values(rng, features, given_features), values(rng, features)
    found = run(backend, Linear(weight, bias), x)
    exact = functional.linear(double(x), double(weight), double(bias))
    magnitude = functional.linear(double(abs(x)), double(abs(weight)), double(abs(bias)))
    close(found, exact, magnitude, given_features)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations(backend: Backend, function: str, rng: np.random.Generator) -> None:
    spread = [rng.normal(size=100) * scale for scale in (1e-3, 1.0, 10.0, 100.0)]
    x = np.concatenate(spread).astype(np.float32).reshape(1, 4, 100)
    found = compute(backend, Network([Activation(function, 0.2)]), x)["output"]
    given_x = double(x)
    exact = {
        "linear": lambda: given_x,
        "relu": lambda: functional.relu(given_x),
        "leaky_relu": lambda: functional.leaky_relu(given_x, 0.2),
        "sigmoid": lambda: torch.sigmoid(given_x),
        "tanh": lambda: torch.tanh(given_x),
        "gelu": lambda: functional.gelu(given_x),
        "silu": lambda: functional.silu(given_x),
    }[function]().numpy()
    unit = 2.0**-24
    assert np.all(np.abs(found - exact) <= 12 * unit * np.maximum(np.abs(exact), np.abs(x)) + 2.0**-126)


def test_a_sum_of_branches(backend: Backend, rng: np.random.Generator) -> None:
    weight, x = values(rng, 2, 2, 3, 3), values(rng, 2, 2, 9, 8)
    network = Network(
        [
            Node("a", Conv(weight, padding=1)),
            Node("b", MaxPool(3, stride=1, padding=1)),
            Node("s", Add(), ("a", "b")),
        ]
    )
    found = compute(backend, network, x)["output"]
    convolved = functional.conv2d(double(x), double(weight), padding=1)
    exact = convolved + functional.max_pool2d(double(x), 3, 1, 1)
    magnitude = functional.conv2d(double(abs(x)), double(abs(weight)), padding=1)
    close(found, exact, magnitude + functional.max_pool2d(double(abs(x)), 3, 1, 1), 20)
