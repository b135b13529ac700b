"""Prints what pip is to install for the project and some of its extras, without the project itself.

Given the path of a pyproject.toml and extras, comma-separated, it hands on one requirement a line on standard
output; with `--build` in place of the extras, what builds the project. A container image installs these in a
layer of its own, which changes only when they do.

    python tools/requirements.py pyproject.toml server,otel
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Return the requirements of the base install and of `extras`.

    Raises:
        ValueError: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    known: dict[str, list[str]] = project["optional-dependencies"]
    unknown = sorted(set(extras) - set(known))
    if unknown:
        raise ValueError(f"there is no extra {unknown[0]!r} in {pyproject}; known are {', '.join(known)}")
    return [*project["dependencies"], *(line for extra in extras for line in known[extra])]


def build_requirements(pyproject: Path) -> list[str]:
    """Return what builds the project."""
    found: list[str] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["build-system"]["requires"]
    return found


def main() -> None:
    """Print the requirements that the command line asks for."""
    pyproject, wanted = Path(sys.argv[1]), sys.argv[2]
    if wanted == "--build":
        found = build_requirements(pyproject)
    else:
        found = requirements(pyproject, [name.strip() for name in wanted.split(",") if name.strip()])
    print("\n".join(found))


if __name__ == "__main__":
    main()
