"""The table of what every kernel takes: a text file with one line for each, made to be read in a diff.

`read` is given the text and hands on a `Table`; `written` does the reverse. Beside the rows a table says
what they hold for: the compiler, its options and the architectures, in the order of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER = """\
# What every kernel takes, as the compiler says it; recorded by `make gate-update`, held to by `make gate`.
# static, dynamic: bytes of shared memory of a block. Below an architecture: registers of a thread.
"""

DIGITS = 16
"""Hexadecimal digits of a source's digest that a row has."""


@dataclass(frozen=True)
class Settings:
    """What a table holds for.

    Attributes:
        compiler: name and version.
        options: the compiler's options, beside the architecture.
        architectures: 10 * major + minor, in rising order.
    """

    compiler: str
    options: str
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One kernel.

    Attributes:
        source: the first digits of the digest of its source.
        threads: threads of a block.
        static: bytes of static shared memory of a block.
        dynamic: bytes of dynamic shared memory of a block.
        registers: architecture to registers of a thread; without those that lack the kernel's instructions.
    """

    source: str
    threads: int
    static: int
    dynamic: int
    registers: dict[int, int]


@dataclass(frozen=True)
class Table:
    """All kernels.

    Attributes:
        settings: what the rows hold for.
        rows: by the kernel's name.
    """

    settings: Settings
    rows: dict[str, Row]


EMPTY = Table(Settings("", "", ()), {})


def written(table: Table) -> str:
    """The table's text."""
    settings = table.settings
    columns = ("source", "threads", "static", "dynamic", *(f"sm_{one}" for one in settings.architectures))
    lines = [
        HEADER,
        f"compiler {settings.compiler}",
        f"options {settings.options}",
        _line("kernel", columns),
    ]
    for name in sorted(table.rows):
        row = table.rows[name]
        registers = [row.registers.get(one, "-") for one in settings.architectures]
        lines.append(_line(name, (row.source, row.threads, row.static, row.dynamic, *registers)))
    return "\n".join(lines) + "\n"


def read(text: str) -> Table:
    """The table in a text.

    Raises:
        ValueError: a line is not as `written` writes it, or a kernel has two.
    """
    compiler, options = "", ""
    architectures: tuple[int, ...] = ()
    rows: dict[str, Row] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, *cells = line.split() or ["#"]
        try:
            if name == "compiler":
                compiler = " ".join(cells)
            elif name == "options":
                options = " ".join(cells)
            elif name == "kernel":
                architectures = tuple(int(cell.removeprefix("sm_")) for cell in cells[4:])
            elif name in rows:
                raise ValueError(f"{name} has two lines")
            elif not name.startswith("#"):
                source, *numbers = cells
                threads, static, dynamic = map(int, numbers[:3])
                pairs = zip(architectures, numbers[3:], strict=True)
                registers = {one: int(cell) for one, cell in pairs if cell != "-"}
                rows[name] = Row(source, threads, static, dynamic, registers)
        except ValueError as exc:
            raise ValueError(f"line {number} of the kernel table cannot be read: {exc}") from exc
    return Table(Settings(compiler, options, architectures), rows)


def _line(name: str, cells: tuple[object, ...]) -> str:
    """Cells in columns of fixed width, so that a new row moves no other."""
    source, *numbers = cells
    return f"{name:<47} {source!s:<{DIGITS}}" + "".join(f" {number!s:>7}" for number in numbers)
