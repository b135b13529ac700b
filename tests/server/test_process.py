"""The serving process: a start that is broken off or fails, a container too small, settings printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from convservice.cli.health import check
from convservice.endpoint import Endpoint
from convservice_server.environment import BLAS_VARIABLES
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
