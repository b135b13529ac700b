"""Kernels and their source: a file of CUDA C++, and the constants that it is compiled for.

A `Kernel` is given by the name of its file and its constants; it hands on the text that a compiler takes,
with the project's own headers put in, and a digest of that text, by which compiled kernels are kept. Two
launchers compile it: NVRTC's for a GPU, g++'s for tests on the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from convservice.dtypes import DType
from convservice_backends.cuda.arguments import (
    AddArguments,
    ConvArguments,
    FoldArguments,
    MapArguments,
    PartsArguments,
    PoolArguments,
)

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "conv": ConvArguments,
    "map": MapArguments,
    "pool": PoolArguments,
    "parts": PartsArguments,
    "fold": FoldArguments,
    "add": AddArguments,
}

CONTAINED = {"pool": ("conv",)}
"""Structures that others begin with."""


@dataclass(frozen=True)
class Kernel:
    """One compiled form of one kernel.

    Attributes:
        file: name of its source, without `.cu`.
        label: what tells it apart from the file's other kernels, as a profiler shows it: "float32_3x3".
        threads: threads of a block.
        constants: macro name to value, in the order they are defined.
        takes: which structure of arguments: a key of `STRUCTURES`.
        dynamic_bytes: dynamic shared memory of a block.
        minimum: the lowest architecture that has its instructions, 10 * major + minor.
    """

    file: str
    label: str
    threads: int
    constants: tuple[tuple[str, int], ...] = ()
    takes: str = "conv"
    dynamic_bytes: int = 0
    minimum: int = 75

    @property
    def name(self) -> str:
        """The function's name: file and label."""
        return f"{self.file}_{self.label}" if self.label else self.file

    @property
    def source(self) -> str:
        """The whole text, constants and headers included, with `#line` marks of where it comes from."""
        structures = (self.takes, *CONTAINED.get(self.takes, ()))
        constants = (
            ("KERNEL", self.name),
            ("THREADS", self.threads),
            *((f"{name.upper()}_ARGUMENTS_BYTES", ctypes.sizeof(STRUCTURES[name])) for name in structures),
            *self.constants,
        )
        lines = [f"#define {name} {value}" for name, value in constants]
        return "\n".join([*lines, _text(f"{self.file}.cu")])

    @property
    def digest(self) -> str:
        """SHA-256 of the source, in hexadecimal."""
        return _digest(self)


@lru_cache(maxsize=1024)
def _digest(kernel: Kernel) -> str:
    return hashlib.sha256(kernel.source.encode()).hexdigest()


@lru_cache(maxsize=64)
def _text(name: str) -> str:
    """A source file with the headers that it includes put in their places, each once."""
    return "\n".join(_expanded(name, set()))


def _expanded(name: str, seen: set[str]) -> list[str]:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    text = files("convservice_backends.cuda").joinpath("kernels", name).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith('#include "'):
            header = line.split('"')[1]
            if header not in seen:
                lines += _expanded(header, seen)
            lines.append(f'#line {number + 1} "{name}"')
        elif line.strip() != "#pragma once":
            lines.append(line)
        else:
            lines.append("")
    return lines


def type_constants(given: DType, out: DType) -> tuple[tuple[str, int], ...]:
    """`IN` and `OUT` for rows of these float dtypes."""
    return (("IN", given.wire), ("OUT", out.wire))


def type_label(given: DType, out: DType) -> str:
    """How a kernel's name says its types: once where both are the same."""
    return given.name if given == out else f"{given.name}_{out.name}"
