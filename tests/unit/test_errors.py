from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from convservice import errors
from convservice.errors import (
    DOMAIN,
    BackendUnavailable,
    Cancelled,
    ConvServiceError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NetworkNotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
    Unauthenticated,
    code_name,
    from_status,
    to_status,
)

CONTRACT = Path(__file__).parents[2] / "proto/convservice/v1/conv.proto"

CLIENT_REASONS = {Reason.UNREACHABLE, Reason.INVALID_FILE, Reason.PACKAGE_MISSING}
"""What clients alone raise, and the contract therefore does not list."""

CLASSES = {
    InvalidRequest: ("INVALID_ARGUMENT", ValueError),
    Unauthenticated: ("UNAUTHENTICATED", PermissionError),
    PermissionDenied: ("PERMISSION_DENIED", PermissionError),
    NetworkNotFound: ("NOT_FOUND", LookupError),
    BackendUnavailable: ("FAILED_PRECONDITION", ConvServiceError),
    ResourceExhausted: ("RESOURCE_EXHAUSTED", ConvServiceError),
    DeadlineExceeded: ("DEADLINE_EXCEEDED", TimeoutError),
    ServiceUnavailable: ("UNAVAILABLE", ConnectionError),
    Cancelled: ("CANCELLED", ConvServiceError),
    InternalError: ("INTERNAL", ConvServiceError),
}


def test_the_tree_is_the_promised_one() -> None:
    assert set(ConvServiceError.__subclasses__()) >= set(CLASSES)
    for cls, (code, builtin) in CLASSES.items():
        assert issubclass(cls, builtin)
        assert code_name(cls.code) == code


def contract_reasons() -> dict[str, set[str]]:
    """Code to reasons, as the comment at `TensorError` lists them."""
    text = CONTRACT.read_text(encoding="utf-8")
    comment = text[
        text.index("// A tensor that failed, as google.rpc.Status") : text.index("message TensorError")
    ]
    listed = " ".join(line.removeprefix("//").strip() for line in comment.splitlines()[1:])
    entries = re.findall(r"([A-Z_]+): ([A-Z_]+(?:, [A-Z_]+)*)", listed)
    return {code: set(reasons.split(", ")) for code, reasons in entries}


def test_the_reasons_are_those_the_contract_lists() -> None:
    listed = contract_reasons()
    assert set().union(*listed.values()) == set(Reason) - CLIENT_REASONS
    assert set(listed) <= set(code_pb2.Code.keys())


@pytest.mark.parametrize("code", code_pb2.Code.keys())
def test_every_status_code_becomes_an_error(code: str) -> None:
    number = code_pb2.Code.Value(code)
    error = from_status(status_pb2.Status(code=number, message="what went wrong"), target="h:1", method="M")
    assert isinstance(error, ConvServiceError)
    assert (error.message, error.target, error.method) == ("what went wrong", "h:1", "M")
    if number in {cls.code for cls in CLASSES}:
        assert type(error).code == number


def test_an_unknown_code_becomes_an_internal_error_that_names_it() -> None:
    error = from_status(status_pb2.Status(code=42))
    assert type(error) is InternalError
    assert error.message == "CODE 42"


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_comes_back_from_its_status_as_it_was(cls: type[ConvServiceError]) -> None:
    error = cls(
        "rule and 3 numbers", reason=Reason.INVALID_SHAPE, metadata={"a": "3"}, field="x", retry_after=1.5
    )
    back = from_status(to_status(error))
    assert type(back) is cls
    assert back.__dict__ == error.__dict__
    assert str(back) == "rule and 3 numbers"


@pytest.mark.parametrize("reason", [Reason.NETWORK_NOT_REGISTERED, Reason.WEIGHTS_MISSING])
def test_what_is_missing_there_travels_as_a_failed_precondition(reason: Reason) -> None:
    status = to_status(NetworkNotFound("not here", reason=reason))
    assert code_name(status.code) == "FAILED_PRECONDITION"
    assert type(from_status(status)) is NetworkNotFound


def test_a_status_carries_one_error_info_and_only_what_applies() -> None:
    def kinds(error: ConvServiceError) -> list[str]:
        return [detail.type_url.rpartition(".")[2] for detail in to_status(error).details]

    assert kinds(Cancelled("c", reason=Reason.ABORTED)) == ["ErrorInfo"]
    assert kinds(InvalidRequest("i", field="weight")) == ["ErrorInfo", "BadRequest"]
    assert kinds(ResourceExhausted("r", retry_after=0.25)) == ["ErrorInfo", "RetryInfo"]
    info = error_details_pb2.ErrorInfo()
    to_status(Cancelled("c", reason=Reason.ABORTED, metadata={"n": "1"})).details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == (DOMAIN, "ABORTED", {"n": "1"})


@given(
    st.integers(-5, 40),
    st.lists(st.tuples(st.sampled_from(["ErrorInfo", "BadRequest", "RetryInfo", "X"]), st.binary())),
)
def test_any_status_becomes_an_error(code: int, details: list[tuple[str, bytes]]) -> None:
    packed = [
        any_pb2.Any(type_url=f"type.googleapis.com/google.rpc.{kind}", value=value) for kind, value in details
    ]
    assert isinstance(from_status(status_pb2.Status(code=code, details=packed)), ConvServiceError)


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_can_be_pickled(cls: type[ConvServiceError]) -> None:
    error = cls("m", reason="R", metadata={"a": "b"}, field="f", target="t", method="M", retry_after=2.0)
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.__dict__) == (cls, "m", error.__dict__)


def test_every_public_name_of_the_module_is_documented() -> None:
    for name, value in vars(errors).items():
        if isinstance(value, type) and value.__module__ == errors.__name__ and not name.startswith("_"):
            assert value.__doc__, name
