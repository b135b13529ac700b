"""Fixtures of the container tests: the engine, the image under test, one container that many tests share.

Without an engine the tests are skipped with the reason, and fail where CI is said to be (`CI=true`): see
`engine-up`, which `make test-containers` runs first.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import convservice
from tests.containers.engine import OWN, Running, container, docker, run, wait_for_health

IMAGE = "convservice:test"


@dataclass(frozen=True)
class Computes:
    """The backend that a container chose, as far as tests of the SDK ask for it.

    Attributes:
        name: its name.
    """

    name: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything here: it runs where it is asked for, and may take a while."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.containers)
            item.add_marker(pytest.mark.timeout(600))
            # docker-py leaves the end of its connections to the garbage collector.
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def base_image() -> str:
    """The image with Python that the image under test is made from; nothing without an engine."""
    script = Path(__file__).parent / "engine-up"
    found = subprocess.run([script, "--check"], capture_output=True, text=True, check=False)
    said = found.stdout.strip()
    if found.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI has a Docker engine: {said}")
        pytest.skip(f"needs a Docker engine (make test-containers): {said}")
    remove_leftovers()
    return said


def remove_leftovers() -> None:
    """Removes containers and networks of test runs that were killed; those of runs that live stay."""
    kinds = {
        ("ps", "--all", "--format", "{{.Names}}"): ("rm", "--force", "--volumes"),
        ("network", "ls", "--format", "{{.Name}}"): ("network", "rm"),
        ("volume", "ls", "--format", "{{.Name}}"): ("volume", "rm"),
    }
    for listed, remove in kinds.items():
        for name in docker(*listed).splitlines():
            found = re.match(rf"{OWN}(\d+)-", name)
            if found is not None and not Path(f"/proc/{found[1]}").exists():
                docker(*remove, name)


@pytest.fixture(scope="session")
def image(base_image: str) -> str:
    """The name of the image, built from this checkout."""
    arguments = ["--build-arg", f"PYTHON_IMAGE={base_image}", "--tag", IMAGE]
    run(["docker", "build", "--quiet", *arguments, "."], timeout=1800)
    return IMAGE


@pytest.fixture(scope="session")
def service(image: str) -> Iterator[Running]:
    """One container of the image as it comes, that many tests share."""
    with container(image, mem_limit="1g", memswap_limit="1g") as found:
        wait_for_health(found.published())
        yield found


@pytest.fixture(scope="session")
def target(service: Running) -> str:
    """Where the shared container is reached."""
    return service.published()


@pytest.fixture(scope="session")
def backend(target: str) -> Computes:
    """What computes there."""
    with convservice.connect(target) as client:
        (name,) = (found.name for found in client.info().backends if found.is_default)
    return Computes(name)
