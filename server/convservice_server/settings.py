"""Where a server's settings come from: flags, the environment, a file, the defaults, in that order.

Given the flags that a command line had and the process's environment, `gather` hands on a `ServerConfig` and,
for each setting, where its value came from. A setting has one name everywhere: `max_streams` in the file
(TOML), `CONVSERVICE_MAX_STREAMS` in the environment, `--max-streams` as a flag; sizes (`*_bytes` of
`ServerConfig`) go without that ending. Whatever is wrong is refused with the place that it came from.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from convservice.errors import InvalidRequest, Reason
from convservice_server.access import Access
from convservice_server.config import ServerConfig, is_size
from convservice_server.tls import Certificates

PREFIX = "CONVSERVICE_"
"""Of a setting's name in the environment."""

FILE_VARIABLE = "CONVSERVICE_CONFIG"
"""Environment: the file, where no flag names one."""

FIELDS = {entry.name.removesuffix("_bytes"): entry.name for entry in dataclasses.fields(ServerConfig)}
"""A setting's name to the field of `ServerConfig`."""

_TRUTHS: dict[str, bool] = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
"""What may be said for a setting that is true or false."""

DEFAULT = "default"
"""Where a value came from that nobody set."""


@dataclass(frozen=True)
class Settings:
    """What a server is told, and by whom.

    Attributes:
        config: the settings.
        sources: a setting's name to where its value came from: `"--max-streams"`,
            `"CONVSERVICE_MAX_STREAMS"`, the path of a file, or `"default"`.
    """

    config: ServerConfig
    sources: Mapping[str, str]

    def as_toml(self) -> str:
        """A file that says the same, each line with where its value came from; what is unset is a comment."""
        lines = ["# What this server is told. A flag goes before the environment, that before a file."]
        for name, field in FIELDS.items():
            value = getattr(self.config, field)
            said = f"# {name} is not set" if value is None else f"{name} = {_as_toml(value)}"
            lines.append(f"{said}  # {self.sources[name]}")
        return "\n".join(lines) + "\n"


def gather(flags: Mapping[str, Any], environment: Mapping[str, str], file: str | None = None) -> Settings:
    """The settings.

    Args:
        flags: a setting's name to what its flag said; None where it was not given.
        environment: the process's.
        file: path of a TOML file; `CONVSERVICE_CONFIG` of the environment where not given.

    Raises:
        InvalidRequest: a file that cannot be read, a setting that there is not, a value that is empty or out
            of range, tokens or certificates that cannot be used; the message says where it came from.
    """
    layers: list[tuple[str, str, Any]] = []  # setting, source, value; later ones go before earlier ones
    path = environment.get(FILE_VARIABLE) if file is None else file
    if path is not None:
        _check_not_empty(FILE_VARIABLE if file is None else "--config", "config", path)
        layers += [(name, path, value) for name, value in _read(Path(path)).items()]
    layers += [
        (name, variable, environment[variable])
        for name in FIELDS
        if (variable := PREFIX + name.upper()) in environment
    ]
    layers += [
        (name, "--" + name.replace("_", "-"), value) for name, value in flags.items() if value is not None
    ]
    values: dict[str, Any] = {}
    sources = dict.fromkeys(FIELDS, DEFAULT)
    for name, source, value in layers:
        if name not in FIELDS:
            raise _wrong(source, name, f"there is no setting {name!r}; known are {', '.join(sorted(FIELDS))}")
        _check_not_empty(source, name, value)
        values[FIELDS[name]] = _typed(FIELDS[name], value)
        sources[name] = source
    try:
        config = ServerConfig.of(**values)
        Access.of(config)
        Certificates.of(config)
        return Settings(config, sources)
    except InvalidRequest as exc:
        name = (exc.field or "").removesuffix("_bytes")
        source = sources.get(name, DEFAULT)
        raise _wrong(source, name, exc.message) from exc


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of the environment that look like settings and are none."""
    known = {PREFIX + name.upper() for name in FIELDS} | OTHERS
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


OTHERS = {
    FILE_VARIABLE,
    "CONVSERVICE_DEVICE_MEMORY",
    "CONVSERVICE_CUDA_ALGORITHM",
    "CONVSERVICE_KERNEL_CACHE",
    "CONVSERVICE_CLIENT_TOKEN_FILE",
}
"""Names in the environment that others read."""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise _wrong(str(path), "config", f"it cannot be read: {exc.strerror or exc}") from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise _wrong(str(path), "config", f"it is no TOML file: {exc}") from exc


def _check_not_empty(source: str, name: str, value: Any) -> None:
    """Refuses nothing as a value: who sets it may have lost what it should hold, as the path of tokens."""
    if isinstance(value, str) and not value.strip():
        raise _wrong(source, name, f"{name} is empty; leave it out for its default")


def _typed(field: str, value: Any) -> Any:
    """A text as the number or truth that its setting is; `ServerConfig` refuses what is none."""
    kind = get_type_hints(ServerConfig)[field]
    if not isinstance(value, str) or is_size(field):
        return value
    if kind is bool:
        return _TRUTHS.get(value.strip().lower(), value)
    if kind not in (int, float):
        return value
    try:
        return kind(value)
    except ValueError:
        return value


def _as_toml(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrong(source: str, name: str, message: str) -> InvalidRequest:
    return InvalidRequest(
        message if source == DEFAULT else f"{source}: {message}",
        reason=Reason.INVALID_PARAMETER,
        metadata={"name": name, "source": source},
        field=name,
    )


def from_process(flags: Mapping[str, Any], file: str | None = None) -> Settings:
    """`gather` with this process's environment."""
    return gather(flags, os.environ, file)
