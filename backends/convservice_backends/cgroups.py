"""What a container may take: the limits of this process's control groups, versions 1 and 2.

Given the trees /proc and /sys (or copies of them, in tests), this hands on the smallest limit on the way from
the process's own group up to the root, since each of them binds; None where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from math import ceil
from pathlib import Path

ROOT = Path("/")

_V2 = ("unified", "")
"""Where version 2 is mounted below /sys/fs/cgroup: beside version 1, or alone."""


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory that the process's groups allow."""
    return _smallest(
        _files(root, "memory", "memory.limit_in_bytes"), _files(root, None, "memory.max", "memory.high")
    )


def process_limit(root: Path = ROOT) -> int | None:
    """Processes and threads that the process's groups allow."""
    return _smallest(_files(root, "pids", "pids.max"), _files(root, None, "pids.max"))


def processor_limit(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the process's groups allow, such as 1.5."""
    shares = [
        _share(path, path.with_name("cpu.cfs_period_us")) for path in _files(root, "cpu", "cpu.cfs_quota_us")
    ]
    shares += [_share(path) for path in _files(root, None, "cpu.max")]
    return min((share for share in shares if share is not None), default=None)


def processors(root: Path = ROOT, available: int | None = None) -> int:
    """Threads that can run at the same time: the processors, or the limit of their time, rounded up.

    Args:
        root: where /proc and /sys are.
        available: the processors that the process may run on; asked of the system where not given.
    """
    found = len(os.sched_getaffinity(0)) if available is None else available
    share = processor_limit(root)
    return found if share is None else max(1, min(found, ceil(share)))


def _files(root: Path, controller: str | None, *names: str) -> Iterator[Path]:
    """Files of these names that there are, from the process's group up; of version 2 without a controller."""
    mounted = root / "sys/fs/cgroup"
    for controllers, group in _groups(root):
        if controller is None and controllers == [""]:
            tops = [mounted / below for below in _V2]
        elif controller is not None and controller in controllers:
            tops = [mounted / ",".join(controllers), mounted / controller]
        else:
            continue
        # A group outside what is mounted here, as ".." tells, or unknown here, has none of its files here.
        parts = [part for part in group.split("/") if part not in {"", ".."}]
        places = [Path(*parts[:depth]) for depth in range(len(parts), -1, -1)]
        for top in tops:
            for place in places:
                yield from (path for name in names if (path := top / place / name).is_file())


def _groups(root: Path) -> Iterator[tuple[list[str], str]]:
    """The controllers of each hierarchy, and the process's group in it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        match line.split(":", 2):
            case [_, controllers, group]:
                yield controllers.split(","), group
            case _:
                continue


def _smallest(*files: Iterator[Path]) -> int | None:
    """The smallest number that any of the files holds."""
    return min((found for path in chain(*files) if (found := _number(path)) is not None), default=None)


def _number(path: Path) -> int | None:
    """The number that a file holds; None for "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _share(quota: Path, period: Path | None = None) -> float | None:
    """Time by period: of one file that holds both, or of two; None where there is no limit."""
    try:
        words = quota.read_text().split() + ([] if period is None else period.read_text().split())
        allowed, per = int(words[0]), int(words[1])
    except (OSError, ValueError, IndexError):
        return None
    return allowed / per if allowed > 0 and per > 0 else None
