"""Recorded launches in programs of their own, under AddressSanitizer or ThreadSanitizer.

`Sanitizer` is given a launch; it compiles the kernel into a program (`include/runner.h`) with the sanitizer
in it, runs it, and hands on what the sanitizer says. AddressSanitizer sees what is read or written outside of
a buffer, with UndefinedBehaviorSanitizer beside it for misaligned vectors and overflowing indices;
ThreadSanitizer sees two threads of a block at one place of memory, one of them writing, with no barrier
between.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from convservice.errors import InternalError
from convservice_emulator.build import Compiler, cpp_of
from convservice_emulator.recording import Bytes, Recorded, pointers

RUNNER_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer")
ADDRESS_FLAGS = ("-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

TRIVIAL = "int main() { return 0; }\n"


class Kind(Enum):
    """Which sanitizer; `PLAIN` is none, for a kernel that may take its process down."""

    ADDRESS = "address"
    THREAD = "thread"
    PLAIN = "plain"

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told."""
        return {Kind.ADDRESS: ADDRESS_FLAGS, Kind.THREAD: ("-fsanitize=thread",), Kind.PLAIN: ()}[self]


@dataclass(frozen=True, eq=False)
class Report:
    """What came of a run.

    Attributes:
        text: what sanitizer and program said; empty where there was nothing to say.
        buffers: what was in the launch's buffers at the end; empty where the program did not get there.
    """

    text: str
    buffers: tuple[Bytes, ...]


class Sanitizer:
    """Runs launches under one sanitizer.

    Args:
        compiler: of the programs.
        kind: which sanitizer.
    """

    def __init__(self, compiler: Compiler, kind: Kind) -> None:
        self._compiler = compiler
        self._kind = kind
        self._flags = (*RUNNER_FLAGS, *kind.flags)

    def missing(self) -> str:
        """Why it cannot be used here; empty where it can."""
        try:
            program = self._compiler.compiled(TRIVIAL, f"trivial-{self._kind.value}", self._flags, "")
        except InternalError as exc:
            return f"the compiler has no {self._kind.value} sanitizer: {exc.message}"
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False, env=_environment())
        return (
            f"the {self._kind.value} sanitizer does not start: {done.stderr[-500:]}"
            if done.returncode
            else ""
        )

    def run(self, launch: Recorded, source: str | None = None, order: int = 0, seed: int = 1) -> Report:
        """Runs a launch; the arguments are `recording.replay`'s."""
        text = cpp_of(launch.kernel.source if source is None else source, launch.structure)
        text += '#include "runner.h"\n'
        program = self._compiler.compiled(text, f"{launch.kernel.name}-{self._kind.value}", self._flags, "")
        with tempfile.TemporaryDirectory() as folder:
            given, result = Path(folder, "launch"), Path(folder, "result")
            given.write_bytes(_file_of(launch, order, seed))
            done = subprocess.run(
                [str(program), str(given), str(result)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=_environment(),
            )
            buffers = _buffers(launch, result) if result.exists() else ()
        said = (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
        return Report(said, buffers)


def _environment() -> dict[str, str]:
    return {**os.environ, **OPTIONS}


def _file_of(launch: Recorded, order: int, seed: int) -> bytes:
    """A launch as `runner.h` reads it: numbers of 8 bytes, little-endian."""
    parts = [_numbers(*launch.grid, launch.kernel.dynamic_bytes, order, seed, len(launch.arguments))]
    parts += [launch.arguments, _numbers(len(launch.buffers))]
    for buffer in launch.buffers:
        parts += [_numbers(buffer.address, buffer.before.nbytes), buffer.before.tobytes()]
    offsets = pointers(launch.kernel, launch.arguments)
    parts.append(_numbers(len(offsets), *offsets))
    return b"".join(parts)


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def _buffers(launch: Recorded, result: Path) -> tuple[Bytes, ...]:
    whole = np.fromfile(result, np.uint8)
    ends = np.cumsum([buffer.before.nbytes for buffer in launch.buffers])
    if not ends.size or whole.nbytes != ends[-1]:
        return ()
    return tuple(np.split(whole, ends[:-1]))
