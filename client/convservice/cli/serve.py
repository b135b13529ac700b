"""`convservice serve`: runs a server until it is told to stop."""

from __future__ import annotations

import argparse

from convservice.cli.command import Command
from convservice.cli.outcome import missing_extra

DESCRIPTION = """\
Runs a server. Its first line on standard output is `listening on HOST:PORT`, written when it is ready;
logs go to standard error. The first SIGTERM or SIGINT finishes what runs and refuses new work, a second
one ends the server at once. BLAS is set to one thread: blocks run on workers of the backend instead.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, which are the server's settings."""
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default="127.0.0.1:50051",
        help="where to listen; port 0 picks a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="what computes for requests that name none (default: auto)"
    )
    limits = parser.add_argument_group("limits; sizes take units, such as 512MiB or 2G")
    limits.add_argument(
        "--memory-budget",
        metavar="SIZE",
        dest="memory_budget_bytes",
        help="for all running tensors together (default: half of the memory)",
    )
    limits.add_argument(
        "--weights-budget",
        metavar="SIZE",
        dest="weights_budget_bytes",
        help="for all weights together (default: a quarter of the memory)",
    )
    limits.add_argument("--max-streams", metavar="N", type=int, help="streams at the same time (default: 64)")
    limits.add_argument(
        "--unary-workers", metavar="N", type=int, help="workers that streams never take (default: 2 per core)"
    )
    limits.add_argument(
        "--idle-timeout",
        metavar="SECONDS",
        type=float,
        help="after which a call on which nothing moves is ended (default: 60)",
    )
    limits.add_argument(
        "--drain-grace",
        metavar="SECONDS",
        type=float,
        help="that running tensors get when the server stops (default: 30)",
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-format", choices=("text", "json"), help="default: text")
    logs.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")


def run(arguments: argparse.Namespace) -> int:
    """Serves until stopped; hands back the server's own exit status."""
    from convservice_server.environment import one_blas_thread

    # Before anything heavy is imported: it may start this very command over.
    one_blas_thread()
    try:
        from convservice_server.server import serve
    except ModuleNotFoundError as exc:
        raise missing_extra(exc.name or "of the server", "server") from exc
    from convservice_server.config import ServerConfig

    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name in ServerConfig.__dataclass_fields__ and value is not None
    }
    return serve(ServerConfig.of(**settings))


COMMAND = Command("serve", "run a server", DESCRIPTION, add_arguments, run)
