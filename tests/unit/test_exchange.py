"""The stream's protocol with no network at all: the two sides talk to each other, and to misuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convservice.bands import Band, TensorSpec
from convservice.dtypes import FLOAT32, dtype_of
from convservice.errors import Cancelled, InternalError, InvalidRequest, Reason, ResourceExhausted
from convservice.exchange import (
    Aborted,
    Done,
    Ended,
    Failed,
    FramingError,
    Opened,
    ResultOpened,
    ResultReceiver,
    ResultRows,
    Rows,
    TensorReceiver,
    TensorSender,
    result_header,
    result_payload,
    tensor_done,
    tensor_error,
)
from convservice.geometry import SampleShape
from convservice.packing import BandPacker
from convservice.v1 import conv_pb2 as pb
from convservice.wire.headers import ResultSpec, TensorReport, TensorRequest
from tests.helpers import random_array
from tests.strategies import SEEDS, specs

SPEC = TensorSpec(dtype_of("uint8"), SampleShape(1, 4, (2,)), 1, 2)
REQUEST = TensorRequest("networks/n", SPEC, tensor_id=5)


def opened(request: TensorRequest = REQUEST) -> tuple[TensorReceiver, TensorSender]:
    receiver, sender = TensorReceiver(), TensorSender(request)
    assert receiver.receive(sender.header()) == Opened(request)
    return receiver, sender


def rows(event: Any) -> list[Band]:
    assert isinstance(event, (Rows, Ended, ResultRows, Done))
    return list(event.bands)


@given(specs(), st.integers(1, 30), SEEDS)
def test_a_tensor_arrives_as_it_was_sent(spec: TensorSpec, payload_bytes: int, seed: int) -> None:
    receiver, sender = opened(replace(REQUEST, spec=spec))
    shape = (spec.samples, spec.sample.channels, spec.sample.height, *spec.sample.rest)
    x, packer = random_array(np.random.default_rng(seed), shape, spec.dtype), BandPacker(spec, payload_bytes)
    found = np.zeros_like(x)
    for data in [*packer.add(x), *packer.finish()]:
        for band in rows(receiver.receive(sender.payload(data))):
            count, _, height = band.array.shape[:3]
            found[band.sample : band.sample + count, :, band.first_row : band.first_row + height] = band.array
    ended = receiver.receive(sender.end())
    assert isinstance(ended, Ended)
    assert list(ended.bands) == []
    assert ended.rows == spec.samples * spec.sample.height
    assert receiver.between
    assert found.tobytes() == x.tobytes()


def test_an_unknown_height_is_told_by_the_end() -> None:
    receiver, sender = opened(replace(REQUEST, spec=replace(SPEC, sample=SampleShape(1, None, (2,)))))
    assert [band.array.shape[2] for band in rows(receiver.receive(sender.payload(bytes(6))))] == [2]
    ended = receiver.receive(sender.end())
    assert isinstance(ended, Ended)
    assert [band.array.shape[2] for band in ended.bands] == [1]
    assert ended.rows == 3


def test_tensors_follow_one_another() -> None:
    receiver, sender = opened()
    assert not receiver.between
    receiver.receive(sender.payload(bytes(8)))
    receiver.receive(sender.end())
    second = TensorSender(replace(REQUEST, tensor_id=6))
    receiver.receive(second.header())
    assert receiver.receive(second.abort()) == Aborted()
    third = TensorSender(replace(REQUEST, tensor_id=2**64 - 1))
    assert isinstance(receiver.receive(third.header()), Opened)


@pytest.mark.parametrize("tensor_id", [0, 4, 5])
def test_ids_must_increase(tensor_id: int) -> None:
    receiver, sender = opened()
    receiver.receive(sender.abort())
    with pytest.raises(FramingError, match=f"{tensor_id} came after 5") as caught:
        receiver.receive(TensorSender(replace(REQUEST, tensor_id=tensor_id)).header())
    assert caught.value.reason == "FRAMING"


def test_the_first_id_may_be_zero() -> None:
    opened(replace(REQUEST, tensor_id=0))


def test_a_tensor_opens_only_after_the_one_before_ended() -> None:
    receiver, _ = opened()
    with pytest.raises(FramingError, match="tensor 6 was opened before tensor 5 ended"):
        receiver.receive(TensorSender(replace(REQUEST, tensor_id=6)).header())


@pytest.mark.parametrize("kind", ["payload", "end", "abort"])
def test_what_belongs_to_no_open_tensor_is_a_framing_error(kind: str) -> None:
    other = TensorSender(replace(REQUEST, tensor_id=9))
    message = {"payload": other.payload(b"x"), "end": other.end(), "abort": other.abort()}[kind]
    with pytest.raises(FramingError, match=f"{kind} came for tensor 9, but none is open"):
        TensorReceiver().receive(message)
    receiver, sender = opened()
    with pytest.raises(FramingError, match=f"{kind} came for tensor 9, but 5 is open"):
        receiver.receive(message)
    receiver, sender = opened()
    receiver.receive(sender.abort())
    with pytest.raises(FramingError, match="none is open"):
        receiver.receive(
            {"payload": sender.payload(b"x"), "end": sender.end(), "abort": sender.abort()}[kind]
        )


def test_an_empty_message_is_a_framing_error() -> None:
    with pytest.raises(FramingError, match="this has none"):
        TensorReceiver().receive(pb.ConvolveStreamRequest())


@pytest.mark.parametrize("closing", ["end", "abort"])
def test_a_tensor_that_failed_is_discarded_and_the_stream_goes_on(closing: str) -> None:
    receiver, sender = opened()
    with pytest.raises(InvalidRequest, match="at least 9 were sent"):
        receiver.receive(sender.payload(bytes(9)))
    receiver.discard()
    assert receiver.receive(sender.payload(bytes(1000))) is None
    between = receiver.between
    assert not between
    assert receiver.receive(getattr(sender, closing)()) is None
    assert receiver.between
    following = replace(REQUEST, tensor_id=7)
    assert receiver.receive(TensorSender(following).header()) == Opened(following)


def test_a_header_that_breaks_a_rule_fails_its_tensor_only() -> None:
    receiver = TensorReceiver()
    bad = TensorSender(REQUEST)
    message = bad.header()
    message.header.data_type = 99  # type: ignore[assignment]
    with pytest.raises(InvalidRequest) as caught:
        receiver.receive(message)
    assert not isinstance(caught.value, FramingError)
    assert receiver.tensor_id == 5
    receiver.discard()
    assert receiver.receive(bad.payload(b"whatever")) is None
    assert receiver.receive(bad.end()) is None
    assert isinstance(receiver.receive(TensorSender(replace(REQUEST, tensor_id=6)).header()), Opened)


def test_too_few_bytes_fail_the_tensor_at_its_end_and_the_stream_goes_on() -> None:
    receiver, sender = opened()
    receiver.receive(sender.payload(bytes(7)))
    with pytest.raises(InvalidRequest, match=r"has 8 bytes .*7 were sent") as caught:
        receiver.receive(sender.end())
    assert not isinstance(caught.value, FramingError)
    receiver.discard()
    assert receiver.between
    assert isinstance(receiver.receive(TensorSender(replace(REQUEST, tensor_id=6)).header()), Opened)


def test_bytes_out_of_order_fail_the_tensor() -> None:
    receiver, sender = opened()
    sender.payload(bytes(4))
    with pytest.raises(InvalidRequest, match="byte 0, not 4") as caught:
        receiver.receive(sender.payload(bytes(4)))
    assert caught.value.reason == "PAYLOAD_OFFSET"


RESULT = ResultSpec(0, "out", replace(SPEC, dtype=FLOAT32), 2, 3)


def test_results_arrive_as_they_were_sent() -> None:
    receiver = ResultReceiver(REQUEST, "host:1")
    second = replace(RESULT, index=1, name="other")
    assert receiver.receive(result_header(5, RESULT)) == ResultOpened(RESULT)
    assert receiver.receive(result_header(5, second)) == ResultOpened(second)
    x = np.arange(8, dtype=np.float32).reshape(1, 1, 4, 2)
    data = x.tobytes()
    assert [b.array.shape[2] for b in rows(receiver.receive(result_payload(5, 1, 0, data[:20])))] == [2]
    (first,) = rows(receiver.receive(result_payload(5, 0, 0, data)))
    assert (first.output, first.array.tolist()) == ("out", x.tolist())
    (rest,) = rows(receiver.receive(result_payload(5, 1, 20, data[20:])))
    assert (rest.output, rest.first_row, rest.array.tolist()) == ("other", 2, x[:, :, 2:].tolist())
    report = TensorReport("b", {"n": "a"}, 4, 0.5)
    done = receiver.receive(tensor_done(5, report))
    assert isinstance(done, Done)
    assert (done.report, list(done.bands)) == (report, [])


def test_the_last_rows_of_an_unknown_height_come_with_done() -> None:
    unknown = replace(REQUEST, spec=replace(SPEC, sample=SampleShape(1, None, (2,))))
    receiver = ResultReceiver(unknown)
    receiver.receive(
        result_header(5, replace(RESULT, spec=replace(RESULT.spec, sample=SampleShape(1, None, (2,)))))
    )
    assert rows(receiver.receive(result_payload(5, 0, 0, bytes(8)))) == []
    assert [band.array.shape[2] for band in rows(receiver.receive(tensor_done(5, TensorReport("b"))))] == [1]


def test_a_failed_tensor_is_its_error() -> None:
    error = ResourceExhausted(
        "3 of 2 bytes", reason=Reason.MEMORY_BUDGET, metadata={"n": "3"}, retry_after=2.0
    )
    failed = ResultReceiver(REQUEST, "host:1").receive(tensor_error(5, error))
    assert isinstance(failed, Failed)
    assert type(failed.error) is ResourceExhausted
    assert (failed.error.reason, failed.error.metadata, failed.error.retry_after) == (
        "MEMORY_BUDGET",
        {"n": "3"},
        2.0,
    )
    assert (failed.error.target, failed.error.method) == ("host:1", "ConvolveStream")
    aborted = ResultReceiver(REQUEST).receive(tensor_error(5, Cancelled("by you", reason=Reason.ABORTED)))
    assert isinstance(aborted, Failed)
    assert type(aborted.error) is Cancelled


@pytest.mark.parametrize(
    "messages",
    [
        [pb.ConvolveStreamResponse()],
        [result_header(6, RESULT)],
        [tensor_done(4, TensorReport("b"))],
        [result_payload(5, 0, 0, b"x")],
        [result_header(5, replace(RESULT, index=1))],
        [result_header(5, RESULT), result_header(5, RESULT)],
        [result_header(5, RESULT), result_payload(5, 1, 0, b"x")],
        [result_header(5, RESULT), result_payload(5, 0, 1, b"x")],
        [result_header(5, RESULT), result_payload(5, 0, 0, bytes(33))],
        [result_header(5, RESULT), tensor_done(5, TensorReport("b"))],
        [pb.ConvolveStreamResponse(header=pb.ResultHeader(tensor_id=5))],
    ],
)
def test_a_server_that_breaks_the_protocol_is_an_internal_error(
    messages: list[pb.ConvolveStreamResponse],
) -> None:
    receiver = ResultReceiver(REQUEST, "host:1")
    for message in messages[:-1]:
        receiver.receive(message)
    with pytest.raises(InternalError) as caught:
        rows(receiver.receive(messages[-1]))
    assert (caught.value.target, caught.value.method) == ("host:1", "ConvolveStream")
