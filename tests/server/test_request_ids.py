"""Request ids: known to the client, in every line of the log, in what comes back, and in errors."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest

from convservice.errors import InvalidRequest, Reason
from convservice.metadata import REQUEST_ID
from convservice.v1 import conv_pb2 as pb
from convservice_server.lines import Budget, Lines
from convservice_server.records import CallRecord, TensorRecord
from tests.server.support import (
    WAIT,
    Requests,
    collect,
    error_of,
    pointwise,
    put_messages,
    raw,
    running,
    tensor_messages,
    unary,
    weight,
)

X = np.ones((1, 1, 3, 2), np.float32)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the lines about calls and tensors, in order."""
    return [vars(record)["fields"] for record in caplog.records if record.name == "convservice_server.lines"]


def returned(call: grpc.Call) -> str:
    (found,) = [value for key, value in call.trailing_metadata() if key == REQUEST_ID]
    return str(found)


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_the_clients_id_is_in_its_lines_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    with running() as found:
        network = pointwise()
        mine = ((REQUEST_ID, "batch-1:7"),)
        request = unary(network, X)
        _, call = found.stub.Convolve.with_call(request, timeout=WAIT, metadata=mine)
        assert returned(call) == "batch-1:7"
        stream = found.stub.ConvolveStream(
            (message for number in (1, 2) for message in tensor_messages(network.name, X, number)),
            timeout=WAIT,
            metadata=mine,
        )
        collect(stream)
        assert returned(stream) == "batch-1:7"
        found.stub.PutWeights(put_messages(weight()), timeout=WAIT, metadata=mine)
        told = lines(caplog)
        assert [line["call"] for line in told] == [
            "Convolve",
            "ConvolveStream",
            "ConvolveStream",
            "PutWeights",
        ]
        assert {line["request_id"] for line in told} == {"batch-1:7"}
        assert [line.get("tensor_id") for line in told] == [0, 1, 2, None]
        assert told[3]["status"] == "OK"
        assert told[3]["bytes_in"] > 4


@pytest.mark.parametrize("given", [None, "", "x" * 65, "with space", 'quote"d'])
def test_an_id_that_is_missing_or_may_not_stand_in_a_log_is_made_anew(given: str | None) -> None:
    with running() as found:
        metadata = () if given is None else ((REQUEST_ID, given),)
        ids = set[str]()
        for _ in range(2):
            _, call = found.stub.GetServerInfo.with_call(
                pb.GetServerInfoRequest(), timeout=WAIT, metadata=metadata
            )
            ids.add(returned(call))
        assert len(ids) == 2
        assert all(len(made) == 16 and int(made, 16) >= 0 for made in ids)


def test_errors_carry_the_id(caplog: pytest.LogCaptureFixture) -> None:
    with running() as found:
        mine = ((REQUEST_ID, "r-1"),)
        with pytest.raises(grpc.RpcError) as caught:
            found.stub.Convolve(unary(pointwise(), X, backend="made"), timeout=WAIT, metadata=mine)
        assert error_of(caught.value).request_id == "r-1"
        assert "request_id" not in error_of(caught.value).metadata
        with pytest.raises(grpc.RpcError) as caught:
            found.stub.Convolve(pb.ConvolveRequest(), timeout=WAIT, metadata=mine)
        assert error_of(caught.value).request_id == "r-1"
        with pytest.raises(grpc.RpcError) as caught:
            list(raw(found.channel, "RegisterNetwork")(iter([b"\xff"]), timeout=WAIT, metadata=mine))
        assert error_of(caught.value).request_id == "r-1"
        with pytest.raises(grpc.RpcError) as caught:
            found.stub.PutWeights(iter(()), timeout=WAIT, metadata=mine)
        assert error_of(caught.value).request_id == "r-1"
        results = collect(
            found.stub.ConvolveStream(tensor_messages("networks/none", X, 4), timeout=WAIT, metadata=mine)
        )
        assert results[4].error is not None
        assert results[4].error.request_id == "r-1"
        told = lines(caplog)
        assert {line["request_id"] for line in told} == {"r-1"}
        assert [line["call"] for line in told] == [
            "Convolve",
            "Convolve",
            "RegisterNetwork",
            "PutWeights",
            "ConvolveStream",
        ]
        assert all(line["reason"] and line["error"] for line in told)
        assert told[2]["peer"].startswith("ipv4:127.0.0.1:")


def test_a_refused_stream_has_a_line_and_one_that_carried_tensors_has_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(max_streams=1) as found:
        name = found.register(pointwise())
        requests = Requests(tensor_messages(name, X))
        open_stream = found.stub.ConvolveStream(requests, timeout=WAIT)
        next(open_stream)
        with pytest.raises(grpc.RpcError):
            list(found.stub.ConvolveStream(iter(()), timeout=WAIT))
        requests.end()
        list(open_stream)
        found.settle()
        refused = [line for line in lines(caplog) if line["status"] == "RESOURCE_EXHAUSTED"]
        assert [(line["call"], line["reason"]) for line in refused] == [
            ("ConvolveStream", "TOO_MANY_STREAMS")
        ]
        assert len([line for line in lines(caplog) if line["call"] == "ConvolveStream"]) == 2


def test_lines_about_failed_calls_come_no_faster_than_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    told = Lines(Budget(3, 2.0, lambda: now[0]))

    def fail(count: int) -> list[dict[str, Any]]:
        before = len(lines(caplog))
        for _ in range(count):
            call = CallRecord("GetServerInfo")
            call.status = "UNAUTHENTICATED"
            told.call_ended(call)
        return lines(caplog)[before:]

    assert len(fail(10)) == 3
    now[0] += 0.5
    (line,) = fail(5)
    assert line["lines_left_out"] == 7
    call = CallRecord("GetServerInfo")
    told.call_ended(call)
    assert lines(caplog)[-1]["status"] == "OK", "calls that succeed are always told of"
    now[0] += 100.0
    assert [line.get("lines_left_out") for line in fail(4)] == [4, None, None]


def test_a_call_that_ends_before_its_request_is_no_incident(caplog: pytest.LogCaptureFixture) -> None:
    requests: Any = Requests()
    with running(idle_timeout=0.5) as found:
        with pytest.raises(grpc.RpcError):
            list(raw(found.channel, "GetServerInfo")(requests, timeout=WAIT))
        requests.end()
    (line,) = lines(caplog)
    assert line["status"] in {"CANCELLED", "INVALID_ARGUMENT"}, (
        "gRPC says that it was cancelled, or just its end"
    )
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_lines_about_failed_tensors_are_bounded_with_them(caplog: pytest.LogCaptureFixture) -> None:
    told = Lines(Budget(3, 2.0, lambda: 0.0))
    error = InvalidRequest("no", reason=Reason.FRAMING)
    call = CallRecord("ConvolveStream")
    for _ in range(10):
        told.tensor_ended(TensorRecord(call, 0, "n", None, 0.0, error))
    assert len(lines(caplog)) == 3
    told.tensor_ended(TensorRecord(call, 0, "n", None, 0.0))
    assert len(lines(caplog)) == 4, "tensors that pass are always told of"


BROKEN_LOG = """
import logging, sys
import numpy as np
from convservice_server import logs
logs.configure("json", "info")
from tests.server.support import WAIT, pointwise, running, unary
with running() as found:
    for _ in range(3):
        found.stub.Convolve(unary(pointwise(), np.ones((1, 1, 3, 2), np.float32)), timeout=WAIT)
print("served")
"""


@pytest.mark.parametrize("log", ["full", "closed"])
def test_a_log_that_cannot_be_written_ends_no_server(log: str) -> None:
    if log == "full":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stderr = os.pipe()
        os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", BROKEN_LOG],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=2 * WAIT,
            check=False,
        )
    finally:
        os.close(stderr)
    assert ended.stdout == "served\n"


def test_a_line_is_json_with_the_id() -> None:
    from convservice_server.logs import JsonFormatter

    call = CallRecord("ListNetworks", "abc")
    record = logging.LogRecord("x", logging.INFO, "", 1, "call", None, None)
    vars(record)["fields"] = {"request_id": call.request_id}
    assert json.loads(JsonFormatter().format(record))["request_id"] == "abc"
