"""`convservice bench`: how long a convolution takes over the wire, and how many a second.

The first answer is compared with the sums computed here; only what is right is timed.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice import ConvClient, TensorReport
from convservice.cli.arguments import (
    add_json,
    add_service,
    integers,
    one_or_per_axis,
    padding,
    positive,
)
from convservice.cli.command import Command
from convservice.cli.embedded import connected
from convservice.cli.local import check
from convservice.cli.outcome import CommandFailed, Exit
from convservice.cli.output import byte_size, progress, show_json, show_table
from convservice.dtypes import FLOAT32, dtype_of
from convservice.layers import Conv

DESCRIPTION = """\
Times a convolution of random numbers over the wire: latency as a caller sees it, and throughput. The first
answer is checked against the same convolution computed here, in float64; if a single element lies beyond the
error bound that the service promises, nothing is timed and the command fails.
"""


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        requests: requests timed.
        p50_ms: half of them took no longer, in milliseconds.
        p95_ms: 95 of 100 took no longer.
        server_ms: the median time on the server, from the header to the last byte.
        compute_ms: of it, computing.
        requests_per_s: all callers together.
        input_mb_per_s: input, in 10**6 bytes.
        gmacs_per_s: 10**9 multiply-adds.
    """

    requests: int
    p50_ms: float
    p95_ms: float
    server_ms: float
    compute_ms: float
    requests_per_s: float
    input_mb_per_s: float
    gmacs_per_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--shape", metavar="N,C,H,W", type=integers, default=(1, 3, 224, 224), help="default: 1,3,224,224"
    )
    parser.add_argument(
        "--weight-shape", metavar="O,C,KH,KW", type=integers, default=(16, 3, 3, 3), help="default: 16,3,3,3"
    )
    parser.add_argument("--dtype", default="float32", help="of the input (default: float32)")
    parser.add_argument("--stride", metavar="N", type=one_or_per_axis, default=1, help="default: 1")
    parser.add_argument("--padding", metavar="P", type=padding, default=0, help="default: 0")
    parser.add_argument("--dilation", metavar="N", type=one_or_per_axis, default=1, help="default: 1")
    parser.add_argument("--groups", metavar="N", type=positive, default=1, help="default: 1")
    parser.add_argument(
        "--repeat", metavar="N", type=positive, default=50, help="requests timed (default: 50)"
    )
    parser.add_argument(
        "--concurrency", metavar="N", type=positive, default=1, help="callers at the same time (default: 1)"
    )
    add_service(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Validates, then times, then prints."""
    layer, x = _problem(arguments)
    reports: list[TensorReport] = []
    with connected(arguments) as client:
        answer = client.run(layer, x, backend=arguments.backend, on_report=reports.append)
        checked = check(layer, x, answer)
        if not checked.equal:
            raise CommandFailed(
                f"the answer is wrong: an element is {checked.largest_error:.3g} away from the sum computed"
                f" here, {checked.share_of_bound:.3g} times the promised bound; nothing was timed"
            )
        timing = _measure(client, layer, x, arguments)
    first = reports[0]
    if arguments.json:
        show_json(
            {
                "target": client.target,
                "shape": list(x.shape),
                "weight_shape": list(layer.weight.shape),
                "dtype": x.dtype.name,
                "concurrency": arguments.concurrency,
                "backend": first.backend,
                "algorithms": first.algorithms,
                "error_share_of_bound": checked.share_of_bound,
                **asdict(timing),
            }
        )
        return Exit.OK
    print(f"input       {x.shape} {x.dtype}, {byte_size(x.nbytes)}")
    print(f"weight      {layer.weight.shape}")
    print(
        f"output      {answer.shape}, the largest error is {checked.share_of_bound:.2g} of the promised bound"
    )
    print(f"backend     {first.backend} ({', '.join(first.algorithms.values())})\n")
    show_table("", ("measure", "value "), _rows(timing, arguments.concurrency))
    return Exit.OK


def _problem(arguments: argparse.Namespace) -> tuple[Conv, NDArray[Any]]:
    dtype = dtype_of(arguments.dtype)
    for name, sizes in (("--shape", arguments.shape), ("--weight-shape", arguments.weight_shape)):
        if len(sizes) not in (3, 4, 5) or min(sizes) < 1 or math.prod(sizes) > 1 << 31:
            raise CommandFailed(
                f"{name} must be 3 to 5 sizes of at least 1, at most 2**31 elements in all, not {sizes}",
                Exit.USAGE,
            )
    shape: tuple[int, ...] = arguments.shape
    weight_shape: tuple[int, ...] = arguments.weight_shape
    random = np.random.default_rng(0)
    weight_type = (dtype if dtype.is_float else FLOAT32).numpy
    weight = random.uniform(-1, 1, weight_shape).astype(weight_type)
    x: NDArray[Any]
    if dtype.is_float:
        x = random.uniform(-1, 1, shape).astype(dtype.numpy)
    else:
        limits = np.iinfo(dtype.numpy)
        x = random.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype.numpy)
    layer = Conv(
        weight,
        stride=arguments.stride,
        padding=arguments.padding,
        dilation=arguments.dilation,
        groups=arguments.groups,
    )
    layer.output_shape(x.shape)
    if x.ndim != layer.rank + 2:
        raise CommandFailed(
            f"--shape must have {layer.rank + 2} sizes, samples first, not {x.shape}", Exit.USAGE
        )
    return layer, x


def _measure(client: ConvClient, layer: Conv, x: NDArray[Any], arguments: argparse.Namespace) -> Timing:
    network = client.register(layer)
    reports: list[TensorReport] = []

    def one(advance: Any) -> float:
        started = time.perf_counter()
        network(x, backend=arguments.backend, on_report=reports.append)
        elapsed = time.perf_counter() - started
        advance(1)
        return elapsed

    with (
        progress("timing", arguments.repeat) as advance,
        ThreadPoolExecutor(arguments.concurrency) as pool,
    ):
        started = time.perf_counter()
        seconds = list(pool.map(one, [advance] * arguments.repeat))
        elapsed = time.perf_counter() - started
    terms = math.prod(layer.weight.shape[1:])
    products = x.shape[0] * layer.neuron_count(x.shape) * terms
    return Timing(
        requests=len(seconds),
        p50_ms=1e3 * float(np.percentile(seconds, 50)),
        p95_ms=1e3 * float(np.percentile(seconds, 95)),
        server_ms=1e3 * float(np.median([report.total for report in reports])),
        compute_ms=1e3 * float(np.median([report.compute for report in reports])),
        requests_per_s=len(seconds) / elapsed,
        input_mb_per_s=len(seconds) * x.nbytes / elapsed / 1e6,
        gmacs_per_s=len(seconds) * products / elapsed / 1e9,
    )


def _rows(timing: Timing, concurrency: int) -> list[tuple[str, str]]:
    return [
        ("requests", str(timing.requests)),
        ("callers at the same time", str(concurrency)),
        ("latency, p50", f"{timing.p50_ms:.2f} ms"),
        ("latency, p95", f"{timing.p95_ms:.2f} ms"),
        ("on the server, median", f"{timing.server_ms:.2f} ms"),
        ("computing, median", f"{timing.compute_ms:.2f} ms"),
        ("throughput", f"{timing.requests_per_s:.1f} requests/s"),
        ("input", f"{timing.input_mb_per_s:.1f} MB/s"),
        ("multiply-adds", f"{timing.gmacs_per_s:.2f} G/s"),
    ]


COMMAND = Command("bench", "time a convolution over the wire", DESCRIPTION, add_arguments, run)
