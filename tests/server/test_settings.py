"""Settings from flags, the environment and a file: which goes first, and what each refusal says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from convservice.cli.serve import SETTINGS
from convservice.errors import InvalidRequest
from convservice_server.config import ServerConfig
from convservice_server.settings import DEFAULT, FIELDS, PREFIX, gather, unknown_variables

DECLARED = {setting.name: setting for group in SETTINGS.values() for setting in group}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text('max_streams = 3\nidle_timeout = 7\nmemory_budget = "64MiB"\nlog_format = "json"\n')
    return path


def test_every_setting_has_a_flag_a_variable_and_a_place_in_the_file() -> None:
    assert set(DECLARED) == set(FIELDS)
    for name, setting in DECLARED.items():
        assert setting.variable == PREFIX + name.upper()


def test_flags_go_before_the_environment_before_the_file_before_the_defaults(file: Path) -> None:
    environment = {"CONVSERVICE_IDLE_TIMEOUT": "8.5", "CONVSERVICE_MAX_UPLOADS": "2", "HOME": "/"}
    found = gather({"max_uploads": "1", "listen": None}, environment, str(file))
    assert (found.config.max_streams, found.sources["max_streams"]) == (3, str(file))
    assert found.config.memory_budget_bytes == 64 << 20
    assert (found.config.idle_timeout, found.sources["idle_timeout"]) == (8.5, "CONVSERVICE_IDLE_TIMEOUT")
    assert (found.config.max_uploads, found.sources["max_uploads"]) == (1, "--max-uploads")
    assert (found.config.listen, found.sources["listen"]) == ("127.0.0.1:50051", DEFAULT)


def test_the_environment_may_name_the_file(file: Path) -> None:
    environment = {"CONVSERVICE_CONFIG": str(file)}
    assert gather({}, environment).config.max_streams == 3
    assert gather({}, environment, "/dev/null").config == ServerConfig(), "a flag goes first here too"


def test_what_is_printed_is_a_file_that_says_the_same(file: Path, tmp_path: Path) -> None:
    found = gather({"backend": 'a "name"\\'}, {}, str(file))
    printed = tmp_path / "printed.toml"
    printed.write_text(found.as_toml())
    assert gather({}, {}, str(printed)).config == found.config
    unset = {name for name, field in FIELDS.items() if getattr(found.config, field) is None}
    assert set(tomllib.loads(found.as_toml())) == set(FIELDS) - unset
    assert all(f"# {name} is not set  # default\n" in found.as_toml() for name in unset)
    assert f"max_streams = 3  # {file}\n" in found.as_toml()
    assert "lease_seconds = 60  # default\n" in found.as_toml()


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"max_streams": "many"}, {}, "--max-streams: max_streams must be a whole number from 1 to 4096"),
        ({}, {"CONVSERVICE_LISTEN": "here"}, "CONVSERVICE_LISTEN: listen must be HOST:PORT"),
        (
            {},
            {"CONVSERVICE_MEMORY_BUDGET": "a lot"},
            "CONVSERVICE_MEMORY_BUDGET: memory_budget_bytes must be",
        ),
        ({}, {"CONVSERVICE_CONFIG": "/no/such/file"}, "/no/such/file: it cannot be read: No such file"),
    ],
)
def test_a_refusal_says_where_the_value_came_from(
    flags: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        gather(flags, environment)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "there is no setting 'colour'; known are backend, "),
        ("max_streams = ", "it is no TOML file: "),
        ("max_streams = 0", "max_streams must be a whole number from 1 to 4096, not 0"),
        ("max_streams = true", "max_streams must be a whole number from 1 to 4096, not True"),
        ("listen = 5", "listen must be HOST:PORT"),
    ],
)
def test_a_file_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        gather({}, {}, str(path))
    assert caught.value.message.startswith(f"{path}: {message}")


def test_what_looks_like_a_setting_and_is_none_is_found() -> None:
    environment = {
        "CONVSERVICE_LISTNE": "",
        "CONVSERVICE_LISTEN": "",
        "CONVSERVICE_KERNEL_CACHE": "",
        "PATH": "",
    }
    assert unknown_variables(environment) == ["CONVSERVICE_LISTNE"]
