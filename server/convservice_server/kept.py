"""What is kept: tensors, networks, and the forms that backends have prepared of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from convservice.network import Network
from convservice.tensors import Tensor
from convservice.wire.enums import Precision
from convservice_backends.interface import PreparedNetwork

TENSOR_OVERHEAD = 2048
"""Bytes that keeping a tensor takes beside its values: counted, so that many tiny ones do not add up
unseen."""
NODE_OVERHEAD = 4096
"""Bytes that one node of a kept network takes."""


@dataclass(eq=False)
class Weights:
    """A tensor that is kept.

    Attributes:
        tensor: it.
        leases: owner to the time when the lease ends.
        pins: uses that hold it right now.
    """

    tensor: Tensor
    leases: dict[str, float] = field(default_factory=dict[str, float])
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
        weights: its tensors, by digest.
        owners: who may use it.
        pins: uses that hold it right now.
        forms: its prepared forms, by backend and precision.
        form_bytes: what they take.
    """

    network: Network
    weights: Mapping[bytes, Weights]
    owners: set[str] = field(default_factory=set[str])
    pins: int = 0
    forms: dict[tuple[str, Precision], Form] = field(default_factory=dict[tuple[str, Precision], Form])
    form_bytes: int = 0

    @property
    def name(self) -> str:
        """The network's."""
        return self.network.name

    @property
    def charge(self) -> int:
        """Bytes it counts for beside its tensors."""
        return NODE_OVERHEAD * len(self.network.nodes) + self.form_bytes
