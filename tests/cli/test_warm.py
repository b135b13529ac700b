"""Compiling ahead of time, for devices that are not here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convservice_backends.cuda.algorithms.base import every_kernel
from convservice_backends.cupy.cache import FOLDER_VARIABLE
from tests.cli.conftest import Cli

SMALL = ("8,4,3,3", "--shape", "2,4,20,30", "--architecture", "90")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept."""
    kept = tmp_path / "kernels"
    monkeypatch.setenv(FOLDER_VARIABLE, str(kept))
    return kept


def test_what_was_compiled_is_found(cli: Cli, folder: Path) -> None:
    first = cli("warm", *SMALL, "--json").json
    assert first["compiled"] == len(first["kernels"]) > 0
    assert first["found"] == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(first["kernels"].values())
    assert set(first["kernels"]) <= {kernel.name for kernel in every_kernel()}
    second = cli("warm", *SMALL, "--json").json
    assert (second["compiled"], second["found"]) == (0, first["compiled"])
    assert second["kernels"] == first["kernels"]


def test_as_a_page(cli: Cli, folder: Path) -> None:
    ended = cli("warm", *SMALL)
    assert ended.status == 0
    assert "kernels for sm_90" in ended.out
    assert ended.out.splitlines()[-1].endswith(f"0 were there; in {folder}")


def test_integers_are_widened_first(cli: Cli) -> None:
    floats = cli("warm", *SMALL, "--json").json
    integers = cli("warm", *SMALL, "--dtype", "uint8", "--json").json
    (widening,) = set(integers["kernels"]) - set(floats["kernels"])
    assert "uint8_float32" in widening


def test_filters_from_a_file_and_the_options_of_a_convolution(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "weight.npy", np.ones((6, 2, 5), np.float16))
    geometry = ("--groups", "2", "--stride", "3", "--padding", "same", "--activation", "gelu")
    ended = cli(
        "warm", tmp_path / "weight.npy", "--shape", "1,4,1000", "--architecture", "80", *geometry, "--json"
    )
    assert ended.status == 0
    assert any("float16" in name for name in ended.json["kernels"])


def test_images_that_come_in_bands(cli: Cli) -> None:
    ended = cli("warm", "4,3,3,3", "--shape", "1,3,3000,4000", "--architecture", "120", "--json")
    assert ended.status == 0
    assert ended.json["compiled"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8,4,3,3", "--shape", "4,20,30"), "--shape must have 4 sizes of at least 1, samples first"),
        (("8,4,3,3", "--shape", "1,3,20,30"), "channels"),
        (("8,4,3,3", "--shape", "1,4,20,30", "--dtype", "complex64"), "complex64"),
        (("nowhere.npy", "--shape", "1,4,20,30"), "cannot read nowhere.npy"),
    ],
)
def test_wrong_arguments(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    ended = cli("warm", *arguments, "--architecture", "90")
    assert ended.status == 2
    assert message in ended.err


def test_a_device_that_no_kernel_can_be_compiled_for(cli: Cli) -> None:
    ended = cli("warm", *SMALL[:3], "--architecture", "60")
    assert ended.status == 1
    assert "compiles for sm_75" in ended.err


def test_a_folder_that_keeps_nothing(cli: Cli, folder: Path) -> None:
    folder.write_bytes(b"")
    ended = cli("warm", *SMALL)
    assert ended.status == 1
    assert f"cannot be kept in {folder}" in ended.err
