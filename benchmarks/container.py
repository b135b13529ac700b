"""The container image: its size, how soon a container answers, what it takes when idle.

Builds the image as it comes, starts containers of it one after another, each on a read-only root and without
capabilities, and measures from `docker run` to the exact answer of the worked example. Nothing is kept from
one container to the next but what the machine keeps of the image's files. Memory is read after that answer,
with no health check at work. Writes the figures to benchmarks/results/container.md.

    python -m benchmarks.container --runs 9
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

import convservice
from benchmarks.stream import Memory, processor
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT

MIB = 1 << 20
MB = 1_000_000
ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "container.md"
PORT = 50051
START_SECONDS = 60.0
AT_ONCE = 20
"""Milliseconds between attempts to reach a server that is not there yet; gRPC's own pause is a second."""
LOCKED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--no-healthcheck")
LIBRARIES = ("grpcio", "numpy", "protobuf", "scipy")


@dataclass(frozen=True)
class Started:
    """What one container showed, in seconds from `docker run` and in bytes.

    Attributes:
        created: until the engine had started it.
        answered: until the worked example's answer was here.
        resident: the server process's memory, shared libraries included.
        own: what of it is the process's alone.
    """

    created: float
    answered: float
    resident: int
    own: int


def docker(*arguments: str) -> str:
    """What a docker command printed."""
    command = ["docker", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def base_image() -> str:
    """The base image that is here; see `tests/containers/engine-up`.

    Raises:
        SystemExit: there is none, or no engine.
    """
    script = ROOT / "tests" / "containers" / "engine-up"
    found = subprocess.run([script, "--check"], check=False, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"needs a Docker engine: {found.stdout.strip()}")
    return found.stdout.strip()


def start(image: str) -> Started:
    """Starts a container, has it compute the worked example, and removes it.

    Raises:
        SystemExit: the answer is wrong.
    """
    began = time.perf_counter()
    unit = docker("run", "--detach", "--publish", f"127.0.0.1::{PORT}", *LOCKED, image)
    try:
        created = time.perf_counter() - began
        target = docker("port", unit, f"{PORT}/tcp")
        wait_until_serving(target)
        with convservice.connect(target, timeout=START_SECONDS) as client:
            found = client.conv2d(INPUT, WEIGHT)
        answered = time.perf_counter() - began
        if not np.array_equal(found, FEATURE_MAP):
            raise SystemExit(f"the feature map is wrong: {found.tolist()}; no figure is reported")
        pid = int(docker("inspect", "--format", "{{.State.Pid}}", unit))
        own = next(
            int(line.split()[1]) * 1024
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("RssAnon:")
        )
        return Started(created, answered, Memory.of(pid).resident, own)
    finally:
        docker("rm", "--force", "--volumes", unit)


def wait_until_serving(target: str) -> None:
    """Returns once the server says that it serves."""
    pauses = [(f"grpc.{name}_reconnect_backoff_ms", AT_ONCE) for name in ("min", "initial", "max")]
    with grpc.insecure_channel(target, options=pauses) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=START_SECONDS)
        for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
    raise SystemExit(f"{target} did not serve within {START_SECONDS:g} s")


def figures(image: str, base: str, runs: list[Started]) -> list[tuple[str, str]]:
    """What was measured, as names and values for people."""
    sizes = {name: int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (image, base)}
    return [
        ("image", f"{sizes[image] / MB:.0f} MB"),
        ("of it the base image", f"{sizes[base] / MB:.0f} MB"),
        ("of it the service's own", f"{(sizes[image] - sizes[base]) / MB:.0f} MB"),
        ("containers started", f"{len(runs)}"),
        ("`docker run` itself", seconds([run.created for run in runs])),
        ("`docker run` to the first answer", seconds([run.answered for run in runs])),
        ("idle, resident", f"{statistics.median(run.resident for run in runs) / MIB:.0f} MiB"),
        ("idle, the process's own", f"{statistics.median(run.own for run in runs) / MIB:.0f} MiB"),
    ]


def seconds(values: list[float]) -> str:
    """The median, the least and the most."""
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def inside(image: str) -> str:
    """The versions in the image."""
    script = (
        "import platform, importlib.metadata as m; print('Python', platform.python_version(),"
        f" *(f', {{n}} {{m.version(n)}}' for n in {LIBRARIES!r}), sep='')"
    )
    found = docker("run", "--rm", "--entrypoint", "/opt/convservice/bin/python", image, "-c", script)
    return found.replace("Python", "Python ", 1)


def result_page(rows: list[tuple[str, str]], image: str, base: str, load: float) -> str:
    """The result file: what was run, where, with what, and the figures."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    engine = docker("version", "--format", "{{.Server.Version}}")
    return f"""\
# The container image

Written by `python -m benchmarks.container`; see the module for what each figure means.

- date: {datetime.now(UTC):%Y-%m-%d}
- command: `{shlex.join(["python", "-m", "benchmarks.container", *sys.argv[1:]])}`
- machine: {processor()}, {os.cpu_count()} cores; load average before the run {load:.1f}
- software: {platform.system()}, Docker {engine}, base image {base}; in the image {inside(image)}

| figure | value |
| --- | --- |
{table}
"""


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9, help="containers to start (default: 9)")
    parser.add_argument("--image", default="convservice:bench", help="its name (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="the result file (default: %(default)s)")
    arguments = parser.parse_args()
    base = base_image()
    print(f"building {arguments.image} from {base} ...", flush=True)
    docker("build", "--quiet", "--build-arg", f"PYTHON_IMAGE={base}", "--tag", arguments.image, str(ROOT))
    load = os.getloadavg()[0]
    start(arguments.image)  # the machine reads the image's files for the first time
    rows = figures(arguments.image, base, [start(arguments.image) for _ in range(arguments.runs)])
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(result_page(rows, arguments.image, base, load))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
