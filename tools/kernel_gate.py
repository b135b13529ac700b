"""The compile gate: every kernel for every architecture, held to what the table says of it. Needs no GPU.

    python -m tools.kernel_gate [--full | --update]

Given are all kernels that may ever be launched and `kernels.txt`. A kernel must compile without a warning,
keep all that it holds in registers, fit every architecture that has its instructions, and take the
registers and the shared memory of its row. Kernels whose source is that of their row are compiled for one
architecture only, which their digest chooses, so that the table cannot lie unnoticed; `--full` compiles all
for all. `--update` records what was found instead of holding it against the table. Exits with 1 where a
rule is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from convservice.errors import InternalError
from convservice_backends.cuda.source import Kernel
from convservice_backends.cupy.compiler import OPTIONS, Compiled, compile_kernel
from tools.kernel_table import DIGITS, EMPTY, Row, Settings, Table, read, written

TABLE = Path(__file__).parent / "kernels.txt"

SHARED_BYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Architecture to the most shared memory of a block, in KiB. These limits and the next are from the CUDA C++
Programming Guide, table "Technical Specifications per Compute Capability"."""

STATIC_BYTES = 48 << 10
"""The most static shared memory of a block."""

REGISTERS = 64 << 10
"""Registers of a multiprocessor, given out to warps."""

REGISTERS_AT_ONCE = 256
"""A warp gets a multiple of so many."""

Compile = Callable[[Kernel, int], Compiled]


class Gate:
    """The rules, for a set of kernels and a table.

    Args:
        kernels: all that may be launched.
        table: what they are held to.
        settings: compiler, options and architectures of now.
        compile_with: what compiles.

    Attributes:
        rows: what the table should say, once `run` is done.
        changes: differences from the table, a line each.
        compiled: compilations.
        forms: kernels times architectures.
    """

    def __init__(
        self,
        kernels: Iterable[Kernel],
        table: Table,
        settings: Settings,
        compile_with: Compile = compile_kernel,
    ) -> None:
        self._table = table
        self._settings = settings
        self._compile = compile_with
        self._kernels: dict[str, Kernel] = {}
        self.rows: dict[str, Row] = {}
        self.changes: list[str] = []
        self.compiled = 0
        self._faults: dict[tuple[str, str], list[str]] = defaultdict(list)
        for kernel in kernels:
            known = self._kernels.setdefault(kernel.name, kernel)
            if known != kernel:
                self._fault(kernel.name, None, "two kernels have this name")
        self.forms = sum(len(self._runs_on(kernel)) for kernel in self._kernels.values())

    @property
    def faults(self) -> list[str]:
        """What no table can allow: a line for each kernel and rule, with the architectures."""
        return [f"{' '.join([name, *where])}: {what}" for (name, what), where in self._faults.items()]

    def run(self, *, full: bool = False) -> None:
        """Compiles what has to be and fills in the attributes.

        Args:
            full: compiles everything.
        """
        if self._table.settings != self._settings:
            self.changes.append(f"the table holds for {self._table.settings}, this is {self._settings}")
        wanted = [
            (kernel, architecture)
            for kernel in self._kernels.values()
            for architecture in self._to_compile(kernel, full=full)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NVRTC compiles several at a time
            outcomes = list(pool.map(self._compiled, *zip(*wanted, strict=True))) if wanted else []
        found: dict[str, dict[int, Compiled]] = defaultdict(dict)
        for (kernel, architecture), outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, Compiled):
                found[kernel.name][architecture] = outcome
            else:
                self._fault(kernel.name, architecture, outcome)
        self.compiled = len(wanted)
        for name, kernel in self._kernels.items():
            self._hold(kernel, found[name])
        for name in sorted(self._table.rows.keys() - self._kernels.keys()):
            self.changes.append(f"{name}: the table has a row, there is no such kernel")

    def _runs_on(self, kernel: Kernel) -> tuple[int, ...]:
        return tuple(one for one in self._settings.architectures if one >= kernel.minimum)

    def _to_compile(self, kernel: Kernel, *, full: bool) -> tuple[int, ...]:
        runs_on = self._runs_on(kernel)
        if full or not self._is_known(kernel):
            return runs_on
        return (runs_on[int(kernel.digest, 16) % len(runs_on)],)

    def _is_known(self, kernel: Kernel) -> bool:
        """Whether the table has a row for this very source and these architectures."""
        row = self._table.rows.get(kernel.name)
        return (
            self._table.settings == self._settings
            and row is not None
            and row.source == kernel.digest[:DIGITS]
            and tuple(row.registers) == self._runs_on(kernel)
        )

    def _compiled(self, kernel: Kernel, architecture: int) -> Compiled | str:
        try:
            compiled = self._compile(kernel, architecture)
            _ = compiled.resources  # a log that does not say is an error as well
        except InternalError as exc:
            return exc.message.replace(
                f"{kernel.name} does not compile for sm_{architecture}", "does not compile"
            )
        return compiled

    def _hold(self, kernel: Kernel, found: dict[int, Compiled]) -> None:
        """Applies the rules to one kernel, and makes its row."""
        old = self._table.rows.get(kernel.name)
        known = old if old is not None and self._is_known(kernel) else None
        registers = dict(known.registers) if known else {}
        statics = {known.static} if known else set[int]()
        for architecture, compiled in found.items():
            takes = compiled.resources
            registers[architecture] = takes.registers
            statics.add(takes.static_shared_bytes)
            for count, what in (
                (takes.spill_bytes, "spilled registers"),
                (takes.stack_bytes, "local memory"),
            ):
                if count:
                    self._fault(kernel.name, architecture, f"{count} bytes of {what}, none are allowed")
            for line in compiled.warnings:
                self._fault(kernel.name, architecture, line)
        if not registers:
            return
        if len(statics) > 1:
            differ = f"static shared memory differs between architectures: {sorted(statics)}"
            self._fault(kernel.name, None, differ)
        registers = {one: registers[one] for one in sorted(registers)}
        row = Row(kernel.digest[:DIGITS], kernel.threads, max(statics), kernel.dynamic_bytes, registers)
        for architecture in registers:
            self._fits(kernel.name, row, architecture)
        self.rows[kernel.name] = row
        if old != row:
            self.changes.append(f"{kernel.name}: {_difference(old, row)}")

    def _fault(self, name: str, architecture: int | None, what: str) -> None:
        """Notes a fault; one that several architectures share is one."""
        where = self._faults[name, what]
        if architecture is not None:
            where.append(f"sm_{architecture}")

    def _fits(self, name: str, row: Row, architecture: int) -> None:
        """At least one block must run."""
        shared, most = row.static + row.dynamic, SHARED_BYTES[architecture] << 10
        if shared > most or row.static > STATIC_BYTES:
            self._fault(
                name,
                architecture,
                f"a block takes {row.static} + {row.dynamic} bytes of shared memory; there are {most},"
                f" {STATIC_BYTES} for the static",
            )
        warps = -(-row.threads // 32)
        of_warp = -(-row.registers[architecture] * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        if warps * of_warp > REGISTERS:
            self._fault(
                name,
                architecture,
                f"a block of {row.threads} threads takes {warps * of_warp} registers, there are {REGISTERS}",
            )


def _difference(old: Row | None, new: Row) -> str:
    """What differs, such as "sm_90 registers 40 -> 44"."""
    if old is None:
        return "the table has no row"
    parts = [
        f"{what} {before} -> {after}"
        for what, before, after in (
            ("threads", old.threads, new.threads),
            ("static shared memory", old.static, new.static),
            ("dynamic shared memory", old.dynamic, new.dynamic),
        )
        if before != after
    ]
    for one in sorted(old.registers.keys() | new.registers.keys()):
        before, after = old.registers.get(one, "-"), new.registers.get(one, "-")
        if before != after:
            parts.append(f"sm_{one} registers {before} -> {after}")
    source = "the source is another" if old.source != new.source else "the source is the row's"
    return f"{source}; {', '.join(parts) or 'what it takes is the same'}"


def main() -> int:
    """Runs the gate; see the module."""
    from convservice_backends.cuda.algorithms.base import every_kernel

    parser = argparse.ArgumentParser(description="Holds every kernel to the table of what it takes.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--full", action="store_true", help="compile everything")
    choice.add_argument("--update", action="store_true", help="record what was found")
    arguments = parser.parse_args()
    started = time.perf_counter()
    settings = Settings(
        f"nvidia-cuda-nvrtc {version('nvidia-cuda-nvrtc')}", " ".join(OPTIONS), tuple(sorted(SHARED_BYTES))
    )
    gate = Gate(every_kernel(), read(TABLE.read_text()) if TABLE.exists() else EMPTY, settings)
    gate.run(full=arguments.full)
    elapsed = time.perf_counter() - started
    for line in gate.faults:
        print(f"kernel gate: FAULT {line}", file=sys.stderr)
    for line in gate.changes:
        print(f"kernel gate: change: {line}", file=sys.stdout if arguments.update else sys.stderr)
    print(
        f"kernel gate: {len(gate.rows)} kernels, {gate.forms} with their architectures; compiled"
        f" {gate.compiled} in {elapsed:.0f} s; {len(gate.changes)} changes, {len(gate.faults)} faults"
    )
    if gate.faults:
        return 1
    if arguments.update:
        TABLE.write_text(written(Table(settings, gate.rows)))
        return 0
    if gate.changes:
        print("kernel gate: `make gate-update` records the changes, after review", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
