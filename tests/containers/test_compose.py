"""The compose files: valid in every combination, closed to the network, and what they bring up works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convservice
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT
from tests.containers.engine import Project, Running, compose_commands, run, told, wait_for_health

MAIN = "docker-compose.yml"
SECURE, MUTUAL, GPU = (f"docker-compose.{name}.yml" for name in ("secure", "mtls", "gpu"))
OVERRIDES = ((), (GPU,), (SECURE,), (MUTUAL,), (GPU, SECURE, MUTUAL))
PROFILES = ((), ("scale",), ("observability",), ("demo",), ("scale", "observability", "demo"))
SERVICES = {"scale": ("replicas",), "observability": ("prometheus", "grafana"), "demo": ("demo",)}


@pytest.mark.parametrize(("override", "profiles"), list(product(OVERRIDES, PROFILES)))
def test_every_profile_and_override_is_valid(
    base_image: str, override: tuple[str, ...], profiles: tuple[str, ...]
) -> None:
    for tool in compose_commands():
        files = [part for name in (MAIN, *override) for part in ("-f", name)]
        chosen = [part for name in profiles for part in ("--profile", name)]
        printed = run([*tool, *files, *chosen, "config"])
        assert "convservice:" in printed
        assert all(f"{service}:" in printed for name in profiles for service in SERVICES[name])


@pytest.fixture(scope="module")
def project(image: str, base_image: str) -> Iterator[Project]:
    """The service as `docker-compose up` gives it."""
    with Project([MAIN], environment=told(image, base_image)) as found:
        found("up", "-d")
        yield found


@pytest.fixture(scope="module")
def unit(project: Project) -> Running:
    """Its one container."""
    (found,) = project.containers("convservice")
    found.wait_until_healthy()
    return found


def test_up_gives_a_service(unit: Running) -> None:
    wait_for_health(unit.published())
    with convservice.connect(unit.published()) as client:
        assert np.array_equal(client.conv2d(INPUT, WEIGHT), FEATURE_MAP)


def test_it_is_limited_and_locked(unit: Running) -> None:
    facts = unit.inspect()
    host = facts["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 512 << 20
    assert host["NanoCpus"] == 2_000_000_000
    assert host["PidsLimit"] == 512
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    published = host["PortBindings"]
    assert published.keys() == {"50051/tcp", "9464/tcp"}
    assert {binding["HostIp"] for bindings in published.values() for binding in bindings} == {"127.0.0.1"}
    (volume,) = facts["Mounts"]
    assert volume["Destination"] == "/var/cache/convservice"
    assert facts["Config"]["User"] == "65532:65532"


def test_it_may_be_stopped_for_longer_than_it_drains(unit: Running) -> None:
    environment = dict(entry.split("=", 1) for entry in unit.inspect()["Config"]["Env"])
    assert unit.inspect()["Config"]["StopTimeout"] > float(environment["CONVSERVICE_DRAIN_GRACE"])


def test_the_kernel_cache_can_be_written(unit: Running) -> None:
    script = "from pathlib import Path; Path('/var/cache/convservice/probe').write_text('x')"
    run(["docker", "exec", unit.id, "/opt/convservice/bin/python", "-c", script])


def test_the_demo_writes_what_it_made_of_a_folder_of_images(
    image: str, base_image: str, tmp_path: Path
) -> None:
    stripes = np.zeros((40, 60, 3), np.uint8)
    stripes[:, ::8] = 255
    given, results = tmp_path / "images", tmp_path / "results"
    given.mkdir()
    results.mkdir()
    for name, pixels in (("fence", stripes), ("shelves", stripes.swapaxes(0, 1))):
        Image.fromarray(pixels).save(given / f"{name}.png")
    tmp_path.chmod(0o755)
    os.chown(results, 65532, 65532)
    environment = told(
        image,
        base_image,
        CONVSERVICE_DEMO_IMAGE="convservice-demo:test",
        DEMO_IMAGES=str(given),
        DEMO_RESULTS=str(results),
    )
    with Project([MAIN], ["demo"], environment) as project:
        project("build", "--quiet", "demo")
        project("up", "-d", "demo")
        (demo,) = project.containers("demo")
        assert demo.wait() == 0, demo.logs()
        printed = demo.logs()[0]
    assert "fence.png: (40, 60, 4), edges mostly vertical" in printed
    assert "shelves.png: (60, 40, 4), edges mostly horizontal" in printed
    assert {path.name for path in results.iterdir()} == {"fence.png", "shelves.png"}
    with Image.open(results / "shelves.png") as drawn:
        edges = np.asarray(drawn)
    assert edges.shape == (60, 40)
    assert (edges[:, :1] == edges).all(), "the shelves' edges are the same in every column"
    assert edges.max() > 128 > edges.min()


def test_the_gpu_override_asks_for_every_gpu(base_image: str) -> None:
    tool = compose_commands()[0]
    printed = run([*tool, "-f", MAIN, "-f", "docker-compose.gpu.yml", "config"])
    assert "driver: nvidia" in printed
    assert "count: all" in printed
    assert "EXTRAS: server,bfloat16,otel,cuda13" in printed
