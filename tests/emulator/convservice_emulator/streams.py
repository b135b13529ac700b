"""Streams and events, emulated: work is kept until it must be done, and then done in a bad order.

A call on a stream only adds to its queue. What is in a queue runs when somebody waits for an event or a
stream, and what that depends on by events runs before. A `Policy` says how much more may run, and when: a
program that waits for all it has to gives the same results under each.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Work = Callable[[], None]


class Policy(Enum):
    """When queued work runs.

    Attributes:
        EAGER: as soon as events allow it.
        LAZY: when somebody waits for it, and no more than what is waited for.
        OTHERS_FIRST: when somebody waits for it, after all that other streams are free to do.
    """

    EAGER = "eager"
    LAZY = "lazy"
    OTHERS_FIRST = "others first"


class Queue:
    """One stream's work, in order.

    Attributes:
        items: what is still to be done: work, or a place in another queue that must have been passed.
        done: how many items have been.
        asked: how many have ever been put in.
    """

    def __init__(self) -> None:
        self.items: deque[Work | Place] = deque()
        self.done = 0

    @property
    def asked(self) -> int:
        """How many items have ever been put in."""
        return self.done + len(self.items)

    @property
    def is_blocked(self) -> bool:
        """Whether it waits for another queue."""
        first = self.items[0] if self.items else None
        return isinstance(first, Place) and not first.passed


@dataclass(frozen=True)
class Place:
    """A place in a queue: behind its first `count` items."""

    queue: Queue
    count: int

    @property
    def passed(self) -> bool:
        """Whether all before it is done."""
        return self.queue.done >= self.count


class Scheduler:
    """Runs the work of several queues; one thread at a time may call it.

    Args:
        policy: what runs when.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._queues: list[weakref.ref[Queue]] = []  # of the streams that there still are

    def queue(self) -> Queue:
        """A new queue."""
        made = Queue()
        self._queues = [known for known in self._queues if known() is not None]
        self._queues.append(weakref.ref(made))
        return made

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not any(queue.items for known in self._queues if (queue := known()) is not None)

    def put(self, queue: Queue, item: Work | Place) -> None:
        """Adds to a queue; the work runs now if the policy is to run all at once."""
        queue.items.append(item)
        if self._policy is Policy.EAGER:
            self.pass_place(Place(queue, queue.asked))

    def pass_place(self, place: Place) -> None:
        """Does all the work before a place, and what that waits for."""
        wanted = [place]
        while wanted:
            queue = wanted[-1].queue
            if wanted[-1].passed:
                wanted.pop()
                continue
            first = queue.items[0]
            if isinstance(first, Place) and not first.passed:
                wanted.append(first)
                continue
            if self._policy is Policy.OTHERS_FIRST:
                self._run_others(queue)
            _step(queue)

    def _run_others(self, held_back: Queue) -> None:
        """Everything that other queues can do while one stands still."""
        progress = True
        while progress:
            progress = False
            queues = [queue for known in self._queues if (queue := known()) is not None]
            for queue in queues:
                while queue is not held_back and queue.items and not queue.is_blocked:
                    _step(queue)
                    progress = True


def _step(queue: Queue) -> None:
    item = queue.items.popleft()
    queue.done += 1
    if not isinstance(item, Place):
        item()
