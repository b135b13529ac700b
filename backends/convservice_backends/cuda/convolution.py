"""A convolution on a device: which algorithm computes it, and the arguments of a run of rows.

Given a layer and the types of its rows, `ConvOperator` chooses an algorithm, packs the filters for it and,
run by run, hands the algorithm a `Problem` and its launches to the stream.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convservice.dtypes import DType
from convservice.errors import InternalError, Reason
from convservice.geometry import MAX_SIZE, PaddingMode, SampleShape
from convservice.layers import FUNCTIONS, Conv
from convservice.wire.enums import Precision
from convservice_backends.cuda import pieces
from convservice_backends.cuda.algorithms import Algorithm, Case, Fourier, Problem, choose
from convservice_backends.cuda.arguments import ConvArguments
from convservice_backends.cuda.array import DeviceArray
from convservice_backends.cuda.axes import sliding_axes
from convservice_backends.cuda.device import DeviceInfo, Memory, Transform
from convservice_backends.cuda.workspace import DeviceWorkspace
from convservice_backends.operators import Run
from convservice_backends.plan import BlockPlan

MOST_HELD = 1 << 28
"""Rows beyond any that a stage holds, its windows apart."""

PADDING = {PaddingMode.ZEROS: 0, PaddingMode.REFLECT: 1, PaddingMode.REPLICATE: 2}


@dataclass(frozen=True, kw_only=True)
class SampleBlockPlan(BlockPlan):
    """A block plan that knows the sample it was made for.

    Attributes:
        sample: the whole feature map of one sample, as it was announced: where the height was not, its rows
            are None, also once it is known.
    """

    sample: SampleShape


class ConvOperator:
    """One convolution, for rows of one type and width.

    Args:
        layer: the convolution.
        given: dtype of the rows it reads, a float type.
        sample: shape of the samples it is given; its rows are not looked at.
        precision: what the caller allows.
        info: the device.
        algorithm: one to take wherever it fits.
    """

    def __init__(
        self,
        layer: Conv,
        given: DType,
        sample: SampleShape,
        *,
        precision: Precision,
        info: DeviceInfo,
        algorithm: str | None = None,
    ) -> None:
        self._layer = layer
        self._given = given
        rows = layer.windows(sample)[0]
        mirrored = rows.before + rows.after + 1 if layer.padding_mode is PaddingMode.REFLECT else 0
        case = Case(
            layer,
            given,
            sample.row_elements,
            precision,
            info.architecture,
            reach=_reach(layer, sample),
            mirrored=mirrored,
            row_positions=math.prod(layer.output_sample(sample).rest),
        )
        self.algorithm: Algorithm = choose(case, algorithm)

    @property
    def name(self) -> str:
        """The algorithm's name."""
        return self.algorithm.name

    @property
    def packing(self) -> tuple[Hashable, ...]:
        """What its weights on the device depend on beside the layer: the rows' dtype, algorithm, form."""
        return (self._given, self.algorithm.name, self.algorithm.packing)

    def weights(self) -> tuple[NDArray[Any], ...]:
        """What has to be on the device: the filters as packed, and the thresholds where there are any."""
        filters = np.ascontiguousarray(self.algorithm.pack())
        if self._layer.bias is None:
            return (filters,)
        return (filters, self._layer.bias.astype(self._given.accumulator.numpy))

    def block_plan(self, given: SampleShape, out: SampleShape) -> BlockPlan:
        """Any rows give the same bits, beginning at a multiple of the algorithm's quantum."""
        pieces.check_positions(math.prod(out.rest))
        quantum = self.algorithm.quantum
        return SampleBlockPlan(self.algorithm.name, quantum, out.rest, 0, any_rows=True, sample=out)

    def scratch_bytes(self, out: SampleShape, rows: int, samples: int) -> int:
        """Working memory for runs of at most so many rows of so many samples."""
        at_once = self._rows_at_once(out, rows, samples)
        if at_once < rows:  # fewer samples may take a few rows more each
            at_once += self.algorithm.quantum
        return self.algorithm.scratch_bytes(out, at_once, samples)

    def library_bytes(self, out: SampleShape) -> int:
        """What a library may take of the device's memory by itself while it computes this layer."""
        return self.algorithm.library_bytes(out) if isinstance(self.algorithm, Fourier) else 0

    def compute(
        self, run: Run, out: DeviceArray, workspace: DeviceWorkspace, weights: tuple[Memory, ...]
    ) -> None:
        """Writes output rows first <= i < last to `out`."""
        if not isinstance(run.blocks, SampleBlockPlan):
            raise InternalError("a run is computed with the operator's own plan", reason=Reason.INTERNAL)
        whole = run.blocks.sample
        step = self._rows_at_once(whole, run.last - run.first, out.shape[0])
        for first in range(run.first, run.last, step):
            last = min(first + step, run.last)
            part = out[:, :, first - run.first : last - run.first]
            self._check_scratch(self.algorithm.scratch_bytes(whole, last - first, out.shape[0]), workspace)
            problem = self._problem(run, first, part, whole=whole, workspace=workspace, weights=weights)
            for work in self.algorithm.launches(problem):
                if isinstance(work, Transform):
                    workspace.stream.transform(work)
                else:
                    workspace.stream.launch(work)
            workspace.check()

    def _rows_at_once(self, out: SampleShape, rows: int, samples: int) -> int:
        """Output rows of one launch: at most `MOST_WORK`, a multiple of the quantum."""
        work = out.row_elements * samples * math.prod(self._layer.filters.shape[1:])
        return pieces.rows_at_once(work, math.prod(out.rest), rows, quantum=self.algorithm.quantum)

    @staticmethod
    def _check_scratch(wanted: int, workspace: DeviceWorkspace) -> None:
        """A launch must find the working memory that was planned for it."""
        there = 0 if workspace.scratch is None else workspace.scratch.nbytes
        if wanted > there:
            raise InternalError(
                f"a launch wants {wanted} bytes of working memory, {there} were planned",
                reason=Reason.INTERNAL,
            )

    def _problem(
        self,
        run: Run,
        first: int,
        out: DeviceArray,
        *,
        whole: SampleShape,
        workspace: DeviceWorkspace,
        weights: tuple[Memory, ...],
    ) -> Problem:
        layer, rows, positions = self._layer, run.rows, math.prod(out.shape[2:])
        if positions > MAX_SIZE:
            raise InternalError(
                f"a launch has {positions} positions, more than {MAX_SIZE}", reason=Reason.INTERNAL
            )
        windows = layer.windows(SampleShape(rows.shape[1], run.height, rows.shape[3:]))
        arguments = ConvArguments(
            input=rows.address,
            filters=weights[0].address,
            thresholds=weights[1].address if len(weights) > 1 else 0,
            output=out.address,
            input_sample=rows.strides[0],
            input_channel=rows.strides[1],
            output_sample=out.strides[0],
            output_channel=out.strides[1],
            axes=sliding_axes(windows, run, first, out),
            samples=out.shape[0],
            groups=layer.groups,
            group_in=layer.in_channels // layer.groups,
            group_out=layer.out_channels // layer.groups,
            taps=math.prod(layer.kernel),
            positions=positions,
            padding=PADDING[layer.padding_mode],
            activation=FUNCTIONS.index(layer.activation.function),
            splits=1,
            slope=layer.activation.negative_slope,
        )
        holds = (rows.memory, out.memory, *weights)
        return Problem(arguments, whole, out.dtype, workspace.scratch, workspace.info.processors, holds)


def _reach(layer: Conv, sample: SampleShape) -> int:
    """How far from 0 a coordinate may lie that a window looks at; along rows, which count from the first
    held, beyond what any run holds."""
    reaches: list[int] = []
    for axis, (window, size) in enumerate(zip(layer.windows(sample), sample.spatial, strict=True)):
        inside = min(MOST_HELD, MAX_SIZE if size is None else size) if axis == 0 else size or 0
        reaches.append(window.before + inside + window.after + window.extent + window.stride)
    return max(reaches)
