"""Stages: layers at work on rows.

A `Stage` is given rows of one sample as they come and computes runs of output rows as soon as the rows
under them are there, holding no row that no later neuron looks at. It knows where rows are and when they
may be dropped; the arithmetic is its operator's.
"""

from __future__ import annotations

from typing import Any

from convservice.geometry import MAX_SIZE, first_row_kept
from convservice_backends.arrays import Arrays
from convservice_backends.operators import Operator, Run
from convservice_backends.plan import NodePlan


class RowBuffer:
    """The rows of one sample that have come and are still needed: (1, channels, capacity, *rest).

    Rows lie in order; when the end is reached, what is still needed moves to the front.
    """

    def __init__(self, array: Any, arrays: Arrays) -> None:
        self._array = array
        self._arrays = arrays
        self._start = 0  # where in the array the first held row lies
        self.clear()

    def clear(self) -> None:
        """Forgets all rows: the next sample begins."""
        self._start = 0
        self.first = 0
        self.seen = 0

    @property
    def room(self) -> int:
        """Rows that can be appended now."""
        return int(self._array.shape[2]) - (self.seen - self.first)

    @property
    def held(self) -> Any:
        """The rows held, a view."""
        return self._array[:, :, self._start : self._start + self.seen - self.first]

    def append(self, rows: Any) -> None:
        """Takes the next rows (1, channels, n, *rest), at most `room`; each is rounded to the dtype."""
        count = rows.shape[2]
        held = self.seen - self.first
        if self._start + held + count > self._array.shape[2]:
            self._move_to_front(held)
        end = self._start + held
        self._arrays.copy(rows, self._array[:, :, end : end + count])
        self.seen += count

    def _move_to_front(self, held: int) -> None:
        """Moves the rows held, a few at a time: never onto rows that have still to move, by no large copy."""
        row_bytes = max(1, self._array[:, :, :1].nbytes)
        step = min(self._start, max(1, self._arrays.moved_bytes // row_bytes))
        for at in range(0, held, step):
            count = min(step, held - at)
            source = self._start + at
            self._arrays.copy(self._array[:, :, source : source + count], self._array[:, :, at : at + count])
        self._start = 0

    def drop_before(self, row: int) -> None:
        """Forgets rows before `row`, which may lie beyond those that have come."""
        drop = min(row, self.seen) - self.first
        if drop > 0:
            self._start += drop
            self.first += drop

    def skip(self, count: int) -> None:
        """Passes over the next rows without keeping them; none may be held."""
        self.seen += count
        self.first = self.seen
        self._start = 0


class Stage:
    """One node of a network at work on one sample after another.

    Args:
        plan: how it works.
        operator: what computes.
        arrays: the backend's.
    """

    def __init__(self, plan: NodePlan, operator: Operator[Any], arrays: Arrays) -> None:
        self.plan = plan
        self._operator = operator
        self._held = RowBuffer(
            arrays.empty((1, plan.given.channels, plan.capacity, *plan.given.rest), plan.given_dtype), arrays
        )
        self._out = arrays.empty((1, plan.out.channels, plan.run_rows, *plan.out.rest), plan.out_dtype)
        self.begin()

    def begin(self) -> None:
        """Begins a sample."""
        self._held.clear()
        self._given = self.plan.given
        self._out_rows = self.plan.out.rows
        self._done = 0

    @property
    def output_rows(self) -> int:
        """Output rows computed so far."""
        return self._done

    def put(self, rows: Any) -> int:
        """Takes as many of the rows (1, channels, n, *rest) as there is room for; returns how many."""
        count = int(rows.shape[2])
        skip = min(count, max(0, self._keep_from() - self._held.seen))
        if skip:
            self._held.skip(skip)
            return skip
        taken = min(count, self._held.room)
        self._held.append(rows[:, :, :taken])
        return taken

    def end(self) -> None:
        """Says that all rows of the sample have come.

        Raises:
            InvalidRequest: what only the end could show, when the height was not announced.
        """
        if self._given.rows is None:
            self._given = self._given.with_rows(self._held.seen)
            self._out_rows = self.plan.layer.output_sample(self._given).rows

    def next_run(self) -> tuple[int, int] | None:
        """The largest run of whole blocks whose input has come; None when more rows are needed."""
        first, step = self._done, self.plan.blocks.rows
        if self._out_rows is not None and first >= self._out_rows:
            return None
        fewest, most = 0, self.plan.run_rows // step
        while fewest < most:  # the input that a run needs grows with the run
            middle = (fewest + most + 1) // 2
            if self._is_ready(first, self._clipped(first + middle * step)):
                fewest = middle
            else:
                most = middle - 1
        return (first, self._clipped(first + fewest * step)) if fewest else None

    def may_grow(self, first: int, last: int) -> bool:
        """Whether a run would be larger if more rows came first, and there is room for them."""
        return last - first < self.plan.run_rows and self._held.room > 0 and last != self._out_rows

    def compute(self, first: int, last: int, workspace: Any) -> Any:
        """Computes output rows first <= i < last and drops the input that nobody needs any more.

        Returns:
            (1, out_channels, last - first, *rest), valid until the next call.
        """
        out = self._out[:, :, : last - first]
        run = Run(self._held.held, self._held.first, self._given.rows, first, last, self.plan.blocks)
        self._operator.compute(run, out, workspace)
        self._done = last
        self._held.drop_before(self._keep_from())
        return out

    def _clipped(self, row: int) -> int:
        return row if self._out_rows is None else min(row, self._out_rows)

    def _is_ready(self, first: int, last: int) -> bool:
        return self.plan.layer.real_rows(first, last, self._given)[1] <= self._held.seen

    def _keep_from(self) -> int:
        """The first row that the next block or a later one reads."""
        if self._out_rows is not None and self._done >= self._out_rows:
            return MAX_SIZE
        window = self.plan.layer.window(self._given)
        start, _ = window.span(self._done, self._done + 1)
        mode = self.plan.layer.row_mode
        return first_row_kept(start, window.after, self._held.seen, self._given.rows, mode)
