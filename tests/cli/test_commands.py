"""The commands that ask a server, against a server that runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from convservice.worked_example import FEATURE_MAP
from tests.cli.conftest import Cli


def test_health_of_a_server_that_serves(cli: Cli, target: str) -> None:
    ended = cli("health", "--target", target)
    assert (ended.status, ended.out) == (0, f"{target}: SERVING\n")
    assert cli("health", "--target", target, "--json").json == {
        "target": target,
        "status": "SERVING",
        "detail": "",
    }


def test_health_of_a_server_that_is_not_there(cli: Cli) -> None:
    ended = cli("health", "--target", "127.0.0.1:1", "--timeout", "5", "--json")
    assert ended.status == 1
    assert ended.json["status"] == "UNREACHABLE"
    assert "UNAVAILABLE" in ended.json["detail"]


def test_info_names_what_computes(cli: Cli, target: str) -> None:
    shown = cli("info", "--target", target, "--json")
    assert shown.status == 0
    (default,) = (backend for backend in shown.json["backends"] if backend["is_default"])
    assert default["available"]
    assert shown.json["limits"]["max_message_bytes"] > 0
    text = cli("info", "--target", target).out
    assert default["name"] in text
    assert default["device"] in text
    assert "memory of running tensors" in text


def test_the_example_is_exact(cli: Cli, target: str) -> None:
    ended = cli("example", "--target", target, "--json")
    assert ended.status == 0
    assert ended.json["exact"] is True
    assert ended.json["feature_map"] == FEATURE_MAP.tolist()


def test_the_example_as_a_page(cli: Cli, target: str) -> None:
    ended = cli("example", "--target", target)
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert "3  3  2  1  0       0  1  2       12  12  17" in lines
    assert "neuron (1, 0) = 10     neuron (1, 1) = 17     neuron (1, 2) = 19" in lines
    assert " 3₂ 1₂ 2₀ 2  3          3  1₂ 2₂ 2₀ 3          3  1  2₂ 2₂ 3₀" in lines
    assert max(map(len, lines)) <= 100


def test_the_example_on_a_server_of_its_own(cli: Cli) -> None:
    assert cli("example", "--json").json["exact"] is True


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("j", range(3))
def test_explain_a_neuron_of_the_example(cli: Cli, target: str, i: int, j: int) -> None:
    ended = cli("explain", "--target", target, "--neuron", f"{i},{j}", "--json")
    assert ended.status == 0
    assert ended.json["receptive_field"] == [[i, i + 1, i + 2], [j, j + 1, j + 2]]
    assert ended.json["computed"] == ended.json["expected"] == FEATURE_MAP[i, j]
    assert np.sum(ended.json["products"]) == ended.json["sum"]
    assert ended.json["agree"] is True


def test_explain_as_a_page(cli: Cli, target: str) -> None:
    lines = cli("explain", "--target", target, "--neuron", "1,0").out.splitlines()
    assert "Neuron (1, 0) of channel 0 looks at rows 1 to 3, columns 0 to 2" in lines
    assert "3  1  2       2  2  0       6  2  0" in lines
    assert "sum of the 9 products               10" in lines
    assert "computed by the server              10  the same" in lines


def test_explain_shows_the_padding_in_parentheses(cli: Cli, target: str) -> None:
    ended = cli("explain", "--target", target, "--neuron", "0,0", "--padding", "same", "--activation", "tanh")
    assert ended.status == 0
    assert "(0)  3   3       2  2  0       0  6  0" in ended.out
    assert "activation tanh" in ended.out


def test_explain_arrays_from_files(cli: Cli, target: str, tmp_path: Path, rng: np.random.Generator) -> None:
    x, weight, bias = tmp_path / "x.npy", tmp_path / "weight.npy", tmp_path / "bias.npy"
    np.save(x, rng.integers(0, 255, (3, 4, 9, 8), dtype=np.uint8))
    np.save(weight, rng.uniform(-1, 1, (6, 2, 3, 3)).astype(np.float32))
    np.save(bias, rng.uniform(-1, 1, 6))
    files = ["--input", x, "--weight", weight, "--bias", bias]
    geometry = ["--groups", "2", "--stride", "2,1", "--padding", "1:0,2:2", "--padding-mode", "reflect"]
    place = ["--neuron", "2,5", "--channel", "4", "--sample", "1", "--activation", "gelu"]
    ended = cli("explain", "--target", target, *files, *geometry, *place, "--json")
    assert ended.status == 0
    assert ended.json["input_channels"] == [2, 4]
    assert ended.json["receptive_field"] == [[3, 4, 5], [3, 4, 5]]
    text = cli("explain", "--target", target, *files, *geometry, *place, "--slices", "1").out
    assert "channel 2\n" in text
    assert "... and 1 more like these (--slices 2 shows all)" in text


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_explain_bare_whole_numbers(cli: Cli, target: str, tmp_path: Path, rank: int) -> None:
    x, weight = tmp_path / "x.npy", tmp_path / "weight.npy"
    np.save(x, np.indices((5,) * rank).sum(axis=0))
    np.save(weight, np.indices((2,) * rank).sum(axis=0) - 1)
    neuron = ",".join(["1"] * rank)
    ended = cli(
        "explain", "--target", target, "--input", x, "--weight", weight, "--rank", rank, "--neuron", neuron
    )
    assert ended.status == 0
    assert ended.out.splitlines()[-1].endswith("the same")


@pytest.mark.parametrize("activation", ["linear", "relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("first", [(np.nan, 1), (np.inf, 1), (-np.inf, 1), (np.inf, -np.inf)], ids=str)
def test_explain_what_is_not_finite(
    cli: Cli, target: str, tmp_path: Path, first: tuple[float, float], activation: str
) -> None:
    x, weight = tmp_path / "x.npy", tmp_path / "weight.npy"
    np.save(x, np.array([[*first, 2], [3, 4, 5]], np.float32))
    np.save(weight, np.eye(2, dtype=np.float32) + 1)
    command = ["explain", "--target", target, "--input", x, "--weight", weight, "--activation", activation]
    page = cli(*command)
    assert (page.status, page.err) == (0, "")
    assert page.out.endswith("the same\n")
    ended = cli(*command, "--json")
    assert ended.json["agree"] is True
    assert ended.json["computed"] == ended.json["expected"]
    assert ended.json["values"] == [[[str(x) if np.isinf(x) or np.isnan(x) else x for x in first], [3, 4]]]


def test_explain_a_sum_that_the_dtype_cannot_hold(cli: Cli, target: str, tmp_path: Path) -> None:
    x, weight = tmp_path / "x.npy", tmp_path / "weight.npy"
    np.save(x, np.full((2, 2), 30000, np.float16))
    np.save(weight, np.ones((2, 2), np.float16))
    ended = cli("explain", "--target", target, "--input", x, "--weight", weight, "--json")
    assert ended.status == 0
    assert (ended.json["expected"], ended.json["computed"]) == (120000, "inf")


def test_bench_validates_and_times(cli: Cli, target: str) -> None:
    shape = ["--shape", "2,4,16,12", "--weight-shape", "6,2,3,3", "--groups", "2", "--padding", "same"]
    ended = cli("bench", "--target", target, *shape, "--repeat", "3", "--concurrency", "2", "--json")
    assert ended.status == 0
    assert ended.json["requests"] == 3
    assert ended.json["error_share_of_bound"] <= 1
    assert 0 < ended.json["p50_ms"] <= ended.json["p95_ms"]
    assert "latency, p95" in cli("bench", "--target", target, *shape, "--repeat", "2").out


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int16"])
def test_bench_of_every_kind_of_number(cli: Cli, target: str, dtype: str) -> None:
    shape = ["--shape", "1,2,9,9", "--weight-shape", "3,2,3,3"]
    assert cli("bench", "--target", target, *shape, "--dtype", dtype, "--repeat", "1").status == 0


def test_json_is_one_object_and_nothing_else(cli: Cli, target: str) -> None:
    for command in ("health", "info", "example", "explain"):
        ended = cli(command, "--target", target, "--json")
        assert isinstance(json.loads(ended.out), dict)
        assert not ended.err
