"""Admission: all or nothing at the header, released exactly once."""

from __future__ import annotations

import threading

import pytest

from convservice.bands import TensorSpec
from convservice.dtypes import FLOAT32
from convservice.errors import Reason, ResourceExhausted
from convservice.geometry import SampleShape
from convservice_server.admission import Admission, largest_holding
from convservice_server.holdings import Holdings
from tests.server.support import WAIT, pointwise


def any_amount() -> Holdings:
    return Holdings("max_bytes_per_name", "bytes")


def nothing() -> str:
    return "nothing in particular"


def test_bytes_are_held_while_the_context_lasts() -> None:
    admission = Admission(100, any_amount())
    with admission.reserve("", 60, nothing), admission.reserve("", 40, nothing):
        assert (admission.reserved, admission.running) == (100, 2)
    assert (admission.reserved, admission.running) == (0, 0)


def test_what_does_not_fit_now_may_be_tried_again() -> None:
    admission = Admission(100, any_amount())
    with admission.reserve("", 60, nothing):
        with (
            pytest.raises(
                ResourceExhausted, match=r"needs 50 bytes .*nothing in particular.* 40 of .* 100"
            ) as caught,
            admission.reserve("", 50, nothing),
        ):
            pass
        assert (admission.reserved, admission.running) == (60, 1)
    assert caught.value.reason == Reason.MEMORY_BUDGET
    assert caught.value.metadata == {"bytes": "50", "free": "40", "budget": "100"}
    assert caught.value.retry_after is not None
    with admission.reserve("", 50, nothing):
        pass


def test_what_can_never_fit_is_not_to_be_tried_again() -> None:
    with (
        pytest.raises(ResourceExhausted, match="it can never run here") as caught,
        Admission(100, any_amount()).reserve("", 101, nothing),
    ):
        pass
    assert caught.value.retry_after is None


def test_bytes_are_released_when_the_tensor_fails() -> None:
    admission = Admission(100, any_amount())
    with pytest.raises(ZeroDivisionError), admission.reserve("", 60, nothing):
        raise ZeroDivisionError
    assert admission.reserved == 0


def test_many_threads_never_pass_the_budget() -> None:
    admission = Admission(10, any_amount())
    refused = threading.Semaphore(0)
    seen: list[int] = []

    def work() -> None:
        for _ in range(200):
            try:
                with admission.reserve("", 4, nothing):
                    seen.append(admission.reserved)
            except ResourceExhausted:
                refused.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert max(seen) <= 10
    assert (admission.reserved, admission.running) == (0, 0)


def test_a_refusal_names_the_layer_that_holds_most() -> None:
    spec = TensorSpec(FLOAT32, SampleShape(1, None, (7,)), 1, 4)
    assert largest_holding(pointwise(), spec) == (
        "layer 'layer0' holds most: 1 rows of (1, ?, 7), 28 bytes; a band of the input has 112"
    )
