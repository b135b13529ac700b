"""The async client: the twin of `client`, method for method, for asyncio."""

# ruff: noqa: ASYNC109 - `timeout` is the promised argument, and its limit travels to the server
from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, overload

from numpy.typing import ArrayLike, NDArray

from convservice import flows
from convservice.aio_bandtransfer import stream_bands
from convservice.aio_calls import AsyncCalls
from convservice.aio_channel import AsyncConnection
from convservice.aio_spreading import AsyncSpreadPipeline
from convservice.aio_transfer import AsyncPipeline, each, numbered
from convservice.arrays import Options, as_input
from convservice.bands import Band
from convservice.bandstream import BandJob
from convservice.convolutions import Convolutions
from convservice.dtypes import DTypeLike
from convservice.endpoint import Endpoint, Target, Tls
from convservice.errors import ConvServiceError
from convservice.info import ServerInfo
from convservice.jobs import Job
from convservice.layers import Layer
from convservice.network import Network
from convservice.progress import Meter, ProgressLike, metered
from convservice.registered import (
    AsyncRegisteredNetwork,
    NetworkLike,
    RegisteredNetwork,
    name_of,
    network_of,
)
from convservice.replicas import Replicas
from convservice.transfer import OnReport


def connect_async(
    target: Target, *, tls: Tls = None, token: str | None = None, timeout: float | None = None
) -> AsyncConvClient:
    """An async client of the server at `target`, or of several; takes what `connect` takes."""
    return AsyncConvClient(Endpoint.of(target, tls, token), timeout)


class AsyncConvClient(Convolutions[Coroutine[Any, Any, NDArray[Any]]]):
    """An async client of one server or several; made by `connect_async`.

    Close it, or use it with `async with`.

    One client serves any number of tasks of one event loop. Methods take what `ConvClient`'s take and hand
    back what those do, awaited or in an `async for`. gRPC's asyncio cannot be used in a forked child of a
    process that used it: start such a child afresh ("spawn"), or use `ConvClient`.
    """

    def __init__(self, endpoint: Endpoint, timeout: float | None = None) -> None:
        super().__init__(endpoint, timeout)
        self._calls = AsyncCalls(Replicas(endpoint, AsyncConnection))

    @overload
    async def run(
        self,
        network: Layer,
        x: ArrayLike,
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> NDArray[Any]: ...
    @overload
    async def run(
        self,
        network: Network | RegisteredNetwork | AsyncRegisteredNetwork,
        x: ArrayLike,
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> Any: ...
    async def run(
        self,
        network: NetworkLike,
        x: ArrayLike,
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> Any:
        """Sends one array through a network; see `ConvClient.run`."""
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        net = network_of(network)
        job = Job.of(net, as_input(x, net.rank, options.data_format), options)
        return await self._send(job, options, progress, on_report)

    def map(
        self,
        network: NetworkLike,
        xs: Iterable[ArrayLike] | AsyncIterable[ArrayLike],
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        on_report: OnReport = None,
    ) -> AsyncGenerator[Any, None]:
        """Sends many arrays through a network, without waiting between; see `ConvClient.map`.

        `xs` may be an async iterable; a plain one is iterated in the event loop and must not block. To leave
        early at a definite moment wrap the result in `contextlib.aclosing`.
        """
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        net = network_of(network)

        async def jobs() -> AsyncIterator[Job]:
            async for x in each(xs):
                yield Job.of(net, as_input(x, net.rank, options.data_format), options)

        return self._results(net, jobs(), options, on_report)

    def stream(
        self,
        network: NetworkLike,
        bands: Iterable[ArrayLike] | AsyncIterable[ArrayLike],
        *,
        shape: Sequence[int | None],
        dtype: DTypeLike,
        band_rows: int | None = None,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        progress: ProgressLike = None,
        on_report: OnReport = None,
    ) -> AsyncGenerator[Band, None]:
        """Sends one tensor as it comes and hands out its results as they come; see `ConvClient.stream`.

        `bands` may be an async iterable; a plain one is iterated in the event loop and must not block. To
        leave early at a definite moment wrap the result in `contextlib.aclosing`.
        """
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        net = network_of(network)
        job = BandJob.of(net, shape, dtype, band_rows, options)
        return self._stream(job, bands, options, progress, on_report)

    async def register(
        self,
        network: Network | Layer,
        *,
        timeout: float | None = None,
    ) -> AsyncRegisteredNetwork:
        """Sends a network to the server, which keeps it; see `ConvClient.register`."""
        net = network_of(network)
        await self._calls.anywhere(lambda at: flows.register(at.known, net), self._limit(timeout))
        return AsyncRegisteredNetwork(self.run, net)

    async def network(self, name: str, *, timeout: float | None = None) -> AsyncRegisteredNetwork:
        """The registered network of that name; see `ConvClient.network`."""
        network = await self._calls.anywhere(
            lambda at: flows.get_network(at.known, name), self._limit(timeout)
        )
        return AsyncRegisteredNetwork(self.run, network)

    async def networks(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """The names of the caller's registered networks on any server, in order."""
        found = await self._calls.everywhere(lambda _: flows.list_networks(), self._limit(timeout))
        return flows.all_names(found)

    async def unregister(self, network: NetworkLike | str, *, timeout: float | None = None) -> None:
        """Lets the server, or all of them, forget a network; see `ConvClient.unregister`."""
        name = name_of(network)
        flows.check_name(name)
        found = await self._calls.everywhere(
            lambda at: flows.unregister(at.known, name), self._limit(timeout)
        )
        flows.check_forgotten(found)

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """The server's version, backends (or why they cannot run), limits and use; of several, one's."""
        return await self._calls.anywhere(lambda _: flows.server_info(), self._limit(timeout))

    async def infos(self, *, timeout: float | None = None) -> dict[str, ServerInfo]:
        """What every server that can be reached says, by its address; see `ConvClient.infos`."""
        found = await self._calls.everywhere(lambda _: flows.server_info(), self._limit(timeout))
        return flows.answered(found)

    async def close(self) -> None:
        """Closes all connections; calls that still run are cancelled. More than once is fine."""
        await self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncConvClient({self.target!r})"

    async def _send(self, job: Job, options: Options, progress: ProgressLike, on_report: OnReport) -> Any:
        with metered(progress, job.input_bytes, job.output_bytes) as meter:
            collector = None
            if job.small:
                collector = await self._calls.anywhere(
                    lambda at: flows.convolve(at.known, job, at.target), options.timeout
                )
            if collector is None:
                pipeline = self._pipeline(each([job]), options, meter, on_report)
                (result,) = [result async for result in pipeline.results(job.network)]
                return result
            meter.sent(job.input_bytes)
            meter.received(job.output_bytes)
        if on_report is not None and collector.report is not None:
            on_report(collector.report)
        return collector.result()

    async def _results(
        self, network: Network, jobs: AsyncIterator[Job], options: Options, on_report: OnReport
    ) -> AsyncGenerator[Any, None]:
        await self._calls.look_up(options.timeout)
        if len(self._calls.replicas.current()) == 1:
            pipeline = self._pipeline(jobs, options, Meter(None, None, None), on_report)
            found = pipeline.results(network)
        else:
            spread = AsyncSpreadPipeline(self._calls, jobs, timeout=options.timeout, on_report=on_report)
            found = spread.results()
        async with aclosing(found) as results:
            async for result in results:
                yield result

    def _pipeline(
        self, jobs: AsyncIterator[Job], options: Options, meter: Meter, on_report: OnReport
    ) -> AsyncPipeline:
        return AsyncPipeline(
            self._calls, numbered(jobs), timeout=options.timeout, meter=meter, on_report=on_report
        )

    async def _stream(
        self,
        job: BandJob,
        bands: Iterable[ArrayLike] | AsyncIterable[ArrayLike],
        options: Options,
        progress: ProgressLike,
        on_report: OnReport,
    ) -> AsyncGenerator[Band, None]:
        async with self._calls.route(options.timeout) as route:
            # Nothing is sent again, so the server is asked beforehand.
            await self._calls.along(
                route, lambda at: flows.ensure_now(at.known, job.network), options.timeout
            )
            connection = route.replica.connection
            with metered(progress, job.request.spec.total_bytes, job.output_bytes) as meter:
                results = stream_bands(
                    connection, job, bands, timeout=options.timeout, meter=meter, on_report=on_report
                )
                try:
                    async with aclosing(results):
                        async for band in results:
                            yield band
                except ConvServiceError as exc:
                    route.failed(exc)
                    raise

    def _limit(self, timeout: float | None) -> float | None:
        return self._options("channels_first", None, "high", None, timeout).timeout
