"""What is kept, and what makes room.

Given tensors and networks to keep, `Shelf` counts their bytes against a budget and evicts what has been
unused for longest. It never takes what is held: a tensor under lease, what is pinned because somebody uses it
right now, or room that was promised. A network goes together with its prepared forms and with those of its
weights that no other network has. It knows no threads: `Store` calls it with its lock held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from convservice.errors import Reason, ResourceExhausted
from convservice.network import Network
from convservice.tensors import Tensor
from convservice.wire.enums import Precision
from convservice_backends.interface import PreparedNetwork
from convservice_server.calls import Clock

TENSOR_OVERHEAD = 2048
"""Bytes that keeping a tensor takes beside its values: counted, so that many tiny ones do not add up
unseen."""
NODE_OVERHEAD = 4096
"""Bytes that one node of a kept network takes."""

_RETRY_AFTER = 1.0


@dataclass(eq=False)
class Weights:
    """A tensor that is kept.

    Attributes:
        tensor: it.
        leases: owner to the time when the lease ends.
        networks: names of the networks that use it.
        pins: uses that hold it right now.
    """

    tensor: Tensor
    leases: dict[str, float] = field(default_factory=dict[str, float])
    networks: set[str] = field(default_factory=set[str])
    pins: int = 0

    @property
    def charge(self) -> int:
        """Bytes it counts for."""
        return self.tensor.nbytes + TENSOR_OVERHEAD


@dataclass(eq=False)
class Form:
    """One prepared form of a network; None until it has been made."""

    # Guards `made`, and is held while it is being made: who comes second waits and finds it.
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: PreparedNetwork | None = None


@dataclass(eq=False)
class Entry:
    """A network that is kept.

    Attributes:
        network: it.
        digests: its tensors.
        owners: who may use it.
        pins: uses that hold it right now.
        forms: its prepared forms, by backend and precision.
        form_bytes: what they take.
    """

    network: Network
    digests: frozenset[bytes]
    owners: set[str] = field(default_factory=set[str])
    pins: int = 0
    forms: dict[tuple[str, Precision], Form] = field(default_factory=dict[tuple[str, Precision], Form])
    form_bytes: int = 0

    @property
    def charge(self) -> int:
        """Bytes it counts for beside its tensors."""
        return NODE_OVERHEAD * len(self.network.nodes) + self.form_bytes


class Shelf:
    """Tensors and networks within a budget of bytes.

    Args:
        budget: bytes for everything kept.
        clock: tells the time, for leases.
    """

    def __init__(self, budget: int, clock: Clock) -> None:
        self.budget = budget
        self.used = 0
        self.weights: dict[bytes, Weights] = {}
        self.networks: OrderedDict[str, Entry] = OrderedDict()  # the longest unused first
        self._loose: OrderedDict[bytes, None] = OrderedDict()  # tensors in no network; the oldest lease first
        self._clock = clock

    def take(self, size: int) -> None:
        """Counts `size` bytes more, making room for them.

        Raises:
            ResourceExhausted: `WEIGHTS_BUDGET`: they cannot fit beside what is held; nothing was evicted.
        """
        self._make_room(size)
        self.used += size

    def give(self, size: int) -> None:
        """Counts `size` bytes less."""
        self.used -= size

    def put(self, tensor: Tensor) -> Weights:
        """Keeps a tensor whose bytes are counted already."""
        kept = self.weights[tensor.digest] = Weights(tensor)
        self._loose[tensor.digest] = None
        return kept

    def lease(self, owner: str, kept: Weights, until: float) -> None:
        """Holds a tensor for an owner until a time; later leases end later."""
        kept.leases[owner] = until
        if kept.tensor.digest in self._loose:
            self._loose.move_to_end(kept.tensor.digest)

    def insert(self, network: Network) -> Entry:
        """Keeps a network, and those of its tensors that are not here yet.

        Raises:
            ResourceExhausted: as `take`.
        """
        tensors = {tensor.digest: tensor for tensor in network.tensors}
        entry = Entry(network, frozenset(tensors))
        fresh = [tensor for digest, tensor in tensors.items() if digest not in self.weights]
        here = [self.weights[digest] for digest in tensors if digest in self.weights]
        for kept in here:
            kept.pins += 1  # making room must not take what the network is made of
        try:
            self.take(entry.charge + sum(tensor.nbytes + TENSOR_OVERHEAD for tensor in fresh))
        finally:
            for kept in here:
                kept.pins -= 1
        for tensor in fresh:
            self.put(tensor)
        for digest in tensors:
            self.weights[digest].networks.add(network.name)
            self._loose.pop(digest, None)
        self.networks[network.name] = entry
        return entry

    def drop(self, name: str) -> None:
        """Forgets a network, and those of its tensors that nothing else holds."""
        entry = self.networks.pop(name)
        self.used -= entry.charge
        for digest in entry.digests:
            kept = self.weights[digest]
            kept.networks.discard(name)
            if not kept.networks:
                self._loose[digest] = None
                if not self._held(kept):
                    self._drop_loose(digest)

    def _drop_loose(self, digest: bytes) -> None:
        del self._loose[digest]
        self.used -= self.weights.pop(digest).charge

    def _held(self, kept: Weights) -> bool:
        now = self._clock()
        return kept.pins > 0 or any(until > now for until in kept.leases.values())

    def _make_room(self, wanted: int) -> None:
        """Evicts what is longest unused until `wanted` bytes are free; nothing, if that cannot be."""
        short = self.used + wanted - self.budget
        tensors: list[bytes] = []
        for digest in self._loose:
            if short <= 0:
                break
            if not self._held(self.weights[digest]):
                tensors.append(digest)
                short -= self.weights[digest].charge
        networks: list[str] = []
        left: dict[bytes, int] = {}  # how many networks would still have a tensor
        for name, entry in self.networks.items():
            if short <= 0:
                break
            if entry.pins:
                continue
            networks.append(name)
            short -= entry.charge
            for digest in entry.digests:
                kept = self.weights[digest]
                left[digest] = left.get(digest, len(kept.networks)) - 1
                if not left[digest] and not self._held(kept):
                    short -= kept.charge
        if short > 0:
            raise self._no_room(wanted, short)
        for digest in tensors:
            self._drop_loose(digest)
        for name in networks:
            self.drop(name)

    def _no_room(self, wanted: int, short: int) -> ResourceExhausted:
        fits = wanted <= self.budget
        return ResourceExhausted(
            f"the weights need {wanted} bytes; of the server's {self.budget} bytes for weights at most"
            f" {max(wanted - short, 0)} can be freed beside what is leased or in use"
            + ("" if fits else ", so they can never be kept here"),
            reason=Reason.WEIGHTS_BUDGET,
            metadata={
                "bytes": str(wanted),
                "budget": str(self.budget),
                "held": str(self.budget - wanted + short),
            },
            retry_after=_RETRY_AFTER if fits else None,
        )
