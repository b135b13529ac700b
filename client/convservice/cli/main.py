"""The console script `convservice`: reads the arguments, runs one command, ends with its status.

Whatever a command raises on purpose becomes one line on standard error (with `--json` also an object on
standard output) and an exit status; a traceback means a fault of the program.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from convservice.cli import bench, example, explain, filter, health, info, serve, show_maps, warm  # noqa: A004 - named as the command
from convservice.cli.arguments import with_lists_joined
from convservice.cli.outcome import EXIT_HELP, CommandFailed, Exit, status_of
from convservice.cli.output import show_json
from convservice.errors import ConvServiceError
from convservice.version import __version__

COMMANDS = (
    serve.COMMAND,
    health.COMMAND,
    info.COMMAND,
    example.COMMAND,
    explain.COMMAND,
    filter.COMMAND,
    show_maps.COMMAND,
    bench.COMMAND,
    warm.COMMAND,
)

INTERRUPTED = 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog="convservice",
        description="Convolutions computed elsewhere. `convservice COMMAND --help` says more.",
        epilog=EXIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"convservice {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=EXIT_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(run=command.run, json=False)
        command.add_arguments(one)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; those of this process when None.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong arguments, 3 service unavailable.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal without some character shows '?' in its place
    arguments = parser().parse_args(with_lists_joined(sys.argv[1:] if argv is None else argv))
    if argv is None and arguments.run is not serve.COMMAND.run:
        # A command that is ended still stops the server that it started.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return int(arguments.run(arguments))
    except (CommandFailed, ConvServiceError) as exc:
        return _failed(exc, as_json=arguments.json)
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.OK
    except KeyboardInterrupt:
        return INTERRUPTED


def _failed(error: CommandFailed | ConvServiceError, *, as_json: bool) -> int:
    status = status_of(error)
    message = " ".join(str(error).split())
    sys.stderr.write(f"convservice: {message}\n")
    if as_json:
        reason = error.reason if isinstance(error, ConvServiceError) else ""
        metadata = error.metadata if isinstance(error, ConvServiceError) else {}
        show_json(
            {"error": {"message": message, "reason": reason, "metadata": metadata, "exit": int(status)}}
        )
    return int(status)
