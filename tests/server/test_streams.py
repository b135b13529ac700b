"""A stream's tensors without any transport: an iterator in, an iterator out."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from convservice.bands import DataFormat, TensorSpec
from convservice.dtypes import FLOAT32
from convservice.errors import Cancelled, DeadlineExceeded, InvalidRequest, Reason, ServiceUnavailable
from convservice.exchange import FramingError
from convservice.geometry import SampleShape
from convservice.layers import Conv
from convservice.network import Network
from convservice.v1 import conv_pb2 as pb
from convservice.wire.networks import inline_to_proto
from convservice_backends.registry import Registry
from convservice_server.calls import Call, WaitEnded
from convservice_server.config import ServerConfig
from convservice_server.service import Service
from tests.server.support import (
    Double,
    abort_message,
    collect,
    end_message,
    header_message,
    payload_message,
    pointwise,
    tensor_messages,
)

X = np.arange(24, dtype=np.float32).reshape(2, 1, 4, 3)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A service with a `Double` behind it, and one registered network that doubles its input."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.backend = Double()
        config = ServerConfig.of(**settings)
        self.service = Service(config, Registry(factories={"double": lambda: self.backend}), self.clock)
        self.network = pointwise(scale=2)
        request = pb.RegisterNetworkRequest(network=inline_to_proto(self.network))
        self.name = self.service.register_network(request, Call()).name

    def run(
        self, *messages: pb.ConvolveStreamRequest, call: Call | None = None
    ) -> Iterator[pb.ConvolveStreamResponse]:
        return self.service.open_stream(call or Call()).run(iter(messages))

    def tensor(self, tensor_id: int = 0, x: Any = X, **kwargs: Any) -> list[pb.ConvolveStreamRequest]:
        return list(tensor_messages(self.name, x, tensor_id, **kwargs))

    def nothing_left(self) -> bool:
        admission = self.service.admission
        return (admission.reserved, admission.running, self.backend.sessions) == (0, 0, 0)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("message_bytes", [1, 7, 12, 1 << 20])
@pytest.mark.parametrize("band_rows", [1, 3, 4])
def test_tensors_follow_one_another(bench: Bench, band_rows: int, message_bytes: int) -> None:
    cut = {"band_rows": band_rows, "message_bytes": message_bytes}
    results = collect(bench.run(*bench.tensor(3, **cut), *bench.tensor(7, **cut)))
    assert list(results) == [3, 7]
    for result in results.values():
        assert result.floats == (2 * X).ravel().tolist()
        assert result.done is not None
        assert (result.done.backend, result.done.input_rows) == ("double", 8)
        assert result.done.reserved_bytes > bench.backend.peak_bytes
        (header,) = result.headers
        assert (header.name, header.samples, header.band_rows, header.block_rows) == ("output", 2, 1, 1)
    assert bench.nothing_left()


def test_results_leave_before_the_next_message_is_read(bench: Bench) -> None:
    """The stream asks for a message only when nothing more can be computed without it."""
    given: list[str] = []

    def requests() -> Iterator[pb.ConvolveStreamRequest]:
        for message in bench.tensor(x=X[:1], band_rows=1, message_bytes=12):
            given.append(str(message.WhichOneof("message")))
            yield message

    responses = bench.service.open_stream(Call()).run(requests())
    assert next(responses).WhichOneof("message") == "header"
    assert given == ["header"]
    for row in range(4):
        payload = next(responses).payload
        assert payload.byte_offset == 12 * row
        assert np.frombuffer(payload.data, np.float32).tolist() == (2 * X[0, 0, row]).tolist()
        assert given == ["header"] + ["payload"] * (row + 1)
    assert next(responses).WhichOneof("message") == "done"
    assert next(responses, None) is None


def test_an_unannounced_height(bench: Bench) -> None:
    spec = TensorSpec(FLOAT32, SampleShape(1, None, (3,)), 1, 3)
    data = X[:1].tobytes()
    messages = (header_message(bench.name, spec), payload_message(data), end_message())
    (result,) = collect(bench.run(*messages)).values()
    assert not result.headers[0].sample_shape.HasField("rows")
    assert result.floats == (2 * X[:1]).ravel().tolist()
    assert result.done is not None
    assert result.done.input_rows == 4


def test_an_empty_batch(bench: Bench) -> None:
    spec = TensorSpec(FLOAT32, SampleShape(1, 4, (3,)), 0, 4)
    (result,) = collect(bench.run(header_message(bench.name, spec), end_message())).values()
    assert result.data == b""
    assert result.done is not None
    assert result.headers[0].samples == 0


def bad(bench: Bench, kind: str) -> list[pb.ConvolveStreamRequest]:
    """The messages of a tensor 1 that fails in some way."""
    whole = bench.tensor(1)
    header = whole[0]
    if kind == "unknown network":
        header.header.network = "networks/sha256-0"
    elif kind == "unknown dtype":
        header.header.data_type = pb.DataType.ValueType(99)
    elif kind == "other dtype":
        header.header.data_type = pb.DATA_TYPE_FLOAT64
    elif kind == "unknown backend":
        header.header.backend = "abacus"
    elif kind == "no channels":
        header.header.sample_shape.channels = 0
    elif kind == "other channels":
        header.header.sample_shape.channels = 2
    elif kind == "terabytes":
        header.header.sample_shape.rest[0] = 2**31 - 1
        header.header.sample_shape.channels = 2**31 - 1
    elif kind == "too many bytes":
        whole.insert(2, payload_message(b"0", X.nbytes, 1))
    elif kind == "a gap":
        whole[1].payload.byte_offset = 8
    elif kind == "too few bytes":
        whole[1].payload.data = whole[1].payload.data[:-1]
    else:
        whole[-1] = abort_message(1)
    return whole


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unknown network", Reason.NETWORK_NOT_REGISTERED),
        ("unknown dtype", Reason.UNKNOWN_DATA_TYPE),
        ("other dtype", Reason.DATA_TYPE_MISMATCH),
        ("unknown backend", Reason.BACKEND_UNAVAILABLE),
        ("no channels", Reason.INVALID_SHAPE),
        ("other channels", Reason.CHANNEL_MISMATCH),
        ("terabytes", Reason.SIZE_OVERFLOW),
        ("too many bytes", Reason.PAYLOAD_SIZE),
        ("a gap", Reason.PAYLOAD_OFFSET),
        ("too few bytes", Reason.PAYLOAD_SIZE),
        ("aborted", Reason.ABORTED),
    ],
)
def test_a_tensor_that_fails_is_answered_and_the_next_goes_on(
    bench: Bench, kind: str, reason: Reason
) -> None:
    messages = (*bench.tensor(0), *bad(bench, kind), *bench.tensor(2))
    results = collect(bench.run(*messages))
    assert results[0].done is not None
    assert results[2].done is not None
    assert results[2].floats == (2 * X).ravel().tolist()
    error = results[1].error
    assert error is not None
    assert error.reason == reason
    assert bench.nothing_left()


def test_memory_that_cannot_be_had_is_refused_at_the_header() -> None:
    bench = Bench(memory_budget_bytes="64MiB")
    bench.backend.peak_bytes = 60 << 20
    results = collect(bench.run(*bench.tensor(0)))
    error = results[0].error
    assert error is not None
    assert error.reason == Reason.MEMORY_BUDGET
    assert "layer 'layer0' holds most: 1 rows" in error.message
    assert error.retry_after is None
    assert not results[0].headers
    bench.backend.peak_bytes = 0
    first = bench.run(*bench.tensor(0, x=X[:1], band_rows=1, message_bytes=12))
    next(first)
    bench.backend.peak_bytes = 50 << 20
    (second,) = collect(bench.run(*bench.tensor(0))).values()
    assert second.error is not None
    assert second.error.retry_after is not None
    assert collect(first)[0].done is not None
    assert bench.nothing_left()


def test_what_is_reserved_does_not_depend_on_the_height(bench: Bench) -> None:
    tall = np.zeros((1, 1, 64, 3), np.float32)
    messages = [*bench.tensor(0, X[:1], band_rows=4), *bench.tensor(1, tall, band_rows=4)]
    results = collect(bench.run(*messages))
    reserved = [result.done.reserved_bytes for result in results.values() if result.done is not None]
    assert reserved[0] == reserved[1]


@pytest.mark.parametrize("data_format", DataFormat)
def test_bands_as_high_as_the_tensor_take_no_more_than_was_reserved(data_format: DataFormat) -> None:
    """The bytes of such a band are put together while nothing can be computed, and then decoded."""
    height, width, payload = 2048, 1024, bytes(1 << 20)
    weight = np.ones((1, 2, 3, 3), np.float32)
    with closing(Registry()) as registry:
        service = Service(ServerConfig(memory_budget_bytes=1 << 30), registry)
        inline = inline_to_proto(Network([Conv(weight, padding=1)]))
        name = service.register_network(pb.RegisterNetworkRequest(network=inline), Call()).name
        spec = TensorSpec(FLOAT32, SampleShape(2, height, (width,)), 1, height, data_format)

        def requests() -> Iterator[pb.ConvolveStreamRequest]:
            yield header_message(name, spec)
            for offset in range(0, spec.band_bytes, len(payload)):
                yield payload_message(payload, offset)
            yield end_message()

        tracemalloc.start()
        try:
            (*_, last) = (
                response if response.HasField("done") else pb.ConvolveStreamResponse()
                for response in service.open_stream(Call()).run(requests())
            )
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert last.done.input_rows == height
    assert spec.band_bytes < most < last.done.reserved_bytes


def test_an_unexpected_failure_is_internal_and_has_an_incident(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.backend.error = ZeroDivisionError("not for the client's eyes")
    results = collect(bench.run(*bench.tensor(0)))
    error = results[0].error
    assert error is not None
    assert error.reason == Reason.INTERNAL
    assert "eyes" not in error.message
    incident = error.metadata["incident"]
    assert incident in error.message
    (record,) = [record for record in caplog.records if record.exc_info]
    assert incident in record.getMessage()
    assert "not for the client's eyes" in caplog.text
    bench.backend.error = None
    assert collect(bench.run(*bench.tensor(0)))[0].done is not None
    assert bench.nothing_left()


def framing_errors(bench: Bench) -> dict[str, list[pb.ConvolveStreamRequest]]:
    whole = bench.tensor(5)
    return {
        "a payload before a header": [payload_message(b"", 0, 5)],
        "an end before a header": [end_message(5)],
        "an id that does not increase": [*whole, *bench.tensor(5)],
        "a header inside a tensor": [whole[0], bench.tensor(6)[0]],
        "a payload of another tensor": [whole[0], payload_message(b"", 0, 6)],
        "an empty message": [pb.ConvolveStreamRequest()],
        "an end in the middle of a tensor": whole[:2],
        "an end in the middle of a tensor that failed": bad(bench, "a gap")[:2],
        "a header inside a tensor that failed": [*bad(bench, "a gap")[:2], whole[0]],
    }


@pytest.mark.parametrize("kind", framing_errors(Bench()))
def test_a_framing_error_ends_the_stream(bench: Bench, kind: str) -> None:
    with pytest.raises(FramingError) as caught:
        list(bench.run(*framing_errors(bench)[kind], *bench.tensor(9)))
    assert caught.value.reason == Reason.FRAMING
    assert bench.nothing_left()


def test_cancel_is_noticed_between_two_blocks(bench: Bench) -> None:
    call = Call()
    responses = bench.run(*bench.tensor(0), call=call)
    next(responses)
    call.give_up()
    with pytest.raises(Cancelled):
        next(responses)
    assert bench.backend.blocks == 0
    assert bench.nothing_left()


def test_a_stream_that_is_dropped_gives_everything_back(bench: Bench) -> None:
    responses: Any = bench.run(*bench.tensor(0))
    next(responses)
    assert bench.service.admission.running == 1
    responses.close()
    assert bench.nothing_left()


def test_the_tensors_own_time_limit_ends_it_alone(bench: Bench) -> None:
    messages = [*bench.tensor(0, timeout_ms=1500), *bench.tensor(1)]

    def requests() -> Iterator[pb.ConvolveStreamRequest]:
        for message in messages:
            if message.WhichOneof("message") == "payload":
                bench.clock.now += 2
            yield message

    results = collect(bench.service.open_stream(Call()).run(requests()))
    error = results[0].error
    assert isinstance(error, DeadlineExceeded)
    assert (error.reason, error.metadata) == (Reason.DEADLINE, {"timeout_ms": "1500"})
    assert bench.backend.blocks == 8, "only the second tensor's rows were computed"
    assert results[1].done is not None


def test_a_tensor_whose_time_passes_in_silence_is_answered_and_the_next_goes_on(bench: Bench) -> None:
    call = Call()
    messages = [*bench.tensor(0, timeout_ms=1500), *bench.tensor(1)]
    waits: list[float | None] = []

    class Silent(Iterator[pb.ConvolveStreamRequest]):
        """Ends the first wait for a payload as an inbox does."""

        def __next__(self) -> pb.ConvolveStreamRequest:
            waits.append(call.wait_until)
            if len(waits) == 2:
                raise WaitEnded
            if not messages:
                raise StopIteration
            return messages.pop(0)

    responses = bench.service.open_stream(call).run(Silent())
    first = [next(responses), next(responses)]
    assert first[1].WhichOneof("message") == "error"
    assert bench.nothing_left()
    results = collect([*first, *responses])
    assert isinstance(results[0].error, DeadlineExceeded)
    assert results[0].error.metadata == {"timeout_ms": "1500"}
    assert results[1].done is not None
    assert waits == [None, 1.5, *[None] * (len(waits) - 2)]


def test_the_calls_deadline_ends_the_stream(bench: Bench) -> None:
    call = Call(deadline=5.0, clock=bench.clock)
    responses = bench.run(*bench.tensor(0), call=call)
    next(responses)
    bench.clock.now = 5.0
    with pytest.raises(DeadlineExceeded):
        next(responses)
    assert bench.nothing_left()


def test_what_the_requests_raise_ends_the_stream(bench: Bench) -> None:
    def requests() -> Iterator[pb.ConvolveStreamRequest]:
        yield bench.tensor(0)[0]
        raise ServiceUnavailable("nothing came", reason=Reason.IDLE)

    responses = bench.service.open_stream(Call()).run(requests())
    next(responses)
    with pytest.raises(ServiceUnavailable, match="nothing came"):
        next(responses)
    assert bench.nothing_left()


def test_draining_finishes_what_runs_and_refuses_what_follows(bench: Bench) -> None:
    responses = bench.run(*bench.tensor(0), *bench.tensor(1), *bench.tensor(2))
    first = next(responses)
    bench.service.drain()
    results = collect([first, *responses])
    assert results[0].done is not None
    assert results[0].floats == (2 * X).ravel().tolist()
    for number in (1, 2):
        error = results[number].error
        assert isinstance(error, ServiceUnavailable)
        assert error.reason == Reason.DRAINING
        assert error.retry_after is not None
    with pytest.raises(ServiceUnavailable):
        bench.service.open_stream(Call())


def test_phases_are_measured(bench: Bench) -> None:
    """Waiting for the client, computing, and waiting until the client takes results, each by the clock."""

    def requests() -> Iterator[pb.ConvolveStreamRequest]:
        for message in bench.tensor(x=X[:1], band_rows=4):
            bench.clock.now += 1
            yield message

    def work() -> None:
        bench.clock.now += 10

    bench.backend.work = work  # each of the 4 rows takes ten seconds
    done = pb.TensorDone()
    for response in bench.service.open_stream(Call()).run(requests()):
        done = response.done
        bench.clock.now += 100
    assert (done.receive_us, done.compute_us, done.send_us) == (2_000_000, 40_000_000, 200_000_000)
    assert done.total_us == 242_000_000


def test_one_line_of_the_log_per_tensor(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    collect(bench.run(*bench.tensor(0), *bad(bench, "a gap")))
    lines = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "tensor"]
    assert [line["status"] for line in lines] == ["OK", "INVALID_ARGUMENT"]
    good, failed = lines
    assert good["network"] == bench.name
    assert good["input"] == "2 x (1, 4, 3) float32"
    assert good["outputs"] == "output (1, 4, 3) float32"
    assert (good["backend"], good["algorithms"]) == ("double", "direct")
    assert (good["bytes_in"], good["bytes_out"]) == (X.nbytes, X.nbytes)
    assert failed["reason"] == Reason.PAYLOAD_OFFSET


def test_long_names_are_cut_in_errors(bench: Bench) -> None:
    header = bench.tensor(0)[0]
    header.header.network = "n" * 100_000
    header.header.backend = "b" * 100_000
    responses = list(bench.run(header, end_message()))
    assert responses[0].ByteSize() < 6000
    assert isinstance(collect(responses)[0].error, LookupError)


def test_errors_are_typed(bench: Bench) -> None:
    (result,) = collect(bench.run(*bad(bench, "other channels"))).values()
    assert isinstance(result.error, InvalidRequest)
    assert result.error.field == "sample_shape"
