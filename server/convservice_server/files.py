"""Files that may be replaced while the server runs: tokens, certificates, keys.

Given the paths of files and a function that understands what is in them, `Replaceable` hands on what they
say, read anew once one of them has been replaced. A replacement that cannot be read or understood leaves in
place what was there before, and is logged once.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from convservice.errors import ConvServiceError, InvalidRequest, Reason
from convservice_server.calls import Clock

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_BYTES = 1 << 20
"""Of one file: tokens and certificates take far less, and it is read while a call waits."""

_TRIES = 3
"""Readings, where files are replaced while they are read."""

Signature = tuple[int, ...]
"""What tells one file of a path from the next: device, inode, size, times. Empty where there is none."""


class Replaceable(Generic[T]):
    """What files say, as of their last replacement that could be understood; for any number of threads.

    Args:
        paths: the setting that names each file, to its path.
        understand: given the setting's name to the file's bytes, what they say; raises `InvalidRequest`.
        interval: seconds for which the files are not looked at again.
        clock: tells the time.

    Raises:
        InvalidRequest: a file cannot be read or is not understood; the message names setting and path.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        understand: Callable[[Mapping[str, bytes]], T],
        interval: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._paths = paths
        self._understand = understand
        self._interval = interval
        self._clock = clock
        self._looking = threading.Lock()  # held by the one thread that looks, and guards the fields below
        self._signatures, self._said = self._read()
        self._next_look = clock() + interval

    def current(self) -> T:
        """What the files say; looks at them first if the last look is an interval ago."""
        # Who comes while another thread looks takes what is there.
        if self._clock() >= self._next_look and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._said

    def _look(self) -> None:
        self._next_look = self._clock() + self._interval
        signatures = self._now()
        if signatures == self._signatures:
            return
        settings = ", ".join(self._paths)
        try:
            self._signatures, self._said = self._read()
        except ConvServiceError as exc:
            self._signatures = signatures  # what is there now is known to be no good
            log.error("what %s named before stays in force: %s", settings, exc.message)  # noqa: TRY400 - no fault of the program
        else:
            log.info("files replaced", extra={"fields": {"settings": settings}})

    def _read(self) -> tuple[list[Signature], T]:
        """Which files there are and what they say, all of them as they were at one moment."""
        for _ in range(_TRIES):
            signatures = self._now()
            said = self._understand({name: contents(name, path) for name, path in self._paths.items()})
            if self._now() == signatures:
                return signatures, said
        name, path = next(iter(self._paths.items()))
        raise wrong_file(name, path, "it is replaced again and again while it is read")

    def _now(self) -> list[Signature]:
        return [_signature(path) for path in self._paths.values()]


def contents(setting: str, path: str) -> bytes:
    """The bytes of a setting's file.

    Raises:
        InvalidRequest: it cannot be read, is no regular file, or has more than `MOST_BYTES`.
    """
    try:
        # Opening a pipe would wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise wrong_file(setting, path, "it is no regular file")
            data = file.read(MOST_BYTES + 1)
    except InvalidRequest:
        raise
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        why = getattr(exc, "strerror", None) or exc
        raise wrong_file(setting, path, f"it cannot be read: {why}") from exc
    if len(data) > MOST_BYTES:
        raise wrong_file(setting, path, f"it has more than {MOST_BYTES} bytes")
    return data


def wrong_file(setting: str, path: str, why: str) -> InvalidRequest:
    """The error for a setting's file."""
    return InvalidRequest(
        f"{setting} {path}: {why}",
        reason=Reason.INVALID_PARAMETER,
        metadata={"name": setting, "path": path},
        field=setting,
    )


def _signature(path: str) -> Signature:
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
