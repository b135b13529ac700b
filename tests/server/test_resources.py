"""What a server takes by default within a container's limits: safe in each, refused in one too small."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convservice_server.config import ServerConfig
from convservice_server.resources import (
    FILES_ASIDE,
    LEAST_MEMORY_BYTES,
    MIB,
    PROCESS_BYTES,
    STREAM_BYTES,
    THREADS_ASIDE,
    UNARY_BYTES,
    Limits,
    defaults,
    limits,
    too_small,
)


@given(
    st.builds(
        Limits,
        memory_bytes=st.integers(LEAST_MEMORY_BYTES, 1 << 42),
        processors=st.integers(1, 256),
        threads=st.none() | st.integers(1, 100_000),
        open_files=st.none() | st.integers(1, 1 << 20),
    ).filter(lambda found: not too_small(found))
)
def test_the_defaults_fit_within_the_limits(found: Limits) -> None:
    made = defaults(found)
    calls = made.max_streams + made.max_uploads
    aside = PROCESS_BYTES + calls * STREAM_BYTES + made.unary_workers * UNARY_BYTES
    assert aside + made.memory_budget_bytes + made.weights_budget_bytes <= found.memory_bytes
    if found.threads is not None:
        assert THREADS_ASIDE + found.processors + made.unary_workers + 2 * calls <= found.threads
    if found.open_files is not None:
        assert made.max_streams + FILES_ASIDE <= found.open_files
    assert ServerConfig.of(**vars(made)).max_streams == made.max_streams


def test_a_small_container_takes_a_stream_and_leaves_room() -> None:
    made = defaults(Limits(256 * MIB, 1))
    assert made.memory_budget_bytes >= 40 * MIB
    assert made.max_streams == 16


def test_a_large_machine_is_bounded_by_no_container() -> None:
    made = defaults(Limits(64 << 30, 32))
    assert (made.max_streams, made.max_uploads, made.unary_workers) == (64, 8, 64)
    assert made.memory_budget_bytes > 31 << 30


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Limits(128 * MIB, 2), "a server needs at least 201326592 bytes of memory, its machine or container"),
        (Limits(1 << 30, 2, 30), "a server needs at least 70 processes and threads, its machine or"),
        (
            Limits(1 << 30, 2, 300, 20),
            "a server needs at least 72 open files, its machine or container allows",
        ),
        (Limits(1 << 30, 2, 300, 1024), ""),
        (Limits(1 << 30, 2), ""),
    ],
)
def test_a_container_that_is_too_small_is_refused_with_the_numbers(found: Limits, message: str) -> None:
    why = too_small(found)
    assert why.startswith(message)
    assert bool(why) == bool(message)


def test_limits_are_those_of_the_container_where_there_is_one(tmp_path: Path) -> None:
    for name, text in {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{200 * MIB}\n",
        "sys/fs/cgroup/pids.max": "123\n",
        "sys/fs/cgroup/cpu.max": "10000 100000\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = limits(tmp_path)
    assert (found.memory_bytes, found.processors, found.threads) == (200 * MIB, 1, 123)
    assert found.open_files is None or found.open_files > 0


def test_this_process_has_limits_a_server_can_start_within() -> None:
    assert too_small(limits()) == ""
    assert defaults(limits()).memory_budget_bytes == ServerConfig().memory_budget_bytes
