"""What the image is: who it runs as, what it needs, how it starts, tells of its health, and stops."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import convservice
from convservice import BackendUnavailable, Conv, ServiceUnavailable
from tests.containers.engine import METRICS_PORT, WAIT, Running, container, docker, wait_for_health
from tests.helpers import EXAMPLE_INPUT, EXAMPLE_MAP, EXAMPLE_WEIGHT


@pytest.fixture(scope="module")
def facts(image: str) -> Any:
    """What the engine knows of the image."""
    (found,) = json.loads(docker("image", "inspect", image))
    return found


def test_it_runs_as_nobody_in_particular_and_stops_on_sigterm(facts: Any) -> None:
    config = facts["Config"]
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] == "SIGTERM"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "ConvService"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {"version", "revision", "description"} <= {name.rpartition(".")[2] for name in labels}


def test_no_shell_is_asked_for(facts: Any) -> None:
    config = facts["Config"]
    assert config["Entrypoint"] == ["/opt/convservice/bin/convservice"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"][0] == "CMD", "not CMD-SHELL"


def test_the_environment_has_no_pip_and_no_tests(image: str) -> None:
    script = "import importlib.util as u; print([u.find_spec(n) for n in ('pip', 'numpy.tests', 'pytest')])"
    with container(image, "-c", script, entrypoint="/opt/convservice/bin/python") as found:
        assert found.wait() == 0, found.logs()
        assert found.logs()[0].strip() == "[None, None, None]"


def test_nothing_is_written_where_it_runs(image: str) -> None:
    """All that the worked example imports is compiled in the image, base image included."""
    script = (
        "import sys; import convservice_server.server, convservice_backends.numpy.backend;"
        "from pathlib import Path;"
        "print([n for n, m in sys.modules.items() if (s := getattr(m, '__spec__', None)) and s.cached"
        " and s.has_location and str(s.origin).endswith('.py') and not Path(s.cached).exists()])"
    )
    with container(image, "-c", script, entrypoint="/opt/convservice/bin/python") as found:
        assert found.wait() == 0, found.logs()
        assert found.logs()[0].strip() == "[]"


def test_the_engine_finds_it_healthy(service: Running) -> None:
    service.wait_until_healthy()
    assert service.state["Health"]["Status"] == "healthy"


def test_what_is_locked_is_locked(service: Running) -> None:
    host = service.inspect()["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["Privileged"]


def test_the_worked_example(target: str) -> None:
    with convservice.connect(target) as client:
        found = client.conv2d(np.array(EXAMPLE_INPUT, "float32"), np.array(EXAMPLE_WEIGHT, "float32"))
    assert found.tolist() == [list(row) for row in EXAMPLE_MAP]


def test_sigterm_lets_a_running_tensor_finish(image: str) -> None:
    """The rows after the signal are sent only when health has told of it."""
    layer = Conv(np.ones((1, 1, 3, 3), "float32"), padding=1)
    with container(image) as unit:
        target = unit.published()
        wait_for_health(target)
        told = threading.Event()

        def rows() -> Iterator[Any]:
            for first in range(0, 2000, 50):
                if first == 1000:
                    docker("kill", "--signal", "TERM", unit.id)
                    wait_for_health(target, "NOT_SERVING")
                    told.set()
                yield np.ones((1, 50, 300), "float32")

        with convservice.connect(target) as client:
            bands = list(client.stream(layer, rows(), shape=(1, 2000, 300), dtype="float32"))
        assert told.is_set()
        whole = np.concatenate([band.array for band in bands], axis=1)
        assert whole.shape == (1, 2000, 300)
        assert (whole[:, 1:-1, 1:-1] == 9).all()
        assert unit.wait() == 0
        out, err = unit.logs()
        assert out == "listening on 0.0.0.0:50051\n"
        assert [json.loads(line)["message"] for line in err.splitlines()][-1] == "stopped"


def test_a_stream_that_outlasts_the_grace_time_fails_with_its_last_row(image: str) -> None:
    layer = Conv(np.ones((1, 1, 3, 3), "float32"), padding=1)
    over = threading.Event()
    with container(image, env={"CONVSERVICE_DRAIN_GRACE": "0.5"}) as unit:
        target = unit.published()
        wait_for_health(target)

        def rows() -> Iterator[Any]:
            for first in range(0, 2000, 50):
                if first == 1000:
                    docker("kill", "--signal", "TERM", unit.id)
                    assert over.wait(WAIT), "nothing comes any more"
                yield np.ones((1, 50, 4096), "float32")

        received = [0]
        with convservice.connect(target) as client:
            bands = client.stream(layer, rows(), shape=(1, 2000, 4096), dtype="float32")
            with pytest.raises(ServiceUnavailable) as caught:
                received += (band.array.shape[1] for band in bands)
        over.set()
        assert sum(received) > 0
        assert caught.value.metadata["last_row"] == str(sum(received) - 1)
        assert unit.wait() == 0
        ends = [json.loads(line) for line in unit.logs()[1].splitlines()]
        assert [record["finished"] for record in ends if record["message"] == "stopped"] == [False]


def test_the_metrics_page_counts_what_was_asked(service: Running, target: str) -> None:
    address = f"http://{service.published(METRICS_PORT)}/metrics"

    def page() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        with urllib.request.urlopen(address, timeout=WAIT) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        assert all(family.documentation for family in families)
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    answered = ("convservice_calls_total", frozenset({("method", "Convolve"), ("status", "OK")}))
    received = ("convservice_received_bytes_total", frozenset({("method", "Convolve")}))
    before = page()
    with convservice.connect(target) as client:
        for _ in range(3):
            client.conv2d(np.ones((40, 50), "float32"), np.ones((2, 2), "float32"))
    after = page()
    while after[answered] < before.get(answered, 0) + 3:  # a call is counted just after its answer has left
        after = page()
    assert after[answered] == before.get(answered, 0) + 3
    assert after[received] >= before.get(received, 0) + 3 * 40 * 50 * 4
    assert after[("convservice_serving", frozenset())] == 1
    assert after[("convservice_memory_budget_bytes", frozenset())] < 1 << 30, (
        "a share of the container's limit"
    )


def test_the_logs_are_json_with_a_line_for_each_tensor(service: Running, target: str) -> None:
    with convservice.connect(target) as client:
        client.conv2d(np.ones((7, 11), "float32"), np.ones((2, 2), "float32"))
    tensor = service.record(lambda record: record.get("input") == "1 x (1, 7, 11) float32")
    records = [json.loads(line) for line in service.logs()[1].splitlines()]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert tensor["status"] == "OK"
    assert tensor["bytes_in"] == 7 * 11 * 4
    assert tensor["outputs"] == "output (1, 6, 10) float32"


def test_an_error_leads_to_its_line_in_the_log(service: Running, target: str) -> None:
    with convservice.connect(target) as client, pytest.raises(BackendUnavailable) as caught:
        client.conv2d(np.ones((7, 11), "float32"), np.ones((2, 2), "float32"), backend="no-such")
    asked = caught.value.request_id
    assert asked
    assert service.record(lambda record: record.get("request_id") == asked)["status"] == "FAILED_PRECONDITION"
