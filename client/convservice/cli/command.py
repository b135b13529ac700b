"""What a command is: its name, what it says of itself, its options, and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command of the console script.

    Attributes:
        name: as it is typed.
        summary: one line for the list of commands.
        description: what `--help` says first.
        add_arguments: adds its options to a parser.
        run: is given what came for them, and hands back the exit status.
    """

    name: str
    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
