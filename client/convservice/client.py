"""The sync client. Given arrays and networks it hands back feature maps; safe to use from many threads."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, overload

from numpy.typing import ArrayLike, NDArray

from convservice import flows
from convservice.arrays import Options, as_input
from convservice.bands import Band
from convservice.bandstream import BandJob
from convservice.bandtransfer import stream_bands
from convservice.calls import Calls
from convservice.channel import Connection
from convservice.convolutions import Convolutions
from convservice.dtypes import DTypeLike
from convservice.endpoint import Endpoint, Target, Tls
from convservice.errors import ConvServiceError
from convservice.flight import numbered
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
from convservice.spreading import SpreadPipeline
from convservice.transfer import OnReport, Pipeline


def connect(
    target: Target, *, tls: Tls = None, token: str | None = None, timeout: float | None = None
) -> ConvClient:
    """A client of the server at `target`, or of several; it connects when the first call is made.

    Args:
        target: `HOST:PORT`, or a gRPC target such as `unix:PATH`. Several servers that do the same work are
            a list of these, one string with commas between, or a name that has several addresses: the work
            is spread over them, and goes on elsewhere when one is lost.
        tls: None for plaintext; True for TLS with the system's authorities; a CA as a path or PEM bytes; or
            (CA or None, client certificate, client key).
        token: sent with every call as a bearer token; over plaintext only to this machine.
        timeout: seconds that a call may take unless it says otherwise; None for no limit.

    Raises:
        InvalidRequest: an argument breaks a rule.
    """
    return ConvClient(Endpoint.of(target, tls, token), timeout)


class ConvClient(Convolutions[NDArray[Any]]):
    """A client of one server or several; made by `connect`. Close it, or use it as a context manager.

    One client serves any number of threads. After a fork the child's copy opens a channel of its own; calls
    that were running at that moment belong to the parent, which should have none running in other threads,
    because gRPC does not promise that a child forked in the middle of one works.
    """

    def __init__(self, endpoint: Endpoint, timeout: float | None = None) -> None:
        super().__init__(endpoint, timeout)
        self._calls = Calls(Replicas(endpoint, Connection))

    @overload
    def run(
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
    def run(
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
    def run(
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
        """Sends one array through a network.

        Args:
            network: a `Network`, a registered one, or a single layer.
            x: (N, C, *spatial) or (C, *spatial); channels last with that `data_format`. Vectors, (N, F) or
                (F,), where the network begins with `Linear`. A network in which no layer fixes the number of
                spatial axes takes x as samples, (N, C, *spatial) or (N, F).
            data_format: "channels_first" or "channels_last", for x and the results.
            out_dtype: the results' dtype, the network's own if None; integers are rounded half to even and
                saturated.
            precision: "high", or "fast" to allow algorithms with a larger error bound.
            backend: a backend's name; None for the server's choice.
            timeout: seconds; None for the client's own.
            progress: True for a bar on standard error, or a function that takes each `Progress`; it may be
                called from another thread, one call at a time.
            on_report: a function that is given the `TensorReport`: backend, algorithms and times.

        Returns:
            The feature maps in x's rank and order of axes, one array, or a dict by name where the network has
            several outputs. What comes of `Flatten` or `Linear` is (N, F), or (F,) where x is one sample.

        Raises:
            InvalidRequest, BackendUnavailable, ResourceExhausted, DeadlineExceeded, ServiceUnavailable: as
                for `conv2d`.
            NetworkNotFound: the server lacks the network's weights, and they are not known here.
        """
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        net = network_of(network)
        job = Job.of(net, as_input(x, net.rank, options.data_format), options)
        return self._send(job, options, progress, on_report)

    def map(
        self,
        network: NetworkLike,
        xs: Iterable[ArrayLike],
        *,
        data_format: str = "channels_first",
        out_dtype: DTypeLike | None = None,
        precision: str = "high",
        backend: str | None = None,
        timeout: float | None = None,
        on_report: OnReport = None,
    ) -> Generator[Any, None, None]:
        """Sends many arrays through a network, without waiting between: one after another over one stream, or
        over as many streams as there are servers.

        Args:
            network: as for `run`.
            xs: arrays as for `run`, of any sizes; may be endless. It is iterated in another thread, ahead of
                the results: as far as input and results in flight stay below 64 MiB, or by one array if that
                alone is larger. An array must stay as it is until its result has come.
            data_format: as for `run`.
            out_dtype: as for `run`.
            precision: as for `run`.
            backend: as for `run`.
            timeout: seconds for each array from its turn on, without the time that the caller takes between
                results; None for the client's own.
            on_report: is given each array's report, before its result comes out.

        Returns:
            A generator of results as `run` hands them back, in the order of `xs`. When the connection is
            lost, arrays not yet delivered are sent again. An exception of `xs` comes out after the results of
            the arrays before it. Leaving early cancels the rest.
        """
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        net = network_of(network)
        jobs = (Job.of(net, as_input(x, net.rank, options.data_format), options) for x in xs)
        return self._results(net, jobs, options, on_report)

    def stream(
        self,
        network: NetworkLike,
        bands: Iterable[ArrayLike],
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
    ) -> Generator[Band, None, None]:
        """Sends one tensor as it comes, rows at a time, and hands out rows of the results as they come.

        Neither side ever holds more of it than the network's halo and a few bands.

        Args:
            network: as for `run`.
            bands: arrays (C, rows, *rest) of any height, top to bottom; with channels last (rows, *rest, C);
                for a network that takes vectors, one vector (F,) each.
                They are taken in another thread. An array may be filled anew once the next one is asked for.
            shape: (C, H, W) or the like, or (N, C, H, W) for N samples one after another; with channels last
                (H, W, C). H may be None: the tensor then ends when the bands do. A network that takes any
                number of spatial axes takes all sizes as one sample's.
            dtype: of the bands.
            band_rows: rows that travel together; rows leave when so many are there. None: about 64 KiB.
            data_format: as for `run`.
            out_dtype: as for `run`.
            precision: as for `run`.
            backend: as for `run`.
            timeout: seconds for the whole stream; None for the client's own.
            progress: as for `run`.
            on_report: is given the report at the end.

        Returns:
            A generator of `Band(array, sample, first_row, output)`; the array is (C, rows, *rest), or
            (rows, *rest, C) with channels last. A vector comes as one band, its array (F,). An exception of
            `bands` comes out of it as it is. Leaving early cancels the stream.

        Raises:
            ServiceUnavailable: the connection was lost. A stream is never sent again; `metadata["sample"]`
                and `metadata["last_row"]` say how far the results had come (-1: no row).
        """
        options = self._options(data_format, out_dtype, precision, backend, timeout)
        net = network_of(network)
        job = BandJob.of(net, shape, dtype, band_rows, options)
        return self._stream(job, bands, options, progress, on_report)

    def register(self, network: Network | Layer, *, timeout: float | None = None) -> RegisteredNetwork:
        """Sends a network to the server, which keeps it; the same network twice is the same as once.

        Of several servers one is sent it now, each other one when it is first needed there.

        Raises:
            ResourceExhausted: its weights do not fit there.
        """
        net = network_of(network)
        self._calls.anywhere(lambda at: flows.register(at.known, net), self._limit(timeout))
        return RegisteredNetwork(self.run, net)

    def network(self, name: str, *, timeout: float | None = None) -> RegisteredNetwork:
        """The registered network of that name; its weights are known by digest alone.

        Raises:
            NetworkNotFound: the server has none so named for this caller.
        """
        network = self._calls.anywhere(lambda at: flows.get_network(at.known, name), self._limit(timeout))
        return RegisteredNetwork(self.run, network)

    def networks(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """The names of the caller's registered networks on any server, in order."""
        return flows.all_names(self._calls.everywhere(lambda _: flows.list_networks(), self._limit(timeout)))

    def unregister(self, network: NetworkLike | str, *, timeout: float | None = None) -> None:
        """Lets the server, or all of them, forget a network, given or named; work that is running goes on.

        Raises:
            NetworkNotFound: the server has none so named for this caller.
        """
        name = name_of(network)
        flows.check_name(name)
        found = self._calls.everywhere(lambda at: flows.unregister(at.known, name), self._limit(timeout))
        flows.check_forgotten(found)

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """The server's version, backends (or why they cannot run), limits and use; of several, one's."""
        return self._calls.anywhere(lambda _: flows.server_info(), self._limit(timeout))

    def infos(self, *, timeout: float | None = None) -> dict[str, ServerInfo]:
        """What every server that can be reached says, by its address.

        Raises:
            ServiceUnavailable: none can be reached.
        """
        return flows.answered(self._calls.everywhere(lambda _: flows.server_info(), self._limit(timeout)))

    def close(self) -> None:
        """Closes all connections; calls that still run are cancelled. More than once is fine."""
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ConvClient({self.target!r})"

    def _send(self, job: Job, options: Options, progress: ProgressLike, on_report: OnReport) -> Any:
        with metered(progress, job.input_bytes, job.output_bytes) as meter:
            collector = None
            if job.small:
                collector = self._calls.anywhere(
                    lambda at: flows.convolve(at.known, job, at.target), options.timeout
                )
            if collector is None:
                pipeline = self._pipeline(iter([job]), options, meter, on_report)
                (result,) = pipeline.results(job.network)
                return result
            meter.sent(job.input_bytes)
            meter.received(job.output_bytes)
        if on_report is not None and collector.report is not None:
            on_report(collector.report)
        return collector.result()

    def _results(
        self, network: Network, jobs: Iterator[Job], options: Options, on_report: OnReport
    ) -> Generator[Any, None, None]:
        replicas = self._calls.replicas
        replicas.directory.wait(options.timeout)
        if len(replicas.current()) == 1:
            pipeline = self._pipeline(jobs, options, Meter(None, None, None), on_report)
            yield from pipeline.results(network)
        else:
            spread = SpreadPipeline(self._calls, jobs, timeout=options.timeout, on_report=on_report)
            yield from spread.results()

    def _pipeline(self, jobs: Iterator[Job], options: Options, meter: Meter, on_report: OnReport) -> Pipeline:
        return Pipeline(
            self._calls, numbered(jobs), timeout=options.timeout, meter=meter, on_report=on_report
        )

    def _stream(
        self,
        job: BandJob,
        bands: Iterable[ArrayLike],
        options: Options,
        progress: ProgressLike,
        on_report: OnReport,
    ) -> Generator[Band, None, None]:
        with self._calls.route(options.timeout) as route:
            # Nothing is sent again, so the server is asked beforehand.
            self._calls.along(route, lambda at: flows.ensure_now(at.known, job.network), options.timeout)
            connection = route.replica.connection
            with metered(progress, job.request.spec.total_bytes, job.output_bytes) as meter:
                results = stream_bands(
                    connection, job, bands, timeout=options.timeout, meter=meter, on_report=on_report
                )
                try:
                    yield from results
                except ConvServiceError as exc:
                    route.failed(exc)
                    raise

    def _limit(self, timeout: float | None) -> float | None:
        return self._options("channels_first", None, "high", None, timeout).timeout
