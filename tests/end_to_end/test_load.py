"""Many callers at once: every answer right, and nothing left behind."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

import convservice
from convservice import Conv, ConvClient, Network
from convservice.dtypes import FLOAT32
from convservice.v1.conv_pb2_grpc import ConvServiceStub
from convservice_backends.interface import Backend
from convservice_server.server import Server
from tests.helpers import Array, compute, random_array
from tests.raw_stream import SECONDS, wait_until_nothing_runs

REQUESTS = 1000
READER = "stream-reader"
WORKERS = "call_N"
"""Names of the server's threads, their numbers left out: one per stream, and the workers of gRPC's pool."""
LEAKED = 64 << 20
"""Bytes by which the process may seem to grow, as its allocator pleases; the requests and answers of a round
carry four times that, so that keeping a part of each would show."""


class Work:
    """Requests that differ, with their answers: many small ones, and one in ten that goes by a stream."""

    def __init__(self, backend: Backend, rng: np.random.Generator) -> None:
        weight = random_array(rng, (8, 3, 3, 3), FLOAT32)
        self.network = Network([Conv(weight, padding=1, activation="relu")])
        small = [random_array(rng, (1, 3, 40 + n, 60), FLOAT32) for n in range(9)]
        self.inputs = [*small, random_array(rng, (1, 3, 220, 180), FLOAT32)]
        self._expected = [compute(backend, self.network, x)["output"] for x in self.inputs]

    def given(self, number: int) -> Array:
        return self.inputs[number % len(self.inputs)]

    def is_right(self, number: int, found: Array) -> bool:
        return np.array_equal(found, self._expected[number % len(self.inputs)])


def memory_bytes() -> int:
    """Memory of this process, server and client, that is in use; 0 where that cannot be read."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, which comes and goes with the load
    except AttributeError:
        return 0
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    except OSError:
        return 0


def threads() -> Counter[str]:
    """How many threads of each name there are, those that are about to end left out."""
    here = threading.enumerate()
    for thread in here:
        if thread.name == READER:  # its call may have been counted as over just before it ended
            thread.join(SECONDS)
    return Counter(re.sub(r"\d+", "N", thread.name) for thread in here if thread.is_alive())


def no_growth(server: Server, work: Callable[[int], None]) -> None:
    """Does the work, some of it beforehand; afterwards there must not be more threads and memory than then.

    The server's pool may still have grown: it makes a worker whenever none is idle, up to its size.
    """
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = ConvServiceStub(channel)
        work(REQUESTS // 2)
        wait_until_nothing_runs(stub)
        before, memory = threads(), memory_bytes()
        work(REQUESTS)
        wait_until_nothing_runs(stub)
        after = threads()
        assert after.pop(WORKERS, 0) <= server.config.pool_size
        assert after <= before
        assert memory_bytes() <= memory + LEAKED


def test_a_thousand_requests_from_sixteen_threads(
    client: ConvClient, server: Server, backend: Backend, rng: np.random.Generator
) -> None:
    work = Work(backend, rng)

    def send(count: int) -> None:
        def one(number: int) -> Array:
            found: Array = client.run(work.network, work.given(number))
            return found

        with ThreadPoolExecutor(16) as pool:
            found = pool.map(one, range(count))
            assert all(work.is_right(number, each) for number, each in enumerate(found))

    no_growth(server, send)


def test_a_thousand_requests_from_two_hundred_tasks(
    target: str, server: Server, backend: Backend, rng: np.random.Generator
) -> None:
    work = Work(backend, rng)

    async def send(count: int) -> None:
        async with convservice.connect_async(target, timeout=60) as client:

            async def task(first: int) -> list[bool]:
                numbers = range(first, count, 200)
                return [work.is_right(n, await client.run(work.network, work.given(n))) for n in numbers]

            right = await asyncio.gather(*(task(first) for first in range(200)))
            assert all(all(each) for each in right)
            assert sum(map(len, right)) == count

    no_growth(server, lambda count: asyncio.run(send(count)))


@pytest.mark.parametrize("clients", [1, 8])
def test_streams_beside_one_another(
    target: str, backend: Backend, clients: int, rng: np.random.Generator
) -> None:
    work = Work(backend, rng)

    def stream(_: int) -> bool:
        with convservice.connect(target, timeout=60) as client:
            found = client.map(work.network, work.inputs)
            return all(work.is_right(number, each) for number, each in enumerate(found))

    with ThreadPoolExecutor(clients) as pool:
        assert all(pool.map(stream, range(clients)))
