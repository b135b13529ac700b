"""Replicas behind one name: restarted one after another, one of them killed, and no call fails."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.containers.engine import Project, Running, container, docker, following, told

LOAD = Path(__file__).with_name("load.py").read_text()
MINUTES = 60.0


@pytest.fixture
def project(image: str, base_image: str) -> Iterator[Project]:
    """Three replicas that serve."""
    environment = told(image, base_image, CONVSERVICE_CPUS="0.5")
    with Project(["docker-compose.yml"], ["scale"], environment) as found:
        found("up", "-d", "replicas")
        for replica in found.containers("replicas"):
            replica.wait_until_healthy()
        yield found


class Load:
    """A container that calls the replicas without a pause.

    Args:
        unit: it.
        lines: what it prints, as it comes.
    """

    def __init__(self, unit: Running, lines: Iterator[str]) -> None:
        self.unit = unit
        self._lines = lines
        self._done: dict[str, Any] = {"unary": 0, "map": 0}

    def goes_on(self, more: int) -> None:
        """Returns once so many more small calls and tensors of `map` are done, of each kind."""
        wanted = {kind: self._done[kind] + more for kind in ("unary", "map")}
        for line in self._lines:
            assert line.startswith("{"), line
            self._done = json.loads(line)
            if all(self._done[kind] >= wanted[kind] for kind in wanted):
                return
        raise AssertionError(f"the load came to an end: {self._done}, {self.unit.logs()[1][-3000:]}")

    def stop(self) -> dict[str, Any]:
        """Ends it; what it has done."""
        assert self.unit.state["Running"], f"it has ended: {self.unit.logs()}"
        docker("kill", "--signal", "TERM", self.unit.id)
        assert self.unit.wait() == 0, self.unit.logs()
        found: dict[str, Any] = json.loads(self.unit.logs()[0].splitlines()[-1])
        return found


@contextmanager
def load(image: str, project: Project) -> Generator[Load]:
    """The load on a project's replicas, under way."""
    python = "/opt/convservice/bin/python"
    command = ("-u", "-c", LOAD, "replicas:50051")
    with (
        container(image, *command, entrypoint=python, network=project.network) as unit,
        following(["docker", "logs", "--follow", unit.id], 10 * MINUTES) as lines,
    ):
        found = Load(unit, lines)
        found.goes_on(30)
        yield found


def now() -> str:
    """The time, as the engine takes it."""
    return datetime.now(UTC).isoformat()


@pytest.mark.timeout(900)
def test_a_rolling_restart_and_a_killed_replica_under_load(image: str, project: Project) -> None:
    replicas = project.containers("replicas")
    assert len(replicas) == 3
    with load(image, project) as calls:
        for replica in replicas:
            since = now()
            docker("restart", "--time", "45", replica.id)
            replica.wait_until_healthy(since)
            calls.goes_on(30)
        docker("kill", replicas[0].id)
        calls.goes_on(60)
        since = now()
        docker("start", replicas[0].id)
        replicas[0].wait_until_healthy(since)
        calls.goes_on(60)
        done = calls.stop()
    assert done["failed"] == []
    for replica in replicas:
        records = [json.loads(line) for line in replica.logs()[1].splitlines()]
        assert any(record.get("status") == "OK" for record in records), "every replica had its share"
        stops = [record for record in records if record["message"] == "stopped"]
        assert [record["finished"] for record in stops] == [True], "what ran was finished before the restart"
