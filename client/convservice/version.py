"""The version of the installed package, as its metadata states it."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("convservice")
except metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
