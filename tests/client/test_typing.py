"""What a type checker knows of the SDK; checked by mypy and pyright, of which this file is user code."""

from __future__ import annotations

import inspect
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from convservice import (
    AsyncConvClient,
    AsyncRegisteredNetwork,
    Band,
    Conv,
    ConvClient,
    Network,
    RegisteredNetwork,
)

X = np.zeros((1, 1, 5, 5), np.float32)
W = np.zeros((1, 1, 3, 3), np.float32)


def of_the_sync_client(client: ConvClient) -> None:
    assert_type(client.conv2d(X, W, padding=((0, 1), (1, 0))), NDArray[Any])
    assert_type(client.conv1d([1.0, 2.0], [1.0], stride=(2,)), NDArray[Any])
    assert_type(client.run(Conv(W, padding="same"), X), NDArray[Any])
    assert_type(client.register(Network([Conv(W)])), RegisteredNetwork)
    assert_type(client.networks(), tuple[str, ...])
    for band in client.stream(Conv(W), iter([X[0]]), shape=(1, None, 5), dtype=np.float32):
        assert_type(band, Band)
        assert_type(band.array, NDArray[Any])


async def of_the_async_client(client: AsyncConvClient) -> None:
    assert_type(await client.conv3d(X, W, bias=None), NDArray[Any])
    assert_type(await client.run(Conv(W), X), NDArray[Any])
    assert_type(await client.register(Conv(W)), AsyncRegisteredNetwork)
    async for band in client.stream(Conv(W), iter([X[0]]), shape=(1, None, 5), dtype="float32"):
        assert_type(band, Band)


def test_the_async_half_is_awaited() -> None:
    assert inspect.iscoroutinefunction(of_the_async_client)
