"""A network on devices: operators chosen, plans made, sessions opened.

`CudaNetwork` is given a network and the backend's devices. Planning is pure arithmetic: which algorithm
computes each layer for this tensor, how large runs and slots are, what is taken of the host's and of each
device's memory. Opening a session promises that memory, puts the weights on the devices where they are not
there yet, and takes streams.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from convservice.bands import TensorSpec
from convservice.dtypes import DType
from convservice.errors import InternalError, Reason
from convservice.network import Network
from convservice.wire.enums import Precision
from convservice_backends.cuda.elementwise import DeviceArrays
from convservice_backends.cuda.lanes import SLOTS, Lane, locked_bytes, slot_bytes
from convservice_backends.cuda.memory import UPLOAD_BYTES
from convservice_backends.cuda.operators import DeviceOperator, operator_for, placed
from convservice_backends.cuda.session import DeviceSession, Way
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.interface import Check, Session, SessionPlan
from convservice_backends.operators import AnyOperator
from convservice_backends.plan import Manner, NetworkPlan
from convservice_backends.plan_cache import PlanCache
from convservice_backends.planning import plan_session, sources
from convservice_backends.session import open_session

if TYPE_CHECKING:
    from convservice_backends.cuda.backend import DeviceContext

RUNS_SHARE = 4
"""All runs of a network take about one in so many of a device's bytes."""

LEAST_RUN_BYTES = 1 << 20
"""Of one node all the same."""

ALLOCATION_BYTES = 512
"""What an allocation may be rounded up to a multiple of."""


@dataclass(frozen=True)
class DevicePlan(NetworkPlan):
    """A network's plan, on devices.

    Attributes:
        operators: node id to operator.
        in_bytes: size of a slot that bands go up in.
        out_bytes: size of a slot that results come down in.
        working_bytes: an operator's working memory, on each device.
        ways: devices that the tensor is spread over.
    """

    operators: Mapping[str, DeviceOperator]
    in_bytes: int
    out_bytes: int
    working_bytes: int
    ways: int


class CudaNetwork:
    """A network prepared on devices of one model.

    Args:
        network: the network.
        precision: what the caller allows.
        contexts: the devices.
        manner: run and sample sizes.
        algorithm: a convolution algorithm to take wherever it fits.
    """

    def __init__(
        self,
        network: Network,
        precision: Precision,
        contexts: Sequence[DeviceContext],
        manner: Manner,
        algorithm: str | None = None,
    ) -> None:
        self._network = network
        self._precision = precision
        self._contexts = tuple(contexts)
        self._manner = manner
        self._algorithm = algorithm
        self._token = object()  # whose weights these are, in every device's memory
        self._plans: PlanCache[DevicePlan] = PlanCache(network)
        for context in self._contexts:
            weakref.finalize(self, context.memory.forget, self._token)

    @property
    def network(self) -> Network:
        """The network."""
        return self._network

    @property
    def nbytes(self) -> int:
        """None of the host's: packed weights are kept on the devices."""
        return 0

    def plan(self, spec: TensorSpec, out_dtype: DType | None = None) -> SessionPlan:
        """See `interface.PreparedNetwork`."""
        return self._plans.get(spec, out_dtype, self._plan_anew)

    def open(self, plan: SessionPlan, check: Check) -> Session:
        """Opens a session.

        Raises:
            ResourceExhausted: `OUT_OF_DEVICE_MEMORY`: the devices have no room for it now.
        """
        if not isinstance(plan, DevicePlan):
            raise InternalError("a session is opened with a plan of the same network", reason=Reason.INTERNAL)
        with ExitStack() as stack:
            stack.callback(_keep, self)
            # Those with least to do; the first among equals, where this network's weights are likely to be.
            idlest = sorted(self._contexts, key=lambda context: context.memory.promised)[: plan.ways]
            ways = [self._way(context, plan, check, stack) for context in idlest]
            return DeviceSession(plan, ways, check, stack.pop_all())
        raise AssertionError("a session was opened or an error raised")

    def _way(self, context: DeviceContext, plan: DevicePlan, check: Check, stack: ExitStack) -> Way:
        """One device's part, its resources on the stack."""
        context.memory.promise(plan.device_bytes)
        stack.callback(context.memory.release, plan.device_bytes)
        operators: dict[str, AnyOperator] = {}
        beside = plan.device_bytes
        for name, operator in plan.operators.items():
            key = (self._token, name, *operator.packing)
            uploaded = context.memory.weights(key, operator.weights, beside=beside)
            weights = stack.enter_context(uploaded)
            beside += sum(memory.nbytes for memory in weights)
            operators[name] = placed(operator, weights)
        streams = stack.enter_context(context.streams())
        lane = Lane(context.device, streams, plan.in_bytes, plan.out_bytes)
        stack.callback(lane.close)
        working = streams.compute.allocate(plan.working_bytes) if plan.working_bytes else None
        workspace = DeviceWorkspace(streams.compute, working, context.device.info, check)
        arrays = DeviceArrays(streams.compute)
        driver = open_session(plan, operators, workspace, arrays, may_wait=lane.is_behind)
        stack.callback(
            driver.close
        )  # its memory is the compute stream's own: what is under way keeps its turn
        return Way(lane, driver)

    def _plan_anew(self, spec: TensorSpec, out_dtype: DType | None) -> DevicePlan:
        operators = dict(self._operators(spec))
        manner = self._manner_for(len(operators))
        plan = plan_session(self._network, operators, spec, out_dtype, manner)
        ways = max(1, min(len(self._contexts), spec.samples))
        in_bytes, out_bytes = _slots(plan)
        working = max(_working_bytes(plan, name, operator) for name, operator in operators.items())
        slots = SLOTS * (in_bytes + out_bytes)
        on_device = plan.peak_bytes - spec.band_bytes + slots + working
        on_device += sum(operator.library_bytes(plan.nodes[name].out) for name, operator in operators.items())
        on_device += ALLOCATION_BYTES * (2 * SLOTS + 4 * len(operators) + 1)
        kept = {field.name: getattr(plan, field.name) for field in fields(NetworkPlan)}
        locked = SLOTS * (locked_bytes(in_bytes) + locked_bytes(out_bytes))
        # Whichever session is the first with its weights on a device sends them up.
        tensors = self._network.tensors
        largest = max((math.prod(one.shape) * one.dtype.accumulator.itemsize for one in tensors), default=0)
        staging = min(UPLOAD_BYTES, largest)
        kept |= {"peak_bytes": spec.band_bytes + ways * locked + staging, "device_bytes": on_device}
        return DevicePlan(
            **kept,
            operators=operators,
            in_bytes=in_bytes,
            out_bytes=out_bytes,
            working_bytes=working,
            ways=ways,
        )

    def _manner_for(self, nodes: int) -> Manner:
        """The manner, with the runs of all nodes together bounded: hundreds of nodes would else, where the
        height is not known, want all memory of a device."""
        share = max(LEAST_RUN_BYTES, self._contexts[0].device.info.memory_bytes // (RUNS_SHARE * nodes))
        return replace(self._manner, run_bytes=min(self._manner.run_bytes, share))

    def _operators(self, spec: TensorSpec) -> Iterator[tuple[str, DeviceOperator]]:
        """The operator of every node that is needed, for the rows and samples that this tensor gives it."""
        own, info = self._network.dtype(spec.dtype), self._contexts[0].device.info
        shapes = self._network.shapes(spec.sample)
        layers = {node.id: node.layer for node in self._network.nodes}
        for name, taken in sources(self._network).items():
            given = [self._manner.held(source, spec.dtype, own) for source in taken]
            operator = operator_for(
                layers[name],
                given,
                shapes[taken[0]],
                precision=self._precision,
                info=info,
                algorithm=self._algorithm,
            )
            yield name, operator


def _keep(network: CudaNetwork) -> None:
    """A network lives as long as its sessions: its weights are forgotten when it goes."""


def _slots(plan: NetworkPlan) -> tuple[int, int]:
    """Sizes of the slots, up and down: for whole small samples, or for as many rows as a band of the input;
    the height plays no part."""
    sizes: list[int] = []
    for spec in (plan.spec, *(result.spec for result in plan.results)):
        if plan.whole:
            sample_bytes = spec.row_bytes * spec.sample.height
            sizes.append(slot_bytes(sample_bytes, sample_bytes * spec.samples))
        else:
            sizes.append(slot_bytes(spec.row_bytes, spec.row_bytes * plan.spec.band_rows))
    return sizes[0], max(sizes[1:])


def _working_bytes(plan: NetworkPlan, name: str, operator: DeviceOperator) -> int:
    """An operator's working memory for the largest run of the plan."""
    node = plan.nodes[name]
    if not plan.whole:
        return operator.scratch_bytes(node.out, node.run_rows, 1)
    rows = node.given.height if node.layer.reducing else node.out.height
    return operator.scratch_bytes(node.out, rows, plan.stack)
