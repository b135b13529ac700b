"""Tables: columns of texts, as plain text and as HTML.

A column whose heading ends with a space is aligned to the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text: columns padded with spaces, a line of dashes below the headings."""
    headings = [column.strip() for column in columns]
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]

    def padded(line: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if column.endswith(" ") else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        return "  ".join(parts).rstrip()

    dashes = "  ".join("-" * width for width in widths)
    return "\n".join(([title] if title else []) + [padded(headings), dashes, *map(padded, rows)])


def html_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    """The table as an HTML element, with the title as its caption and the notes below; every text escaped."""
    aligned = ["right" if column.endswith(" ") else "left" for column in columns]

    def line(kind: str, cells: Sequence[str]) -> str:
        made = (
            f'<{kind} style="text-align: {side}">{escape(cell)}</{kind}>'
            for cell, side in zip(cells, aligned, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    caption = f'<caption style="text-align: left">{escape(title)}</caption>' if title else ""
    head = f"<thead>{line('th', [column.strip() for column in columns])}</thead>"
    body = f"<tbody>{''.join(line('td', row) for row in rows)}</tbody>"
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<div><table>{caption}{head}{body}</table>{below}</div>"
