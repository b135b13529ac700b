"""Workers: threads that compute blocks side by side.

NumPy's products and copies release the interpreter's lock, and BLAS runs on one thread (two would change
bits), so parallelism is different blocks on different threads. The thread that asks works too; the others
come from one pool that all sessions share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from convservice_backends.interface import Check
from convservice_backends.operators import Task

WORTH_SHARING = 1 << 21
"""Multiply-adds below which handing work to another thread costs more than it saves (about 0.1 ms)."""


class Workers:
    """The backend's threads.

    Args:
        count: blocks computed at the same time by one session, the asking thread included.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, "convservice-numpy") if count > 1 else None

    def run(self, tasks: Sequence[Task], work: float, check: Check) -> None:
        """Does all tasks; `check` runs before each of the asking thread's own.

        Raises:
            Exception: the first that a task or `check` raised, after every worker has stopped.
        """
        check()
        if self._pool is None or len(tasks) < 2 or work < WORTH_SHARING:
            for task in tasks:
                task(0)
                check()
            return
        shared = _Shared(tasks)
        helpers = min(self.count, len(tasks)) - 1
        futures = [self._pool.submit(shared.work, number + 1, None) for number in range(helpers)]
        try:
            shared.work(0, check)
        finally:
            shared.stop()
            _settle(futures)

    def close(self) -> None:
        """Stops the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _settle(futures: list[Future[None]]) -> None:
    """Waits for helpers that have begun; one that has not is no longer needed."""
    for future in futures:
        if not future.cancel():
            future.result()


class _Shared:
    """Tasks that several threads take from, in order."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._lock = threading.Lock()  # guards _tasks
        self._tasks: Iterator[Task] = iter(tasks)

    def work(self, worker: int, check: Check | None) -> None:
        while (task := self._take()) is not None:
            try:
                task(worker)
                if check is not None:
                    check()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        with self._lock:
            self._tasks = iter(())

    def _take(self) -> Task | None:
        with self._lock:
            return next(self._tasks, None)


class SessionWorkspace:
    """What one session lends to operators: the workers, its scratch, its check.

    Args:
        workers: the backend's threads.
        scratch_bytes: working memory of each worker, allocated when it is first used.
        check: raises when the work is no longer wanted.
    """

    def __init__(self, workers: Workers, scratch_bytes: int, check: Check) -> None:
        self._workers = workers
        self._scratch_bytes = scratch_bytes
        self._check = check
        self._scratch: list[NDArray[np.uint8] | None] = [None] * workers.count

    @property
    def workers(self) -> int:
        """Tasks that can be done at the same time."""
        return self._workers.count

    def scratch(self, worker: int) -> NDArray[np.uint8]:
        """The working memory of a worker."""
        found = self._scratch[worker]
        if found is None:
            found = self._scratch[worker] = np.empty(self._scratch_bytes, dtype=np.uint8)
        return found

    def run(self, tasks: Sequence[Task], work: float) -> None:
        """Does all tasks; see `operators.Workspace`."""
        self._workers.run(tasks, work, self._check)
