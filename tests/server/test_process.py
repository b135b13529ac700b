"""The serving process: a start that is broken off or fails, a container too small, settings printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convservice
from convservice.cli.health import check
from convservice.endpoint import Endpoint
from convservice_server.environment import BLAS_VARIABLES
from convservice_server.resources import Limits, defaults
from convservice_server.settings import FIELDS
from tests.server.support import WAIT

SERVE = """
import sys
from convservice_server import process
from convservice_server.config import ServerConfig
{prelude}
sys.exit(process.serve(ServerConfig.of(listen="127.0.0.1:0", log_format="json", **{settings})))
"""
SLOW_BACKEND = """
import threading
from convservice_backends.registry import Registry
def never():
    threading.Event().wait()
from convservice_server import server
server.Registry = lambda default, trial: Registry(default, {"slow": never}, trial)
"""
NO_BACKEND = """
from convservice.errors import BackendUnavailable
from convservice_server import server
def trial(backend):
    raise BackendUnavailable("the trial gave [[13]]")
server.try_worked_example = trial
"""
SMALL = """
from convservice_server.resources import Limits
process.limits = lambda: Limits(64 << 20, 1)
"""


@contextmanager
def start(prelude: str = "", **settings: Any) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(prelude=prelude, settings=settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # BLAS is set already, so that the process is not started over and nothing is lost on the way.
        env={**os.environ, **dict.fromkeys(BLAS_VARIABLES, "1")},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def log_until(process: subprocess.Popen[str], message: str) -> dict[str, Any]:
    """The log's first line that says `message`."""
    assert process.stderr is not None
    for line in process.stderr:
        found: dict[str, Any] = json.loads(line)
        if found["message"] == message:
            return found
    raise AssertionError(f"it ended without saying {message!r}")


def test_sigterm_ends_a_start_that_is_still_warming_up() -> None:
    with start(SLOW_BACKEND) as process:
        port = log_until(process, "listening")["port"]
        assert check(Endpoint.of(f"127.0.0.1:{port}"), WAIT) == ("NOT_SERVING", "")
        process.terminate()
        assert log_until(process, "stopped while it was warming up")["signal"] == "SIGTERM"
        assert process.wait(WAIT) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_it_ends_and_says_why_where_no_backend_gives_the_worked_examples_answer() -> None:
    with start(NO_BACKEND) as process:
        output, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, output) == (1, "")
    (said,) = [line for line in errors.splitlines() if line.startswith("convservice: ")]
    assert said.startswith("convservice: no backend can run here: ")
    assert "the trial gave [[13]]" in said
    assert "Traceback" not in errors


def test_a_container_that_is_too_small_is_a_clear_error() -> None:
    with start(SMALL) as process:
        output, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, output) == (1, "")
    assert errors == (
        "convservice: a server needs at least 201326592 bytes of memory, its machine or container allows"
        " 67108864\n"
    )


def test_the_log_says_where_health_is_answered() -> None:
    with start(health_listen="127.0.0.1:0") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on 127.0.0.1:")
        port = log_until(process, "listening")["health_port"]
        assert check(Endpoint.of(f"127.0.0.1:{port}"), WAIT) == ("SERVING", "")
        process.terminate()
        assert process.wait(WAIT) == 0


def test_the_settings_are_printed_all_of_them() -> None:
    printed = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "convservice.cli",
            "serve",
            "--print-config",
            "--health-listen",
            "[::1]:9",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT,
    ).stdout
    unset = {name for name in FIELDS if f"# {name} is not set  # default\n" in printed}
    assert set(tomllib.loads(printed)) == set(FIELDS) - unset
    assert "token_file" in unset
    assert 'health_listen = "[::1]:9"  # --health-listen\n' in printed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_with_a_small_containers_defaults_it_stays_within_the_container() -> None:
    """More is asked of it than fits, by streams and by small calls; what does not fit is refused."""
    container = 256 << 20
    image = np.ones((3, 64, 2048), np.float32)
    weights = np.ones((8, 3, 5, 5), np.float32)
    refused = list[str]()
    settings = {"log_level": "error", **vars(defaults(Limits(container, 2)))}  # nobody reads the log
    with start(metrics="127.0.0.1:0", **settings) as process:
        assert process.stdout is not None
        target = process.stdout.readline().split()[-1]

        def stream() -> None:
            network = convservice.Network([convservice.Conv(weights, padding=2)])
            with convservice.connect(target) as client, suppressed(refused):
                for _ in client.stream(network, repeat(image, 8), shape=(3, None, 2048), dtype="float32"):
                    pass

        def small(seed: int) -> None:
            with convservice.connect(target) as client:
                for number in range(20):
                    with suppressed(refused):
                        client.conv2d(image[:, :, :300], weights + np.float32(20 * seed + number))

        with ThreadPoolExecutor(24) as pool:
            done = [pool.submit(stream) for _ in range(12)] + [pool.submit(small, seed) for seed in range(12)]
            for future in done:
                future.result(timeout=240)
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    assert set(refused) <= {"MEMORY_BUDGET", "WEIGHTS_BUDGET", "TOO_MANY_STREAMS"}
    assert most < container


@contextmanager
def suppressed(refused: list[str]) -> Generator[None]:
    """Goes on after a refusal, and notes its reason."""
    try:
        yield
    except convservice.ResourceExhausted as exc:
        refused.append(exc.reason)


NOWHERE = """
import os, sys
from convservice_server.environment import open_standard_streams
open_standard_streams()
assert all(os.path.samestat(os.fstat(number), os.stat(os.devnull)) for number in range(3))
print("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
assert sys.stdin.read() == ""
sys.exit(7)
"""


def test_standard_streams_that_are_closed_lead_nowhere() -> None:
    closed = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    ended = subprocess.run([*closed, sys.executable, "-c", NOWHERE], check=False, timeout=WAIT)
    assert ended.returncode == 7
