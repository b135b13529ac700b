"""The sync client's way of sending one tensor band by band.

Given a `Connection`, a `BandJob` and the bands, `stream_bands` hands on the results' bands as they come. gRPC
takes the requests in a thread of its own; the answers are read in the caller's thread. The books are kept by
`bandstream`; nothing is ever sent again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

from convservice.bands import Band
from convservice.bandstream import BandJob, BandReader, BandWriter
from convservice.channel import Connection
from convservice.errors import ConvServiceError, ServiceUnavailable
from convservice.progress import Meter
from convservice.transfer import OnReport, unanswered
from convservice.v1 import conv_pb2 as pb


def stream_bands(
    connection: Connection,
    job: BandJob,
    bands: Iterable[Any],
    *,
    timeout: float | None,
    meter: Meter,
    on_report: OnReport,
) -> Iterator[Band]:
    """One tensor band by band: the results' bands as they come. Leaving early cancels the call.

    Raises:
        ServiceUnavailable: the connection was lost; the metadata says how far the results had come.
    """
    reader = BandReader(job, connection.target)
    failed: list[BaseException] = []
    call: Any = None

    def requests() -> Iterator[pb.ConvolveStreamRequest]:
        try:
            for message in band_messages(job, bands):
                yield message
                meter.sent(len(message.payload.data))
        except GeneratorExit:  # gRPC has ended the call
            raise
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's thread
            failed.append(exc)
            started.wait()
            call.cancel()

    started = threading.Event()
    call = connection.stream(requests(), timeout)
    started.set()
    try:
        for message in connection.answers(call, timeout):
            meter.received(len(message.payload.data))
            yield from reader.receive(message)
        if reader.report is None:
            raise unanswered(connection.target)
    except ConvServiceError as exc:
        if failed:
            raise failed[0] from None
        if isinstance(exc, ServiceUnavailable):
            raise reader.interrupted(exc) from exc.__cause__
        raise
    finally:
        call.cancel()
    if on_report is not None:
        on_report(reader.report)


def band_messages(job: BandJob, bands: Iterable[Any]) -> Iterator[pb.ConvolveStreamRequest]:
    """All messages of a band job, as the bands come."""
    writer = BandWriter(job)
    yield writer.header()
    for band in bands:
        yield from writer.add(band)
    yield from writer.end()
