"""How commands end: statuses, one line for what is expected to go wrong, and servers that stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convservice.cli.embedded import READY, EmbeddedServer
from convservice.cli.outcome import CommandFailed
from tests.cli.conftest import Cli

EXTRAS = {
    "PIL",
    "convservice_backends",
    "convservice_server",
    "grpc_health",
    "grpc_reflection",
    "matplotlib",
    "ml_dtypes",
    "rich",
    "scipy",
    "threadpoolctl",
}
"""What the base install does not have."""

BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from convservice.cli.main import main
raise SystemExit(main({arguments!r}))
"""


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "convservice.cli", *arguments], capture_output=True, text=True, check=False
    )


def without(names: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line where some packages are not installed."""
    code = BLOCKED.format(names=names, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_says_what_the_statuses_mean() -> None:
    for arguments in ([], ["serve"], ["filter"], ["explain"], ["bench"]):
        shown = program(*arguments, "--help")
        assert shown.returncode == 0
        assert "3  the service cannot be reached, or is stopping" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice"),
        ([], "required: COMMAND"),
        (["info", "--target", "nowhere"], "must be HOST:PORT with a port from 1 to 65535, not 'nowhere'"),
        (["info", "--target", "host:0"], "must be HOST:PORT with a port from 1 to 65535"),
        (["info", "--timeout", "-1"], "must be a number of seconds above 0, not '-1'"),
        (["explain", "--padding", "some"], "must be same, valid, 1, 1,2 (per axis) or 0:1,2:2"),
        (["explain", "--padding", "-1:0,0:0"], "or 0:1,2:2 (before and after), not '-1:0,0:0'"),
        (["explain", "--neuron", "a"], "must be whole numbers with commas between, not 'a'"),
        (["bench", "--repeat", "0"], "must be a whole number, at least 1, not '0'"),
    ],
)
def test_wrong_arguments_end_with_2(cli: Cli, arguments: list[str], message: str) -> None:
    ended = cli(*arguments)
    assert ended.status == 2
    assert message in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--neuron", "3,0"], "neuron (3, 0) is outside the feature map of size (3, 3)"),
        (["explain", "--neuron", "-1,0"], "neuron (-1, 0) is outside the feature map of size (3, 3)"),
        (["explain", "--neuron", "1,-1"], "neuron (1, -1) is outside the feature map of size (3, 3)"),
        (["explain", "--neuron", "1"], "index must be one integer or one for each of the 2 spatial axes"),
        (["explain", "--stride", "0"], "stride must be an integer from 1"),
        (["explain", "--channel", "7"], "channel must be from 0 to 0, not 7"),
        (["explain", "--sample", "1"], "--sample must be from 0 to 0, not 1"),
        (["explain", "--activation", "swish"], "activation must be one of linear, relu"),
        (["explain", "--rank", "1"], "the worked example has rank 2: --rank 1 needs --input and --weight"),
        (["explain", "--rank", "3"], "the worked example has rank 2: --rank 3 needs --input and --weight"),
        (["explain", "--input", "x.npy"], "--input and --weight go together"),
        (["bench", "--shape", "1,4,9,9"], "weight has 3 input channels per group, the input has 4 channels"),
        (["bench", "--shape", "1,4"], "--shape must be 3 to 5 sizes of at least 1"),
        (["bench", "--shape", "-1,3,9,9"], "--shape must be 3 to 5 sizes of at least 1"),
        (["bench", "--shape", "3,9,9"], "--shape must have 4 sizes, samples first"),
        (["bench", "--dtype", "int32"], "dtype int32 is not supported"),
    ],
)
def test_what_cannot_be_computed_ends_with_2_and_one_line(
    cli: Cli, target: str, arguments: list[str], message: str
) -> None:
    ended = cli(*arguments, "--target", target)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("convservice: ")
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_shapes_that_do_not_fit_are_told_with_the_numbers(cli: Cli, target: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 2), np.float32))
    np.save(tmp_path / "weight.npy", np.zeros((4, 1, 3, 3), np.float32))
    ended = cli(
        "explain", "--input", tmp_path / "x.npy", "--weight", tmp_path / "weight.npy", "--target", target
    )
    assert ended.status == 2
    assert "with 2 spatial axes, not one of shape (2, 2)" in ended.err


@pytest.mark.parametrize("command", ["info", "example", "explain", "bench"])
def test_a_server_that_is_not_there_ends_with_3(cli: Cli, command: str) -> None:
    ended = cli(command, "--target", "127.0.0.1:1", "--json")
    assert ended.status == 3
    assert "127.0.0.1:1 cannot be reached" in ended.err
    assert ended.json["error"]["exit"] == 3
    assert ended.json["error"]["message"] in ended.err


def test_a_backend_that_is_not_there_ends_with_1(cli: Cli, target: str) -> None:
    ended = cli("example", "--backend", "no-such-backend", "--target", target, "--json")
    assert ended.status == 1
    assert ended.json["error"]["reason"] == "BACKEND_UNAVAILABLE"
    assert "no-such-backend" in ended.json["error"]["message"]


def test_serve_says_where_and_stops_when_told() -> None:
    command = [
        sys.executable,
        "-m",
        "convservice.cli",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--log-format",
        "json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        line = server.stdout.readline().strip()
        assert line.startswith(READY)
        checked = program("health", "--target", line.removeprefix(READY))
        assert (checked.returncode, checked.stdout.split()[-1]) == (0, "SERVING")
        threads = Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
        assert b"OPENBLAS_NUM_THREADS=1" in threads
        server.send_signal(signal.SIGTERM)
        rest, logs = server.communicate()
    assert (server.returncode, rest) == (0, "")
    assert all(isinstance(json.loads(entry), dict) for entry in logs.splitlines())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--listen", "nowhere"], 2, "listen must be HOST:PORT with a port from 0 to 65535"),
        (["--max-streams", "0"], 2, "max_streams must be a whole number from 1"),
        (["--memory-budget", "much"], 2, "memory_budget_bytes must be a number of bytes"),
        (["--backend", "no-such-backend"], 1, "there is no backend 'no-such-backend'"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: list[str], status: int, message: str) -> None:
    ended = program("serve", "--listen", "127.0.0.1:0", *arguments)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken(target: str) -> None:
    ended = program("serve", "--listen", target)
    assert ended.returncode == 1
    assert f"cannot listen on {target}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_embedded_server_ends_with_its_context() -> None:
    with EmbeddedServer() as server:
        os.kill(server.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_an_embedded_server_that_cannot_start_says_why() -> None:
    with pytest.raises(CommandFailed, match="no server could be started here: there is no backend 'no-such'"):
        EmbeddedServer(["--backend", "no-such"])


def test_the_base_install_can_ask_a_server(target: str) -> None:
    for command in ("health", "info", "example", "explain", "bench"):
        ended = without(EXTRAS, command, "--target", target)
        assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        (
            "PIL",
            ["filter", "a.png", "--kernel", "box", "-o", "b.png"],
            "pillow: pip install 'convservice[cli]'",
        ),
        ("grpc_health", ["serve"], "grpc_health: pip install 'convservice[server]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(missing: str, arguments: list[str], message: str) -> None:
    ended = without({missing}, *arguments)
    assert ended.returncode == 1
    assert ended.stderr == f"convservice: this needs the package {message}\n"


def test_a_server_of_ones_own_is_not_told_what_others_are(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSERVICE_LISTEN", "nowhere")
    monkeypatch.setenv("CONVSERVICE_CONFIG", "/no/such/file")
    assert cli("example").status == 0
    monkeypatch.setenv("CONVSERVICE_BACKEND", "abacus")
    assert "there is no backend 'abacus'" in cli("example").err


def test_serve_prints_its_settings_and_says_where_a_wrong_one_came_from(cli: Cli) -> None:
    printed = cli("serve", "--print-config", "--max-streams", "5")
    assert printed.status == 0
    assert "max_streams = 5  # --max-streams\n" in printed.out
    refused = cli("serve", "--max-streams", "none")
    assert refused.status == 2
    assert "--max-streams: max_streams must be a whole number from 1 to 4096, not 'none'" in refused.err
