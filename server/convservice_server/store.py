"""Weights by digest and networks by name, for many threads and owners.

Given weight tensors (through `uploads`, or inline) and networks made of them, the store hands on prepared
networks. Each tensor is kept once, whoever sent it; what makes room for what is `Shelf`'s part. A tensor that
was put is leased for a while; registering a network turns the leases into the network's own hold; what is
used is pinned. A network or tensor is there only for the owners who brought it: its name is no permission.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from heapq import nsmallest

from convservice.errors import InvalidRequest, NetworkNotFound, Reason
from convservice.network import Network
from convservice.tensors import Tensor
from convservice.wire.enums import Precision
from convservice_backends.interface import Backend, PreparedNetwork
from convservice_server.calls import Clock
from convservice_server.kept import TENSOR_OVERHEAD, Entry, Form, Weights
from convservice_server.shelf import Shelf

_LISTED_DIGESTS = 16


class Store:
    """Keeps weights and networks.

    Args:
        budget: bytes for everything kept.
        lease: seconds for which a tensor that no network uses is held.
        clock: tells the time.
        budget_per_name: bytes for what one owner has; without it as much as for everything.
        networks_per_name: networks that one owner has.
    """

    def __init__(
        self,
        budget: int,
        lease: float,
        clock: Clock = time.monotonic,
        budget_per_name: int | None = None,
        networks_per_name: int = sys.maxsize,
    ) -> None:
        self._lease = lease
        self._clock = clock
        self._lock = threading.Lock()  # guards _shelf and everything on it but Form.made
        share = budget if budget_per_name is None else budget_per_name
        self._shelf = Shelf(budget, share, networks_per_name, clock)
        self.budget = budget

    @property
    def used(self) -> int:
        """Bytes kept or promised to uploads."""
        with self._lock:
            return self._shelf.total.used

    @property
    def count(self) -> int:
        """Networks kept."""
        with self._lock:
            return len(self._shelf.total.networks)

    def renew(self, owner: str, reference: Tensor) -> bool:
        """Leases a tensor anew if this owner has it here.

        Raises:
            InvalidRequest: `TENSOR_MISMATCH`: it is here with another type or shape.
        """
        with self._lock:
            kept = self._shelf.visible(owner, reference.digest)
            if kept is None:
                return False
            _check_same(kept.tensor, reference)
            self._shelf.lease(owner, kept, self._clock() + self._lease)
            return True

    @contextmanager
    def promise(self, owner: str, size: int) -> Generator[Callable[[Tensor], None]]:
        """Holds room for a tensor of `size` bytes that is on its way; the context's value keeps it, leased.

        Raises:
            ResourceExhausted: `WEIGHTS_BUDGET` or `NAME_LIMIT`: it cannot fit beside what is held.
        """
        shelf = self._shelf
        pending = size + TENSOR_OVERHEAD
        with self._lock:
            shelf.take(owner, pending)

        def keep(tensor: Tensor) -> None:
            nonlocal pending
            with self._lock:
                shelf.give(owner, pending)  # the room held is now the tensor's own, or not needed
                pending = 0
                kept = shelf.weights.get(tensor.digest) or shelf.put(tensor)
                shelf.lease(owner, kept, self._clock() + self._lease)

        try:
            yield keep
        finally:
            with self._lock:
                shelf.give(owner, pending)

    @contextmanager
    def tensors(
        self, owner: str, references: Iterable[Tensor], brought: Mapping[bytes, Tensor]
    ) -> Generator[dict[bytes, Tensor]]:
        """The tensors that references name, by digest, held while the context lasts.

        Args:
            owner: who asks.
            references: what is wanted.
            brought: tensors that came with the request, by digest; one that is here already is used instead.

        Raises:
            NetworkNotFound: `WEIGHTS_MISSING`, with the digests that this owner must send.
            InvalidRequest: `TENSOR_MISMATCH`: one has another type or shape than its reference says.
        """
        found: dict[bytes, Tensor] = {}
        held: list[Weights] = []
        missing: dict[bytes, None] = {}
        with self._lock:
            for reference in references:
                digest = reference.digest
                shelf = self._shelf
                here = shelf.weights.get(digest) if digest in brought else shelf.visible(owner, digest)
                if here is not None:
                    held.append(here)
                elif digest not in brought:
                    missing[digest] = None
                    continue
                found[digest] = brought[digest] if here is None else here.tensor
                _check_same(found[digest], reference)
            if missing:
                raise _weights_missing(list(missing))
            for kept in held:
                kept.pins += 1
        try:
            yield found
        finally:
            with self._lock:
                for kept in held:
                    kept.pins -= 1

    def add(self, owner: str, network: Network) -> None:
        """Keeps a network and its tensors for an owner; the tensors' leases become the network's own hold.

        Raises:
            ResourceExhausted: `WEIGHTS_BUDGET` or `NAME_LIMIT`: it cannot fit beside what is held.
        """
        with self._lock:
            self._shelf.add(owner, network)

    @contextmanager
    def use(self, owner: str, name: str) -> Generator[Use]:
        """Pins a network while the context lasts.

        Raises:
            NetworkNotFound: `NETWORK_NOT_REGISTERED`: this owner has registered none of that name here.
        """
        with self._lock:
            entry = self._shelf.find(owner, name)
            if entry is None:
                raise NetworkNotFound(
                    f"network {name!r} is not registered here",
                    reason=Reason.NETWORK_NOT_REGISTERED,
                    metadata={"network": name},
                    field="network",
                )
            entry.pins += 1
            self._shelf.touch(owner, entry)
        try:
            yield Use(self, owner, entry)
        finally:
            with self._lock:
                entry.pins -= 1
                self._shelf.drop_if_unwanted(entry)

    def get(self, owner: str, name: str) -> Network:
        """A registered network.

        Raises:
            NetworkNotFound: `NETWORK_NOT_FOUND`: this owner has none of that name.
        """
        with self._lock:
            return self._owned(owner, name).network

    def delete(self, owner: str, name: str) -> None:
        """Drops an owner's reference; the network goes with the last one, once nobody uses it any more.

        Raises:
            NetworkNotFound: `NETWORK_NOT_FOUND`: this owner has none of that name.
        """
        with self._lock:
            self._owned(owner, name)
            self._shelf.forget(owner, name)

    def names(self, owner: str, after: str, count: int) -> list[str]:
        """The first `count` names above `after` of an owner's networks, in ascending order."""
        with self._lock:
            mine = [name for name in self._shelf.names(owner) if name > after]
        return nsmallest(count, mine)

    def prepared(self, owner: str, entry: Entry, backend: Backend, precision: Precision) -> PreparedNetwork:
        """A pinned network's prepared form, made once however many ask at the same time.

        Room for the most that it can take is held before it is made, and what it does not take given back.
        """
        with self._lock:
            form = entry.forms.setdefault((backend.name, precision), Form())
        with form.lock:
            if form.made is None:
                most, size = _most_prepared_bytes(entry.network), 0
                with self._lock:
                    self._shelf.take(owner, most)
                try:
                    made = backend.prepare(entry.network, precision)
                    size = made.nbytes
                finally:
                    with self._lock:
                        self._shelf.give(owner, most)
                        self._shelf.grow(owner, entry, size)
                form.made = made
            return form.made

    def _owned(self, owner: str, name: str) -> Entry:
        """An owner's network; the lock is held."""
        entry = self._shelf.find(owner, name)
        if entry is None:
            raise NetworkNotFound(
                f"there is no network {name!r}",
                reason=Reason.NETWORK_NOT_FOUND,
                metadata={"network": name},
                field="name",
            )
        return entry


class Use:
    """A network that is pinned.

    Args:
        store: where it is kept.
        owner: who uses it.
        entry: it.
    """

    def __init__(self, store: Store, owner: str, entry: Entry) -> None:
        self._store = store
        self._owner = owner
        self._entry = entry

    @property
    def network(self) -> Network:
        """The network."""
        return self._entry.network

    def prepared(self, backend: Backend, precision: Precision) -> PreparedNetwork:
        """Its prepared form on a backend.

        Raises:
            ResourceExhausted: `WEIGHTS_BUDGET` or `NAME_LIMIT`: it cannot fit beside what is held.
        """
        return self._store.prepared(self._owner, self._entry, backend, precision)


def _most_prepared_bytes(network: Network) -> int:
    """Bytes of a copy of all weights in the type that sums are made in, which is never the smaller one."""
    return sum(math.prod(tensor.shape) * tensor.dtype.accumulator.itemsize for tensor in network.tensors)


def _check_same(tensor: Tensor, reference: Tensor) -> None:
    if (tensor.dtype, tensor.shape) != (reference.dtype, reference.shape):
        raise InvalidRequest(
            f"tensor sha256-{tensor.digest.hex()} is {tensor.dtype} of shape {tensor.shape}, the reference"
            f" says {reference.dtype} of shape {reference.shape}",
            reason=Reason.TENSOR_MISMATCH,
            metadata={"digest": tensor.digest.hex()},
        )


def _weights_missing(digests: list[bytes]) -> NetworkNotFound:
    listed = ",".join(digest.hex() for digest in digests[:_LISTED_DIGESTS])
    return NetworkNotFound(
        f"{len(digests)} weight tensors of the network are not here: send them by PutWeights, then register"
        " it again",
        reason=Reason.WEIGHTS_MISSING,
        metadata={"count": str(len(digests)), "digests": listed},
    )
