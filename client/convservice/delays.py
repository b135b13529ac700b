"""Delays: how far the rows of a network's nodes lie behind its input, and what that makes them hold.

Given nodes and shapes it hands back the input rows that rows of a node need, and the rows that each input of
each node with several holds. The work grows with the network, never with the rows: the number of rows that a
node has put out after t rows of an earlier one lies between two lines,

    at least rate * t - lag, or all of them        at most rate * t + lead, or, at the end, all of them

and what an `Add` holds of its faster branch is the largest difference of two such lines, both counted from
where the branches fork: what lies before delays them alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE, AxisWindow, PaddingMode, SampleShape
from convservice.layers import Layer, TransposedWindow
from convservice.nodes import INPUT, Node, label

_ZERO = Fraction(0)


@dataclass(frozen=True)
class Pace:
    """The lines between which the rows of a node lie, counted from an earlier node.

    Attributes:
        rate: rows per row of the earlier node.
        lag: how far below rate * t they may be.
        lead: how far above, before the end.
        last: how far above rate * height all of them are, at most.
        full: rows of the earlier node after which this one may have all of its rows.
    """

    rate: Fraction
    lag: Fraction
    lead: Fraction
    last: Fraction
    full: Fraction

    def then(self, step: Pace, rows: int | None) -> Pace:
        """The pace of a node of so many rows that goes at `step`, counted from a node that goes at this."""
        full = min(self.full, self.first_at(step.full))
        pace = Pace(
            self.rate * step.rate,
            self.lag * step.rate + step.lag,
            self.lead * step.rate + step.lead,
            self.last * step.rate + step.last,
            full,
        )
        return pace if rows is None else replace(pace, full=min(full, pace.first_at(Fraction(rows))))

    def first_at(self, rows: Fraction) -> Fraction:
        """The first t at which there may be so many rows before the end, never after `full`."""
        if not self.rate:
            return _ZERO if self.lead >= rows else self.full
        return max(_ZERO, (rows - self.lead) / self.rate)


def input_rows_needed(
    nodes: Sequence[Node],
    node_id: str,
    rows: int,
    shapes: Mapping[str, SampleShape],
    blocks: Mapping[str, int] | None = None,
) -> int:
    """Rows of the network's input that must have come before the first `rows` rows of a node leave.

    Args:
        nodes: the network's, in topological order.
        node_id: one of them.
        rows: output rows asked for.
        shapes: node id to the shape of its feature map, with that of `"input"`.
        blocks: rows that each node computes together, aligned to multiples; 1 where not named.

    Returns:
        The rows; `MAX_SIZE` where all are needed and the height is not known.
    """
    needed = {node_id: rows}
    for node in reversed(nodes):
        wanted = needed.get(node.id, 0)
        if not wanted:
            continue
        step = (blocks or {}).get(node.id, 1)
        wanted = -(-wanted // step) * step
        height = shapes[node.id].rows
        wanted = min(wanted, MAX_SIZE if height is None else height)
        for source in node.inputs:
            reads = min(node.layer.real_rows(0, wanted, shapes[source])[1], MAX_SIZE)
            needed[source] = max(needed.get(source, 0), reads)
    return needed.get(INPUT, 0)


def port_rows(
    nodes: Sequence[Node],
    shapes: Mapping[str, SampleShape],
    computed: Mapping[str, int] | None = None,
    handed: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Most rows that each input of each node with several inputs holds while a sample streams through.

    Every node is taken to compute as soon as `computed` of its rows can be, and to hand each run of at most
    `handed` rows to its consumers one after another, each of which computes what it can before the next is
    given any; the order among them does not matter.

    Args:
        nodes: the network's, in topological order.
        shapes: node id to the shape of its feature map, with that of `"input"`.
        computed: node id to the rows it may wait for before it computes; 1 where not named.
        handed: node id, or `"input"`, to the rows it hands over at once; 1 where not named.

    Returns:
        Node id to rows, one number per input, each bounded by that input's height.

    Raises:
        InvalidRequest: `HEIGHT_REQUIRED` where branches take rows at different rates while the height is not
            known: what is held would grow for ever.
    """
    wait = {name: rows - 1 for name, rows in (computed or {}).items()}
    flow = _Flow(shapes, handed or {})
    found: dict[str, tuple[int, ...]] = {}
    for position, node in enumerate(nodes):
        if len(node.inputs) == 1:
            flow.add(node, _behind(node.layer, shapes[node.inputs[0]]), wait.get(node.id, 0))
            continue
        fork = flow.fork(node)
        paces = [flow.given(source, fork) for source in node.inputs]
        height, rows = shapes[fork].rows, shapes[node.id].rows
        if height is None and rows is None and len({pace.rate for pace in paces}) > 1:
            raise _without_end(label(position, node), node, [pace.rate for pace in paces])
        slowest = _slowest(paces, Fraction(MAX_SIZE if height is None else height))
        flow.add(node, slowest, wait.get(node.id, 0), fork)
        found[node.id] = _port_rows(paces, slowest, rows, wait.get(node.id, 0))
    return found


class _Flow:
    """The nodes so far, as a tree: each hangs on the last node that all of its rows come through."""

    def __init__(self, shapes: Mapping[str, SampleShape], handed: Mapping[str, int]) -> None:
        self._shapes = shapes
        self._handed = handed
        self._before: dict[str, str] = {}
        self._depth = {INPUT: 0}
        self._steps: dict[str, Pace] = {}  # from the node before

    def add(self, node: Node, step: Pace, wait: int, fork: str | None = None) -> None:
        """Hangs a node on `fork`, or on its one input, of which the last run may not be handed over yet."""
        before = node.inputs[0] if fork is None else fork
        lag = step.lag + wait
        if fork is None:
            lag += self._handed.get(before, 1) * step.rate
        self._before[node.id] = before
        self._depth[node.id] = self._depth[before] + 1
        self._steps[node.id] = replace(step, lag=lag)

    def fork(self, node: Node) -> str:
        """The last node that all rows of all inputs of `node` come through."""
        first = node.inputs[0]
        for source in node.inputs[1:]:
            other = source
            while first != other:
                if self._depth[first] < self._depth[other]:
                    first, other = other, first
                first = self._before[first]
        return first

    def given(self, source: str, fork: str) -> Pace:
        """The pace, counted from `fork`, of the rows of `source` that a consumer has been given: perhaps not
        of its last run."""
        height = self._shapes[fork].rows
        pace = Pace(Fraction(1), _ZERO, _ZERO, _ZERO, Fraction(MAX_SIZE if height is None else height))
        path: list[str] = []
        at = source
        while at != fork:
            path.append(at)
            at = self._before[at]
        for name in reversed(path):
            pace = pace.then(self._steps[name], self._shapes[name].rows)
        return replace(pace, lag=pace.lag + self._handed.get(source, 1))


def _without_end(where: str, node: Node, rates: Sequence[Fraction]) -> InvalidRequest:
    named = ", ".join(map(str, rates))
    return InvalidRequest(
        f"{where} needs the height, which is not known: its inputs bring {named} rows for each row that they"
        " are given, and what it holds of one would grow for ever",
        reason=Reason.HEIGHT_REQUIRED,
        metadata={"node": node.id, "rates": named},
    )


def _behind(layer: Layer, sample: SampleShape) -> Pace:
    """The pace of a layer's rows, counted from those that it has been given."""
    window = layer.window(sample)
    full = Fraction(MAX_SIZE if sample.rows is None else sample.rows)
    before, after, extent = (Fraction(value) for value in (window.before, window.after, window.extent))
    if isinstance(window, TransposedWindow):
        rate = Fraction(window.stride)
        last = extent - rate - before - after + window.output_padding
        # Where the end may be near, a row waits until it is sure that the output does not end before it.
        lag = before if sample.rows is not None else max(before, -last)
        return Pace(rate, lag, -before, last, full)
    if isinstance(window, AxisWindow):
        rate = Fraction(1, window.stride)
        lead = (before - extent) * rate + 1
        lag = (extent - before - 1) * rate + _first_wait(window, layer.row_mode)
        return Pace(rate, lag, lead, lead + after * rate + window.ceil_mode, full)
    return Pace(_ZERO, _ZERO, _ZERO, Fraction(1), full)  # nothing before the end


def _first_wait(window: AxisWindow, mode: PaddingMode) -> Fraction:
    """How much further the lower line lies below: first rows wait for those that the padding reads."""
    if mode is PaddingMode.ZEROS or not window.before:
        return _ZERO
    rows = window.before if mode is PaddingMode.REFLECT else 0  # with so many there is nothing yet
    return max(_ZERO, Fraction(rows + window.before - window.extent + 1, window.stride))


def _slowest(given: Sequence[Pace], end: Fraction) -> Pace:
    """The pace of the slowest of several inputs."""
    full = max(pace.full for pace in given)
    first = given[0]
    if all(pace.rate == first.rate for pace in given):
        lag, lead = max(pace.lag for pace in given), min(pace.lead for pace in given)
        return Pace(first.rate, lag, lead, min(pace.last for pace in given), full)
    # Below the least of several lines lies one that is below it at both ends; above it lies each of them.
    upper = min(given, key=lambda pace: pace.rate * end + pace.lead)
    least = [min(pace.rate * t - pace.lag for pace in given) for t in (_ZERO, end)]
    lag = max(-least[0], upper.rate * end - least[1])
    return Pace(upper.rate, lag, upper.lead, upper.last, full)


def _port_rows(given: Sequence[Pace], slowest: Pace, rows: int | None, wait: int) -> tuple[int, ...]:
    """The rows that each input of a node of `rows` rows holds: those by which it is before the slowest of the
    others, the row being computed, and those that wait for others to be computed with."""
    ahead: dict[tuple[Pace, Pace], int] = {}
    pairs = list(zip(given, _slowest_others(given, slowest), strict=True))
    for fast, slow in pairs:
        if (fast, slow) not in ahead:
            ahead[fast, slow] = _held(fast, slow, rows)
    held = [1 + wait + max(0, ahead[pair] - 1) for pair in pairs]
    return tuple(count if rows is None else min(count, rows) for count in held)


def _slowest_others(given: Sequence[Pace], slowest: Pace) -> list[Pace]:
    """For each of several inputs the slowest of the others; where the rates differ, of all."""
    if any(pace.rate != slowest.rate for pace in given):
        return [slowest] * len(given)
    *_, second, last = sorted(range(len(given)), key=lambda port: given[port].lag)
    return [given[second if port == last else last] for port in range(len(given))]


def _held(fast: Pace, slow: Pace, rows: int | None) -> int:
    """The largest number of rows by which `fast` may be before `slow`, of `rows` rows in all."""
    if rows is None:  # the rates are equal
        return _ceil(max(fast.lead, fast.last) + max(slow.lag, _ZERO))

    def least(t: Fraction) -> Fraction:
        return max(_ZERO, min(slow.rate * t - slow.lag, Fraction(rows)))

    turns = {_ZERO, fast.full}
    if slow.rate:
        turns |= {slow.lag / slow.rate, (rows + slow.lag) / slow.rate}
    running = [t for t in turns if 0 <= t <= fast.full]
    ahead = [min(fast.rate * t + fast.lead, Fraction(rows)) - least(t) for t in running]
    return _ceil(max(*ahead, rows - least(fast.full)))


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
