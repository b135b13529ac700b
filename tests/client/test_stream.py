"""`stream`: rows in, rows out, never sent again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest

from convservice import (
    Band,
    Conv,
    ConvClient,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ResourceExhausted,
    ServiceUnavailable,
    TensorReport,
)
from convservice.exchange import tensor_error
from convservice.v1 import conv_pb2 as pb
from tests.client.fake import REPORT, FakeService, hang, relu, serve_then_break

X = np.random.default_rng(3).normal(size=(3, 50, 7)).astype("float32")
SHAPE = (3, 50, 7)


def cut(array: Any, *heights: int) -> Iterator[Any]:
    """The array's rows in bands of these heights, over and over."""
    at = 0
    while at < array.shape[1]:
        for height in heights:
            yield array[:, at : at + height]
            at += height


def joined(bands: list[Band]) -> Any:
    return np.concatenate([band.array for band in bands], axis=1)


@pytest.mark.parametrize("heights", [(1,), (7,), (50,), (0, 3, 13), (49, 1)])
@pytest.mark.parametrize("band_rows", [None, 1, 4, 50])
@pytest.mark.parametrize("height", [50, None])
def test_bands_of_any_height(
    client: ConvClient, heights: tuple[int, ...], band_rows: int | None, height: int | None
) -> None:
    reports: list[TensorReport] = []
    found = list(
        client.stream(
            relu(),
            cut(X, *heights),
            shape=(3, height, 7),
            dtype="float32",
            band_rows=band_rows,
            on_report=reports.append,
        )
    )
    assert np.array_equal(joined(found), np.maximum(X, 0))
    assert [band.first_row for band in found] == [
        sum(b.array.shape[1] for b in found[:i]) for i in range(len(found))
    ]
    assert {(band.sample, band.output) for band in found} == {(0, "output")}
    assert reports == [REPORT]


def test_channels_last(client: ConvClient) -> None:
    last = np.moveaxis(X, 0, -1)
    bands = (last[i : i + 7] for i in range(0, 50, 7))
    found = client.stream(relu(), bands, shape=(50, 7, 3), dtype="float32", data_format="channels_last")
    assert np.array_equal(np.concatenate([band.array for band in found]), np.maximum(last, 0))


def test_several_samples_one_after_another(client: ConvClient) -> None:
    rows = np.concatenate([X, -X], axis=1)
    layer = Conv(np.ones((3, 3, 1, 1), "float32"))  # the scripted server takes it for a relu
    found = list(client.stream(layer, cut(rows, 30), shape=(2, *SHAPE), dtype="float32", band_rows=8))
    for sample, expected in enumerate((X, -X)):
        assert np.array_equal(joined([b for b in found if b.sample == sample]), np.maximum(expected, 0))


def test_rows_leave_before_the_next_are_asked_for(client: ConvClient) -> None:
    """Each band is given only after the result of the one before has come back."""
    back = threading.Semaphore(1)

    def in_turn() -> Iterator[Any]:
        for band in cut(X, 5):
            assert back.acquire(timeout=30), "the rows given were held back"
            yield band

    rows = 0
    for band in client.stream(relu(), in_turn(), shape=(3, None, 7), dtype="float32", band_rows=5):
        rows += band.array.shape[1]
        back.release()
    assert rows == 50


def test_an_array_may_be_filled_anew(client: ConvClient) -> None:
    buffer = np.empty((3, 5, 7), "float32")

    def camera() -> Iterator[Any]:
        for band in cut(X, 5):
            buffer[...] = band
            yield buffer

    found = list(client.stream(relu(), camera(), shape=SHAPE, dtype="float32", band_rows=12))
    assert np.array_equal(joined(found), np.maximum(X, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (3, 50)}, None),
        ({"shape": ()}, r"shape has 0 sizes, \(\)"),
        ({"shape": (3, float("nan"), 7)}, "shape must be an integer from 1 .* not nan"),
        ({"shape": (3, -50, 7)}, "shape must be an integer from 1"),
        ({"shape": (3, 2.0, 7)}, "shape must be an integer from 1"),
        ({"shape": (None, 50, 7)}, "shape must be an integer from 1"),
        ({"shape": (3, 2**31 - 1, 2**31 - 1, 2**31 - 1)}, "are more than"),
        ({"band_rows": 0}, "band_rows must be an integer from 1"),
        ({"band_rows": 1.5}, "band_rows must be an integer from 1"),
        ({"dtype": "int64"}, "dtype int64 is not supported"),
        ({"dtype": "complex64"}, "dtype complex64 is not supported"),
    ],
)
def test_what_is_announced_is_checked_before_sending(
    fake: FakeService, client: ConvClient, arguments: dict[str, Any], message: str | None
) -> None:
    given: dict[str, Any] = {"shape": SHAPE, "dtype": "float32", **arguments}
    if message is None:
        client.stream(relu(), [], **given)
        return
    with pytest.raises(InvalidRequest, match=message):
        client.stream(relu(), [], **given)
    assert not fake.requests


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([X[:, :20]], r"50 rows were announced .*, the bands ended after 20"),
        ([X, X[:, :1]], "50 rows were announced .*, the bands brought at least 51"),
        ([X[:2]], r"a band has shape \(2, 50, 7\); it must be \(3, rows, 7\)"),
        ([X[..., :6]], "a band has shape"),
        ([X[0]], "a band has shape"),
        ([1.0], "a band has dtype float64, the stream was announced with float32"),
        ([np.float32(1.0)], r"a band has shape \(\)"),
        ([X.astype("float64")], "a band has dtype float64"),
        ([X.astype("int32")], "dtype int32 is not supported"),
    ],
)
def test_bands_that_break_the_announcement(client: ConvClient, bands: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        list(client.stream(relu(), bands, shape=SHAPE, dtype="float32"))


def test_an_error_of_the_bands_comes_out_as_it_is(fake: FakeService, client: ConvClient) -> None:
    class CameraGoneError(Exception):
        pass

    def broken() -> Iterator[Any]:
        yield X[:, :10]
        assert fake.streaming.wait(30)
        raise CameraGoneError("unplugged")

    with pytest.raises(CameraGoneError, match="unplugged"):
        list(client.stream(relu(), broken(), shape=SHAPE, dtype="float32"))
    assert fake.cancelled.wait(30)


class Abandoned(BaseException):
    """An exception that is no `Exception`."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Abandoned])
def test_what_ends_the_bands_comes_out_whatever_its_kind(
    fake: FakeService, client: ConvClient, kind: type[BaseException]
) -> None:
    def interrupted() -> Iterator[Any]:
        yield X[:, :10]
        raise kind

    with pytest.raises(kind):
        list(client.stream(relu(), interrupted(), shape=SHAPE, dtype="float32"))
    assert fake.cancelled.wait(30)


def leave_by_closing(results: Any) -> None:
    next(results)
    results.close()


def leave_by_an_exception(results: Any) -> None:
    with suppress(ZeroDivisionError):
        for _ in results:
            raise ZeroDivisionError
    del results


def leave_by_an_interrupt(results: Any) -> None:
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_an_exception, leave_by_an_interrupt])
def test_leaving_early_cancels(fake: FakeService, client: ConvClient, leave: Callable[[Any], None]) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield X

    leave(client.stream(relu(), endless(), shape=(3, None, 7), dtype="float32"))
    assert fake.cancelled.wait(30)


def test_a_lost_connection_says_how_far_it_came(fake: FakeService, client: ConvClient) -> None:
    """The server breaks off after it has answered rows 0 to 19; nothing is sent again."""

    def script(fake: FakeService, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        answered = 0
        for answer in fake.serve(requests):
            yield answer
            answered += len(answer.payload.data) // (3 * 7 * 4)
            if answered == 20:
                break
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    fake.scripts.append(script)
    bands: list[Band] = []
    results = client.stream(relu(), cut(X, 5), shape=SHAPE, dtype="float32", band_rows=5)
    with pytest.raises(ServiceUnavailable, match="gone") as caught:
        bands.extend(results)
    delivered = sum(band.array.shape[1] for band in bands)
    assert caught.value.metadata["sample"] == "0"
    assert int(caught.value.metadata["last_row"]) == delivered - 1
    assert fake.streams == 1


def test_a_connection_lost_at_once(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(serve_then_break(0))
    with pytest.raises(ServiceUnavailable) as caught:
        list(client.stream(relu(), cut(X, 5), shape=SHAPE, dtype="float32"))
    assert caught.value.metadata["last_row"] == "-1"


def test_a_refusal_comes_out_though_bands_are_left(fake: FakeService, client: ConvClient) -> None:
    def refuse(fake: FakeService, requests: Iterator[Any], context: object) -> Iterator[Any]:
        header = next(requests).header
        yield tensor_error(header.tensor_id, ResourceExhausted("no room", retry_after=1.0))
        next(requests, None)

    fake.scripts.append(refuse)
    with pytest.raises(ResourceExhausted, match="no room"):
        list(client.stream(relu(), cut(X, 1), shape=SHAPE, dtype="float32"))


def test_the_network_is_registered_before_the_bands_are_touched(
    fake: FakeService, client: ConvClient
) -> None:
    for _ in range(2):
        fake.forget()
        assert len(list(client.stream(relu(), [X], shape=SHAPE, dtype="float32"))) >= 1


def test_a_stream_that_takes_too_long(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(hang)
    with pytest.raises(DeadlineExceeded):
        list(client.stream(relu(), cut(X, 5), shape=SHAPE, dtype="float32", timeout=0.3))


def test_a_stream_that_ends_too_early(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(lambda fake, requests, context: iter(()))
    with pytest.raises(ServiceUnavailable, match="ended the stream before"):
        list(client.stream(relu(), cut(X, 5), shape=SHAPE, dtype="float32"))


def test_an_output_that_geometry_forbids(fake: FakeService, client: ConvClient) -> None:
    def script(fake: FakeService, requests: Iterator[Any], context: object) -> Iterator[Any]:
        for answer in fake.serve(requests):
            if answer.HasField("header"):
                answer.header.sample_shape.channels = 1 << 30
            yield answer

    fake.scripts.append(script)
    with pytest.raises(InternalError, match="the server broke the protocol"):
        list(client.stream(relu(), cut(X, 5), shape=SHAPE, dtype="float32"))


def test_each_band_leaves_in_messages_below_the_limit(fake: FakeService, client: ConvClient) -> None:
    wide = np.ones((1, 2, 600_000), "float32")
    list(client.stream(relu(), [wide], shape=wide.shape, dtype="float32"))
    sizes = [m.ByteSize() for _, m in fake.requests if isinstance(m, pb.ConvolveStreamRequest)]
    assert max(sizes) <= (1 << 20) + 64
