"""Logs and errors on their way out: one line a record, and no more of a client's text than fits."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from convservice.errors import InternalError, InvalidRequest, Reason, to_status
from convservice_server import logs
from convservice_server.environment import keep_freed_memory
from convservice_server.faults import MESSAGE_BYTES, METADATA_BYTES, as_error


def record(message: str, fields: dict[str, object], *, failed: bool = False) -> logging.LogRecord:
    exc_info = None
    if failed:
        try:
            raise ZeroDivisionError(message)
        except ZeroDivisionError:
            exc_info = sys.exc_info()
    made = logging.LogRecord("a.logger", logging.INFO, "", 1, message, None, exc_info)
    made.created = 0.5
    made.fields = fields
    return made


def test_text() -> None:
    line = logs.TextFormatter().format(record("tensor", {"status": "OK", "bytes_in": 7}))
    assert line == "1970-01-01 00:00:00.500+00:00 info    tensor status=OK bytes_in=7"


def test_a_clients_text_forges_no_line() -> None:
    line = logs.TextFormatter().format(record("tensor", {"network": "a\n1970 info tensor \x1b[2J\u2028"}))
    assert "\n" not in line
    assert line.isprintable()
    assert r"network=a\n1970 info tensor \x1b[2J\u2028" in line


def test_json() -> None:
    line = logs.JsonFormatter().format(record("tensor\n", {"status": "OK", "network": "\n"}))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.500+00:00",
        "level": "info",
        "logger": "a.logger",
        "message": "tensor\n",
        "status": "OK",
        "network": "\n",
    }


def test_a_long_text_is_cut() -> None:
    long = "n" * 1_000_000
    for formatter in (logs.TextFormatter(), logs.JsonFormatter()):
        line = formatter.format(record("tensor", {"network": long, "status": "OK"}))
        assert len(line) < logs.MOST_CHARACTERS + 300
        assert "OK" in line


def test_a_traceback_goes_to_the_log() -> None:
    for formatter in (logs.TextFormatter(), logs.JsonFormatter()):
        assert "ZeroDivisionError: by what?" in formatter.format(record("by what?", {}, failed=True))


@pytest.mark.parametrize("character", ["a", "\N{SNOWMAN}", "%"])
def test_an_error_is_cut_to_what_travels(character: str) -> None:
    long = character * 10_000
    error = as_error(
        InvalidRequest(long, reason=Reason.INVALID_SHAPE, metadata={"a": long, "b": long}, field=long)
    )
    assert len(error.message.encode()) <= MESSAGE_BYTES
    assert error.message.endswith("...")
    assert sum(len(name) + len(value.encode()) for name, value in error.metadata.items()) <= METADATA_BYTES
    assert 4 * len(to_status(error).SerializeToString()) // 3 + 3 * len(error.message.encode()) < 8192


def test_a_short_error_is_left_as_it_is() -> None:
    error = InvalidRequest("x is 3", reason=Reason.INVALID_SHAPE, metadata={"x": "3"}, field="x")
    assert as_error(error) is error
    assert (error.message, error.metadata, error.field) == ("x is 3", {"x": "3"}, "x")


def test_what_nobody_meant_to_raise_is_an_incident(caplog: pytest.LogCaptureFixture) -> None:
    error = as_error(KeyError("secret"))
    assert isinstance(error, InternalError)
    assert "secret" not in error.message
    assert error.metadata["incident"] in caplog.text
    assert "secret" in caplog.text


def test_keeping_freed_memory_is_safe_anywhere() -> None:
    keep_freed_memory()
    keep_freed_memory()
