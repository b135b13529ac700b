"""Convolutions in-process, each backend that can run here beside PyTorch on the CPU.

    make bench-convolution

Every result is first compared with a float64 convolution within the bound that the service promises; only
then it is timed. Each figure is the median of several runs, the two libraries taking turns, so that a change
of the machine's speed meets both. Both run with glibc's malloc set as the server sets it. The table goes to
benchmarks/results/convolution.md.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.layers import Conv
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.interface import Description, PreparedNetwork
from convservice_backends.registry import Registry
from convservice_backends.session import run

torch: Any = importlib.import_module(
    "torch"
)  # in this benchmark's own environment alone, so without its types

TURNS = 3
REST = 0.25  # seconds

RESULTS = Path(__file__).parent / "results" / "convolution.md"


@dataclass(frozen=True)
class Case:
    """One convolution: the input's shape, the filter bank's, and its geometry."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


CASES = (
    Case("5x5, 3x3", (1, 1, 5, 5), (1, 1, 3, 3)),
    Case("1080p grey, 3x3", (1, 1, 1080, 1920), (1, 1, 3, 3)),
    Case("1080p colour depthwise, 5x5", (1, 3, 1080, 1920), (3, 1, 5, 5), groups=3),
    Case("3 to 64, 224x224, 7x7 stride 2", (1, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    Case("64 to 64, 56x56, 3x3", (1, 64, 56, 56), (64, 64, 3, 3), padding=1),
    Case("128 to 128, 28x28, 3x3", (1, 128, 28, 28), (128, 128, 3, 3), padding=1),
    Case("256 to 256, 14x14, 3x3", (1, 256, 14, 14), (256, 256, 3, 3), padding=1),
    Case("512 to 512, 7x7, 3x3", (1, 512, 7, 7), (512, 512, 3, 3), padding=1),
    Case("256 to 64, 56x56, 1x1", (1, 256, 56, 56), (64, 256, 1, 1)),
    Case("64 to 64, 224x224, 3x3", (1, 64, 224, 224), (64, 64, 3, 3), padding=1),
    Case("64 to 64, 56x56, 3x3 dilation 2", (1, 64, 56, 56), (64, 64, 3, 3), padding=2, dilation=2),
    Case("depthwise 32, 112x112, 3x3", (1, 32, 112, 112), (32, 1, 3, 3), padding=1, groups=32),
    Case("128 in 32 groups, 56x56, 3x3", (1, 128, 56, 56), (128, 4, 3, 3), padding=1, groups=32),
    Case("1-D, 64 to 64, 16000, kernel 9", (1, 64, 16000), (64, 64, 9), padding=4),
    Case("3-D, 16 to 32, 16x56x56, 3x3x3", (1, 16, 16, 56, 56), (32, 16, 3, 3, 3), padding=1),
    Case("batch 8, 64 to 64, 56x56, 3x3", (8, 64, 56, 56), (64, 64, 3, 3), padding=1),
    Case("batch 128, 64 to 64, 7x7, 3x3", (128, 64, 7, 7), (64, 64, 3, 3), padding=1),
)

Array = NDArray[Any]


def torch_convolution(case: Case) -> Callable[..., Any]:
    """PyTorch's function for the case's rank."""
    functions: dict[int, Callable[..., Any]] = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
    return functions[len(case.x)]


def options(case: Case) -> dict[str, int]:
    """The geometry, as both libraries spell it."""
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }


def validate(case: Case, x: Array, weight: Array, y: Array) -> float:
    """The largest error as a share of the promised bound (K + 3) u (|x|*|w|) + u |y|.

    Raises:
        ArithmeticError: the bound does not hold.
    """
    function, geometry = torch_convolution(case), options(case)
    x64, w64 = torch.from_numpy(x.astype(np.float64)), torch.from_numpy(weight.astype(np.float64))
    exact: Array = function(x64, w64, **geometry).numpy()
    size: Array = function(x64.abs(), w64.abs(), **geometry).numpy()
    unit = 2.0**-24
    bound = (weight[0].size + 3) * unit * size + unit * np.abs(exact)
    share = float(np.max(np.abs(y - exact) / bound))
    if not share <= 1:
        raise ArithmeticError(f"{case.name}: an error is {share} times the bound")
    return share


def medians(first: Callable[[], object], second: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median seconds of two functions that take turns, a third of the time at a time.

    Before each turn the machine rests: threads of the other library spin for a while after their last call,
    and would take a processor from this one's.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for function, taken in zip((first, second), times, strict=True):
            time.sleep(REST)
            function()
            until = time.perf_counter() + seconds / TURNS / 2
            while not taken or time.perf_counter() < until:
                start = time.perf_counter()
                function()
                taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def measure(case: Case, prepared: PreparedNetwork, x: Array, seconds: float) -> str:
    """One row of the table."""
    layer = prepared.network.nodes[0].layer
    if not isinstance(layer, Conv):
        raise TypeError(f"a case is a convolution, not {layer!r}")
    y = run(prepared, x)["output"]
    share = validate(case, x, layer.weight, y)
    function, geometry = torch_convolution(case), options(case)
    tx, tw = torch.from_numpy(x), torch.from_numpy(layer.weight.copy())
    function(tx, tw, **geometry)
    ours, theirs = medians(lambda: run(prepared, x), lambda: function(tx, tw, **geometry), seconds)
    operations = 2 * y.size * layer.weight[0].size
    return (
        f"| {case.name} | {ours * 1e3:.3f} | {operations / ours / 1e9:.1f} | {theirs * 1e3:.3f}"
        f" | {theirs / ours:.2f} | {share:.3f} |"
    )


def header(name: str, described: Description) -> list[str]:
    """What was measured on what, and the head of the table."""
    versions = ", ".join(f"{library} {number}" for library, number in described.versions.items())
    machine = f"{described.device}, {described.workers} workers, {versions}"
    peer = f"PyTorch {torch.__version__} on {torch.get_num_threads()} threads"
    return [
        f"## {name}",
        "",
        f"{machine}; {peer}; Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "Float32; medians in milliseconds; malloc as the server sets it. Ratio: PyTorch's time over this",
        "backend's. Error: the largest as a share of the promised bound.",
        "",
        "| convolution | ms | GFLOP/s | PyTorch ms | ratio | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]


def main() -> None:
    """Measures every case on every backend and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    registry, rng = Registry(), np.random.default_rng(0)
    lines: list[str] = []
    for status in registry.statuses():
        if status.description is None:
            print(status.reason)
            continue
        backend, described = registry.resolve(status.name), status.description
        lines += header(status.name, described)
        for case in CASES:
            x = rng.standard_normal(case.x, dtype=np.float32)
            weight = rng.standard_normal(case.weight, dtype=np.float32)
            layer = Conv(
                weight,
                stride=case.stride,
                padding=case.padding,
                dilation=case.dilation,
                groups=case.groups,
            )
            prepared = backend.prepare(Network([layer]), Precision.HIGH)
            lines.append(measure(case, prepared, x, arguments.seconds))
            print(lines[-1], flush=True)
    head = ["# Convolutions in-process beside PyTorch", "", "`make bench-convolution`", ""]
    arguments.output.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    registry.close()


if __name__ == "__main__":
    main()
