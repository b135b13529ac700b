"""How far the branches of a join may be apart: the rows that an `Add` holds of the branch that is ahead.

Given the wiring, every node's windows and blocks, `Joins` hands back for each input of a node with several
inputs the most rows that can wait there. The branches of a join begin at one place, the last node that every
way to it goes through. The driver hands that node's rows to all branches in pieces, and whatever follows from
a piece is computed before the next; so how many rows a branch has given when its origin has given m lies
between two straight lines in m, and what can wait is the upper line of one branch, a piece further, less the
lower line of another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from convservice.errors import InvalidRequest, Reason
from convservice.geometry import AxisWindow, PaddingMode, SampleShape
from convservice.layers import Layer, TransposedWindow

MOST_LINES = 4
"""Lines of different slopes kept of one bound; more are replaced by fewer that bound less tightly."""


@dataclass(frozen=True)
class Line:
    """rate * m + offset."""

    rate: Fraction
    offset: Fraction

    def at(self, m: Fraction) -> Fraction:
        """Its height at `m`."""
        return self.rate * m + self.offset


@dataclass(frozen=True)
class Branch:
    """What the joins must know of a node.

    Attributes:
        layer: its layer.
        sources: ids of the nodes that it takes its inputs from.
        given: shape of the sample on its inputs.
        out: shape of its feature map.
        block_rows: output rows that it computes together.
        piece_rows: most rows of its feature map that are handed to its consumers at a time.
    """

    layer: Layer
    sources: tuple[str, ...]
    given: SampleShape
    out: SampleShape
    block_rows: int
    piece_rows: int


@dataclass(frozen=True)
class _Given:
    """Bounds of the rows that a node has given when the origin has given m: the smallest of the upper lines,
    the smallest of the lower ones, neither below 0."""

    upper: tuple[Line, ...]
    lower: tuple[Line, ...]


class Joins:
    """The joins of one network.

    Args:
        root: id under which the network's input is a source.
        root_rows: most rows of it that are handed to its consumers at a time.
        branches: every node, in topological order.
    """

    def __init__(self, root: str, root_rows: int, branches: Mapping[str, Branch]) -> None:
        self._root = root
        self._root_rows = root_rows
        self._branches = branches
        self._origins = _origins(root, branches)
        self.between: set[str] = set()
        """Nodes between a join and its origin: they compute what they can at once, or others would wait."""
        self.origins: set[str] = set()
        """Where branches begin: their rows are handed on in pieces."""

    def waiting(self, name: str) -> tuple[int, ...]:
        """Most rows that wait at each input of a join.

        Raises:
            InvalidRequest: `HEIGHT_REQUIRED`: the branches give rows at different rates, so how many wait
                depends on the height, which is not known.
        """
        node, origin = self._branches[name], self._origins[name]
        self.origins.add(origin)
        region = self._region(name, origin)
        self.between.update(region)
        piece = self._root_rows if origin == self._root else self._branches[origin].piece_rows
        one = (Line(Fraction(1), Fraction(0)),)
        given = {origin: _Given(one, one)}
        for inner in region:
            given[inner] = self._through(self._branches[inner], given)
        ends = [given[source] for source in node.sources]
        found: list[int] = []
        for port, ahead in enumerate(ends):
            most = 1
            for other, behind in enumerate(ends):
                if other != port:
                    most = max(most, self._apart(node, ahead, behind, piece))
            found.append(most)
        return tuple(found)

    def _region(self, name: str, origin: str) -> list[str]:
        """The nodes between a join and its origin, in topological order."""
        found: set[str] = set()
        open_nodes = list(self._branches[name].sources)
        while open_nodes:
            inner = open_nodes.pop()
            if inner != origin and inner not in found:
                found.add(inner)
                open_nodes.extend(self._branches[inner].sources)
        return [inner for inner in self._branches if inner in found]

    @staticmethod
    def _through(node: Branch, given: Mapping[str, _Given]) -> _Given:
        """What a node gives, from what its sources do."""
        upper = [line for source in node.sources for line in given[source].upper]
        lower = [line for source in node.sources for line in given[source].lower]
        if node.layer.reducing:
            return _Given((Line(Fraction(0), Fraction(1)),), (Line(Fraction(0), Fraction(0)),))
        rate, low, high = rows_given(node.layer, node.given, node.block_rows)
        return _Given(
            _fewer_upper([Line(line.rate * rate, line.offset * rate + high) for line in upper]),
            _fewer_lower([Line(line.rate * rate, line.offset * rate + low) for line in lower]),
        )

    @staticmethod
    def _apart(node: Branch, ahead: _Given, behind: _Given, piece: int) -> int:
        """Most rows that one branch is ahead of another, when the origin has given it a piece more."""
        rows, most = node.given.rows, 0
        for low in behind.lower:
            apart = [_line_apart(high, low, piece) for high in ahead.upper]
            known = [value for value in apart if value is not None]
            if not known and rows is None:
                raise InvalidRequest(
                    f"the inputs of {node.layer.type_name} come at different rates, so the rows that wait"
                    " there depend on the height, which is not known",
                    reason=Reason.HEIGHT_REQUIRED,
                )
            most = max(most, math.ceil(min(known)) if known else node.given.height)
        return most if rows is None else min(most, rows)


def rows_given(layer: Layer, given: SampleShape, block_rows: int) -> tuple[Fraction, Fraction, Fraction]:
    """What a windowed layer gives for m > 0 rows: at least rate * m + low rows, at most rate * m + high, also
    when the sample ends with row m. Neither counts beyond the feature map's height.

    Returns:
        rate, low, high.
    """
    window = layer.window(given)
    if isinstance(window, TransposedWindow):
        rate = Fraction(window.stride)
        low = Fraction(-window.before)
        past = window.extent + window.output_padding - window.stride - window.before - window.after
        high = Fraction(max(-window.before, past))
        first = 0
    elif isinstance(window, AxisWindow):
        rate = Fraction(1, window.stride)
        low = (window.before - window.extent + 1) * rate
        high = (window.before + window.after - window.extent + window.stride) * rate
        if window.ceil_mode:
            high = max(high, (window.before + window.stride - 1) * rate)
        first = window.before if layer.row_mode is PaddingMode.REFLECT else 0
    else:
        raise TypeError(f"{layer.type_name} is no windowed layer")
    low -= block_rows - 1
    # Nothing is given for the first rows: none without any row, nor what a mirrored edge still waits for.
    return rate, low - max(Fraction(0), first * rate + low), high


def _line_apart(high: Line, low: Line, piece: int) -> Fraction | None:
    """The most by which `high`, a piece further, is above `low`, neither taken below 0; None for no limit."""
    if high.rate > low.rate:
        return None
    turn = max(Fraction(0), -low.offset / low.rate) if low.rate else Fraction(0)
    return max(Fraction(0), max(Fraction(0), high.at(turn + piece)) - max(Fraction(0), low.at(turn)))


def _fewer_upper(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lowest line of each rate; a few of them bound as well, less tightly."""
    best: dict[Fraction, Fraction] = {}
    for line in lines:
        best[line.rate] = min(line.offset, best.get(line.rate, line.offset))
    return tuple(Line(rate, best[rate]) for rate in sorted(best)[:MOST_LINES])


def _fewer_lower(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lowest line of each rate; where they are many, one below all of them."""
    best: dict[Fraction, Fraction] = {}
    for line in lines:
        best[line.rate] = min(line.offset, best.get(line.rate, line.offset))
    if len(best) > MOST_LINES:
        return (Line(min(best), min(best.values())),)
    return tuple(Line(rate, offset) for rate, offset in best.items())


def _origins(root: str, branches: Mapping[str, Branch]) -> dict[str, str]:
    """Each node's immediate dominator: the last node that every way from the root to it goes through.

    In topological order one pass of Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm (2001), does.
    """
    depth, origins = {root: 0}, dict[str, str]()
    for name, node in branches.items():
        common = node.sources[0]
        for source in node.sources[1:]:
            other = source
            while common != other:
                if depth[common] >= depth[other]:
                    common = origins[common]
                else:
                    other = origins[other]
        origins[name], depth[name] = common, depth[common] + 1
    return origins
