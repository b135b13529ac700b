"""What a server may take of its machine or container, and the settings that follow from it.

Given the limits of memory, processors, threads and open files, `defaults` hands on the settings that are safe
within them: what the process takes for itself (the interpreter, its libraries, messages that come before a
tensor is admitted, stacks) is set aside, and the rest is divided between tensors, weights and room to spare.
It is arithmetic on the limits alone; `limits` reads them.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from convservice_backends.cgroups import ROOT, memory_limit, process_limit, processors

MIB = 1 << 20

PROCESS_BYTES = 96 * MIB
"""What a process takes that has only started: measured, with metrics and traces, and some to spare."""

STREAM_BYTES = 2 * MIB
"""What a stream takes beside its admitted tensor: the message that waits in its inbox, one on its way in, and
two stacks. Messages have about 1 MiB."""

UNARY_BYTES = 4 * MIB
"""What a unary call takes before it is admitted: its request as it came and taken apart, with weights."""

LEAST_MEMORY_BYTES = 192 * MIB
"""With less a server does not start: one stream's tensor of any size would not fit beside the process."""

MOST_STREAMS, MOST_UPLOADS, LEAST_UNARY = 64, 8, 8
FEWEST_STREAMS, FEWEST_UPLOADS = 4, 2

THREADS_ASIDE = 48
"""Threads that are not a call's: gRPC's own, health, metrics, traces, watchdogs, signals."""

FILES_ASIDE = 64
"""Files that are not a connection: libraries, logs, listeners, devices."""


@dataclass(frozen=True)
class Limits:
    """What the process may take.

    Attributes:
        memory_bytes: memory.
        processors: threads that can run at the same time.
        threads: processes and threads; None for as many as one likes.
        open_files: files and connections open at the same time; None likewise.
    """

    memory_bytes: int
    processors: int
    threads: int | None = None
    open_files: int | None = None


@dataclass(frozen=True)
class Defaults:
    """Settings that fit the limits; named as those of `ServerConfig`."""

    memory_budget_bytes: int
    weights_budget_bytes: int
    max_streams: int
    max_uploads: int
    unary_workers: int


def limits(root: Path = ROOT) -> Limits:
    """The limits of this process: its machine's, and those of its control groups where they are less.

    Args:
        root: where /proc and /sys are.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        min(machine, memory_limit(root) or machine),
        processors(root),
        process_limit(root),
        None if files == resource.RLIM_INFINITY else files,
    )


def defaults(found: Limits) -> Defaults:
    """The settings that are safe within limits; the least that there are where those are too small."""
    memory = found.memory_bytes
    streams = _between(FEWEST_STREAMS, memory // (16 * MIB), MOST_STREAMS)
    uploads = _between(FEWEST_UPLOADS, memory // (64 * MIB), MOST_UPLOADS)
    unary = max(LEAST_UNARY, 2 * found.processors)
    unary = _between(LEAST_UNARY, memory // (32 * MIB), unary)
    if found.threads is not None:
        # A stream and an upload have a thread that computes and one that reads.
        left = found.threads - THREADS_ASIDE - found.processors
        unary = _between(LEAST_UNARY, left // 4, unary)
        uploads = _between(FEWEST_UPLOADS, left // 8, uploads)
        streams = _between(FEWEST_STREAMS, (left - unary - 2 * uploads) // 2, streams)
    if found.open_files is not None:
        streams = _between(FEWEST_STREAMS, (found.open_files - FILES_ASIDE) // 2, streams)
    left = memory - PROCESS_BYTES - (streams + uploads) * STREAM_BYTES - unary * UNARY_BYTES
    return Defaults(max(left // 2, MIB), max(left // 4, MIB), streams, uploads, unary)


def too_small(found: Limits) -> str:
    """Why a server cannot work within limits; empty where it can."""
    least_threads = THREADS_ASIDE + found.processors + LEAST_UNARY + 2 * (FEWEST_STREAMS + FEWEST_UPLOADS)
    least_files = FILES_ASIDE + 2 * FEWEST_STREAMS
    for what, has, least in (
        ("bytes of memory", found.memory_bytes, LEAST_MEMORY_BYTES),
        ("processes and threads", found.threads, least_threads),
        ("open files", found.open_files, least_files),
    ):
        if has is not None and has < least:
            return f"a server needs at least {least} {what}, its machine or container allows {has}"
    return ""


def _between(least: int, wanted: int, most: int) -> int:
    return max(least, min(wanted, most))
