"""The NumPy backend.

It computes wherever NumPy runs. BLAS is set to one thread, once, when the backend is constructed: two
threads would change last bits, and parallelism is different blocks on different workers.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from convservice.bands import TensorSpec
from convservice.dtypes import DType
from convservice.errors import BackendUnavailable, InternalError, Reason
from convservice.layers import (
    Activation,
    Add,
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Layer,
    Linear,
    LocallyConnected,
    MaxPool,
)
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cgroups import processors
from convservice_backends.interface import Check, Description, Session, SessionPlan
from convservice_backends.numpy.elementwise import ElementwiseOperator, NumpyArrays
from convservice_backends.numpy.im2col import Im2colOperator
from convservice_backends.numpy.linear import LinearOperator
from convservice_backends.numpy.local import LocallyConnectedOperator
from convservice_backends.numpy.pooling import PoolOperator
from convservice_backends.numpy.reducing import FlattenOperator, GlobalPoolOperator
from convservice_backends.numpy.transposed import TransposedOperator
from convservice_backends.numpy.workers import SessionWorkspace, Workers
from convservice_backends.operators import require_layers
from convservice_backends.plan import Manner, NetworkPlan
from convservice_backends.plan_cache import PlanCache
from convservice_backends.planning import plan_session
from convservice_backends.session import open_session

log = logging.getLogger(__name__)

NumpyOperator = (
    Im2colOperator
    | TransposedOperator
    | LocallyConnectedOperator
    | PoolOperator
    | GlobalPoolOperator
    | ElementwiseOperator
    | FlattenOperator
    | LinearOperator
)

OPERATORS: dict[type[Layer], Callable[[Any, DType], NumpyOperator]] = {
    Conv: Im2colOperator,
    ConvTranspose: TransposedOperator,
    LocallyConnected: LocallyConnectedOperator,
    MaxPool: PoolOperator,
    AvgPool: PoolOperator,
    GlobalMaxPool: GlobalPoolOperator,
    GlobalAvgPool: GlobalPoolOperator,
    Activation: ElementwiseOperator,
    Add: ElementwiseOperator,
    Flatten: FlattenOperator,
    Linear: LinearOperator,
}
"""What computes each layer, given it and the type that it computes in."""


class NumpyBackend:
    """Convolution on the processor.

    Args:
        workers: blocks computed at the same time by one session; where not given, the processors that a
            container's limits leave.

    Raises:
        BackendUnavailable: `threadpoolctl`, which the `server` extra brings, is not installed.
    """

    name: ClassVar[str] = "numpy"
    failure = ""

    def __init__(self, workers: int | None = None) -> None:
        self._blas = _single_threaded_blas()
        self._workers = Workers(workers or processors())

    def describe(self) -> Description:
        """The processor, the BLAS that NumPy calls, and the number of workers."""
        versions = {"numpy": np.__version__, "blas": self._blas}
        return Description(_processor(), versions, self._workers.count)

    def prepare(self, network: Network, precision: Precision) -> NumpyNetwork:
        """Chooses an operator for each layer; every algorithm here is of `precision` high.

        Raises:
            BackendUnavailable: a layer that this backend has no operator for.
        """
        require_layers(network, tuple(OPERATORS), self.name)
        return NumpyNetwork(network, self._workers)

    def close(self) -> None:
        """Stops the workers."""
        self._workers.close()


class NumpyNetwork:
    """A network in place: one operator per node, shared by all sessions."""

    def __init__(self, network: Network, workers: Workers) -> None:
        self._network = network
        self._workers = workers
        self._operators: dict[DType, Mapping[str, NumpyOperator]] = {}
        self._plans: PlanCache[NetworkPlan] = PlanCache(network)
        if network.tensors:
            self._in(network.tensors[0].dtype.accumulator)

    @property
    def network(self) -> Network:
        """The network."""
        return self._network

    @property
    def nbytes(self) -> int:
        """Bytes of filters kept in the accumulator's type, beside the network's own."""
        return sum(operator.nbytes for kept in self._operators.values() for operator in kept.values())

    def plan(self, spec: TensorSpec, out_dtype: DType | None = None) -> SessionPlan:
        """See `interface.PreparedNetwork`."""
        return self._plans.get(spec, out_dtype, self._plan_anew)

    def _plan_anew(self, spec: TensorSpec, out_dtype: DType | None) -> NetworkPlan:
        operators = self._in(self._network.dtype(spec.dtype).accumulator)
        return plan_session(self._network, operators, spec, out_dtype, Manner(self._workers.count))

    def open(self, plan: SessionPlan, check: Check) -> Session:
        """See `interface.PreparedNetwork`."""
        if not isinstance(plan, NetworkPlan):
            raise InternalError("a session is opened with a plan of the same network", reason=Reason.INTERNAL)
        workspace = SessionWorkspace(self._workers, plan.scratch_bytes, check)
        return open_session(plan, self._in(plan.dtype.accumulator), workspace, NumpyArrays())

    def _in(self, accumulator: DType) -> Mapping[str, NumpyOperator]:
        """The operators that sum in a type. A network without weights has them for each type it is given;
        making them twice at the same time is harmless."""
        found = self._operators.get(accumulator)
        if found is None:
            found = {
                node.id: OPERATORS[type(node.layer)](node.layer, accumulator) for node in self._network.nodes
            }
            self._operators[accumulator] = found
        return found


def _single_threaded_blas() -> str:
    """Sets BLAS to one thread for the whole process; returns its name, version and architecture."""
    try:
        import threadpoolctl
    except ImportError as exc:
        raise BackendUnavailable(
            "the package threadpoolctl is not installed: pip install 'convservice[server]'",
            reason=Reason.BACKEND_UNAVAILABLE,
        ) from exc
    threadpools: Any = threadpoolctl.ThreadpoolController()
    controller = threadpools.select(user_api="blas")
    for library in controller.lib_controllers:
        if library.num_threads != 1:
            log.info("BLAS %s is set from %d threads to 1", library.internal_api, library.num_threads)
            library.set_num_threads(1)
    libraries: list[dict[str, Any]] = controller.info()
    names = [
        " ".join(str(info[key]) for key in ("internal_api", "version", "architecture") if info.get(key))
        for info in libraries
    ]
    return ", ".join(names) or "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
