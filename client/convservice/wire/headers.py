"""Tensor headers, result headers and reports: what is said about a tensor, as objects and as messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from convservice.bands import DataFormat, TensorSpec
from convservice.dtypes import DType, dtype_of_wire
from convservice.errors import InvalidRequest, Reason
from convservice.geometry import MAX_RANK, MAX_SIZE, SampleShape
from convservice.v1 import conv_pb2 as pb
from convservice.wire.enums import DATA_FORMATS, PRECISIONS, Precision, number_of, value_of

MAX_TENSOR_BYTES = 2**62
"""No tensor may be larger: sizes and offsets stay within what 64-bit arithmetic can add."""


@dataclass(frozen=True)
class TensorRequest:
    """A tensor's header: what it is and what is to be done with it.

    Attributes:
        network: the registered network's name; may be empty where the network travels inline.
        spec: the tensor.
        out_dtype: the results' dtype; None for the network's own.
        backend: a backend's name; empty for the server's choice.
        precision: what algorithms are allowed.
        timeout_ms: milliseconds for the tensor from its header on; 0 for no limit of its own.
        tensor_id: its number in a stream.
    """

    network: str
    spec: TensorSpec
    out_dtype: DType | None = None
    backend: str = ""
    precision: Precision = Precision.HIGH
    timeout_ms: int = 0
    tensor_id: int = 0


@dataclass(frozen=True)
class ResultSpec:
    """One output of a tensor, as the server announces it.

    Attributes:
        index: its place among the outputs.
        name: its name.
        spec: the result as a tensor.
        block_rows: output rows computed together.
        first_block_input_rows: input rows that must have come before the first output rows leave.
    """

    index: int
    name: str
    spec: TensorSpec
    block_rows: int
    first_block_input_rows: int


@dataclass(frozen=True)
class TensorReport:
    """How a tensor went; times in seconds on the server.

    Attributes:
        backend: the backend that computed it.
        algorithms: node id to the backend's name of the algorithm.
        input_rows: rows received over all samples.
        total: from header to done.
        receive: of it, waiting for the client.
        compute: of it, computing.
        send: of it, waiting until the client took results.
        reserved_bytes: memory that was reserved for it.
    """

    backend: str
    algorithms: dict[str, str] = field(default_factory=dict[str, str])
    input_rows: int = 0
    total: float = 0.0
    receive: float = 0.0
    compute: float = 0.0
    send: float = 0.0
    reserved_bytes: int = 0


def sample_to_proto(sample: SampleShape) -> pb.SampleShape:
    """A sample's shape; rows absent where not known, and where it is a vector."""
    if sample.vector:
        return pb.SampleShape(channels=sample.channels, vector=True)
    return pb.SampleShape(channels=sample.channels, rows=sample.rows, rest=sample.rest)


def sample_from_proto(message: pb.SampleShape) -> SampleShape:
    """A sample's shape, every size checked.

    Raises:
        InvalidRequest: `INVALID_SHAPE` for a size below 1 or above 2**31 - 1 or too many axes.
    """
    rows = message.rows if message.HasField("rows") else None
    if message.vector:
        return _vector_from_proto(message)
    sizes = [message.channels, *([] if rows is None else [rows]), *message.rest]
    if min(sizes) < 1 or max(sizes) > MAX_SIZE or len(message.rest) >= MAX_RANK:
        raise InvalidRequest(
            f"a sample has channels and 1 to {MAX_RANK} spatial axes, each from 1 to {MAX_SIZE},"
            f" not {tuple(sizes)}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str(tuple(sizes))},
            field="sample_shape",
        )
    return SampleShape(message.channels, rows, tuple(message.rest))


def _vector_from_proto(message: pb.SampleShape) -> SampleShape:
    rows = message.rows if message.HasField("rows") else 1
    if rows != 1 or message.rest or not 1 <= message.channels <= MAX_SIZE:
        raise InvalidRequest(
            f"a vector has 1 to {MAX_SIZE} channels and no spatial axes, not"
            f" {(message.channels, rows, *message.rest)}",
            reason=Reason.INVALID_SHAPE,
            metadata={"shape": str((message.channels, rows, *message.rest))},
            field="sample_shape",
        )
    return SampleShape.of_vector(message.channels)


def request_to_proto(request: TensorRequest) -> pb.TensorHeader:
    """A tensor's header."""
    spec = request.spec
    return pb.TensorHeader(
        tensor_id=request.tensor_id,
        network=request.network,
        data_type=pb.DataType.ValueType(spec.dtype.wire),
        sample_shape=sample_to_proto(spec.sample),
        samples=spec.samples,
        band_rows=spec.band_rows,
        data_format=pb.DataFormat.ValueType(number_of(DATA_FORMATS, spec.data_format)),
        output_data_type=pb.DataType.ValueType(0 if request.out_dtype is None else request.out_dtype.wire),
        backend=request.backend,
        precision=pb.Precision.ValueType(number_of(PRECISIONS, request.precision)),
        timeout_ms=request.timeout_ms,
    )


def request_from_proto(message: pb.TensorHeader) -> TensorRequest:
    """A tensor's header, its numbers checked against each other.

    Raises:
        InvalidRequest: a type, format or size is none that this version knows, or the tensor is too large.
    """
    dtype = dtype_of_wire(message.data_type, "data_type")
    out = message.output_data_type
    sample = sample_from_proto(message.sample_shape)
    band_rows = message.band_rows or sample.rows or 1
    data_format = value_of(DATA_FORMATS, message.data_format, "data_format")
    spec = TensorSpec(dtype, sample, message.samples, band_rows, data_format)
    _check_size(spec)
    if sample.rows is None and message.samples != 1:
        raise InvalidRequest(
            f"only one sample may have an unknown height, not {message.samples}",
            reason=Reason.INVALID_SHAPE,
            metadata={"samples": str(message.samples)},
            field="samples",
        )
    return TensorRequest(
        network=message.network,
        spec=spec,
        out_dtype=dtype_of_wire(out, "output_data_type") if out else None,
        backend=message.backend,
        precision=value_of(PRECISIONS, message.precision, "precision"),
        timeout_ms=message.timeout_ms,
        tensor_id=message.tensor_id,
    )


def _check_size(spec: TensorSpec) -> None:
    rows = spec.band_rows if spec.sample.rows is None else spec.sample.rows
    total = max(1, spec.samples) * max(rows, 1) * spec.row_bytes
    if max(total, spec.band_rows) > MAX_TENSOR_BYTES:
        raise InvalidRequest(
            f"{spec.samples} samples of {spec.sample} {spec.dtype} in bands of {spec.band_rows} rows are more"
            f" than {MAX_TENSOR_BYTES} bytes",
            reason=Reason.SIZE_OVERFLOW,
            metadata={"bytes": str(total), "limit": str(MAX_TENSOR_BYTES)},
            field="sample_shape",
        )


def result_to_proto(tensor_id: int, result: ResultSpec) -> pb.ResultHeader:
    """An output's header."""
    return pb.ResultHeader(
        tensor_id=tensor_id,
        output=result.index,
        name=result.name,
        data_type=pb.DataType.ValueType(result.spec.dtype.wire),
        sample_shape=sample_to_proto(result.spec.sample),
        samples=result.spec.samples,
        band_rows=result.spec.band_rows,
        block_rows=result.block_rows,
        first_block_input_rows=result.first_block_input_rows,
    )


def result_from_proto(message: pb.ResultHeader, data_format: DataFormat) -> ResultSpec:
    """An output's header, read for a request that asked for `data_format`."""
    sample = sample_from_proto(message.sample_shape)
    dtype = dtype_of_wire(message.data_type, "data_type")
    spec = TensorSpec(dtype, sample, message.samples, max(1, message.band_rows), data_format)
    _check_size(spec)
    return ResultSpec(message.output, message.name, spec, message.block_rows, message.first_block_input_rows)


def report_to_proto(tensor_id: int, report: TensorReport) -> pb.TensorDone:
    """How a tensor went, in microseconds."""
    return pb.TensorDone(
        tensor_id=tensor_id,
        backend=report.backend,
        algorithms=[pb.NodeAlgorithm(node=n, algorithm=a) for n, a in report.algorithms.items()],
        input_rows=report.input_rows,
        total_us=round(report.total * 1e6),
        receive_us=round(report.receive * 1e6),
        compute_us=round(report.compute * 1e6),
        send_us=round(report.send * 1e6),
        reserved_bytes=report.reserved_bytes,
    )


def report_from_proto(message: pb.TensorDone) -> TensorReport:
    """How a tensor went, in seconds."""
    return TensorReport(
        backend=message.backend,
        algorithms={entry.node: entry.algorithm for entry in message.algorithms},
        input_rows=message.input_rows,
        total=message.total_us / 1e6,
        receive=message.receive_us / 1e6,
        compute=message.compute_us / 1e6,
        send=message.send_us / 1e6,
        reserved_bytes=message.reserved_bytes,
    )
