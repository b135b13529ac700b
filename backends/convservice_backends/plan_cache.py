"""Plans kept for the next tensor of the same shape.

Small tensors of one shape come in their thousands, and planning would be a good part of their time. A large
network's plans would take more memory than they save time, and are made anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from convservice.bands import TensorSpec
from convservice.dtypes import DType
from convservice.network import Network

Plan = TypeVar("Plan")

MOST_PLANS = 64
"""Plans kept of one network."""

MOST_NODES = 8
"""Nodes of the largest network whose plans are kept."""


class PlanCache(Generic[Plan]):
    """The plans of one network that were asked for last.

    Args:
        network: whose plans.
    """

    def __init__(self, network: Network) -> None:
        self._most = MOST_PLANS if len(network.nodes) <= MOST_NODES else 0
        self._lock = threading.Lock()  # guards _plans
        self._plans: OrderedDict[tuple[TensorSpec, DType | None], Plan] = OrderedDict()

    def get(
        self, spec: TensorSpec, out_dtype: DType | None, make: Callable[[TensorSpec, DType | None], Plan]
    ) -> Plan:
        """The plan for a tensor; `make` makes it where it is not kept, perhaps by two threads at a time."""
        key = (spec, out_dtype)
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = make(spec, out_dtype)
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)
        return plan
