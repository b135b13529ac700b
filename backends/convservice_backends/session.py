"""Sessions: one tensor's passage through one network.

One driver moves rows from the input to every consumer, depth first: whatever a stage computes is taken by
the stages behind it before it computes more, so that between two stages there is never more than one run.
Where branches begin that join again, all of them are given a piece before any is given the next. Small
samples that are one block in every layer go whole, several at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from convservice.bands import Band, DataFormat, TensorSpec
from convservice.dtypes import DType, dtype_of
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import SampleShape
from convservice.network import INPUT
from convservice_backends.arrays import Arrays
from convservice_backends.interface import PreparedNetwork, Session
from convservice_backends.operators import AnyOperator, Operator, ReducingOperator, Rows, Run
from convservice_backends.plan import Edge, NetworkPlan, NodePlan
from convservice_backends.stages import MayWait, no_room, stage_of

Steps: TypeAlias = "Iterator[Band | Steps]"
"""A piece of the driver's work: bands, and further pieces to do first."""


def never() -> bool:
    """False: what can be computed is."""
    return False


@dataclass(eq=False)
class _Session:
    """What both kinds of sessions are made of.

    Attributes:
        plan: how the tensor passes.
        operators: node id to operator.
        workspace: what operators borrow; None after `close`.
        arrays: the backend's.
        may_wait: whether rows may be collected into larger runs, because nothing would begin sooner if they
            were handed to the operators now.
    """

    plan: NetworkPlan
    operators: Mapping[str, AnyOperator]
    workspace: Any
    arrays: Arrays
    may_wait: MayWait = never
    sample: int = field(default=0, init=False)
    """Number of the sample that comes next, or whose rows are coming."""
    _rows: int = field(default=0, init=False)


@dataclass(eq=False)
class FlowSession(_Session):
    """Rows of one sample after another flow through the stages."""

    def __post_init__(self) -> None:
        nodes = self.plan.nodes
        self._stages = {
            name: stage_of(node, self.operators[name], self.arrays) for name, node in nodes.items()
        }

    def submit(self, band: Band) -> Iterator[Band]:
        """Takes the next rows and hands on what can now be computed; see `interface.Session`."""
        for index in range(band.array.shape[0]):
            rows = band.array[index : index + 1]
            yield from _bands(self._feed(self.plan.consumers, rows, self.plan.piece_rows))
            self._rows += rows.shape[2]
            if self._rows == self.plan.spec.sample.rows:
                yield from _bands(self._end())

    def finish(self) -> Iterator[Band]:
        """Ends the input; see `interface.Session`."""
        if self.plan.spec.sample.rows is not None:
            return
        if not self._rows:
            raise InvalidRequest(
                "a sample has at least 1 row; the input ended with none", reason=Reason.INVALID_SHAPE
            )
        yield from _bands(self._end())

    def drain(self) -> Iterator[Band]:
        """Hands on what was left to wait for more rows; see `interface.Session`."""
        if self._rows:  # a sample of which nothing has come may never come
            for name in self._stages:
                yield from _bands(self._advance(name, never))

    def close(self) -> None:
        """Gives the memory back."""
        self._stages, self.operators, self.workspace = {}, {}, None

    def _end(self) -> Steps:
        """Ends a sample in every stage, in topological order, and begins the next."""
        for name, stage in self._stages.items():
            stage.end()
            yield self._advance(name, never)
        for stage in self._stages.values():
            stage.begin()
        self.sample += 1
        self._rows = 0

    def _feed(self, consumers: tuple[Edge, ...], rows: Any, piece_rows: int) -> Steps:
        """Gives rows to all consumers, a piece at a time."""
        for first in range(0, rows.shape[2], piece_rows):
            piece = rows[:, :, first : first + piece_rows]
            for name, port in consumers:
                stage, at = self._stages[name], 0
                while at < piece.shape[2]:
                    taken = stage.put(port, piece[:, :, at:])
                    at += taken
                    yield self._advance(name, self.may_wait)
                    if not taken and not stage.room(port):
                        raise no_room(stage.plan)

    def _advance(self, name: str, may_wait: MayWait) -> Steps:
        """Computes what can be computed in a stage; a run that could be larger may wait for more rows."""
        stage = self._stages[name]
        while (computed := stage.advance(self.workspace, may_wait)) is not None:
            rows, plan = computed.rows, stage.plan
            for output in plan.outputs:
                converted = self.arrays.convert(rows, self.plan.out_dtype)
                yield Band(converted, self.sample, computed.first, output)
            if plan.consumers:
                yield self._feed(plan.consumers, self.arrays.convert(rows, self.plan.dtype), plan.piece_rows)


def _bands(steps: Steps) -> Iterator[Band]:
    """What `steps` and all the steps that they lead to hand on, depth first, however deep the network."""
    open_steps = [steps]
    while open_steps:
        step = next(open_steps[-1], None)
        if step is None:
            open_steps.pop()
        elif isinstance(step, Band):
            yield step
        else:
            open_steps.append(step)


class WholeSession(_Session):
    """Samples that are one block in every layer: several at a time, each layer after the other."""

    _partial: Any = None
    """The sample that is being collected, where rows come in parts."""

    def submit(self, band: Band) -> Iterator[Band]:
        """Takes the next rows and hands on whole samples; see `interface.Session`."""
        height = self.plan.spec.sample.height
        if band.array.shape[2] < height:
            yield from self._collect(band.array, height)
            return
        for first in range(0, band.array.shape[0], self.plan.stack):
            yield from self._compute(band.array[first : first + self.plan.stack])

    def finish(self) -> Iterator[Band]:
        """Nothing is left: a sample is computed when its last row has come."""
        return iter(())

    def drain(self) -> Iterator[Band]:
        """Nothing: what can be computed was handed on."""
        return iter(())

    def close(self) -> None:
        """Gives the memory back."""
        self._partial, self.operators, self.workspace = None, {}, None

    def _collect(self, rows: Any, height: int) -> Iterator[Band]:
        spec = self.plan.spec
        if self._partial is None:
            shape = (1, spec.sample.channels, height, *spec.sample.rest)
            self._partial = self.arrays.empty(shape, spec.dtype)
        self.arrays.copy(rows, self._partial[:, :, self._rows : self._rows + rows.shape[2]])
        self._rows += rows.shape[2]
        if self._rows == height:
            self._rows = 0
            yield from self._compute(self._partial)

    def _compute(self, samples: Any) -> Iterator[Band]:
        maps: dict[str, Any] = {INPUT: samples}
        count = int(samples.shape[0])
        for name, node in self.plan.nodes.items():
            shape = (count, node.out.channels, node.out.height, *node.out.rest)
            maps[name] = self.arrays.empty(shape, node.out_dtype)
            self._compute_node(node, maps, maps[name])
        for name, node in self.plan.nodes.items():
            for output in node.outputs:
                yield Band(self.arrays.convert(maps[name], self.plan.out_dtype), self.sample, 0, output)
        self.sample += count

    def _compute_node(self, node: NodePlan, maps: Mapping[str, Any], out: Any) -> None:
        operator, height = self.operators[node.node.id], node.given.height
        given = tuple(Rows(self.arrays.convert(maps[port.source], port.dtype), 0) for port in node.ports)
        if not node.layer.reducing:
            run = Run(given, height, 0, node.out.height, node.blocks)
            cast("Operator[Any]", operator).compute(run, out, self.workspace)
            return
        reducing = cast("ReducingOperator[Any]", operator)
        sums = None if node.sums is None else self.arrays.empty((out.shape[0], *node.sums[0]), node.sums[1])
        reducing.accumulate(Run(given, height, 0, height, node.blocks), sums, out, self.workspace)
        reducing.finish(height, node.given, sums, out, self.workspace)


def run(
    prepared: PreparedNetwork,
    x: NDArray[Any],
    *,
    band_rows: int | None = None,
    out_dtype: DType | None = None,
) -> dict[str, NDArray[Any]]:
    """Sends a whole array through a prepared network, in-process.

    Args:
        prepared: the network, prepared on some backend.
        x: (samples, channels, *spatial), vectors (samples, features).
        band_rows: rows handed over at a time; all of a sample where not given.
        out_dtype: dtype of the results; None for the network's own.

    Returns:
        Output name to feature map (samples, out_channels, *spatial), vectors (samples, features).
    """
    if x.ndim == 2:
        sample, x = SampleShape.of_vector(x.shape[1]), x[..., None]
    else:
        sample = SampleShape(x.shape[1], x.shape[2], tuple(x.shape[3:]))
    spec = TensorSpec(
        dtype_of(x.dtype), sample, x.shape[0], band_rows or x.shape[2], DataFormat.CHANNELS_FIRST
    )
    plan = prepared.plan(spec, out_dtype)
    results: dict[str, NDArray[Any]] = {}
    for result in plan.results:
        shape = result.spec.sample
        results[result.name] = np.empty(
            (x.shape[0], shape.channels, shape.height, *shape.rest), result.spec.dtype.numpy
        )
    session = prepared.open(plan, check=lambda: None)
    try:
        for band in _all_bands(session, x, spec):
            count, _, rows = band.array.shape[:3]
            target = results[band.output][band.sample : band.sample + count]
            target[:, :, band.first_row : band.first_row + rows] = band.array
    finally:
        session.close()
    vectors = {result.name for result in plan.results if result.spec.sample.vector}
    return {name: array[..., 0] if name in vectors else array for name, array in results.items()}


def _all_bands(session: Session, x: NDArray[Any], spec: TensorSpec) -> Iterator[Band]:
    if spec.band_rows >= spec.sample.height:
        yield from session.submit(Band(x))
    else:
        for sample in range(x.shape[0]):
            for row in range(0, x.shape[2], spec.band_rows):
                rows = x[sample : sample + 1, :, row : row + spec.band_rows]
                yield from session.submit(Band(rows, sample, row))
    yield from session.finish()


def open_session(
    plan: NetworkPlan,
    operators: Mapping[str, AnyOperator],
    workspace: Any,
    arrays: Arrays,
    may_wait: MayWait = never,
) -> FlowSession | WholeSession:
    """The session that the plan asks for; the arguments are those of its class."""
    kind = WholeSession if plan.whole else FlowSession
    return kind(plan, operators, workspace, arrays, may_wait)


__all__ = ["FlowSession", "NodePlan", "WholeSession", "open_session", "run"]
