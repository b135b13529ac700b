"""Prints a pip constraints file that holds every dependency to its declared floor.

Given the path of a pyproject.toml, it reads the project's dependencies and extras and hands on one line
`name==floor` for each, on standard output. What is pinned has no other version to try. A dependency without a
floor is an error: nobody has tried it.
"""

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*>=\s*(?P<floor>[0-9][0-9.]*)")
PINNED = re.compile(r"[A-Za-z0-9._-]+\s*==")


def lowest_versions(pyproject: Path) -> list[str]:
    """Return the sorted constraints `name==floor` of the base install and of every extra.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups: list[list[str]] = [project["dependencies"], *project["optional-dependencies"].values()]
    constraints: set[str] = set()
    for requirement in (requirement for group in groups for requirement in group):
        if PINNED.match(requirement):
            continue
        found = REQUIREMENT.match(requirement)
        if found is None:
            raise ValueError(
                f"every dependency states its floor as 'name>=version', {pyproject} has {requirement!r}"
            )
        constraints.add(f"{found['name']}=={found['floor']}")
    return sorted(constraints)


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(sys.argv[1]))))
