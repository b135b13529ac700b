"""Stages: layers at work on rows.

A `WindowedStage` is given rows of one sample as they come, at one port or several, and computes runs of
output rows as soon as the rows under them are there, holding no row that no later neuron looks at. A
`ReducingStage` takes rows in and puts out its one row when the sample has ended. Stages know where rows are
and when they may be dropped; the arithmetic is their operators'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

from convservice.errors import InternalError, Reason
from convservice.geometry import MAX_SIZE, first_row_kept
from convservice_backends.arrays import Arrays
from convservice_backends.operators import AnyOperator, Operator, ReducingOperator, Rows, Run
from convservice_backends.plan import NodePlan, PortPlan

MayWait: TypeAlias = Callable[[], bool]
"""Whether rows may be collected into larger runs, because nothing would begin sooner without."""


class RowBuffer:
    """The rows of one sample that have come and are still needed: (1, channels, capacity, *rest).

    Rows lie in order; when the end is reached, what is still needed moves to the front.
    """

    def __init__(self, port: PortPlan, arrays: Arrays) -> None:
        shape = port.shape
        self._array = arrays.empty((1, shape.channels, port.capacity, *shape.rest), port.dtype)
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
    def held(self) -> Rows:
        """The rows held, a view."""
        return Rows(self._array[:, :, self._start : self._start + self.seen - self.first], self.first)

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


class Computed(NamedTuple):
    """Rows of a node's feature map.

    Attributes:
        rows: (1, out_channels, n, *rest), valid until the stage computes again.
        first: index of the first one in the sample.
    """

    rows: Any
    first: int


class Stage:
    """What both kinds of stages share: one node of a network at work on one sample after another.

    Args:
        plan: how it works.
        arrays: the backend's.
    """

    def __init__(self, plan: NodePlan, arrays: Arrays) -> None:
        self.plan = plan
        self._ports = [RowBuffer(port, arrays) for port in plan.ports]
        self._out = arrays.empty((1, plan.out.channels, plan.out_rows, *plan.out.rest), plan.out_dtype)
        self.begin()

    def begin(self) -> None:
        """Begins a sample."""
        for held in self._ports:
            held.clear()
        self._given = self.plan.given
        self._out_rows = self.plan.out.rows
        self._done = 0

    def room(self, port: int) -> int:
        """Rows that can be held now beside those that are."""
        return self._ports[port].room

    def put(self, port: int, rows: Any) -> int:
        """Takes as many of the rows (1, channels, n, *rest) as there is room for; returns how many."""
        held, count = self._ports[port], int(rows.shape[2])
        taken = min(count, held.room)
        held.append(rows[:, :, :taken])
        return taken

    def end(self) -> None:
        """Says that all rows of the sample have come.

        Raises:
            InvalidRequest: what only the end could show, when the height was not announced.
        """
        if self._given.rows is None:
            samples = [self._given.with_rows(held.seen) for held in self._ports]
            self._out_rows = self.plan.layer.joined_sample(samples).rows
            self._given = samples[0]

    def advance(self, workspace: Any, may_wait: MayWait) -> Computed | None:
        """Computes what can be computed next; None when more rows are needed, or may be waited for."""
        raise NotImplementedError

    def _run(self, first: int, last: int) -> Run:
        ports = tuple(held.held for held in self._ports)
        return Run(ports, self._given.rows, first, last, self.plan.blocks)


class WindowedStage(Stage):
    """A windowed layer: output rows as soon as the rows under them are there."""

    def __init__(self, plan: NodePlan, operator: Operator[Any], arrays: Arrays) -> None:
        self._operator = operator
        super().__init__(plan, arrays)

    def put(self, port: int, rows: Any) -> int:
        """Takes rows; passes over those that no neuron looks at."""
        held = self._ports[port]
        skip = min(int(rows.shape[2]), max(0, self._keep_from(held) - held.seen))
        if skip:
            held.skip(skip)
            return skip
        return super().put(port, rows)

    def advance(self, workspace: Any, may_wait: MayWait) -> Computed | None:
        """Computes the largest run of whole blocks whose input has come."""
        run = self._next_run()
        if run is None:
            return None
        first, last = run
        if self._may_grow(first, last) and may_wait():
            return None
        out = self._out[:, :, : last - first]
        self._operator.compute(self._run(first, last), out, workspace)
        self._done = last
        for held in self._ports:
            held.drop_before(self._keep_from(held))
        return Computed(out, first)

    def _next_run(self) -> tuple[int, int] | None:
        first, step = self._done, self.plan.blocks.rows
        if self._out_rows is not None and first >= self._out_rows:
            return None
        fewest, most, tried = 0, self.plan.run_rows // step, 1
        while fewest < most:  # the input that a run needs grows with the run: doubled, then halved
            if self._is_ready(first, self._clipped(first + tried * step)):
                fewest = tried
                tried = min(2 * tried, (tried + most + 1) // 2)
            else:
                most = tried - 1
                tried = (fewest + most + 1) // 2
        return (first, self._clipped(first + fewest * step)) if fewest else None

    def _may_grow(self, first: int, last: int) -> bool:
        """Whether a run would be larger if more rows came first, and there is room for them."""
        if not self.plan.may_wait or last - first >= self.plan.run_rows or last == self._out_rows:
            return False
        return all(held.room > 0 for held in self._ports)

    def _clipped(self, row: int) -> int:
        return row if self._out_rows is None else min(row, self._out_rows)

    def _is_ready(self, first: int, last: int) -> bool:
        """Whether the rows under these output rows have come, and there will be these whatever follows: a
        transposed convolution's last may look at nothing that is still to come, and not be there either."""
        seen = min(held.seen for held in self._ports)
        if self._given.rows is None and last > self.plan.layer.window(self._given).output_size(seen):
            return False
        return self.plan.layer.real_rows(first, last, self._given)[1] <= seen

    def _keep_from(self, held: RowBuffer) -> int:
        """The first row that the next block or a later one reads."""
        if self._out_rows is not None and self._done >= self._out_rows:
            return MAX_SIZE
        window = self.plan.layer.window(self._given)
        start, _ = window.span(self._done, self._done + 1)
        return first_row_kept(start, window.after, held.seen, self._given.rows, self.plan.layer.row_mode)


class ReducingStage(Stage):
    """A reducing layer: rows are taken in, some blocks at a time, and one row leaves when the sample ends."""

    def __init__(self, plan: NodePlan, operator: ReducingOperator[Any], arrays: Arrays) -> None:
        self._operator = operator
        self._sums = None if plan.sums is None else arrays.empty((1, *plan.sums[0]), plan.sums[1])
        super().__init__(plan, arrays)

    def begin(self) -> None:
        """Begins a sample."""
        super().begin()
        self._finished = False

    def advance(self, workspace: Any, may_wait: MayWait) -> Computed | None:
        """Takes in the whole blocks that have come, and finishes when they were the last."""
        (held,), height = self._ports, self._given.rows
        while (last := self._next_block_end(held, height)) > self._done:
            if held.room > 0 and last != height and self.plan.may_wait and may_wait():
                return None
            self._operator.accumulate(self._run(self._done, last), self._sums, self._out, workspace)
            self._done = last
            held.drop_before(last)
        if self._finished or height is None or self._done < height:
            return None
        self._operator.finish(height, self._given, self._sums, self._out, workspace)
        self._finished = True
        return Computed(self._out, 0)

    def _next_block_end(self, held: RowBuffer, height: int | None) -> int:
        """Where the run of whole blocks that have come ends."""
        if height is not None and held.seen == height:
            return min(height, self._done + self.plan.run_rows)
        step = self.plan.blocks.rows
        return min(self._done + self.plan.run_rows, held.seen // step * step)


def stage_of(plan: NodePlan, operator: AnyOperator, arrays: Arrays) -> Stage:
    """The stage that computes a node."""
    if plan.layer.reducing:
        return ReducingStage(plan, cast("ReducingOperator[Any]", operator), arrays)
    return WindowedStage(plan, cast("Operator[Any]", operator), arrays)


def no_room(plan: NodePlan) -> InternalError:
    """A stage can neither take a row nor compute one: its plan was wrong."""
    return InternalError(
        f"{plan.layer.type_name} {plan.node.id!r} would hold more rows than were planned",
        reason=Reason.INTERNAL,
    )
