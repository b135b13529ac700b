"""The one place that is told what happens: calls that begin and end, tensors that end.

Given records (`records`), `Observation` hands each to every observer: log lines, and metrics and traces where
those are wanted. The service and gRPC's side of it know nothing of what hangs here. An observer that fails
harms no call: it is logged, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from convservice_server.records import CallRecord, TensorRecord

log = logging.getLogger(__name__)


class Observer:
    """What may hang on an observation; each method does nothing unless it is overridden.

    Methods are called from any thread, several at a time, and on a call's own way: they must be quick.
    """

    def call_started(self, call: CallRecord) -> None:
        """A worker has taken a call."""

    def call_ended(self, call: CallRecord) -> None:
        """A call has ended, its last message not sent yet."""

    def tensor_ended(self, tensor: TensorRecord) -> None:
        """A tensor has ended, or was refused."""


class Observation:
    """Tells observers.

    Args:
        observers: whom, in this order.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._failed: set[type[Observer]] = set()

    def add(self, observer: Observer) -> None:
        """Tells another observer too, from now on."""
        self._observers += (observer,)

    def call_started(self, call: CallRecord) -> None:
        """See `Observer`."""
        for observer in self._observers:
            self._tell(observer, observer.call_started, call)

    def call_ended(self, call: CallRecord) -> None:
        """See `Observer`."""
        for observer in self._observers:
            self._tell(observer, observer.call_ended, call)

    def tensor_ended(self, tensor: TensorRecord) -> None:
        """See `Observer`."""
        tensor.call.tensors += 1
        for observer in self._observers:
            self._tell(observer, observer.tensor_ended, tensor)

    def _tell(self, observer: Observer, method: Callable[..., None], record: object) -> None:
        try:
            method(record)
        except Exception:  # whatever it was, the call goes on
            if type(observer) not in self._failed:
                self._failed.add(type(observer))
                log.exception("%s failed; that it does so again is not logged", type(observer).__name__)
