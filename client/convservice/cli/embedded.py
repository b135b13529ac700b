"""A server of one's own for a while: a child process on a free port of this machine.

What is given no `--target` starts one, uses it and stops it. The server runs in a process of its own
because BLAS must be on one thread from the moment NumPy is imported there, and because the SDK never
imports it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import IO

from convservice import ConvClient, connect
from convservice.cli.credentials import credentials, given
from convservice.cli.outcome import CommandFailed, Exit
from convservice.cli.serve import SETTINGS

START_SECONDS = 60.0
"""A server that has not said where it listens by then is given up."""

STOP_SECONDS = 15.0
"""A server that has not ended so long after SIGTERM is killed."""

ERROR = "convservice: "
"""How the line begins on which it says why it ends."""

READY = "listening on "
"""How the first line of `convservice serve` begins when it is ready."""


class EmbeddedServer:
    """`convservice serve` as a child process; a context manager.

    Attributes:
        target: where it listens, `"127.0.0.1:PORT"`.
        pid: its process id.

    Raises:
        CommandFailed: the server ended before it was ready, or took more than 60 s; with its last line.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        # Whatever it logs matters only if it fails; a file never makes it wait for a reader, as a pipe would.
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in stop()
        # -P: like the console script, it imports nothing from the folder that it happens to run in.
        program = [sys.executable, "-P", "-m", "convservice.cli"]
        # In a session of its own an interrupt from the keyboard reaches this process alone, which stops it.
        self._process = subprocess.Popen(  # noqa: S603 - this very interpreter, and options of our own
            [*program, "serve", "--listen", "127.0.0.1:0", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        try:
            self.target = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def stop(self) -> None:
        """Ends it as SIGTERM does, running tensors finished first; safe more than once."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _wait_until_ready(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - it was opened as a pipe
        give_up = threading.Timer(START_SECONDS, self._process.kill)
        give_up.start()
        try:
            line = self._process.stdout.readline().strip()
        finally:
            give_up.cancel()
        if line.startswith(READY):
            return line.removeprefix(READY)
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        said = self._log.read().splitlines() or [line or "it said nothing"]
        reason = next((text.removeprefix(ERROR) for text in said if text.startswith(ERROR)), said[-1])
        raise CommandFailed(f"no server could be started here: {reason}")

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _environment() -> dict[str, str]:
    """This process's environment without the settings of other servers, the choice of a backend apart."""
    settings = {
        setting.variable for group in SETTINGS.values() for setting in group if setting.name != "backend"
    }
    return {
        name: value for name, value in os.environ.items() if name not in settings | {"CONVSERVICE_CONFIG"}
    }


@contextmanager
def connected(arguments: argparse.Namespace) -> Generator[ConvClient]:
    """A client of the server that a command's `--target` names, or of an embedded one.

    Args:
        arguments: a command's, with those of `arguments.add_target`.

    Raises:
        CommandFailed: as `EmbeddedServer` and `credentials`, or credentials without `--target`.
    """
    if arguments.target is not None:
        with connect(arguments.target, timeout=arguments.timeout, **credentials(arguments)) as client:
            yield client
        return
    if options := given(arguments):
        raise CommandFailed(
            f"{options[0]} says how to reach a server: it needs --target HOST:PORT", Exit.USAGE
        )
    with EmbeddedServer() as server, connect(server.target, timeout=arguments.timeout) as client:
        yield client
