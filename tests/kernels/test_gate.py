"""The compile gate against a compiler that says what a test wants: each rule catches what it is there for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convservice.dtypes import FLOAT32
from convservice.errors import InternalError
from convservice_backends.cuda.source import Kernel, type_constants
from convservice_backends.cupy.compiler import Compiled
from tools.kernel_gate import Gate
from tools.kernel_table import EMPTY, Row, Settings, Table, read, written

CONSTANTS = type_constants(FLOAT32, FLOAT32)
FIRST = Kernel("direct", "first", 128, CONSTANTS)
SECOND = Kernel("direct", "second", 128, CONSTANTS, dynamic_bytes=4096, minimum=80)
SETTINGS = Settings("nvrtc 1.2", "--fast --exact", (75, 80, 90))


class FakeCompiler:
    """Says what it was told to, and counts."""

    def __init__(self, log: str = "", **others: str) -> None:
        self.log = log
        self.others = others
        self.asked: list[tuple[str, int]] = []

    def __call__(self, kernel: Kernel, architecture: int) -> Compiled:
        self.asked.append((kernel.name, architecture))
        return Compiled(b"", self.others.get(f"sm_{architecture}", self.log))


def says(*, registers: int = 40, stack: int = 0, stores: int = 0, loads: int = 0, shared: int = 1024) -> str:
    return (
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem"
    )


def gate(
    compiler: FakeCompiler,
    table: Table = EMPTY,
    kernels: tuple[Kernel, ...] = (FIRST, SECOND),
    *,
    full: bool = False,
) -> Gate:
    found = Gate(kernels, table, SETTINGS, compiler)
    found.run(full=full)
    return found


@pytest.fixture
def table() -> Table:
    """What the gate records of a compiler that has nothing remarkable to say."""
    return Table(SETTINGS, gate(FakeCompiler(says())).rows)


def test_a_table_is_read_as_it_was_written(table: Table) -> None:
    assert table.rows.keys() == {"direct_first", "direct_second"}
    assert table.rows["direct_second"] == Row(SECOND.digest[:16], 128, 1024, 4096, {80: 40, 90: 40})
    assert read(written(table)) == table
    widths = {len(line) for line in written(table).splitlines() if line.startswith(("kernel", "direct"))}
    assert len(widths) == 1


@pytest.mark.parametrize(
    "line", ["direct_first 0123 128 0 0 40 40", "direct_first 0123 many 0 0 40 40 40", "direct_first"]
)
def test_a_table_that_cannot_be_read(table: Table, line: str) -> None:
    rows = [one for one in written(table).splitlines() if not one.startswith("direct_first")]
    with pytest.raises(ValueError, match=f"line {len(rows) + 1} of the kernel table"):
        read("\n".join([*rows, line]))


def test_a_kernel_with_two_rows(table: Table) -> None:
    row = next(line for line in written(table).splitlines() if line.startswith("direct_first"))
    with pytest.raises(ValueError, match="direct_first has two lines"):
        read(written(table) + row)


def test_what_is_known_is_compiled_for_one_architecture(table: Table) -> None:
    compiler = FakeCompiler(says())
    found = gate(compiler, table)
    assert (found.changes, found.faults, found.rows) == ([], [], table.rows)
    assert [name for name, _ in sorted(compiler.asked)] == ["direct_first", "direct_second"]
    again = FakeCompiler(says())
    gate(again, table)
    assert sorted(again.asked) == sorted(compiler.asked)


def test_full_compiles_everything(table: Table) -> None:
    compiler = FakeCompiler(says())
    assert gate(compiler, table, full=True).changes == []
    assert len(compiler.asked) == len(set(compiler.asked)) == 5


def test_the_table_cannot_lie_unnoticed(table: Table) -> None:
    """Of a kernel whose source is known, one architecture tells."""
    found = gate(FakeCompiler(says(registers=44)), table)
    assert len(found.changes) == 2
    assert all("the source is the row's; sm_" in line for line in found.changes)
    assert all("registers 40 -> 44" in line for line in found.changes)


def test_another_source_is_compiled_for_every_architecture(table: Table) -> None:
    compiler = FakeCompiler(says(), sm_90=says(registers=52))
    other = replace(FIRST, constants=(*CONSTANTS, ("DEPTH", 8)))
    found = gate(compiler, table, (other, SECOND))
    assert {(FIRST.name, one) for one in (75, 80, 90)} <= set(compiler.asked)
    assert "direct_first: the source is another; sm_90 registers 40 -> 52" in found.changes
    assert found.rows["direct_first"].registers == {75: 40, 80: 40, 90: 52}


def test_another_source_that_takes_the_same(table: Table) -> None:
    other = replace(FIRST, constants=(*CONSTANTS, ("DEPTH", 8)))
    assert gate(FakeCompiler(says()), table, (other, SECOND)).changes == [
        "direct_first: the source is another; what it takes is the same"
    ]


def test_another_compiler(table: Table) -> None:
    compiler = FakeCompiler(says())
    found = gate(compiler, replace(table, settings=replace(SETTINGS, compiler="nvrtc 1.1")))
    assert len(compiler.asked) == 5
    assert len(found.changes) == 1
    assert "nvrtc 1.1" in found.changes[0]


def test_dynamic_shared_memory_is_in_the_table_too(table: Table) -> None:
    found = gate(FakeCompiler(says()), table, (FIRST, replace(SECOND, dynamic_bytes=8192)))
    assert found.changes == ["direct_second: the source is the row's; dynamic shared memory 4096 -> 8192"]


def test_a_row_without_a_kernel(table: Table) -> None:
    assert gate(FakeCompiler(says()), table, (FIRST,)).changes == [
        "direct_second: the table has a row, there is no such kernel"
    ]


def test_a_kernel_without_a_row(table: Table) -> None:
    third = replace(FIRST, label="third")
    found = gate(FakeCompiler(says()), table, (FIRST, SECOND, third))
    assert found.changes == ["direct_third: the table has no row"]


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        (says(stores=8, loads=12, stack=8), "20 bytes of spilled registers, none are allowed"),
        (says(stack=16), "16 bytes of local memory, none are allowed"),
        (says(shared=100 << 10), "a block takes 102400 + 0 bytes of shared memory; there are 65536"),
        (says(shared=49 << 10), "50176 + 0 bytes of shared memory; there are 65536, 49152 for the static"),
        ('kernel.cu(3): warning #177-D: variable "i" was declared\n' + says(), "warning #177-D"),
        ("nothing", "must speak of one kernel"),
    ],
)
def test_what_no_table_allows(log: str, fault: str) -> None:
    found = gate(FakeCompiler(says(), sm_75=log), kernels=(FIRST,))
    assert any(line.startswith("direct_first sm_75") and fault in line for line in found.faults)


def test_a_block_that_has_no_registers_to_run() -> None:
    large = replace(FIRST, threads=1024)
    found = gate(FakeCompiler(says(registers=65), sm_75=says(registers=64)), kernels=(large,))
    assert found.faults == [
        "direct_first sm_80 sm_90: a block of 1024 threads takes 73728 registers, there are 65536"
    ]


def test_too_much_dynamic_shared_memory_is_seen_without_compiling(table: Table) -> None:
    found = gate(FakeCompiler(says()), table, (FIRST, replace(SECOND, dynamic_bytes=200 << 10)))
    assert [line.split(":")[0] for line in found.faults] == ["direct_second sm_80"]


def test_static_shared_memory_that_differs() -> None:
    found = gate(FakeCompiler(says(), sm_80=says(shared=2048)), kernels=(FIRST,))
    assert found.faults == ["direct_first: static shared memory differs between architectures: [1024, 2048]"]


def test_two_kernels_of_one_name() -> None:
    found = gate(FakeCompiler(says()), kernels=(FIRST, FIRST, replace(FIRST, threads=64)))
    assert found.faults == ["direct_first: two kernels have this name"]


def test_a_kernel_that_does_not_compile() -> None:
    def compiler(kernel: Kernel, architecture: int) -> Compiled:
        if architecture < 90:
            raise InternalError(f"direct_first does not compile for sm_{architecture}: line 7")
        return Compiled(b"", says())

    found = Gate((FIRST,), EMPTY, SETTINGS, compiler)
    found.run()
    assert found.faults == ["direct_first sm_75 sm_80: does not compile: line 7"]
