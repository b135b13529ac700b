"""Small grids of numbers as text, one beside another, as a book sets them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STYLE = re.compile(r"\x1b\[\d+m")


def number(value: float) -> str:
    """A number in at most six significant digits: `"12"`, `"0.333333"`, `"-1.5e+09"`."""
    return f"{float(value) + 0.0:.6g}"


def grid(values: NDArray[Any], marked: NDArray[np.bool_] | None = None) -> list[str]:
    """A matrix as lines of right-aligned numbers.

    Args:
        values: (rows, columns).
        marked: (rows, columns), true for the numbers to put in parentheses; none where not given.
    """
    matrix: list[list[float]] = values.tolist()
    brackets: list[list[bool]] = np.broadcast_to(False if marked is None else marked, values.shape).tolist()
    cells = [
        [f"({number(x)})" if mark else f"{number(x)} " for x, mark in zip(row, marks, strict=True)]
        for row, marks in zip(matrix, brackets, strict=True)
    ]
    width = max((len(cell) for row in cells for cell in row), default=0)
    return [" ".join(cell.rjust(width) for cell in row) for row in cells]


def framed(title: str, lines: Sequence[str]) -> list[str]:
    """Lines below their title, all of one width."""
    width = max(shown_width(line) for line in (title, *lines))
    return [line + " " * (width - shown_width(line)) for line in (title, *lines)]


def beside(*blocks: Sequence[str], gap: int = 3) -> Iterator[str]:
    """Blocks of lines next to one another; each block's lines are of one width."""
    widths = [shown_width(block[0]) for block in blocks]
    for lines in zip_longest(*blocks):
        cells = (" " * width if line is None else line for line, width in zip(lines, widths, strict=True))
        yield (" " * gap).join(cells).rstrip()


def shown_width(text: str) -> int:
    """Characters of `text` that take room on a terminal: all but colours."""
    return len(_STYLE.sub("", text))
