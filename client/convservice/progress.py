"""How far a transfer has come: a callback, or a bar.

`metered` is given what a user passed as `progress` and hands back a `Meter`, which the client tells what it
sent and received.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from convservice.errors import InvalidRequest, Reason


@dataclass(frozen=True)
class Progress:
    """How far a transfer has come, in bytes of tensor.

    Attributes:
        sent_bytes: input handed to the transport.
        total_bytes: the whole input; None while its height is not known.
        received_bytes: results received.
        received_total: all results; None while the height is not known.
    """

    sent_bytes: int
    total_bytes: int | None
    received_bytes: int
    received_total: int | None


ProgressLike = bool | Callable[[Progress], None] | None
"""None or False for nothing, True for a bar on standard error, or a function that takes each `Progress`."""


class Meter:
    """Counts bytes and calls back; one call at a time, from whichever thread moves the bytes."""

    def __init__(
        self, callback: Callable[[Progress], None] | None, total: int | None, received_total: int | None
    ) -> None:
        self._callback = callback
        self._lock = threading.Lock()  # guards the count, and lets one callback run at a time
        self._now = Progress(0, total, 0, received_total)

    def sent(self, count: int) -> None:
        """`count` more bytes of input were handed over."""
        self._add(count, 0)

    def received(self, count: int) -> None:
        """`count` more bytes of results came."""
        self._add(0, count)

    def restart(self) -> None:
        """The transfer begins anew on another connection."""
        with self._lock:
            self._now = replace(self._now, sent_bytes=0, received_bytes=0)

    def _add(self, sent: int, received: int) -> None:
        if self._callback is None or not sent + received:
            return
        with self._lock:
            now = self._now
            self._now = replace(
                now, sent_bytes=now.sent_bytes + sent, received_bytes=now.received_bytes + received
            )
            self._callback(self._now)


@contextmanager
def metered(progress: ProgressLike, total: int | None, received_total: int | None) -> Generator[Meter]:
    """A meter for one transfer; the bar, if one was asked for, goes when the context ends.

    Raises:
        InvalidRequest: a bar was asked for and the package `rich` is missing.
    """
    if progress is not True:
        yield Meter(progress or None, total, received_total)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars
    except ImportError as exc:
        raise InvalidRequest(
            "progress=True draws its bar with the package rich: pip install 'convservice[cli]'",
            reason=Reason.INVALID_PARAMETER,
            field="progress",
        ) from exc
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        sent = bars.add_task("sent", total=total)
        received = bars.add_task("received", total=received_total)

        def show(now: Progress) -> None:
            bars.update(sent, completed=now.sent_bytes)
            bars.update(received, completed=now.received_bytes)

        yield Meter(show, total, received_total)
