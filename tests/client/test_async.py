"""The async client: the same promises as the sync one's, where tasks take the place of threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import grpc
import numpy as np
import pytest

import convservice
from convservice import (
    AsyncConvClient,
    Cancelled,
    Conv,
    ConvServiceError,
    DeadlineExceeded,
    InvalidRequest,
    Network,
    NetworkNotFound,
    Progress,
    Reason,
    ResourceExhausted,
    ServiceUnavailable,
    TensorReport,
)
from convservice.aio_channel import AsyncConnection
from convservice.exchange import tensor_error
from tests.client.fake import REPORT, FakeServer, FakeService, hang, refuse, relu, serve_then_break
from tests.client.test_calls import LARGE
from tests.client.test_map import arrays, limits, opened

X = np.random.default_rng(3).normal(size=(3, 50, 7)).astype("float32")
LARGE_X = np.random.default_rng(4).normal(size=(1, 3, 400, 500)).astype("float32")


@pytest.fixture
def client(fake_server: FakeServer) -> AsyncConvClient:
    """An async client of the scripted server; it connects in the loop that first uses it."""
    return convservice.connect_async(fake_server.target)


def run(work: Coroutine[Any, Any, None], client: AsyncConvClient) -> None:
    async def main() -> None:
        async with client:
            await work

    asyncio.run(main())


async def bands(height: int = 5) -> AsyncIterator[Any]:
    for at in range(0, 50, height):
        yield X[:, at : at + height]


def test_small_and_large_tensors(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        reports: list[TensorReport] = []
        for x in (X[None], LARGE_X):
            found = await client.run(relu(), x, on_report=reports.append)
            assert np.array_equal(found, np.maximum(x, 0))
        assert reports == [REPORT] * 2

    run(work(), client)
    assert (fake.count("Convolve"), fake.streams) == (1, 1)


def test_convolutions_are_checked_before_sending(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        with pytest.raises(InvalidRequest, match="weight has 3 input channels"):
            await client.conv2d(X[:2], np.zeros((1, 3, 3, 3), "float32"))

    run(work(), client)
    assert not fake.requests


def test_a_refusal_of_weights_comes_out(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        for _ in range(20):  # the server ends the call while the client still writes
            fake.fail("PutWeights", ResourceExhausted("no room", reason=Reason.WEIGHTS_BUDGET))
            with pytest.raises(ResourceExhausted, match="no room"):
                await client.register(Network([Conv(np.ones((1024, 1024, 1, 2), "float32"))]))

    run(work(), client)


def test_networks_and_info(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        registered = await client.register(LARGE)
        assert await client.networks() == (registered.name,)
        assert (await client.network(registered.name)).digest == registered.digest
        await client.unregister(registered)
        assert await client.networks() == ()
        registered = await client.register(Network([relu()]))
        assert np.array_equal(await registered(X[None]), np.maximum(X[None], 0))
        assert (await client.info()).limits.idle_timeout == 1.5

    run(work(), client)


def test_map_is_in_order(fake: FakeService, client: AsyncConvClient) -> None:
    async def source() -> AsyncIterator[Any]:
        for x in arrays(100):
            await asyncio.sleep(0)
            yield x

    async def work() -> None:
        for xs in (arrays(100), source()):
            results = [int(result.flat[0]) async for result in client.map(relu(), xs)]
            assert results == list(range(100))
        assert [result async for result in client.map(relu(), [])] == []

    run(work(), client)


def test_what_is_in_flight_is_bounded(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        delivered = most = 0
        async for _ in client.map(relu(), (np.zeros((1, 1, 2048, 1024), "float32") for _ in range(8))):
            delivered += 1
            most = max(most, len(opened(fake)) - delivered)
        assert delivered == 8
        assert most <= 4

    run(work(), client)


def test_a_slow_source_does_not_hold_results_back(client: AsyncConvClient) -> None:
    async def work() -> None:
        delivered = asyncio.Event()

        async def slowly() -> AsyncIterator[Any]:
            yield np.ones((1, 1, 4, 4), "float32")
            await asyncio.wait_for(delivered.wait(), 30)
            yield np.ones((1, 1, 4, 4), "float32")

        count = 0
        async for _ in client.map(relu(), slowly(), timeout=20):
            delivered.set()
            count += 1
        assert count == 2

    run(work(), client)


def test_an_error_of_the_source_comes_after_the_results_before_it(client: AsyncConvClient) -> None:
    async def broken() -> AsyncIterator[Any]:
        for x in arrays(3):
            yield x
        raise KeyError("the camera is gone")

    async def work() -> None:
        results: list[Any] = []
        with pytest.raises(KeyError, match="the camera is gone"):
            await collect(client.map(relu(), broken()), results)
        assert len(results) == 3

    run(work(), client)


class Abandoned(BaseException):
    """An exception that is no `Exception`."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Abandoned, asyncio.CancelledError])
@pytest.mark.parametrize("call", ["map", "stream"])
def test_what_ends_the_source_comes_out_whatever_its_kind(
    client: AsyncConvClient, call: str, kind: type[BaseException]
) -> None:
    async def interrupted() -> AsyncIterator[Any]:
        yield X[:, :10]
        raise kind

    async def work() -> None:
        if call == "map":
            results: Any = client.map(relu(), interrupted())
        else:
            results = client.stream(relu(), interrupted(), shape=X.shape, dtype="float32")
        with pytest.raises(kind):
            await collect(results, [])

    run(work(), client)


async def collect(results: AsyncIterator[Any], into: list[Any]) -> None:
    async for result in results:
        into.append(result)  # noqa: PERF401 - what came before an error is kept


def test_what_was_not_delivered_is_sent_again(fake: FakeService, client: AsyncConvClient) -> None:
    async def source() -> AsyncIterator[Any]:
        for x in arrays(20):
            await asyncio.sleep(0)
            yield x

    async def work() -> None:
        cancelled = grpc.StatusCode.CANCELLED
        fake.scripts.extend([serve_then_break(4), serve_then_break(0, cancelled), serve_then_break(3)])
        results = [int(result.flat[0]) async for result in client.map(relu(), source())]
        assert results == list(range(20))
        fake.scripts.extend([serve_then_break(0)] * 9)
        with pytest.raises(ServiceUnavailable, match="the connection broke"):
            await client.run(relu(), LARGE_X)
        fake.scripts.clear()

    run(work(), client)
    assert fake.streams == 8


def test_a_server_that_will_not_wait_for_the_source_is_no_failure(
    fake: FakeService, client: AsyncConvClient
) -> None:
    def impatient(fake: FakeService, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        refuse(context, ServiceUnavailable("nothing came", reason=Reason.IDLE))

    async def work() -> None:
        async def slowly() -> AsyncIterator[Any]:
            assert await asyncio.to_thread(fake.cancelled.wait, 30)
            yield X[None]

        fake.scripts.append(impatient)
        assert len([result async for result in client.map(relu(), slowly(), timeout=60)]) == 1

    run(work(), client)
    assert fake.streams == 2


class DeadStream:
    """A call to a server that is away."""

    over = True

    def when_over(self, callback: Callable[[], None]) -> None:
        callback()

    async def write(self, message: object) -> bool:
        return False

    async def answer(self) -> None:
        raise ServiceUnavailable("the server is away")

    def cancel(self) -> None:
        pass


def test_a_server_that_is_away_while_nothing_is_to_be_sent_is_no_failure(
    client: AsyncConvClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection is opened anew once the source has given the next array, and not before."""
    calls: list[bool] = []
    source: list[Any] = []
    stream = AsyncConnection.stream

    def away(connection: AsyncConnection, timeout: float | None) -> Any:
        calls.append(bool(source))
        return stream(connection, timeout) if source else DeadStream()

    async def slowly() -> AsyncIterator[Any]:
        source.append(X[None])
        yield source[0]

    async def work() -> None:
        assert len([result async for result in client.map(relu(), slowly())]) == 1

    monkeypatch.setattr(AsyncConnection, "stream", away)
    run(work(), client)
    assert calls == [False, True]


def test_an_array_at_hand_makes_a_server_that_is_away_a_failure(
    client: AsyncConvClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[DeadStream] = []

    def away(*_: object) -> DeadStream:
        calls.append(DeadStream())
        return calls[-1]

    async def work() -> None:
        with pytest.raises(ServiceUnavailable, match="the server is away"):
            await collect(client.map(relu(), arrays(3)), [])

    monkeypatch.setattr(AsyncConnection, "stream", away)
    run(work(), client)
    assert len(calls) == 5  # the first, with nothing to send yet, does not count


def test_a_server_that_restarts_in_between(fake_server: FakeServer, client: AsyncConvClient) -> None:
    async def work() -> None:
        results = client.map(relu(), arrays(500))
        await anext(results)
        await asyncio.to_thread(fake_server.stop)
        fake_server.service.forget()
        fake_server.start()
        assert len([result async for result in results]) == 499

    run(work(), client)


def test_a_server_that_lacks_the_network_is_sent_it(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        await client.register(relu())
        fake.forget()
        assert np.array_equal(await client.run(relu(), LARGE_X), np.maximum(LARGE_X, 0))
        fake.forget()
        fake.fail("Convolve", *[NetworkNotFound("no", reason=Reason.NETWORK_NOT_REGISTERED)] * 2)
        with pytest.raises(NetworkNotFound):
            await client.run(relu(), X[None])

    run(work(), client)


def test_the_limit_is_kept_here_and_not_at_the_server(fake: FakeService, client: AsyncConvClient) -> None:
    """The server's clock would go on while the caller takes time over the results before."""

    async def work() -> None:
        await collect(client.map(relu(), arrays(3), timeout=60), [])
        await client.run(relu(), LARGE_X, timeout=60)

    run(work(), client)
    assert limits(fake) == [0] * 4


def test_time_outs(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        fake.scripts.extend([hang] * 3)
        with pytest.raises(DeadlineExceeded, match="not complete after"):
            await collect(client.map(relu(), arrays(3), timeout=0.2), [])
        with pytest.raises(DeadlineExceeded, match=r"not complete after 0\.2 s"):
            await client.run(relu(), LARGE_X, timeout=0.2)
        with pytest.raises(DeadlineExceeded, match=r"within the call's time limit of 0\.2 s: ."):
            await collect(client.stream(relu(), bands(), shape=X.shape, dtype="float32", timeout=0.2), [])

    run(work(), client)


@pytest.mark.parametrize("height", [50, None])
@pytest.mark.parametrize("band_rows", [1, 12, None])
def test_stream(client: AsyncConvClient, height: int | None, band_rows: int | None) -> None:
    async def work() -> None:
        plain = [X[:, at : at + 7] for at in range(0, 50, 7)]
        for source in (bands(), plain):
            results = client.stream(
                relu(), source, shape=(3, height, 7), dtype="float32", band_rows=band_rows
            )
            found = np.concatenate([band.array async for band in results], axis=1)
            assert np.array_equal(found, np.maximum(X, 0))

    run(work(), client)


def test_rows_leave_before_the_next_are_asked_for(client: AsyncConvClient) -> None:
    async def work() -> None:
        back = asyncio.Semaphore(1)

        async def in_turn() -> AsyncIterator[Any]:
            async for band in bands():
                await asyncio.wait_for(back.acquire(), 30)
                yield band

        rows = 0
        async for band in client.stream(relu(), in_turn(), shape=(3, None, 7), dtype="float32", band_rows=5):
            rows += band.array.shape[1]
            back.release()
        assert rows == 50

    run(work(), client)


def test_errors_of_the_bands_come_out_as_they_are(fake: FakeService, client: AsyncConvClient) -> None:
    async def broken() -> AsyncIterator[Any]:
        yield X[:, :10]
        raise KeyError("unplugged")

    async def work() -> None:
        for source, error in ((broken(), KeyError), ([X[:2]], InvalidRequest), ([X[:, :3]], InvalidRequest)):
            with pytest.raises(error):
                await collect(client.stream(relu(), source, shape=X.shape, dtype="float32"), [])

    run(work(), client)


def test_a_lost_connection_says_how_far_it_came(fake: FakeService, client: AsyncConvClient) -> None:
    def script(fake: FakeService, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        answered = 0
        for answer in fake.serve(requests):
            yield answer
            answered += len(answer.payload.data) // (3 * 7 * 4)
            if answered == 20:
                break
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def work() -> None:
        fake.scripts.append(script)
        found: list[Any] = []
        with pytest.raises(ServiceUnavailable, match="gone") as caught:
            await collect(client.stream(relu(), bands(), shape=X.shape, dtype="float32", band_rows=5), found)
        rows = sum(band.array.shape[1] for band in found)
        assert int(caught.value.metadata["last_row"]) == rows - 1

    run(work(), client)
    assert fake.streams == 1


def test_a_refusal_comes_out_though_bands_are_left(fake: FakeService, client: AsyncConvClient) -> None:
    def refuse(fake: FakeService, requests: Iterator[Any], context: object) -> Iterator[Any]:
        yield tensor_error(next(requests).header.tensor_id, ResourceExhausted("no room", retry_after=1.0))

    async def work() -> None:
        for _ in range(20):  # the server ends the call while the client still writes
            fake.scripts.append(refuse)
            with pytest.raises(ResourceExhausted, match="no room"):
                await client.run(relu(), LARGE_X)

    run(work(), client)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_leaving_early_cancels(fake: FakeService, client: AsyncConvClient, kind: str) -> None:
    async def endless() -> AsyncIterator[Any]:
        while True:
            await asyncio.sleep(0)
            yield X[None] if kind == "map" else X

    async def work() -> None:
        if kind == "map":
            results: Any = client.map(relu(), endless())
        else:
            results = client.stream(relu(), endless(), shape=(3, None, 7), dtype="float32")
        async with aclosing(results):
            await anext(results)
        assert await asyncio.to_thread(fake.cancelled.wait, 30)

    run(work(), client)


def test_a_task_that_is_cancelled_is_cancelled(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        fake.scripts.append(hang)
        task = asyncio.create_task(client.run(relu(), LARGE_X))
        await asyncio.to_thread(fake.streaming.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, 30)

    run(work(), client)


def test_closing_the_client_ends_what_runs(fake: FakeService, client: AsyncConvClient) -> None:
    async def work() -> None:
        fake.scripts.append(hang)
        task = asyncio.create_task(client.run(relu(), LARGE_X))
        await asyncio.to_thread(fake.streaming.wait, 30)
        await client.close()
        with pytest.raises(Cancelled):
            await task
        with pytest.raises(ConvServiceError, match="the client is closed"):
            await client.info()

    run(work(), client)


def test_progress(client: AsyncConvClient) -> None:
    async def work() -> None:
        seen: list[Progress] = []
        await client.run(relu(), LARGE_X, progress=seen.append)
        size = LARGE_X.nbytes
        assert seen[-1] == Progress(size, size, size, size)

    run(work(), client)


def test_one_client_in_two_loops(fake_server: FakeServer) -> None:
    client = convservice.connect_async(fake_server.target)

    async def work() -> None:
        assert (await client.info()).version == "1.2"

    asyncio.run(work())
    asyncio.run(work())
    asyncio.run(client.close())
