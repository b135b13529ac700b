"""`convservice serve`: runs a server until it is told to stop."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from convservice.cli.command import Command
from convservice.cli.outcome import Exit, missing_extra

DESCRIPTION = """\
Runs a server. Its first line on standard output is `listening on HOST:PORT`, written when it is ready:
every backend that can run here has then computed the worked example. Logs go to standard error. The first
SIGTERM or SIGINT finishes what runs and refuses new work, a second one ends the server at once. BLAS is set
to one thread: blocks run on workers of the backend instead.

Every setting may also be given in the environment, as CONVSERVICE_MAX_STREAMS for --max-streams, and in a
TOML file, as max_streams = 64. A flag goes before the environment, the environment before the file.
"""


@dataclass(frozen=True)
class Setting:
    """One setting of the server.

    Attributes:
        name: as it stands in the file.
        metavar: what its value looks like.
        help: what it is, and its default.
    """

    name: str
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        """As it stands on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """As it stands in the environment."""
        return "CONVSERVICE_" + self.name.upper()


SETTINGS: dict[str, tuple[Setting, ...]] = {
    "what it serves": (
        Setting("listen", "HOST:PORT", "where to listen; port 0 picks a free one (default: 127.0.0.1:50051)"),
        Setting("backend", "NAME", "what computes for requests that name none (default: auto)"),
    ),
    "who watches it": (
        Setting("health_listen", "HOST:PORT", "a port for health checks alone, in plaintext (default: none)"),
        Setting("metrics", "HOST:PORT", "a port for Prometheus's page, /metrics (default: none)"),
        Setting("traces", "URL", "send spans there by OTLP over gRPC, as http://HOST:4317 (default: none)"),
    ),
    "limits; sizes take units, such as 512MiB or 2G": (
        Setting(
            "memory_budget",
            "SIZE",
            "for all running tensors together (default: half of what the process leaves)",
        ),
        Setting("weights_budget", "SIZE", "for all weights together (default: a quarter of it)"),
        Setting("max_streams", "N", "streams at the same time (default: 64, fewer in a small container)"),
        Setting("max_uploads", "N", "uploads of weights at the same time (default: 8, likewise)"),
        Setting("unary_workers", "N", "workers that streams never take (default: 2 per core, at least 8)"),
        Setting(
            "max_streams_per_name",
            "N",
            "of the streams, for one name (default: half; all where nobody has one)",
        ),
        Setting("max_uploads_per_name", "N", "of the uploads, likewise"),
        Setting("max_bytes_per_name", "SIZE", "of the memory for running tensors, likewise"),
        Setting("max_weights_per_name", "SIZE", "of the memory for weights, likewise"),
        Setting(
            "max_networks_per_name", "N", "kept for one name, the last used ones (default: 1000, likewise)"
        ),
        Setting("max_message", "SIZE", "largest message taken or sent (default: 4MiB, as clients have it)"),
        Setting("max_unary", "SIZE", "largest input and outputs of a unary call together (default: 1MiB)"),
        Setting("max_inline_weight", "SIZE", "largest weights carried inline in a call (default: 1MiB)"),
        Setting("lease_seconds", "N", "for which weights that no network uses are kept (default: 60)"),
        Setting("idle_timeout", "SECONDS", "after which a call on which nothing moves ends (default: 60)"),
        Setting(
            "crowd_timeout",
            "SECONDS",
            "after which unary calls whose request does not come end where many wait (default: 5)",
        ),
    ),
    "who may call; files that are replaced are read anew": (
        Setting("token_file", "FILE", "tokens that callers must carry, NAME TOKEN a line (default: none)"),
        Setting("tls_certificate", "FILE", "the server's certificate and chain (default: none, plaintext)"),
        Setting("tls_key", "FILE", "the certificate's private key"),
        Setting(
            "tls_client_ca", "FILE", "authorities of the certificates that clients must show (default: none)"
        ),
    ),
    "how it stops": (
        Setting("drain_grace", "SECONDS", "that running tensors get to finish (default: 30)"),
        Setting("drain_linger", "SECONDS", "that a stream between two tensors stays open then (default: 1)"),
    ),
    "logs, on standard error": (
        Setting("log_format", "FORMAT", "text or json (default: text)"),
        Setting("log_level", "LEVEL", "debug, info, warning or error (default: info)"),
    ),
}
"""Every setting, under the heading of its group; the server checks the values."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, which are the server's settings."""
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file of settings (default: CONVSERVICE_CONFIG, if set)"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings and where each comes from, as such a file, and end",
    )
    for heading, settings in SETTINGS.items():
        group = parser.add_argument_group(heading)
        for setting in settings:
            group.add_argument(setting.flag, metavar=setting.metavar, help=setting.help)


def run(arguments: argparse.Namespace) -> int:
    """Serves until stopped; hands back the server's own exit status."""
    from convservice_server.environment import one_blas_thread, open_standard_streams
    from convservice_server.settings import from_process, unknown_variables

    names = [setting.name for group in SETTINGS.values() for setting in group]
    settings = from_process({name: getattr(arguments, name) for name in names}, arguments.config)
    if arguments.print_config:
        print(settings.as_toml(), end="")
        return Exit.OK
    open_standard_streams()
    one_blas_thread()  # before more is imported: it may start this very command over
    try:
        from convservice_server.process import serve
    except ModuleNotFoundError as exc:
        raise missing_extra(exc.name or "of the server", "server") from exc
    return serve(settings.config, unknown_variables(os.environ))


COMMAND = Command("serve", "run a server", DESCRIPTION, add_arguments, run)
