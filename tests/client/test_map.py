"""`map`: pipelined, in order, lazy, bounded in flight, and whole tensors over lost connections."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from convservice import (
    Activation,
    BackendUnavailable,
    ConvClient,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Network,
    NetworkNotFound,
    Progress,
    Reason,
    ServiceUnavailable,
    TensorReport,
)
from convservice.arrays import Options, as_input
from convservice.bands import DataFormat
from convservice.calls import Calls
from convservice.channel import Connection
from convservice.endpoint import Endpoint
from convservice.exchange import tensor_error
from convservice.flight import FLIGHT_BYTES
from convservice.jobs import Job
from convservice.progress import Meter
from convservice.replicas import Replicas
from convservice.transfer import Pipeline
from convservice.v1 import conv_pb2 as pb
from tests.client.fake import FakeServer, FakeService, Refused, Script, hang, refuse, relu, serve_then_break


def arrays(count: int, size: int = 5) -> Iterator[Any]:
    """Arrays that differ, each marked by its number."""
    for number in range(count):
        yield np.full((1, 1, size + number % 3, 4), number, "float32")


def headers(fake: FakeService) -> list[pb.TensorHeader]:
    """The headers of the tensors opened so far, in order."""
    messages = [m for _, m in fake.requests if isinstance(m, pb.ConvolveStreamRequest)]
    return [m.header for m in messages if m.HasField("header")]


def opened(fake: FakeService) -> list[int]:
    """The ids of the tensors opened so far, in order."""
    return [header.tensor_id for header in headers(fake)]


def limits(fake: FakeService) -> list[int]:
    """The time limits that the server was told, in milliseconds; 0 for none."""
    return [header.timeout_ms for header in headers(fake)]


def test_results_come_in_order_over_one_stream(fake: FakeService, client: ConvClient) -> None:
    reports: list[TensorReport] = []
    results = list(client.map(relu(), arrays(100), on_report=reports.append))
    assert [int(result.flat[0]) for result in results] == list(range(100))
    assert len(reports) == 100
    assert fake.streams == 1
    assert opened(fake) == list(range(1, 101))


def test_nothing_is_sent_before_the_first_result_is_asked_for(fake: FakeService, client: ConvClient) -> None:
    results = client.map(relu(), arrays(3))
    assert not fake.requests
    assert len(list(results)) == 3


def test_an_endless_iterable_works_and_leaving_early_cancels(fake: FakeService, client: ConvClient) -> None:
    results = client.map(relu(), (np.full((1, 1, 4, 4), i, "float32") for i in itertools.count()))
    assert [int(next(results).flat[0]) for _ in range(50)] == list(range(50))
    results.close()
    assert fake.cancelled.wait(30)


def test_no_arrays_give_no_results(client: ConvClient) -> None:
    assert list(client.map(relu(), [])) == []


def test_a_slow_iterable_does_not_hold_results_back(client: ConvClient) -> None:
    delivered = threading.Event()

    def slowly() -> Iterator[Any]:
        yield np.ones((1, 1, 4, 4), "float32")
        assert delivered.wait(30), "the first result was held back until the second array came"
        yield np.ones((1, 1, 4, 4), "float32")

    results = client.map(relu(), slowly())
    next(results)
    delivered.set()
    assert len(list(results)) == 1


def test_what_is_in_flight_is_bounded(fake: FakeService, client: ConvClient) -> None:
    """A tensor and its result take 16 MiB here: four at most are open and not delivered."""
    pulled = 0

    def counted() -> Iterator[Any]:
        nonlocal pulled
        for _ in range(8):
            pulled += 1
            yield np.zeros((1, 1, 2048, 1024), "float32")

    most = 0
    for delivered, _ in enumerate(client.map(relu(), counted()), 1):
        most = max(most, len(opened(fake)) - delivered)
    assert pulled == 8
    assert most <= FLIGHT_BYTES // (16 << 20)


def test_one_tensor_larger_than_the_bound_goes_alone(fake: FakeService, client: ConvClient) -> None:
    large = np.zeros((1, 1, 9000, 1024), "float32")
    assert 2 * large.nbytes > FLIGHT_BYTES
    opened_before = [len(opened(fake)) for _ in client.map(relu(), [large] * 3)]
    assert opened_before == [1, 2, 3]


def test_an_error_of_the_iterable_comes_after_the_results_before_it(client: ConvClient) -> None:
    def broken() -> Iterator[Any]:
        yield from arrays(3)
        raise KeyError("the camera is gone")

    results = client.map(relu(), broken())
    assert len(list(itertools.islice(results, 3))) == 3
    with pytest.raises(KeyError, match="the camera is gone"):
        next(results)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_iterable_comes_out_whatever_its_kind(
    client: ConvClient, kind: type[BaseException]
) -> None:
    def interrupted() -> Iterator[Any]:
        yield from arrays(3)
        raise kind

    results = client.map(relu(), interrupted())
    assert len(list(itertools.islice(results, 3))) == 3
    with pytest.raises(kind):
        next(results)


def test_an_array_that_does_not_fit_comes_after_the_results_before_it(client: ConvClient) -> None:
    results = client.map(relu(), [*arrays(2), np.zeros(3, "float32")])
    assert len(list(itertools.islice(results, 2))) == 2
    with pytest.raises(InvalidRequest, match="x has 1 axes"):
        next(results)


def test_a_tensor_that_fails_comes_in_its_turn_and_ends_the_results(
    fake: FakeService, client: ConvClient
) -> None:
    def script(fake: FakeService, requests: Iterator[Any], context: object) -> Iterator[Any]:
        yield from fake.serve(requests, 2)
        yield tensor_error(3, BackendUnavailable("no such backend"))

    fake.scripts.append(script)
    results = client.map(relu(), arrays(5), backend="other")
    assert len(list(itertools.islice(results, 2))) == 2
    with pytest.raises(BackendUnavailable, match="no such backend") as caught:
        next(results)
    assert caught.value.method == "ConvolveStream"


def test_what_was_not_delivered_is_sent_again(fake: FakeService, client: ConvClient) -> None:
    cancelled = grpc.StatusCode.CANCELLED
    fake.scripts.extend([serve_then_break(4), serve_then_break(0, cancelled), serve_then_break(3)])
    results = list(client.map(relu(), arrays(20)))
    assert [int(result.flat[0]) for result in results] == list(range(20))
    assert fake.streams == 4


def test_a_large_run_survives_a_lost_connection(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(serve_then_break(0))
    x = np.random.default_rng(0).normal(size=(1, 3, 400, 500)).astype("float32")
    assert np.array_equal(client.run(relu(), x), np.maximum(x, 0))
    assert fake.streams == 2


def test_a_connection_lost_between_two_arrays_is_opened_anew(fake: FakeService, client: ConvClient) -> None:
    def slowly() -> Iterator[Any]:
        yield np.ones((1, 1, 4, 4), "float32")
        assert fake.cancelled.wait(30)
        yield np.ones((1, 1, 4, 4), "float32")

    fake.scripts.append(serve_then_break(1))
    assert len(list(client.map(relu(), slowly()))) == 2
    assert fake.streams == 2


def test_a_connection_lost_after_the_last_array_matters_to_nobody(
    fake: FakeService, client: ConvClient
) -> None:
    def slowly() -> Iterator[Any]:
        yield np.ones((1, 1, 4, 4), "float32")
        assert fake.cancelled.wait(30)

    fake.scripts.append(serve_then_break(1))
    assert len(list(client.map(relu(), slowly()))) == 1
    assert fake.streams == 1


def test_a_server_that_will_not_wait_for_the_iterable_is_no_failure(
    fake: FakeService, client: ConvClient
) -> None:
    """More streams end between two arrays than would be a failure while one is on its way."""
    ended = threading.Semaphore(0)

    def impatient(tensors: int) -> Script:
        def script(fake: FakeService, requests: Iterator[Any], context: Any) -> Iterator[Any]:
            context.add_callback(ended.release)
            if tensors:
                yield from fake.serve(requests, tensors)
            refuse(context, ServiceUnavailable("nothing came", reason=Reason.IDLE))

        return script

    def slowly() -> Iterator[Any]:
        for number in range(9):
            assert ended.acquire(timeout=30)
            yield np.full((1, 1, 4, 4), number, "float32")

    fake.scripts.extend([impatient(0), *[impatient(1)] * 8])
    results = [int(result.flat[0]) for result in client.map(relu(), slowly())]
    assert results == list(range(9))


class DeadCall:
    """A call to a server that is away; its requests are never taken."""

    def is_active(self) -> bool:
        return False

    def add_callback(self, callback: Callable[[], None]) -> None:
        callback()

    def cancel(self) -> None:
        pass

    def cancelled(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        raise Refused(grpc.StatusCode.UNAVAILABLE, "the server is away")


def test_a_server_that_is_away_while_nothing_is_to_be_sent_is_no_failure(
    client: ConvClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection is opened anew once the iterable has given the next array, and not before."""
    opened_calls: list[bool] = []
    back = threading.Event()
    stream = Connection.stream

    def away(connection: Connection, requests: Iterator[Any], timeout: float | None) -> Any:
        opened_calls.append(back.is_set())
        return stream(connection, requests, timeout) if back.is_set() else DeadCall()

    def slowly() -> Iterator[Any]:
        back.set()
        yield np.ones((1, 1, 4, 4), "float32")

    monkeypatch.setattr(Connection, "stream", away)
    assert len(list(client.map(relu(), slowly()))) == 1
    assert opened_calls == [False, True]


def test_an_array_at_hand_makes_a_server_that_is_away_a_failure(
    client: ConvClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[DeadCall] = []

    def away(*_: object) -> DeadCall:
        calls.append(DeadCall())
        return calls[-1]

    monkeypatch.setattr(Connection, "stream", away)
    with pytest.raises(ServiceUnavailable, match="the server is away"):
        list(client.map(relu(), arrays(3)))
    assert len(calls) == 5  # the first, with nothing to send yet, does not count


def test_a_few_lost_connections_without_a_result_are_enough(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.extend([serve_then_break(0)] * 9)
    with pytest.raises(ServiceUnavailable, match="the connection broke"):
        list(client.map(relu(), arrays(3)))
    assert fake.streams == 4


def test_a_server_that_restarts_in_between(fake_server: FakeServer, client: ConvClient) -> None:
    fake = fake_server.service
    results = client.map(relu(), arrays(1000))
    next(results)
    fake_server.stop()
    fake.forget()
    fake_server.start()
    assert len(list(results)) == 999


def test_a_draining_server_is_left_for_another_connection(fake: FakeService, client: ConvClient) -> None:
    def drain(fake: FakeService, requests: Iterator[Any], context: object) -> Iterator[Any]:
        header = next(requests).header
        error = ServiceUnavailable("stopping", reason=Reason.DRAINING)
        yield tensor_error(header.tensor_id, error)

    fake.scripts.append(drain)
    assert len(list(client.map(relu(), arrays(5)))) == 5


def test_a_server_that_lacks_the_network_is_sent_it_once_a_tensor(
    fake: FakeService, client: ConvClient
) -> None:
    results = client.map(relu(), arrays(200))
    next(results)
    fake.forget()
    assert len(list(results)) == 199
    fake.find = lambda name: (_ for _ in ()).throw(  # type: ignore[method-assign]
        NetworkNotFound("never here", reason=Reason.NETWORK_NOT_REGISTERED)
    )
    with pytest.raises(NetworkNotFound, match="never here"):
        list(client.map(relu(), arrays(2)))


def test_a_tensor_that_takes_too_long(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(hang)
    with pytest.raises(DeadlineExceeded, match=r"not complete after 0\.2 s"):
        list(client.map(relu(), arrays(3), timeout=0.2))


def test_a_large_run_that_takes_too_long(fake: FakeService, client: ConvClient) -> None:
    fake.scripts.append(hang)
    with pytest.raises(DeadlineExceeded, match=r"not complete after 0\.2 s"):
        client.run(relu(), np.zeros((1, 3, 400, 500), "float32"), timeout=0.2)
    assert fake.cancelled.wait(30)


def test_the_limit_is_kept_here_and_not_at_the_server(fake: FakeService, client: ConvClient) -> None:
    """The server's clock would go on while the caller takes time over the results before."""
    for _ in client.map(relu(), arrays(3), timeout=60):
        pass
    client.run(relu(), np.zeros((1, 3, 400, 500), "float32"), timeout=60)
    assert limits(fake) == [0] * 4


def test_an_interrupt_while_sending_comes_out(fake: FakeService, client: ConvClient) -> None:
    caller = threading.current_thread()

    def interrupted(now: Progress) -> None:
        if threading.current_thread() is not caller:
            raise KeyboardInterrupt

    fake.scripts.append(hang)
    with pytest.raises(KeyboardInterrupt):
        client.run(relu(), np.zeros((1, 3, 400, 500), "float32"), progress=interrupted)
    assert fake.cancelled.wait(30)


def test_waiting_for_the_iterable_is_not_the_servers_time(client: ConvClient) -> None:
    delivered = threading.Event()
    due: list[float | None] = []

    def jobs() -> Iterator[Job]:
        given = as_input(np.ones((1, 1, 4, 4), "float32"), None, DataFormat.CHANNELS_FIRST)
        options = Options.of("channels_first", None, "high", None, 60)
        yield Job.of(network, given, options, 1)
        delivered.wait(30)
        due.append(pipeline.due())
        yield Job.of(network, given, options, 2)

    network = Network([relu()])
    client.register(network)
    meter = Meter(None, None, None)
    calls = Calls(Replicas(Endpoint.of(client.target), Connection))
    pipeline = Pipeline(calls, jobs(), timeout=60, meter=meter)
    for _ in pipeline.results(network):
        assert pipeline.due() is None, "the caller's own time does not count either"
        delivered.set()
    assert due == [None]
    calls.close()


@pytest.mark.parametrize("kind", ["header", "payload", "done", "extra"])
def test_answers_that_break_the_protocol(fake: FakeService, client: ConvClient, kind: str) -> None:
    def script(fake: FakeService, requests: Iterator[Any], context: object) -> Iterator[Any]:
        for answer in fake.serve(requests):
            if answer.HasField("payload") and kind == "payload":
                answer.payload.byte_offset += 1
            elif answer.HasField("header") and kind == "header":
                answer.header.sample_shape.rows = 1 << 30
            elif answer.HasField("done") and kind == "done":
                answer.done.tensor_id += 1
            yield answer
        if kind == "extra":
            yield pb.ConvolveStreamResponse(done=pb.TensorDone(tensor_id=9))

    fake.scripts.append(script)
    with pytest.raises(InternalError, match="the server broke the protocol"):
        list(client.map(relu(), arrays(2)))


def test_several_ranks_through_one_network(client: ConvClient) -> None:
    given = [np.ones((1, 2, *[3] * rank), "float32") for rank in (1, 2, 3)]
    assert [result.shape for result in client.map(Activation("linear"), given)] == [x.shape for x in given]
