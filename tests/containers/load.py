"""The load that replicas have to bear while they are restarted; runs in a container on their network.

Given a target, four threads call with small tensors and two send large ones through `map`, all checked
exactly, until SIGTERM. Each line on standard output is what was done so far, as JSON; the last one has what
failed. The exit status is 0 if nothing did.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import convservice
from convservice import Conv, ConvClient, Network

STOP = threading.Event()
LOCK = threading.Lock()  # guards the two below
DONE = {"unary": 0, "map": 0}
FAILED: list[str] = []


def tell(what: Mapping[str, Any]) -> None:
    """Writes a line at once."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def count(kind: str, right: bool) -> None:
    """Counts one result, and prints what was done at every tenth."""
    with LOCK:
        DONE[kind] += 1
        if not right:
            FAILED.append(f"{kind}: a wrong result")
        if sum(DONE.values()) % 10 == 0:
            tell(DONE)


def unary(client: ConvClient, seed: int) -> None:
    """Small calls, each with a filter of its own that no replica has seen."""
    for number in range(seed, 1_000_000, 4):
        if STOP.is_set():
            return
        weight = np.full((1, 1, 1, 1), number % 97, "float32")
        x = np.full((1, 20, 30), number % 89, "float32")
        found = client.conv2d(x, weight)
        count("unary", bool((found == (number % 97) * (number % 89)).all()) and found.shape == x.shape)


def mapped(client: ConvClient, seed: int) -> None:
    """Tensors of about 1 MiB through a registered network, twenty at a time."""
    weight = np.zeros((2, 2, 3, 3), "float32")
    weight[0, 0, 1, 1], weight[1, 1, 1, 1] = 2, 3
    network = client.register(Network([Conv(weight, np.full(2, seed, "float32"), padding=1)]))
    while not STOP.is_set():
        given = (np.full((2, 400, 400), number, "float32") for number in range(20))
        results: Any = client.map(network, given)
        for number, found in enumerate(results):
            right = (found[0] == 2 * number + seed).all() and (found[1] == 3 * number + seed).all()
            count("map", bool(right))


def guarded(work: Callable[[ConvClient, int], None], client: ConvClient, seed: int) -> None:
    """Works, and keeps what it raises."""
    try:
        work(client, seed)
    except Exception as exc:  # noqa: BLE001 - whatever it is, it has failed
        with LOCK:
            FAILED.append(f"{work.__name__}: {exc!r}, {getattr(exc, 'metadata', None)}")
        STOP.set()


def stop(number: int, frame: object) -> None:
    """Ends the work at a signal."""
    STOP.set()


def main() -> int:
    """Works until SIGTERM, or until something has failed."""
    signal.signal(signal.SIGTERM, stop)
    with convservice.connect(sys.argv[1], timeout=120) as client:
        works = [unary] * 4 + [mapped] * 2
        threads = [
            threading.Thread(target=guarded, args=(work, client, seed)) for seed, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tell({**DONE, "failed": FAILED})
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
