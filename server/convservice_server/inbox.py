"""A stream's messages, waited for with a time-out.

gRPC's request iterator blocks for as long as the peer is silent and cannot be told otherwise. So a reader
thread of the stream's own waits in it, and hands over one message at a time: it asks for the next only when
the last one has been taken, so that HTTP/2's window stays the only buffer. `Inbox` is the iterator that the
stream's handler is given; it ends the stream when nothing comes for too long, or when the server stops and no
tensor is open, and a single wait at the time that its call has set for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

from convservice.errors import Cancelled, ConvServiceError, Reason, ServiceUnavailable
from convservice_server.calls import Call, WaitEnded
from convservice_server.faults import draining

T = TypeVar("T")


class Inbox(Iterator[T], Generic[T]):
    """The messages of one stream, one at a time; a context manager that ends its reader.

    Args:
        source: the transport's iterator; it must end or raise when its call ends.
        call: the call it belongs to.
        idle_timeout: seconds to wait for a message.
        linger: seconds to wait for a message that need not come, once `drain` was called.
        between: whether the stream may end here.
    """

    def __init__(
        self,
        source: Iterator[T],
        call: Call,
        *,
        idle_timeout: float,
        linger: float,
        between: Callable[[], bool],
    ) -> None:
        self._source = source
        self._call = call
        self._idle_timeout = idle_timeout
        self._linger = linger
        self._between = between
        self._condition = threading.Condition()  # guards every field below
        self._slot: list[T] = []  # at most one message
        self._ended = False
        self._error: ConvServiceError | None = None
        self._closed = False
        self._drained_at: float | None = None

    def __enter__(self) -> Self:
        threading.Thread(target=self._read, name="stream-reader", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._condition:
            self._closed = True
            self._slot.clear()
            self._condition.notify_all()

    @property
    def has_next(self) -> bool:
        """Whether a message has come and not been taken yet."""
        with self._condition:
            return bool(self._slot)

    def drain(self) -> None:
        """Says that the server stops: between tensors the stream lingers for a moment and then ends."""
        with self._condition:
            self._drained_at = time.monotonic()
            self._condition.notify_all()

    def __next__(self) -> T:
        """The next message, as soon as it has come.

        Raises:
            ServiceUnavailable: `IDLE`: none came in time; `DRAINING`: the server stops.
            Cancelled, DeadlineExceeded: the call was given up.
            InvalidRequest: what came is no message.
            WaitEnded: none came before `Call.wait_until`; the next may still be waited for.
        """
        started = time.monotonic()
        with self._condition:
            while not self._slot and not self._ended:
                left = self._wait_until(started) - time.monotonic()
                if left <= 0:
                    raise self._nothing_came()
                self._condition.wait(left)
            self._call.check()
            if self._slot:
                self._condition.notify_all()
                return self._slot.pop()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _wait_until(self, started: float) -> float:
        until = started + self._idle_timeout
        if self._drained_at is not None and self._between():
            until = min(until, max(started, self._drained_at) + self._linger)
        if self._call.wait_until is not None:
            until = min(until, self._call.wait_until)
        return until

    def _nothing_came(self) -> Exception:
        if self._call.wait_until is not None and time.monotonic() >= self._call.wait_until:
            return WaitEnded()
        if self._drained_at is not None and self._between():
            return draining()
        return ServiceUnavailable(
            f"nothing came for {self._idle_timeout:g} s, so the call was ended",
            reason=Reason.IDLE,
            metadata={"idle_timeout_ms": str(round(self._idle_timeout * 1000))},
        )

    def _read(self) -> None:
        error: ConvServiceError | None = None
        try:
            while self._is_wanted():
                message = next(self._source)
                with self._condition:
                    self._slot.append(message)
                    self._condition.notify_all()
                del message  # held by the slot alone
        except StopIteration:
            pass
        except ConvServiceError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001 - gRPC raises what it likes when a call breaks off
            error = Cancelled(f"the call broke off: {exc}", reason=Reason.CANCELLED)
        with self._condition:
            self._error = error
            self._ended = True
            self._condition.notify_all()

    def _is_wanted(self) -> bool:
        """Waits until the last message has been taken; False when no more are wanted."""
        with self._condition:
            while self._slot and not self._closed:
                self._condition.wait()
            return not self._closed
