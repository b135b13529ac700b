"""From a kernel's source to a function that launches it on the processor.

`Compiler` is given a `Kernel`; it has g++ make a shared object of its text, put between this package's header
and the function that launches a grid, and hands on a `Library`. Shared objects are kept on disk under a
digest of all that they are made from, so that a kernel is compiled once per machine, whichever process or
thread asks first.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

from convservice.errors import BackendUnavailable, InternalError, Reason
from convservice_backends.cuda.source import STRUCTURES, Kernel

CACHE_VARIABLE = "CONVSERVICE_EMULATOR_CACHE"
"""Environment: the folder of compiled kernels."""

COMPILER_VARIABLE = "CONVSERVICE_EMULATOR_CXX"
"""Environment: the C++ compiler, `g++` where not set."""

# A multiplication and an addition stay two roundings; where kernels want one they say so.
FLAGS = ("-std=c++17", "-ffp-contract=off", "-w")
LIBRARY_FLAGS = ("-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")

PROCESSOR_FLAGS = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
"""What a processor may have, to the flag that lets the compiler use it. Without, the same bits, slower."""

MESSAGE_BYTES = 1024


class LaunchFailed(InternalError):
    """A launch that a GPU would refuse, or that would hang there or fail; the message says what it did."""


class Library:
    """One compiled kernel.

    Args:
        path: the shared object.
        name: the kernel's name, for messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # the fibers and shared memory of a library are there once
        self._launch = ctypes.CDLL(str(path)).cuda_on_cpu_launch
        self._launch.restype = ctypes.c_int

    def launch(
        self,
        arguments: bytes,
        grid: tuple[int, int, int],
        dynamic_bytes: int = 0,
        order: int = 0,
        seed: int = 0,
    ) -> None:
        """Runs the kernel over a grid.

        Args:
            arguments: the structure that it takes, as bytes.
            grid: blocks along x, y and z.
            dynamic_bytes: dynamic shared memory of a block.
            order: of threads and blocks: 0 ascending, 1 descending in turns, 2 shuffled.
            seed: of the shuffling.

        Raises:
            LaunchFailed: with the reason.
        """
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        blocks = (ctypes.c_uint * 3)(*grid)
        with self._lock:
            failed = self._launch(
                arguments,
                blocks,
                ctypes.c_uint(dynamic_bytes),
                ctypes.c_int(order),
                ctypes.c_uint(seed & 0xFFFFFFFF),
                message,
                ctypes.c_uint(MESSAGE_BYTES),
            )
        if failed:
            raise LaunchFailed(
                f"kernel {self._name}: {message.value.decode(errors='replace')}", reason=Reason.INTERNAL
            )


class Compiler:
    """Compiles kernels with g++, and keeps what it made.

    Args:
        folder: of compiled kernels; as the environment says where not given.
        flags: further ones, such as `-mno-f16c`.

    Raises:
        BackendUnavailable: there is no compiler, or it does not start.
    """

    def __init__(self, folder: Path | None = None, flags: tuple[str, ...] = ()) -> None:
        self._folder = folder or cache_folder()
        self._program = _program()
        self._flags = (*_processor_flags(), *flags)
        self._lock = threading.Lock()  # guards what follows
        self._libraries: dict[str, Library] = {}  # by the kernel's digest
        self._compiling: dict[Path, threading.Lock] = {}

    @cached_property
    def version(self) -> str:
        """The compiler's own name and version."""
        try:
            shown = subprocess.run(
                [self._program, "--version"], capture_output=True, text=True, check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise _unavailable(f"{self._program} does not start: {exc}") from exc
        return shown.stdout.partition("\n")[0].strip()

    def library(self, kernel: Kernel) -> Library:
        """The kernel, compiled now or before.

        Raises:
            InternalError: it does not compile; with what the compiler says.
        """
        with self._lock:
            found = self._libraries.get(kernel.digest)
        if found is None:
            made = self.library_of(cpp_of(kernel.source, STRUCTURES[kernel.takes].__name__), kernel.name)
            with self._lock:
                found = self._libraries.setdefault(kernel.digest, made)
        return found

    def library_of(self, text: str, name: str) -> Library:
        """The same for the whole text of a C++ file."""
        return _library_at(self.compiled(text, name, LIBRARY_FLAGS, ".so"), name)

    def compiled(self, text: str, name: str, flags: tuple[str, ...], suffix: str) -> Path:
        """A program or shared object made of the whole text of a C++ file, now or before.

        Raises:
            InternalError: it does not compile; with what the compiler says.
        """
        flags = (*FLAGS, *self._flags, *flags)
        parts = (self.version, platform.machine(), *flags, *_headers(), text)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        path = self._folder / f"{name}-{digest[:32]}{suffix}"
        with self._lock:
            compiling = self._compiling.setdefault(path, threading.Lock())
        with compiling:
            if not path.exists():
                self._compile(text, flags, path)
        return path

    def _compile(self, text: str, flags: tuple[str, ...], path: Path) -> None:
        """Writes a file under a name of its own, then renames it: nobody sees half of one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="compiling-") as folder:
            source, made = Path(folder, "kernel.cpp"), Path(folder, "made")
            source.write_text(text, encoding="utf-8")
            command = [self._program, *flags, "-I", str(include_folder()), str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InternalError(
                    f"{self._program} does not compile {path.stem}:\n{done.stderr[-4000:]}",
                    reason=Reason.INTERNAL,
                )
            made.replace(path)


_loading = threading.Lock()
_loaded: dict[Path, Library] = {}


def _library_at(path: Path, name: str) -> Library:
    """The library in a file, one in the whole process: its lock must be there once, as its memory is."""
    with _loading:
        if path not in _loaded:
            _loaded[path] = Library(path, name)
        return _loaded[path]


def cpp_of(source: str, structure: str) -> str:
    """A kernel's text as C++, with the function that launches it on a structure of that name.

    A namespace without a name makes all in it the file's own; only then may shared variables of inline
    functions and of others lie in one section.
    """
    return f'#include "cuda_on_cpu.h"\nnamespace {{\n{source}\n}}\nCUDA_ON_CPU_EXPORT({structure})\n'


def include_folder() -> Path:
    """Of this package's headers."""
    return Path(str(files("convservice_emulator").joinpath("include")))


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "convservice" / "emulator"


@lru_cache(maxsize=1)
def _headers() -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in sorted(include_folder().glob("*.h")))


@lru_cache(maxsize=1)
def _processor_flags() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    has = set(line.split())
    return tuple(flag for name, flag in PROCESSOR_FLAGS.items() if name in has)


def _program() -> str:
    wanted = os.environ.get(COMPILER_VARIABLE, "g++")
    found = shutil.which(wanted)
    if found is None:
        raise _unavailable(f"it needs a C++ compiler, and there is no {wanted} on the path")
    return found


def _unavailable(why: str) -> BackendUnavailable:
    return BackendUnavailable(why, reason=Reason.BACKEND_UNAVAILABLE)
