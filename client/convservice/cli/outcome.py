"""How a command ends: its exit status, and the errors that lead to one.

A command returns an `Exit` or raises; `main` is given what it raised and asks here for the status and the
one line that the user sees.
"""

from __future__ import annotations

from enum import IntEnum

from convservice.errors import InvalidRequest, ServiceUnavailable


class Exit(IntEnum):
    """Exit statuses, the same for every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3


EXIT_HELP = """\
exit status:
  0  done
  1  it failed: a result that is wrong, a backend that cannot run, a limit, a missing package
  2  the arguments are wrong, or what they name: an option, a file, shapes that do not fit
  3  the service cannot be reached, or is stopping
"""


class CommandFailed(Exception):
    """A command cannot go on.

    Args:
        message: one line, with the rule and the numbers.
        status: the exit status it leads to.
    """

    def __init__(self, message: str, status: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.status = status


def missing_extra(package: str, extra: str) -> CommandFailed:
    """The failure of a command whose extra is not installed, naming what installs it."""
    return CommandFailed(f"this needs the package {package}: pip install 'convservice[{extra}]'")


def status_of(error: Exception) -> Exit:
    """The exit status that an error leads to."""
    if isinstance(error, CommandFailed):
        return error.status
    if isinstance(error, InvalidRequest):
        return Exit.USAGE
    if isinstance(error, ServiceUnavailable):
        return Exit.UNAVAILABLE
    return Exit.FAILED
