"""Delays: how far the rows of a network's nodes lie behind its input, and what that makes them hold.

Given nodes and shapes it hands back the input rows that rows of a node need, and the rows that each input of
each node holds. The work grows with the network, never with the rows: between lines, the number of rows that
a node has put out after t rows of input lies at

    at least rate * t - lag, or all of them        at most rate * t + lead, or, at the end, all of them

and what an `Add` holds of its faster branch is the largest difference of two such lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_SIZE, AxisWindow, PaddingMode, SampleShape
from convservice.layers import Layer, TransposedWindow
from convservice.nodes import INPUT, Node, label


@dataclass(frozen=True)
class Pace:
    """The lines between which the rows of a node lie.

    Attributes:
        rate: rows per row of the network's input.
        lag: how far below rate * t they may be.
        lead: how far above, before the end.
        last: how far above rate * height all of them are, at most.
        full: rows of the network's input after which the node may have all of its rows.
    """

    rate: Fraction
    lag: Fraction
    lead: Fraction
    last: Fraction
    full: Fraction


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
    computed, handed = computed or {}, handed or {}
    height = shapes[INPUT].rows
    zero, end = Fraction(0), Fraction(MAX_SIZE if height is None else height)
    paces = {INPUT: Pace(Fraction(1), zero, zero, zero, end)}
    found: dict[str, tuple[int, ...]] = {}
    for position, node in enumerate(nodes):
        given = [_given(paces[source], handed.get(source, 1)) for source in node.inputs]
        wait = computed.get(node.id, 1) - 1
        rows = shapes[node.id].rows
        if len(given) == 1:
            pace = _behind(node.layer, given[0], shapes[node.inputs[0]], wait)
            paces[node.id] = _filled(pace, rows)
            continue
        if height is None and len({pace.rate for pace in given}) > 1:
            rates = ", ".join(str(pace.rate) for pace in given)
            raise InvalidRequest(
                f"{label(position, node)} needs the height, which is not known: its inputs bring {rates} rows"
                " per row of the network's input",
                reason=Reason.HEIGHT_REQUIRED,
                metadata={"node": node.id, "rates": rates},
            )
        slowest = _slowest(given, end, wait)
        held = [max(1 + wait, _held(paces[source], slowest, rows)) for source in node.inputs]
        found[node.id] = tuple(count if rows is None else min(count, rows) for count in held)
        paces[node.id] = _filled(slowest, rows)
    return found


def _given(pace: Pace, handed: int) -> Pace:
    """The rows that a consumer has been given, of those that a node has put out: perhaps not the last run."""
    return replace(pace, lag=pace.lag + handed)


def _behind(layer: Layer, given: Pace, sample: SampleShape, wait: int) -> Pace:
    """The pace of a layer's rows, which wait for `wait` further ones, from that of the rows it is given."""
    window = layer.window(sample)
    before, after, extent = (Fraction(value) for value in (window.before, window.after, window.extent))
    if isinstance(window, TransposedWindow):
        rate = Fraction(window.stride)
        late, early = before, -before
        last = extent - rate - before - after + window.output_padding
    elif isinstance(window, AxisWindow):
        rate = Fraction(1, window.stride)
        late = (extent - before - 1) * rate + _first_wait(window, layer.row_mode)
        early = (before - extent) * rate + 1
        last = early + after * rate + window.ceil_mode
    else:  # nothing before the end
        zero = Fraction(0)
        return Pace(zero, Fraction(wait), zero, Fraction(1), given.full)
    return Pace(
        given.rate * rate,
        given.lag * rate + late + wait,
        given.lead * rate + early,
        given.last * rate + last,
        given.full,
    )


def _first_wait(window: AxisWindow, mode: PaddingMode) -> Fraction:
    """How much further the lower line lies below: first rows wait for those that the padding reads."""
    if mode is PaddingMode.ZEROS or not window.before:
        return Fraction(0)
    rows = window.before if mode is PaddingMode.REFLECT else 0  # with so many there is nothing yet
    return max(Fraction(0), Fraction(rows + window.before - window.extent + 1, window.stride))


def _filled(pace: Pace, rows: int | None) -> Pace:
    """The pace of a node of so many rows, with when it may have them all."""
    if rows is None:
        return pace
    if not pace.rate:
        return replace(pace, full=Fraction(0)) if pace.lead >= rows else pace
    return replace(pace, full=min(pace.full, max(Fraction(0), (rows - pace.lead) / pace.rate)))


def _slowest(given: Sequence[Pace], end: Fraction, wait: int) -> Pace:
    """The pace of the slowest of several inputs."""
    full = max(pace.full for pace in given)
    last = min(pace.last for pace in given)
    first = given[0]
    if all(pace.rate == first.rate for pace in given):
        lag, lead = max(pace.lag for pace in given), min(pace.lead for pace in given)
        return Pace(first.rate, lag + wait, lead, last, full)
    # Below the least of several lines lies one that is below it at both ends; above it lies each of them.
    upper = min(given, key=lambda pace: pace.rate * end + pace.lead)
    least = [min(pace.rate * t - pace.lag for pace in given) for t in (Fraction(0), end)]
    lag = max(-least[0], upper.rate * end - least[1])
    return Pace(upper.rate, lag + wait, upper.lead, upper.last, full)


def _held(fast: Pace, slow: Pace, rows: int | None) -> int:
    """The largest number of rows by which `fast` may be before `slow`, of `rows` rows in all."""
    if rows is None:  # the rates are equal
        return _ceil(max(fast.lead, fast.last) + max(slow.lag, Fraction(0)))

    def least(t: Fraction) -> Fraction:
        return max(Fraction(0), min(slow.rate * t - slow.lag, Fraction(rows)))

    turns = {Fraction(0), fast.full}
    if slow.rate:
        turns |= {slow.lag / slow.rate, (rows + slow.lag) / slow.rate}
    running = [t for t in turns if 0 <= t <= fast.full]
    ahead = [min(fast.rate * t + fast.lead, Fraction(rows)) - least(t) for t in running]
    return _ceil(max(*ahead, rows - least(fast.full)))


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
