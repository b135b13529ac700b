"""Joins: where the branches of a network meet, and where they began.

Given the wiring, `Joins` finds for each node with several inputs its *fork*, the last node that every way to
it goes through, and the nodes between the two. The driver gives a fork's rows to all branches in pieces, and
whatever follows from a piece is computed before the next; so what waits at a join depends on what lies
behind its fork alone (`convservice.delays` has the numbers).
"""

from __future__ import annotations

from collections.abc import Mapping


class Joins:
    """The joins of one network.

    Args:
        root: id under which the network's input is a source.
        sources: every node, in topological order, with where it takes its inputs from.

    Attributes:
        ends: the joins.
        forks: where branches begin.
        between: the nodes between a join and its fork: they compute what they can at once, or others would
            wait for them.
    """

    def __init__(self, root: str, sources: Mapping[str, tuple[str, ...]]) -> None:
        self._sources = sources
        forks = _last_common(root, sources)
        self.ends = [name for name, taken in sources.items() if len(taken) > 1]
        self.forks = {forks[name] for name in self.ends}
        self.between: set[str] = set()
        for name in self.ends:
            self._walk(name, forks[name])

    def _walk(self, end: str, fork: str) -> None:
        """Notes the nodes between a join and its fork."""
        open_nodes, seen = list(self._sources[end]), {fork}
        while open_nodes:
            inner = open_nodes.pop()
            if inner not in seen:
                seen.add(inner)
                open_nodes.extend(self._sources[inner])
        self.between |= seen - {fork}


def _last_common(root: str, sources: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Each node's immediate dominator: the last node that every way from the root to it goes through.

    In topological order one pass of Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm (2001), does.
    """
    depth, found = {root: 0}, dict[str, str]()
    for name, taken in sources.items():
        common = taken[0]
        for other in taken[1:]:
            while common != other:
                if depth[common] >= depth[other]:
                    common = found[common]
                else:
                    other = found[other]
        found[name], depth[name] = common, depth[common] + 1
    return found
