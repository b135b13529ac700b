"""The Docker engine as the tests use it: what they ask of a container, and how they wait for one.

`docker` and `Project` run the commands that users run. A `Running` is one container: its id, where its ports
are published, what it logged, how it ended. Whatever is waited for is waited for by a call that returns when
it has happened: the standard health call, the engine's events, `docker wait`, a log that is followed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any, Self, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

testcontainers_config.ryuk_disabled = True
"""Its reaper is an image of a registry; what a killed run leaves is removed by the next (see conftest.py)."""

ROOT = Path(__file__).parents[2]
SERVICE_PORT, METRICS_PORT = 50051, 9464
OWN = "convservice-test-"
"""How the names of the tests' own containers, networks and projects begin; their process's id follows."""

WAIT = 120.0
"""Seconds after which something that must happen is taken not to happen."""

HARDENED: Mapping[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    "pids_limit": 512,
}
"""What the compose file demands of a container, for one without Compose; not even /tmp can be written."""


def own_name() -> str:
    """A name that says which process it belongs to."""
    return f"{OWN}{os.getpid()}-{os.urandom(3).hex()}"


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 600) -> str:
    """What a command printed; fails with all that it said unless its status is 0."""
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert ended.returncode == 0, f"{' '.join(command)}: {ended.stdout[-6000:]}\n{ended.stderr[-6000:]}"
    return ended.stdout


def docker(*arguments: str) -> str:
    """What a docker command printed."""
    return run(["docker", *arguments]).strip()


def compose_commands() -> list[list[str]]:
    """The Compose tools that are here: 1.29, v2, or both."""
    found = [["docker-compose"]] if shutil.which("docker-compose") else []
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return found + ([["docker", "compose"]] if plugin.returncode == 0 else [])


def wait_for_health(target: str, status: str = "SERVING") -> None:
    """Returns once the server as a whole says that its status is this one."""
    with grpc.insecure_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=WAIT):
            if answer.status == health_pb2.HealthCheckResponse.ServingStatus.Value(status):
                return
    raise AssertionError(f"{target} ended its watch of health before it was {status}")


@dataclass(frozen=True)
class Running:
    """A container that was started.

    Attributes:
        id: the engine's id of it.
    """

    id: str

    def published(self, port: int = SERVICE_PORT) -> str:
        """Where one of its ports is published on this machine, `127.0.0.1:PORT`."""
        (address,) = docker("port", self.id, f"{port}/tcp").splitlines()
        assert address.startswith("127.0.0.1:"), f"published to others than this machine: {address}"
        return address

    def inspect(self) -> Any:
        """All that the engine knows of it."""
        (found,) = json.loads(docker("inspect", self.id))
        return found

    @property
    def state(self) -> Any:
        """How it is, or how it ended: Status, ExitCode, OOMKilled and more."""
        return self.inspect()["State"]

    def logs(self) -> tuple[str, str]:
        """What it has written so far: standard output, standard error."""
        ended = subprocess.run(["docker", "logs", self.id], capture_output=True, text=True, check=True)
        return ended.stdout, ended.stderr

    def record(self, wanted: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """The first record of its log that is wanted, once it is there: a line may come after its cause."""
        with following(["docker", "logs", "--follow", self.id]) as lines:
            for line in lines:
                if line.startswith("{") and wanted(found := json.loads(line)):
                    return cast("Mapping[str, Any]", found)
        raise AssertionError(f"no such record within {WAIT:g} s: {self.logs()[1]}")

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return int(run(["docker", "wait", self.id], timeout=WAIT))

    def wait_until_healthy(self, since: str = "") -> None:
        """Returns once the engine's own health check has found it healthy.

        Args:
            since: the time from which on; that of its start where not given.
        """
        since = since or self.inspect()["Created"]
        filters = ["--filter", f"container={self.id}", "--filter", "event=health_status"]
        command = ["docker", "events", "--since", since, *filters, "--format", "{{.Status}}"]
        with following(command) as lines:
            for line in lines:
                if line.strip() == "health_status: healthy":
                    return
        raise AssertionError(f"not healthy within {WAIT:g} s: {self.inspect()['State']}, {self.logs()}")

    def memory_bytes(self) -> int:
        """Memory that it uses now, as its control group counts it."""
        v1, v2 = "/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory.current"
        script = f"import os; print(open({v1!r} if os.path.exists({v1!r}) else {v2!r}).read())"
        return int(docker("exec", self.id, "/opt/convservice/bin/python", "-c", script))


@contextmanager
def following(command: Sequence[str], seconds: float = WAIT) -> Generator[Any]:
    """The lines of a command's outputs as they come; it ends with the context, or after `seconds`."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        give_up = Timer(seconds, process.kill)
        give_up.start()
        try:
            yield process.stdout
        finally:
            give_up.cancel()
            process.kill()


@contextmanager
def container(image: str, *arguments: str, **options: Any) -> Generator[Running]:
    """A hardened container of an image, its ports published on this machine alone; gone afterwards.

    Args:
        image: its name.
        arguments: the command in place of the image's own.
        options: of docker-py's `containers.create`, and `env`.
    """
    environment: dict[str, str] = options.pop("env", {})
    command: Any = list(arguments) or None
    unit = DockerContainer(image, command=command, env=environment, name=own_name())
    unit.with_kwargs(**{**HARDENED, **options})
    ports = cast("dict[str, Any]", unit.ports)
    ports.update({f"{port}/tcp": ("127.0.0.1", None) for port in (SERVICE_PORT, METRICS_PORT)})
    with unit:
        yield Running(unit.get_container_id())


def told(image: str, base_image: str, **more: str) -> dict[str, str]:
    """What the compose files are told: the image under test, and free ports."""
    return {
        "CONVSERVICE_IMAGE": image,
        "PYTHON_IMAGE": base_image,
        "CONVSERVICE_PORT": "0",
        "CONVSERVICE_METRICS_PORT": "0",
        "CONVSERVICE_MEMORY": "512m",
        **more,
    }


class Project:
    """A Compose project of the tests' own; a context manager that takes all of it down.

    Args:
        files: compose files, the first of them the whole and the others overrides.
        profiles: that are switched on.
        environment: what the files are told.
    """

    def __init__(
        self, files: Sequence[str], profiles: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = own_name()
        self._environment = environment
        self._command = [
            *compose_commands()[0],
            *(part for name in files for part in ("-f", name)),
            *(part for name in profiles for part in ("--profile", name)),
            *("-p", self.name),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self("down", "--volumes", "--timeout", "5", "--remove-orphans")

    def __call__(self, *arguments: str) -> str:
        """What a command of Compose printed."""
        return run([*self._command, *arguments], self._environment).strip()

    def containers(self, service: str) -> list[Running]:
        """The containers of a service."""
        return [Running(found) for found in self("ps", "-q", service).splitlines()]

    @property
    def network(self) -> str:
        """The name of its network."""
        return f"{self.name}_default"
