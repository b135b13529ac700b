"""Compiled kernels on disk, so that each is compiled once a machine and not once a process.

Given a kernel and an architecture, `KernelCache.path` hands on the file of its cubin: kept from before, or
compiled now and kept. A file's name holds the digest of all that the code follows from (source with its
constants, architecture, compiler, options) and the digest of its content, so that a damaged file is found out
and made anew. A file appears whole or not at all: any number of threads and processes may share the folder.
Where nothing can be written there, kernels are compiled into a folder that goes with the process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from convservice.errors import InternalError, Reason
from convservice_backends.cuda.source import Kernel
from convservice_backends.cupy import compiler
from convservice_backends.cupy.compiler import Compiled, compile_kernel

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "CONVSERVICE_KERNEL_CACHE"
"""Environment: the folder; the user's cache folder where it is not set."""

LIMIT_BYTES = 256 << 20
"""Of all files kept: some thousand kernels."""

IN_USE_SECONDS = 3600.0
"""A file used since is not removed: a process may be about to load it."""

DIGITS = 32
"""Hexadecimal digits kept of a digest: 128 bits."""

Compile = Callable[[Kernel, int], Compiled]


class KernelCache:
    """Compiled kernels, by source, architecture, compiler and options.

    Args:
        folder: where they are kept; `default_folder()` where not given.
        limit_bytes: of all files; the ones not used for longest go first.
        compile_with: what compiles.

    Attributes:
        folder: where they are kept; None where nothing is.
        compiled: kernels that were compiled.
        found: kernels that were there.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        limit_bytes: int = LIMIT_BYTES,
        compile_with: Compile = compile_kernel,
    ) -> None:
        self.folder = default_folder() if folder is None else folder
        self.compiled = 0
        self.found = 0
        self._limit = limit_bytes
        self._compile = compile_with
        self._lock = threading.Lock()  # guards the counters, _locks and _own
        self._locks: dict[str, threading.Lock] = {}
        self._own: Path | None = None

    @property
    def compiler_version(self) -> str:
        """NVRTC's version, such as "13.0".

        Raises:
            BackendUnavailable: NVRTC is not installed.
        """
        return compiler.compiler_version()

    def path(self, kernel: Kernel, architecture: int) -> Path:
        """The file of a kernel's cubin.

        Args:
            kernel: which.
            architecture: of the device, 10 * major + minor.

        Raises:
            BackendUnavailable: NVRTC is not installed, or does not know the architecture.
            InternalError: the kernel does not compile, or no folder takes it.
        """
        name = file_name(kernel, architecture)
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # threads that want the same kernel compile it once
            path = self._find(name)
            if path is not None:
                with self._lock:
                    self.found += 1
                return path
            started = time.perf_counter()
            compiled = self._compile(kernel, architecture)
            log.info(
                "compiled %s for sm_%d in %.2f s", kernel.name, architecture, time.perf_counter() - started
            )
            with self._lock:
                self.compiled += 1
            return self._keep(name, compiled.cubin)

    def _find(self, name: str) -> Path | None:
        """The file of that name whose content is what it was when it was written."""
        for folder in (self.folder, self._own):
            if folder is None:
                continue
            for path in folder.glob(f"{name}.*.cubin"):
                try:
                    content = path.read_bytes()
                    if path.name == f"{name}.{_digest(content)}.cubin":
                        with suppress(OSError):  # another user's file serves as well
                            os.utime(path)
                        return path
                    log.warning("%s is damaged; the kernel is compiled again", path)
                    path.unlink()
                except OSError:
                    continue  # removed by another process, or not ours
        return None

    def _keep(self, name: str, cubin: bytes) -> Path:
        """Writes a file; into the process's own folder where the shared one does not take it."""
        if self.folder is not None:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = _write(self.folder, name, cubin)
                _trim(self.folder, self._limit)
                return path
            except OSError as exc:
                if self._own is None:
                    log.warning("compiled kernels cannot be kept in %s: %s", self.folder, exc.strerror or exc)
        try:
            with self._lock:
                if self._own is None:
                    self._own = Path(tempfile.mkdtemp(prefix="convservice-kernels-"))
                    weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)
            return _write(self._own, name, cubin)
        except OSError as exc:
            raise InternalError(
                f"a compiled kernel of {len(cubin)} bytes can be written neither to {self.folder} nor to"
                f" {self._own or 'the folder for temporary files'}: {exc.strerror or exc}",
                reason=Reason.INTERNAL,
            ) from exc


def default_folder() -> Path | None:
    """Where compiled kernels are kept; None where there is no such place.

    `CONVSERVICE_KERNEL_CACHE`, else `convservice/kernels` in the user's cache folder (`XDG_CACHE_HOME`, or
    `~/.cache`).
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if Path(caches).is_absolute():  # others are to be ignored, says the XDG Base Directory Specification
        return Path(caches) / "convservice" / "kernels"
    try:
        return Path.home() / ".cache" / "convservice" / "kernels"
    except RuntimeError:  # a user without a home
        return None


def file_name(kernel: Kernel, architecture: int) -> str:
    """What a kernel's file is called, without the digest of its content.

    Raises:
        BackendUnavailable: NVRTC is not installed, or does not know the architecture.
    """
    target = compiler.target_of(architecture)
    parts = (kernel.digest, compiler.compiler_version(), *compiler.options_for(target))
    return f"{kernel.name}.sm_{target}.{_digest(repr(parts).encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _write(folder: Path, name: str, cubin: bytes) -> Path:
    """Writes a file under another name and gives it its own when it is whole."""
    path = folder / f"{name}.{_digest(cubin)}.cubin"
    handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        Path(part).replace(path)
    except OSError:
        with suppress(OSError):
            Path(part).unlink()
        raise
    return path


def _trim(folder: Path, limit: int) -> None:
    """Removes what is not in use: broken writes, and the oldest files until the rest is within the limit."""
    now = time.time()
    files: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        if re.search(r"\.(cubin|part)$", path.name) is None:
            continue
        with suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        if now - used < IN_USE_SECONDS or (total <= limit and path.suffix != ".part"):
            continue
        with suppress(OSError):
            path.unlink()
            total -= size
