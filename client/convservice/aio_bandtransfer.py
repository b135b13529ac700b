"""The async client's way of sending one tensor band by band: the twin of `bandtransfer`.

A task of its own writes, from the start of the call; the answers are read in the caller's task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from typing import Any

from convservice.aio_channel import AsyncConnection
from convservice.aio_transfer import each, write_all
from convservice.bands import Band
from convservice.bandstream import BandJob, BandReader, BandWriter
from convservice.errors import ConvServiceError, ServiceUnavailable
from convservice.progress import Meter
from convservice.transfer import OnReport, unanswered
from convservice.v1 import conv_pb2 as pb


async def stream_bands(
    connection: AsyncConnection,
    job: BandJob,
    bands: Iterable[Any] | AsyncIterable[Any],
    *,
    timeout: float | None,  # noqa: ASYNC109 - gRPC's own
    meter: Meter,
    on_report: OnReport,
) -> AsyncGenerator[Band, None]:
    """One tensor band by band: the results' bands as they come. Leaving early cancels the call.

    Raises:
        ServiceUnavailable: the connection was lost; the metadata says how far the results had come.
    """
    reader = BandReader(job, connection.target)
    failed: list[BaseException] = []
    call = connection.stream(timeout)

    async def write() -> None:
        try:
            await write_all(call, band_messages(job, bands), meter)
        except BaseException as exc:  # noqa: BLE001 - raised again in the caller's task
            failed.append(exc)
            call.cancel()

    writer = asyncio.create_task(write())
    try:
        while (message := await call.answer()) is not None:
            meter.received(len(message.payload.data))
            for band in reader.receive(message):
                yield band
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
        writer.cancel()
    if on_report is not None:
        on_report(reader.report)


async def band_messages(
    job: BandJob, bands: Iterable[Any] | AsyncIterable[Any]
) -> AsyncIterator[pb.ConvolveStreamRequest]:
    """All messages of a band job, as the bands come."""
    writer = BandWriter(job)
    yield writer.header()
    async for band in each(bands):
        for message in writer.add(band):
            yield message
    for message in writer.end():
        yield message
