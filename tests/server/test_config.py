"""The server's settings: defaults, overrides, and what each refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from convservice.errors import InvalidRequest, Reason
from convservice_server.config import MIB, ServerConfig
from convservice_server.resources import limits


def test_the_defaults_are_valid_and_leave_workers_for_unary_calls() -> None:
    config = ServerConfig()
    assert config.address == ("127.0.0.1", 50051)
    assert config.pool_size == config.max_streams + config.max_uploads + config.unary_workers
    assert config.memory_budget_bytes + config.weights_budget_bytes < limits().memory_bytes
    assert config.max_message_bytes == 4 * MIB


def test_none_stands_for_the_default() -> None:
    config = ServerConfig.of(listen=None, max_uploads=None, idle_timeout=2)
    assert (config.listen, config.max_uploads, config.idle_timeout) == (
        "127.0.0.1:50051",
        ServerConfig().max_uploads,
        2,
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000000", 10**6), ("512K", 512 << 10), ("64MiB", 64 << 20), ("2gb", 2 << 30), (" 1 TiB ", 1 << 40)],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert ServerConfig.of(memory_budget_bytes=text).memory_budget_bytes == size


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "localhost:65535", "[::1]:50051"])
def test_addresses(listen: str) -> None:
    assert f"{ServerConfig(listen=listen).address[0]}:{ServerConfig(listen=listen).address[1]}" == listen


@pytest.mark.parametrize(
    ("settings", "name", "rule"),
    [
        ({"listen": "50051"}, "listen", "HOST:PORT"),
        ({"listen": "localhost:65536"}, "listen", "0 to 65535"),
        ({"listen": "::1:50051"}, "listen", "HOST:PORT"),
        ({"max_streams": 0}, "max_streams", "from 1 to 4096"),
        ({"max_streams": True}, "max_streams", "whole number"),
        ({"unary_workers": 2.5}, "unary_workers", "whole number"),
        ({"memory_budget_bytes": "lots"}, "memory_budget_bytes", "number of bytes"),
        ({"weights_budget_bytes": -1}, "weights_budget_bytes", "from 1"),
        ({"max_message_bytes": 1024}, "max_message_bytes", "from"),
        ({"max_unary_bytes": 8 * MIB}, "max_message_bytes", "max_unary_bytes + max_inline_weight_bytes"),
        ({"idle_timeout": 0}, "idle_timeout", "above 0"),
        ({"crowd_timeout": 0}, "crowd_timeout", "above 0"),
        ({"idle_timeout": float("nan")}, "idle_timeout", "seconds"),
        ({"drain_grace": -1}, "drain_grace", "at least 0"),
        ({"log_format": "xml"}, "log_format", "'text' or 'json'"),
        ({"log_level": "loud"}, "log_level", "'debug'"),
        ({"backend": ""}, "backend", "name or 'auto'"),
        ({"colour": "red"}, "colour", "one of the settings backend, "),
    ],
)
def test_a_refusal_names_the_setting_and_the_rule(settings: dict[str, Any], name: str, rule: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ServerConfig.of(**settings)
    assert caught.value.reason == Reason.INVALID_PARAMETER
    assert caught.value.field == name
    assert caught.value.message.startswith(name)
    assert rule in caught.value.message
