"""A container's limits, read from trees that look as the kernel's do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from convservice_backends.cgroups import memory_limit, process_limit, processor_limit, processors

MIB = 1 << 20
UNLIMITED = "9223372036854771712\n"
V1_GROUPS = "6:memory:/docker/a\n5:pids:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n0::/\n"


def tree(root: Path, groups: str, files: Mapping[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_in_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "0::/\n",
        {"memory.max": f"{256 * MIB}\n", "cpu.max": "150000 100000\n", "pids.max": "200\n"},
    )
    assert memory_limit(root) == 256 * MIB
    assert processor_limit(root) == 1.5
    assert process_limit(root) == 200
    assert processors(root, 16) == 2
    assert processors(root, 1) == 1


def test_version_2_as_a_service_of_the_host_takes_the_least_of_all_on_the_way(tmp_path: Path) -> None:
    files = {
        "system.slice/conv.service/memory.max": "max\n",
        "system.slice/conv.service/memory.high": f"{512 * MIB}\n",
        "system.slice/memory.max": f"{700 * MIB}\n",
        "system.slice/conv.service/cpu.max": "400000 100000\n",
        "system.slice/cpu.max": "50000 100000\n",
        "other.slice/memory.max": "1\n",
        "system.slice/conv.service/pids.max": "max\n",
    }
    root = tree(tmp_path, "0::/system.slice/conv.service\n", files)
    assert memory_limit(root) == 512 * MIB
    assert processor_limit(root) == 0.5
    assert processors(root, 16) == 1
    assert process_limit(root) is None


@pytest.mark.parametrize("below", ["docker/a/", ""])
@pytest.mark.parametrize("cpu", ["cpu", "cpu,cpuacct"])
def test_version_1_with_and_without_the_hosts_paths(tmp_path: Path, below: str, cpu: str) -> None:
    files = {
        f"memory/{below}memory.limit_in_bytes": f"{300 * MIB}\n",
        f"{cpu}/{below}cpu.cfs_quota_us": "250000\n",
        f"{cpu}/{below}cpu.cfs_period_us": "100000\n",
        f"pids/{below}pids.max": "99\n",
    }
    root = tree(tmp_path, V1_GROUPS, files)
    assert memory_limit(root) == 300 * MIB
    assert processor_limit(root) == 2.5
    assert process_limit(root) == 99


def test_version_2_beside_version_1(tmp_path: Path) -> None:
    files = {
        "memory/docker/a/memory.limit_in_bytes": UNLIMITED,
        "memory/docker/memory.limit_in_bytes": f"{400 * MIB}\n",
        "unified/cpu.max": "max 100000\n",
        "cpu/docker/a/cpu.cfs_quota_us": "-1\n",
        "cpu/docker/a/cpu.cfs_period_us": "100000\n",
    }
    root = tree(tmp_path, V1_GROUPS, files)
    assert memory_limit(root) == 400 * MIB
    assert processor_limit(root) is None
    assert processors(root, 3) == 3


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("", {}),
        ("nonsense\n\n0\n", {"memory.max": "1\n"}),
        ("0::/\n", {"memory.max": "", "cpu.max": "1\n", "pids.max": "many\n"}),
        ("0::/../elsewhere\n", {"cpu.max": "100000 0\n"}),
    ],
)
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, groups: str, files: Mapping[str, str]) -> None:
    root = tree(tmp_path, groups, files)
    assert (memory_limit(root), processor_limit(root), process_limit(root)) == (None, None, None)


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert (memory_limit(tmp_path), processors(tmp_path, 4)) == (None, 4)
