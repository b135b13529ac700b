"""What counts against one budget: all that is kept, or what one owner has of it.

Told of tensors and networks, `Ledger` counts the bytes of each once, remembers in which order they were used,
and says what would have to go, the longest unused first, to make room for more. It removes nothing of its own
accord and knows no threads: `Shelf` keeps one ledger of everything and one for each owner.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from convservice_server.kept import Entry, Weights


class Room(NamedTuple):
    """What making room takes.

    Attributes:
        tensors: digests of tensors in no network that must go.
        networks: names of networks that must go.
        short: bytes that are missing even then, if above 0.
        many: networks that are too many even then, if above 0.
    """

    tensors: list[bytes]
    networks: list[str]
    short: int
    many: int


class Ledger:
    """Counts bytes and networks.

    Args:
        budget: bytes in all.
        most_networks: networks in all.
        is_held: whether a tensor must stay, used or not.

    Attributes:
        used: bytes counted: of what is kept, and of room that was promised.
        networks: by name, the longest unused first.
        loose: tensors in none of these networks, by digest, the oldest lease first.
    """

    def __init__(self, budget: int, most_networks: int, is_held: Callable[[Weights], bool]) -> None:
        self.budget = budget
        self.most_networks = most_networks
        self.used = 0
        self.networks: OrderedDict[str, Entry] = OrderedDict()
        self.loose: OrderedDict[bytes, Weights] = OrderedDict()
        self._uses: Counter[bytes] = Counter()  # of a tensor by these networks
        self._is_held = is_held

    @property
    def is_empty(self) -> bool:
        """Whether nothing is counted."""
        return not (self.used or self.networks or self.loose)

    def has(self, digest: bytes) -> bool:
        """Whether a tensor is counted."""
        return digest in self.loose or digest in self._uses

    def add_tensor(self, kept: Weights) -> None:
        """Counts a tensor, as the one used last."""
        digest = kept.tensor.digest
        if digest in self.loose:
            self.loose.move_to_end(digest)
        elif digest not in self._uses:
            self.loose[digest] = kept
            self.used += kept.charge

    def drop_tensor(self, digest: bytes) -> None:
        """Counts a tensor no more that is in no network."""
        self.used -= self.loose.pop(digest).charge

    def cost(self, entry: Entry) -> int:
        """Bytes that `add_network` would count."""
        return entry.charge + sum(
            kept.charge for digest, kept in entry.weights.items() if not self.has(digest)
        )

    def add_network(self, entry: Entry) -> None:
        """Counts a network that is not counted yet, and those of its tensors that are not."""
        self.used += self.cost(entry)
        self.networks[entry.name] = entry
        for digest in entry.weights:
            self.loose.pop(digest, None)
            self._uses[digest] += 1

    def drop_network(self, name: str) -> list[Weights]:
        """Counts a network no more; its tensors that no other one has, which are loose now."""
        entry = self.networks.pop(name)
        self.used -= entry.charge
        loosened: list[Weights] = []
        for digest, kept in entry.weights.items():
            self._uses[digest] -= 1
            if not self._uses[digest]:
                del self._uses[digest]
                self.loose[digest] = kept
                loosened.append(kept)
        return loosened

    def room(self, wanted: int, networks: int = 0) -> Room:
        """What would have to go for so many bytes and networks more; held and pinned things stay."""
        short = self.used + wanted - self.budget
        many = len(self.networks) + networks - self.most_networks
        tensors: list[bytes] = []
        for digest, kept in self.loose.items():
            if short <= 0:
                break
            if not self._is_held(kept):
                tensors.append(digest)
                short -= kept.charge
        names: list[str] = []
        left: dict[bytes, int] = {}  # how many networks would still have a tensor
        for name, entry in self.networks.items():
            if short <= 0 and many <= 0:
                break
            if entry.pins:
                continue
            names.append(name)
            many -= 1
            short -= entry.charge
            for digest, kept in entry.weights.items():
                left[digest] = left.get(digest, self._uses[digest]) - 1
                if not left[digest] and not self._is_held(kept):
                    short -= kept.charge
        return Room(tensors, names, short, many)
