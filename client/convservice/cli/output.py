"""What a command shows: tables, lines and JSON.

Tables are drawn by `rich` where it is installed and the output is a terminal, otherwise as plain text in
columns, so that they can be read, piped and compared without it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

from convservice.tables import plain_table

Advance = Callable[[int], None]
"""Given the number of steps done since the last call."""


def show_json(value: Any) -> None:
    """Prints one JSON object, keys in the order given.

    JSON has no NaN and no infinities: they become the strings `"nan"`, `"inf"` and `"-inf"`.
    """
    print(json.dumps(_named(value), indent=2, allow_nan=False))


def _named(value: Any) -> Any:
    """`value` with the name of each float that is not finite in its place."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    if isinstance(value, Mapping):
        return {key: _named(member) for key, member in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_named(item) for item in cast("Sequence[Any]", value)]
    return value


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table.

    Args:
        title: a line above it; none where empty.
        columns: the headings; a column whose heading ends with a space is aligned to the right.
        rows: one sequence of values per row.
    """
    cells = [[str(value) for value in row] for row in rows]
    if sys.stdout.isatty() and _rich_table(title, columns, cells):
        return
    print(plain_table(title, columns, cells))


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.strip(), justify="right" if column.endswith(" ") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
    return True


@contextmanager
def progress(label: str, total: int) -> Generator[Advance]:
    """A progress bar on the error stream, for as long as the context is open.

    Without `rich`, or where the error stream is no terminal, it shows nothing.

    Args:
        label: what is under way.
        total: steps in all.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda _: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)


def styled(text: str, style: str) -> str:
    """`text` in colour or bold where the output is a terminal: style is `"bold"`, `"green"`, `"red"` or
    `"inverse"`."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    codes = {"bold": 1, "green": 32, "red": 31, "inverse": 7}
    return f"\x1b[{codes[style]}m{text}\x1b[0m"


def byte_size(count: float) -> str:
    """A number of bytes for people: `"1.5 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def can_draw_bar() -> bool:
    """Whether a progress bar can be shown: the error stream is a terminal, and `rich` is installed."""
    return sys.stderr.isatty() and find_spec("rich") is not None
