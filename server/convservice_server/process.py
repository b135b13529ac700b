"""The process around a server: signals, memory, the first line, the exit status.

Given the settings, `serve` owns the process until SIGTERM or SIGINT: it sets up logging, signals, memory and
BLAS (see `environment`), refuses a container that is too small, and prints where it listens once every
backend has been tried. The first signal drains, or ends a start that is still warming up; a second one ends
the process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue

from convservice.errors import ConvServiceError
from convservice_server import logs
from convservice_server.config import ServerConfig
from convservice_server.environment import keep_freed_memory, one_blas_thread, open_standard_streams
from convservice_server.resources import limits, too_small
from convservice_server.server import Server

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_CANNOT_START = 1
EXIT_FORCED = 2

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Events = SimpleQueue[BaseException | None | signal.Signals]
"""What the main thread waits for: a signal, or how warming up ended, with None for well."""


def serve(config: ServerConfig, misspelt: Sequence[str] = ()) -> int:
    """Runs a server until SIGTERM or SIGINT; a second signal ends the process at once.

    It prints `listening on HOST:PORT` as the first line of standard output once it is ready.

    Args:
        config: the settings.
        misspelt: names in the environment that look like settings and are none, to warn of.

    Returns:
        The exit code: 0 after a drain, 1 when the server cannot start.
    """
    open_standard_streams()
    one_blas_thread()
    keep_freed_memory()
    logs.configure(config.log_format, config.log_level)
    for name in misspelt:
        log.warning("%s in the environment is no setting", name)
    if why := too_small(limits()):
        return _cannot_start(why)
    events: Events = SimpleQueue()
    # Blocked before there is any other thread, so that all inherit it and none but the watcher takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_watch_signals, args=(events,), name="signals", daemon=True).start()
    server = None
    try:
        server = Server(config)
        server.listen()
        _warm(server, events)
    except ConvServiceError as exc:
        if server is not None:
            server.stop(0)
        return _cannot_start(exc.message)
    host, _ = config.address
    with suppress(OSError):  # nobody reads it; the log says it too
        sys.stdout.write(f"listening on {host}:{server.port}\n")
        sys.stdout.flush()
    events.get()
    server.stop()
    return EXIT_OK


def _warm(server: Server, events: Events) -> None:
    """Warms a server up in a thread of its own; a signal that comes meanwhile ends the process, since a
    backend that is being constructed cannot be interrupted.

    Raises:
        BackendUnavailable: from `Server.warm`.
    """

    def warm() -> None:
        try:
            server.warm()
        except BaseException as exc:  # noqa: BLE001 - handed to the main thread, which raises it
            events.put(exc)
        else:
            events.put(None)

    threading.Thread(target=warm, name="warming", daemon=True).start()
    match events.get():
        case None:
            return
        case BaseException() as failed:
            raise failed
        case came:
            log.info("stopped while it was warming up", extra={"fields": {"signal": came.name}})
            logging.shutdown()
            os._exit(EXIT_OK)


def _cannot_start(why: str) -> int:
    sys.stderr.write(f"convservice: {why}\n")
    return EXIT_CANNOT_START


def _watch_signals(events: Events) -> None:
    """Tells of the first signal, and ends the process at the second one, whatever it is doing."""
    events.put(signal.Signals(signal.sigwait(_SIGNALS)))
    signal.sigwait(_SIGNALS)
    os._exit(EXIT_FORCED)
