"""What is deployed beside the server: every query asks for metrics and labels that a running server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from convservice_backends.registry import Registry
from convservice_server.config import ServerConfig
from convservice_server.server import Server
from tests.server.support import WAIT, Double, collect, connect, pointwise, tensor_messages, unary
from tests.server.test_metrics import fetch

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "convservice.json"

_NAME = re.compile(r"\b(?:convservice|process)[_:][a-z0-9_:]*")
_SELECTED = re.compile(r"\b((?:convservice|process)_[a-z0-9_]+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)(?:=~|!=|!~|=)"([^"]*)"')
_ADDED = {"job", "instance"}
"""Labels that Prometheus adds."""


def rule_expressions() -> list[str]:
    found = re.findall(r"^ +expr: (.*)$", RULES.read_text(), re.MULTILINE)
    assert len(found) > 10
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


EXPRESSIONS = [*rule_expressions(), *dashboard_expressions()]


class WithDevice(Double):
    """A double that tells of a device's memory."""

    def device_memory(self) -> tuple[tuple[int, int], ...]:
        return ((1, 2),)


@pytest.fixture(scope="module")
def samples() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Every sample's name on a server's page, once it has served and refused, with its labels."""
    registry = Registry(factories={"double": WithDevice})
    config = ServerConfig(listen="127.0.0.1:0", metrics="127.0.0.1:0")
    x = np.ones((1, 1, 3, 2), np.float32)
    with Server(config, registry) as server, connect(server.port) as channel:
        from convservice.v1.conv_pb2_grpc import ConvServiceStub

        stub = ConvServiceStub(channel)
        network = pointwise()
        stub.Convolve(unary(network, x), timeout=WAIT)
        collect(stub.ConvolveStream(tensor_messages(network.name, x), timeout=WAIT))
        server.service.admission.budget = 1
        with pytest.raises(grpc.RpcError):
            stub.Convolve(unary(network, x), timeout=WAIT)
        found: dict[str, list[dict[str, str]]] = {}
        for family in text_string_to_metric_families(fetch(server.metrics_port)[2]):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
        yield found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_that_is_asked_for_is_there(
    expression: str, samples: dict[str, list[dict[str, str]]]
) -> None:
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    names = set(_NAME.findall(expression))
    assert names or "up{" in expression
    assert names <= set(samples) | recorded


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_label_that_is_asked_for_is_there(
    expression: str, samples: dict[str, list[dict[str, str]]]
) -> None:
    for name, matchers in _SELECTED.findall(expression):
        for label, value in _MATCHER.findall(matchers):
            if label in _ADDED:
                continue
            values = {labels[label] for labels in samples[name] if label in labels}
            assert values, f"{name} has no label {label}"
            if label in {"le", "method"}:
                assert value in values, f"{name} has no {label} {value}"
    for by in re.findall(r"\bby \(([^)]*)\)", expression):
        named = [labels for name in _NAME.findall(expression) for labels in samples.get(name, [])]
        known = {label for labels in named for label in labels}
        assert {label.strip() for label in by.split(",")} <= known | _ADDED


def test_the_dashboards_panels_are_whole() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set[tuple[int, int]]()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & places, f"{panel['title']} lies on another"
        assert max(column for column, _ in cells) < 24
        places |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "prometheus"
    source = (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    assert "uid: prometheus\n" in source


def test_every_alert_is_documented() -> None:
    text = (DEPLOY / "README.md").read_text()
    for name in re.findall(r"alert: (\w+)", RULES.read_text()):
        assert f"`{name.replace('Slow', 'Fast')}`" in text


@pytest.mark.parametrize(
    "arguments", ["check rules rules.yml", "test rules rules_test.yml", "check config prometheus.yml"]
)
def test_prometheus_takes_them_or_where_it_is_not_installed_they_look_whole(arguments: str) -> None:
    folder = DEPLOY / "prometheus"
    if shutil.which("promtool") is None:
        assert (folder / arguments.rsplit(maxsplit=1)[-1]).read_text().strip()
        assert all(
            expression.count(left) == expression.count(right)
            for expression in EXPRESSIONS
            for left, right in ("()", "[]", "{}")
        )
        return
    ended = subprocess.run(
        ["promtool", *arguments.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=4 * WAIT,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_page_has_no_names_but_the_servers_and_its_processs(
    samples: dict[str, list[dict[str, str]]],
) -> None:
    assert {name for name in samples if not name.startswith(("convservice_", "process_"))} == set()
