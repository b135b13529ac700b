"""What is kept, whose it is, and what makes room.

Given tensors and networks to keep for owners, `Shelf` keeps each once and counts it twice: against the budget
for everything, and in full against the share of every owner who has it. What does not fit an owner's share
pushes out what that owner has not used for longest, and nobody else's; what does not fit the whole pushes out
what anybody has not used for longest. Never taken is what is held: a tensor under lease, what is pinned
because somebody uses it right now, room that was promised. A network goes together with its prepared forms
and with those of its weights that no other network has. It knows no threads: `Store` calls it, its lock held.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from convservice.errors import Reason, ResourceExhausted
from convservice.network import Network
from convservice.tensors import Tensor
from convservice_server.calls import Clock
from convservice_server.holdings import over_limit
from convservice_server.kept import Entry, Weights
from convservice_server.ledger import Ledger

_RETRY_AFTER = 1.0


class Shelf:
    """Tensors and networks within budgets.

    Args:
        budget: bytes for everything kept.
        budget_per_name: bytes for what one owner has.
        networks_per_name: networks that one owner has.
        clock: tells the time, for leases.

    Attributes:
        total: everything kept.
        weights: all tensors, by digest.
    """

    def __init__(self, budget: int, budget_per_name: int, networks_per_name: int, clock: Clock) -> None:
        self.total = Ledger(budget, sys.maxsize, self._is_held)
        self.weights: dict[bytes, Weights] = {}
        self._shares: dict[str, Ledger] = {}  # of owners who have anything
        self._budget_per_name = budget_per_name
        self._networks_per_name = networks_per_name
        self._clock = clock

    def share(self, owner: str) -> Ledger:
        """What an owner has; not to be kept across calls that may take all of it away."""
        found = self._shares.get(owner)
        if found is None:

            def is_held(kept: Weights) -> bool:
                return kept.pins > 0 or self._is_leased(owner, kept)

            found = Ledger(self._budget_per_name, self._networks_per_name, is_held)
            self._shares[owner] = found
        return found

    def names(self, owner: str) -> Iterator[str]:
        """The names of an owner's networks."""
        return iter(()) if owner not in self._shares else iter(self._shares[owner].networks)

    def find(self, owner: str, name: str) -> Entry | None:
        """An owner's network."""
        return None if owner not in self._shares else self._shares[owner].networks.get(name)

    def visible(self, owner: str, digest: bytes) -> Weights | None:
        """A tensor if this owner brought it; a lease that has ended holds nothing, but is proof of that."""
        share = self._shares.get(owner)
        return None if share is None or not share.has(digest) else self.weights[digest]

    def take(self, owner: str, size: int) -> None:
        """Counts `size` bytes more, making room for them.

        Raises:
            ResourceExhausted: `WEIGHTS_BUDGET` or `NAME_LIMIT`: they cannot fit beside what is held; nothing
                was evicted.
        """
        self._make_room(owner, size, size)
        self.total.used += size
        self.share(owner).used += size

    def give(self, owner: str, size: int) -> None:
        """Counts `size` bytes less."""
        self.total.used -= size
        self.share(owner).used -= size
        self._tidy(owner)

    def grow(self, owner: str, entry: Entry, size: int) -> None:
        """Counts a prepared form of a pinned network, for all who have that network.

        Raises:
            ResourceExhausted: as `take`.
        """
        self._make_room(owner, size, size)
        entry.form_bytes += size
        self.total.used += size
        for name in entry.owners:
            self.share(name).used += size

    def put(self, tensor: Tensor) -> Weights:
        """Keeps a tensor; its room was made before."""
        kept = self.weights[tensor.digest] = Weights(tensor)
        self.total.add_tensor(kept)
        return kept

    def lease(self, owner: str, kept: Weights, until: float) -> None:
        """Holds a tensor for an owner until a time; later leases end later."""
        kept.leases[owner] = until
        self.total.add_tensor(kept)
        self.share(owner).add_tensor(kept)

    def add(self, owner: str, network: Network) -> None:
        """Keeps a network for an owner, and those of its tensors that are not here; their leases end.

        Raises:
            ResourceExhausted: as `take`; `NAME_LIMIT` also where the owner's networks are too many and all in
                use.
        """
        entry = self.total.networks.get(network.name)
        if entry is None:
            tensors = {tensor.digest: tensor for tensor in network.tensors}
            found = {digest: self.weights.get(digest) for digest in tensors}
            entry = Entry(
                network, {digest: kept or Weights(tensors[digest]) for digest, kept in found.items()}
            )
        if owner not in entry.owners:
            self._add(owner, entry)
        self.touch(owner, entry)
        for weights in entry.weights.values():
            weights.leases.pop(owner, None)

    def touch(self, owner: str, entry: Entry) -> None:
        """Makes a network the one used last."""
        self.total.networks.move_to_end(entry.name)
        self.share(owner).networks.move_to_end(entry.name)

    def forget(self, owner: str, name: str) -> None:
        """Takes an owner's network away from him; it goes with the last owner, unless it is in use."""
        entry = self._shares[owner].networks[name]
        self._disown(owner, entry)
        self.drop_if_unwanted(entry)

    def drop_if_unwanted(self, entry: Entry) -> None:
        """Forgets a network that nobody has and nobody uses."""
        if not entry.owners and not entry.pins and self.total.networks.get(entry.name) is entry:
            self._drop(entry)

    def _add(self, owner: str, entry: Entry) -> None:
        fresh = entry.name not in self.total.networks
        with _pinned(entry):  # making room must not take what the network is made of, nor itself
            total = self.total.cost(entry) if fresh else 0
            self._make_room(owner, total, self.share(owner).cost(entry), networks=1)
        if fresh:
            self.weights.update(entry.weights)
            self.total.add_network(entry)
        self.share(owner).add_network(entry)
        entry.owners.add(owner)

    def _disown(self, owner: str, entry: Entry) -> None:
        entry.owners.discard(owner)
        for kept in self._shares[owner].drop_network(entry.name):
            if not self._is_leased(owner, kept):
                self._release(owner, kept)
        self._tidy(owner)

    def _release(self, owner: str, kept: Weights) -> None:
        """Takes a tensor in no network of his away from an owner."""
        self._shares[owner].drop_tensor(kept.tensor.digest)
        kept.leases.pop(owner, None)

    def _drop(self, entry: Entry) -> None:
        """Forgets a network, and those of its tensors that nothing else holds."""
        for owner in list(entry.owners):
            self._disown(owner, entry)
        for kept in self.total.drop_network(entry.name):
            if not self._is_held(kept):
                self._drop_tensor(kept)

    def _drop_tensor(self, kept: Weights) -> None:
        for owner in list(kept.leases):
            self._release(owner, kept)
            self._tidy(owner)
        self.total.drop_tensor(kept.tensor.digest)
        del self.weights[kept.tensor.digest]

    def _tidy(self, owner: str) -> None:
        share = self._shares.get(owner)
        if share is not None and share.is_empty:
            del self._shares[owner]

    def _is_leased(self, owner: str, kept: Weights) -> bool:
        return kept.leases.get(owner, 0.0) > self._clock()

    def _is_held(self, kept: Weights) -> bool:
        now = self._clock()
        return kept.pins > 0 or any(until > now for until in kept.leases.values())

    def _make_room(self, owner: str, total: int, own: int, networks: int = 0) -> None:
        """Evicts what is longest unused until `total` bytes are free in all, and `own` bytes and so many
        networks in the owner's share; nothing, if that cannot be."""
        room, share = self.total.room(total), self.share(owner).room(own, networks)
        if room.short > 0 or share.short > 0 or share.many > 0:
            refused = (
                self._no_room(total, room.short) if room.short > 0 else self._no_share(owner, own, networks)
            )
            self._tidy(owner)
            raise refused
        for digest in share.tensors:
            kept = self.weights[digest]
            self._release(owner, kept)
            if digest in self.total.loose and not kept.leases and not kept.pins:
                self._drop_tensor(kept)
        for name in share.networks:
            self.forget(owner, name)
        room = self.total.room(total)  # less has to go now
        for digest in room.tensors:
            self._drop_tensor(self.weights[digest])
        for name in room.networks:
            self._drop(self.total.networks[name])

    def _no_room(self, wanted: int, short: int) -> ResourceExhausted:
        budget = self.total.budget
        fits = wanted <= budget
        return ResourceExhausted(
            f"the weights need {wanted} bytes; of the server's {budget} bytes for weights at most"
            f" {max(wanted - short, 0)} can be freed beside what is leased or in use"
            + ("" if fits else ", so they can never be kept here"),
            reason=Reason.WEIGHTS_BUDGET,
            metadata={"bytes": str(wanted), "budget": str(budget), "held": str(budget - wanted + short)},
            retry_after=_RETRY_AFTER if fits else None,
        )

    def _no_share(self, owner: str, wanted: int, networks: int) -> ResourceExhausted:
        share = self.share(owner)
        if share.room(wanted).short > 0:
            setting, what = "max_weights_per_name", "bytes of weights that are leased or in use"
            return over_limit(owner, setting, what, limit=share.budget, held=share.used, wanted=wanted)
        setting, what, held = "max_networks_per_name", "networks that are in use", len(share.networks)
        return over_limit(owner, setting, what, limit=share.most_networks, held=held, wanted=networks)


@contextmanager
def _pinned(entry: Entry) -> Generator[None]:
    """Holds a network and its tensors while the context lasts."""
    things: list[Entry | Weights] = [entry, *entry.weights.values()]
    for thing in things:
        thing.pins += 1
    try:
        yield
    finally:
        for thing in things:
            thing.pins -= 1
