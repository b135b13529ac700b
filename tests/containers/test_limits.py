"""A container's memory limit holds: more flows through than fits, and what would not fit is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

import convservice
from convservice import Conv, ConvClient, ResourceExhausted
from tests.containers.engine import WAIT, Running, container, wait_for_health

MIB = 1 << 20
LIMIT = 192 * MIB


def limited(limit: int) -> dict[str, int]:
    """A container's options for so many bytes of memory, none of them swapped out."""
    return {"mem_limit": limit, "memswap_limit": limit}


def not_killed(unit: Running) -> bool:
    """Whether a container still runs, and has not been killed for its memory or started again."""
    state = unit.state
    return state["Running"] and not state["OOMKilled"] and unit.inspect()["RestartCount"] == 0


def test_a_stream_larger_than_the_memory_limit(image: str) -> None:
    channels, width, band = 2, 4096, 64
    height = 3 * LIMIT // (2 * channels * width * 4) // band * band  # 288 MiB each way
    weight = np.zeros((channels, channels, 3, 3), "float32")
    weight[:, :, 0, 1], weight[:, :, 2, 1] = 1, -2  # the row above, less twice the row below

    def rows(first: int, last: int) -> Any:
        """Rows of whole numbers that differ from row to row and from channel to channel."""
        line = np.arange(first, last) % 251
        both = np.stack([line, 3 * line]).astype("float32")
        return np.broadcast_to(both[:, :, None], (channels, last - first, width))

    def expected(first: int, last: int) -> Any:
        around = rows(first - 1, last + 1).copy()
        if first == 0:
            around[:, 0] = 0
        if last == height:
            around[:, -1] = 0
        whole = around.sum(axis=0)
        return np.broadcast_to(whole[:-2] - 2 * whole[2:], (channels, last - first, width))

    used: list[int] = []
    done = 0
    with container(image, **limited(LIMIT)) as unit:
        wait_for_health(unit.published())
        with convservice.connect(unit.published()) as client:
            bands = (rows(first, first + band) for first in range(0, height, band))
            for found in client.stream(
                Conv(weight, padding=1), bands, shape=(channels, height, width), dtype="float32"
            ):
                assert found.first_row == done
                done += found.array.shape[1]
                assert np.array_equal(found.array, expected(found.first_row, done))
                if done * 4 // height > len(used):  # three times on the way
                    used.append(unit.memory_bytes())
        assert done == height
        assert height * channels * width * 4 > LIMIT
        assert len(used) >= 3
        assert max(used) < LIMIT
        assert not_killed(unit)


class Held:
    """A stream that stops in the middle until it is let go.

    Args:
        client: a client.
        layer: what the stream goes through.
    """

    shape = (4, 512, 4096)

    def __init__(self, client: ConvClient, layer: Conv) -> None:
        self._go_on = threading.Event()
        self._bands = client.stream(layer, self._rows(), shape=self.shape, dtype="float32")
        self._first = next(self._bands)

    def _rows(self) -> Iterator[Any]:
        for first in range(0, self.shape[1], 64):
            if first == 256:
                assert self._go_on.wait(WAIT)
            yield np.ones((4, 64, self.shape[2]), "float32")

    def let_go(self) -> bool:
        """Takes the rows that were to come; whether all that came is right."""
        self._go_on.set()
        whole = np.concatenate([band.array for band in (self._first, *self._bands)], axis=1)
        return whole.shape == self.shape and bool((whole[:, 1:-1, 1:-1] == 36).all())


def test_what_does_not_fit_is_refused_and_nothing_is_killed(image: str) -> None:
    """Streams are begun and held one after another until one is refused; those that run go on and are right,
    and so do many small calls beside them."""
    layer = Conv(np.ones((4, 4, 3, 3), "float32"), padding=1)
    with container(image, **limited(256 * MIB)) as unit, ExitStack() as stack:
        target = unit.published()
        wait_for_health(target)
        held: list[Held] = []
        refused: ResourceExhausted | None = None
        while refused is None:
            client = stack.enter_context(convservice.connect(target))
            try:
                held.append(Held(client, layer))
            except ResourceExhausted as exc:
                refused = exc
            assert len(held) < 64
        assert refused.reason == "MEMORY_BUDGET"
        assert refused.retry_after is not None
        assert held

        def small(number: int) -> str:
            """Right, or refused."""
            x = np.full((1, 200, 300), number, "float32")
            with convservice.connect(target) as client:
                try:
                    found = client.conv2d(x, np.ones((1, 1, 1, 1), "float32"))
                except ResourceExhausted as exc:
                    return exc.reason
            return "right" if np.array_equal(found, x) else "wrong"

        with ThreadPoolExecutor(16) as pool:
            outcomes = set(pool.map(small, range(200)))
        assert outcomes <= {"right", "MEMORY_BUDGET"}
        with ThreadPoolExecutor(len(held)) as pool:
            assert all(pool.map(Held.let_go, held))
        assert not_killed(unit)
        with convservice.connect(target) as client:
            assert client.conv2d(np.ones((3, 3)), np.ones((3, 3))).tolist() == [[9.0]]
