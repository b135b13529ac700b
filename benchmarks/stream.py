"""A tensor much larger than memory streamed through a server: memory, the first row's delay, throughput.

Starts `convservice serve` as a child process and streams rows, made as they are sent, through a 3x3 filter
bank. Rows of the result, first and last among them, are compared with the same convolution computed here,
and only when all agree is a figure reported. Writes the figures to benchmarks/results/stream.md and fails
if the server's memory rose by 200 MiB or more above what it had when idle.

    python -m benchmarks.stream --gib 4
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import convservice
from convservice import ConvClient, TensorReport
from convservice.cli.embedded import EmbeddedServer
from convservice.cli.local import check
from convservice.layers import Conv

CHANNELS = 4
WIDTH = 4096
ROWS_AT_ONCE = 64
PERIOD = 251
"""Rows after which the texture repeats; prime, so that it never falls in step with bands or blocks."""

MIB = 1 << 20
LIMIT_BYTES = 200 * MIB
RESULT = Path(__file__).parent / "results" / "stream.md"
LIBRARIES = ("convservice", "grpcio", "numpy", "protobuf", "scipy")


@dataclass(frozen=True)
class Memory:
    """A process's memory, from its /proc/PID/status, in bytes.

    Attributes:
        resident: now.
        peak: most since the last `reset_peak`.
    """

    resident: int
    peak: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """The memory of the process `pid`."""
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        return cls(sizes["VmRSS"], sizes["VmHWM"])


def reset_peak(pid: int) -> None:
    """Makes the kernel count the peak of process `pid` from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@dataclass
class Measured:
    """What one stream showed.

    Attributes:
        height: rows of the input.
        idle_bytes: the server's resident memory before.
        peak_bytes: its largest during the stream.
        sent_before_first_row: bytes of input handed to the transport when the first row came back.
        first_row_seconds: from the start of the stream to that row.
        seconds: of the whole stream.
        rows_checked: output rows compared with the local result.
        report: what the server said of the tensor.
    """

    height: int
    idle_bytes: int
    peak_bytes: int = 0
    sent_before_first_row: int = 0
    first_row_seconds: float = 0.0
    seconds: float = 0.0
    rows_checked: int = 0
    report: TensorReport | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of the input."""
        return self.height * CHANNELS * WIDTH * 4

    @property
    def above_idle(self) -> int:
        """What the stream added to the server's memory, in bytes."""
        return self.peak_bytes - self.idle_bytes


class Image:
    """An image whose rows are made when they are asked for, the same each time.

    Args:
        height: rows.
    """

    def __init__(self, height: int) -> None:
        random = np.random.default_rng(0)
        self.height = height
        self._texture = random.uniform(-1, 1, (CHANNELS, PERIOD + ROWS_AT_ONCE, WIDTH)).astype(np.float32)
        self._texture[:, PERIOD:] = self._texture[:, :ROWS_AT_ONCE]

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """The rows first <= i < last, at most `ROWS_AT_ONCE`: (channels, rows, columns)."""
        brightness = (1 + np.arange(first, last)[:, None] % 1013 / 1013).astype(np.float32)
        at = first % PERIOD
        return self._texture[:, at : at + last - first] * brightness

    def bands(self) -> Iterator[NDArray[np.float32]]:
        """All rows from top to bottom."""
        for first in range(0, self.height, ROWS_AT_ONCE):
            yield self.rows(first, min(first + ROWS_AT_ONCE, self.height))


def stream(client: ConvClient, layer: Conv, image: Image, pid: int) -> Measured:
    """Streams the image, watches the server `pid`, and compares some of the rows that come back.

    Raises:
        SystemExit: a row is wrong.
    """
    client.register(layer)
    measured = Measured(image.height, Memory.of(pid).resident)
    wanted = rows_to_check(image.height)
    kept: dict[int, NDArray[np.float32]] = {}
    sent = 0

    def on_progress(now: convservice.Progress) -> None:
        nonlocal sent
        sent = now.sent_bytes

    def on_report(report: TensorReport) -> None:
        measured.report = report

    reset_peak(pid)
    started = time.perf_counter()
    bands = client.stream(
        layer,
        image.bands(),
        shape=(CHANNELS, image.height, WIDTH),
        dtype="float32",
        progress=on_progress,
        on_report=on_report,
    )
    for band in bands:
        if not band.first_row:
            measured.sent_before_first_row = sent
            measured.first_row_seconds = time.perf_counter() - started
        last = band.first_row + band.array.shape[1]
        kept.update(
            {
                row: band.array[:, row - band.first_row].copy()
                for row in wanted
                if band.first_row <= row < last
            }
        )
    measured.seconds = time.perf_counter() - started
    measured.peak_bytes = Memory.of(pid).peak
    for row in wanted:
        check_row(layer, image, row, kept[row])
    measured.rows_checked = len(wanted)
    return measured


def rows_to_check(height: int) -> list[int]:
    """The first rows, the last ones, and some between."""
    between = np.random.default_rng(1).integers(2, height - 2, 24).tolist()
    return sorted({0, 1, *between, height - 2, height - 1})


def check_row(layer: Conv, image: Image, row: int, computed: NDArray[np.float32]) -> None:
    """Compares one row of the result, (channels, columns), with the same row computed here."""
    first, last = max(0, row - 1), min(image.height, row + 2)
    around = image.rows(first, last)
    above, below = int(row == 0), int(row == image.height - 1)
    one_row = Conv(layer.weight, padding=((above, below), (1, 1)))
    found = check(one_row, around[None], computed[None, :, None])
    if not found.equal:
        raise SystemExit(
            f"row {row} is wrong: it is {found.largest_error:.3g} away from the row computed here,"
            f" {found.share_of_bound:.3g} times the promised bound; no figure is reported"
        )


def figures(measured: Measured) -> list[tuple[str, str]]:
    """What was measured, as names and values for people."""
    report = measured.report or TensorReport("")
    macs = measured.height * WIDTH * CHANNELS * CHANNELS * 9
    return [
        (
            "input",
            f"{CHANNELS} x {measured.height} x {WIDTH} float32, {measured.total_bytes / 2**30:.2f} GiB",
        ),
        (
            "output",
            f"the same; {measured.rows_checked} rows compared with a local result, all within the bound",
        ),
        ("backend", f"{report.backend} ({', '.join(report.algorithms.values())})"),
        ("server, idle", f"{measured.idle_bytes / MIB:.1f} MiB resident"),
        ("server, peak above idle", f"{measured.above_idle / MIB:.1f} MiB"),
        ("reserved for the tensor", f"{report.reserved_bytes / MIB:.1f} MiB"),
        ("sent when the first row came back", f"{measured.sent_before_first_row / MIB:.2f} MiB"),
        ("first row after", f"{measured.first_row_seconds * 1e3:.1f} ms"),
        ("whole stream", f"{measured.seconds:.1f} s"),
        ("throughput", f"{measured.total_bytes / measured.seconds / MIB:.0f} MiB/s each way"),
        ("multiply-adds", f"{macs / measured.seconds / 1e9:.2f} G/s"),
        ("server's time computing", f"{report.compute:.1f} s"),
        ("server's time waiting for input", f"{report.receive:.1f} s"),
        ("server's time waiting for the client to take results", f"{report.send:.1f} s"),
    ]


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def result_page(rows: list[tuple[str, str]], load: float) -> str:
    """The result file: what was run, where, beside what load, with what, and the figures."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""\
# Streaming a tensor larger than memory

Written by `python -m benchmarks.stream`; see the module for what each figure means.

- date: {datetime.now(UTC):%Y-%m-%d}
- command: `{shlex.join(["python", "-m", "benchmarks.stream", *sys.argv[1:]])}`
- machine: {processor()}, {os.cpu_count()} cores, client and server on the same machine over the loopback;
  load average before the run {load:.1f}
- software: {platform.system()}, Python {platform.python_version()}, {libraries}

| figure | value |
| --- | --- |
{table}
"""


def main() -> int:
    """Runs the benchmark; 1 if the server's memory rose too far."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0, help="input to send, in GiB (default: 4)")
    parser.add_argument("--output", type=Path, default=RESULT, help="the result file (default: %(default)s)")
    arguments = parser.parse_args()
    height = max(ROWS_AT_ONCE, round(arguments.gib * 2**30 / (CHANNELS * WIDTH * 4)))
    weight: NDArray[Any] = np.random.default_rng(2).uniform(-1, 1, (CHANNELS, CHANNELS, 3, 3))
    layer = Conv(weight.astype(np.float32), padding=1)
    load = os.getloadavg()[0]
    with EmbeddedServer() as server, convservice.connect(server.target) as client:
        print(f"streaming {arguments.gib:g} GiB through {server.target} ...", flush=True)
        measured = stream(client, layer, Image(height), server.pid)
    rows = figures(measured)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(result_page(rows, load))
    print(f"written to {arguments.output}")
    if measured.above_idle >= LIMIT_BYTES:
        print(
            f"the server's memory rose by {measured.above_idle / MIB:.1f} MiB; less than 200 MiB are allowed"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
