"""The sum of feature maps on a device: rows of several inputs, element by element.

Given the dtypes of its inputs, `AddOperator` hands the rows of all of them to one kernel; more than it takes,
or inputs of different dtypes, go to several launches, sums in between kept in the type of the sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence

from convservice.dtypes import DType
from convservice.errors import InternalError, Reason
from convservice.geometry import SampleShape
from convservice.layers import FUNCTIONS, Add
from convservice_backends.cuda import pieces
from convservice_backends.cuda.algorithms.base import ceil_div, float_types
from convservice_backends.cuda.arguments import ADDENDS, AddArguments, Addend
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.device import Launch, Memory
from convservice_backends.cuda.source import Kernel, type_constants, type_label
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

THREADS = 256
PER_THREAD = 4
"""Elements of one thread, a grid's width apart."""


class AddOperator:
    """The sum of feature maps of one shape, in the order of the inputs.

    Args:
        layer: the layer.
        given: dtype of the rows of each input, float types.
    """

    name = "add"
    packing: tuple[Hashable, ...] = ()

    def __init__(self, layer: Add, given: Sequence[DType]) -> None:
        self._layer = layer
        self._given = tuple(given)

    def weights(self) -> tuple[()]:
        """None."""
        return ()

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits."""
        return BlockPlan(self.name, 1, out.rest, 0, any_rows=True)

    def scratch_bytes(self, out: SampleShape, rows: int, samples: int) -> int:
        """Sums between launches, where there are several."""
        if len(self._launches()) == 1:
            return 0
        return samples * rows * out.row_elements * self._given[0].accumulator.itemsize

    def library_bytes(self, out: SampleShape) -> int:
        """None."""
        return 0

    def compute(
        self, run: Run, out: DeviceArray, workspace: DeviceWorkspace, weights: tuple[Memory, ...]
    ) -> None:
        """Adds rows first <= i < last of all inputs."""
        held = [rows.array[:, :, run.first - rows.first : run.last - rows.first] for rows in run.ports]
        elements = math.prod(out.shape[2:])
        if not out.shape[0] * elements:
            return
        launches = self._launches()
        if len(launches) > 1 and workspace.scratch is None:
            raise InternalError("sums of several launches have their working memory", reason=Reason.INTERNAL)
        for index, ports in enumerate(launches):
            addends = [held[port] for port in ports]
            arguments = AddArguments(
                addends=tuple(Addend(rows.address, rows.strides[0], rows.strides[1]) for rows in addends),
                sums=0 if workspace.scratch is None else workspace.scratch.address,
                output=out.address,
                output_sample=out.strides[0],
                output_channel=out.strides[1],
                elements=elements,
                samples=out.shape[0],
                channels=out.shape[1],
                count=len(addends),
                begins=index == 0,
                ends=index == len(launches) - 1,
                activation=FUNCTIONS.index(self._layer.activation.function),
                slope=self._layer.activation.negative_slope,
            )
            _merge(arguments)
            holds = [rows.memory for rows in (*addends, out)]
            if workspace.scratch is not None:
                holds.append(workspace.scratch)
            grid = (
                min(ceil_div(arguments.elements, THREADS * PER_THREAD), pieces.MOST_ALONG_Y),
                min(arguments.channels, pieces.MOST_ALONG_Y),
                min(arguments.samples, pieces.MOST_ALONG_Y),
            )
            kernel = _kernel(addends[0].dtype, out.dtype)
            workspace.stream.launch(Launch(kernel, grid, arguments, tuple(holds)))
        workspace.check()

    def _launches(self) -> list[tuple[int, ...]]:
        """The inputs of each launch: neighbours of one dtype, at most as many as a kernel takes."""
        found: list[tuple[int, ...]] = []
        for _, group in itertools.groupby(range(len(self._given)), key=lambda port: self._given[port].name):
            ports = tuple(group)
            found += [ports[first : first + ADDENDS] for first in range(0, len(ports), ADDENDS)]
        return found


def every_kernel() -> Iterator[Kernel]:
    """All forms. Where rows of two dtypes are added, an input of integers beside others, the sum stays in the
    type of the sums."""
    for given, out in float_types():
        yield _kernel(given, out)


def _merge(a: AddArguments) -> None:
    """Takes axes that are contiguous in all arrays as one."""
    addends: list[Addend] = list(a.addends[: a.count])
    channels = {a.output_channel, *(addend.channel for addend in addends)}
    if a.channels == 1 or channels == {a.elements}:
        a.elements *= a.channels
        a.channels = 1
        samples = {a.output_sample, *(addend.sample for addend in addends)}
        if a.samples == 1 or samples == {a.elements}:
            a.elements *= a.samples
            a.samples = 1


def _kernel(given: DType, out: DType) -> Kernel:
    constants = (*type_constants(given, out), ("ADDENDS", ADDENDS))
    return Kernel("add", type_label(given, out), THREADS, constants, "add")
