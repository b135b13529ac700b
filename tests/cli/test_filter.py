"""`convservice filter`: files in, files out, compared with a convolution computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from convservice.cli.kernels import KERNELS, finds_edges
from tests.cli.conftest import Cli

Filtered = Callable[..., NDArray[Any]]


def filtered_here(pixels: NDArray[Any], kernel: NDArray[Any], response: str) -> NDArray[Any]:
    """Each channel of (rows, columns, channels) correlated in float64, rounded, saturated."""
    weights = np.asarray(kernel, np.float64)
    if np.allclose(weights * 9, 1):
        weights = np.full(weights.shape, 1 / 9)  # a ninth that float32 cannot hold
    planes = [
        ndimage.correlate(pixels[:, :, channel].astype(np.float64), weights, mode="nearest")
        for channel in range(pixels.shape[2])
    ]
    sums = np.stack(planes, axis=2)
    largest = np.iinfo(pixels.dtype).max
    if response == "absolute":
        sums = np.abs(sums)
    elif response == "offset":
        sums = sums + (largest + 1) // 2
    return np.clip(np.rint(sums), 0, largest).astype(pixels.dtype)


@pytest.fixture
def filtered(cli: Cli, target: str, tmp_path: Path) -> Filtered:
    """Has an image filtered on the server, and reads what was written."""

    def run(image: Image.Image, kernel: object, *options: object) -> NDArray[Any]:
        image.save(tmp_path / "in.tif")
        names = [tmp_path / "in.tif", "--kernel", kernel, "-o", tmp_path / "out.tif"]
        ended = cli("filter", *names, "--target", target, *options)
        assert (ended.status, ended.err) == (0, "")
        with Image.open(tmp_path / "out.tif") as written:
            return np.array(written)

    return run


def noise(rng: np.random.Generator, *shape: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_on_a_colour_image(filtered: Filtered, rng: np.random.Generator, kernel: str) -> None:
    pixels = noise(rng, 31, 23, 3)
    response = "absolute" if finds_edges(KERNELS[kernel]) else "clip"
    written = filtered(Image.fromarray(pixels), kernel)
    np.testing.assert_array_equal(written, filtered_here(pixels, KERNELS[kernel], response))


@pytest.mark.parametrize("response", ["clip", "absolute", "offset"])
def test_every_response(filtered: Filtered, rng: np.random.Generator, response: str) -> None:
    pixels = noise(rng, 9, 14)
    written = filtered(Image.fromarray(pixels), "laplacian", "--response", response)
    expected = filtered_here(pixels[:, :, None], KERNELS["laplacian"], response)
    np.testing.assert_array_equal(written, expected[:, :, 0])


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept(filtered: Filtered, rng: np.random.Generator, channels: int) -> None:
    pixels = noise(rng, 12, 10, channels)
    written = filtered(Image.fromarray(pixels), "box")
    np.testing.assert_array_equal(written[:, :, -1], pixels[:, :, -1])
    expected = filtered_here(pixels[:, :, :-1], KERNELS["box"], "clip")
    np.testing.assert_array_equal(written[:, :, :-1], expected)


def test_sixteen_bit_grey_stays_sixteen_bit(filtered: Filtered, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 1 << 16, (11, 8), dtype=np.uint16)
    written = filtered(Image.fromarray(pixels), "sobel-y")
    assert written.dtype == np.uint16
    expected = filtered_here(pixels[:, :, None], KERNELS["sobel-y"], "absolute")
    np.testing.assert_array_equal(written, expected[:, :, 0])


@pytest.mark.parametrize("mode", ["1", "P", "CMYK"])
def test_other_modes_become_grey_or_colour(filtered: Filtered, rng: np.random.Generator, mode: str) -> None:
    image = Image.fromarray(noise(rng, 8, 8, 3)).convert(mode)
    plain = np.atleast_3d(np.asarray(image.convert("L" if mode == "1" else "RGB")))
    written = np.atleast_3d(filtered(image, "gaussian"))
    np.testing.assert_array_equal(written, filtered_here(plain, KERNELS["gaussian"], "clip"))


def test_a_kernel_from_a_file_even_and_larger_than_the_image(
    filtered: Filtered, tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = noise(rng, 3, 5)
    kernel = rng.integers(-2, 3, (4, 7))
    kernel[0, 0] += 1 - kernel.sum()
    np.save(tmp_path / "kernel.npy", kernel)
    written = filtered(Image.fromarray(pixels), tmp_path / "kernel.npy")
    around = np.pad(pixels.astype(int), [(1, 2), (3, 3)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(around, kernel.shape)
    expected = np.clip((windows * kernel).sum(axis=(2, 3)), 0, 255)
    np.testing.assert_array_equal(written, expected)


def test_an_image_of_several_megabytes(filtered: Filtered, rng: np.random.Generator) -> None:
    pixels = noise(rng, 1100, 900, 3)
    written = filtered(Image.fromarray(pixels), "sharpen")
    np.testing.assert_array_equal(written, filtered_here(pixels, KERNELS["sharpen"], "clip"))


@pytest.mark.parametrize("limit", [100, 10])
def test_an_image_beyond_pillows_limit(
    cli: Cli, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    Image.fromarray(np.full((12, 15), 7, np.uint8)).save(tmp_path / "in.png")
    names = [tmp_path / "in.png", "--kernel", "gaussian", "-o", tmp_path / "out.png"]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns beyond it, and refuses beyond twice
        ended = cli("filter", *names, "--target", target)
        assert (ended.status, ended.err) == (0, "")
        assert limit == Image.MAX_IMAGE_PIXELS
    with Image.open(tmp_path / "out.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.full((12, 15), 7))


def test_an_image_beyond_memory(cli: Cli, target: str, tmp_path: Path) -> None:
    (tmp_path / "in.ppm").write_bytes(b"P6 2000000000 3 255\n")
    names = [tmp_path / "in.ppm", "--kernel", "box", "-o", tmp_path / "out.png"]
    ended = cli("filter", *names, "--target", target)
    assert ended.status == 1
    assert ended.err == "convservice: there is no memory here for an image of 2000000000x3 pixels\n"


def test_what_it_says_of_itself(cli: Cli, target: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((31, 23, 3), np.uint8)).save(tmp_path / "in.png")
    command = [
        "filter",
        tmp_path / "in.png",
        "--kernel",
        "box",
        "-o",
        tmp_path / "out.png",
        "--target",
        target,
    ]
    assert "23x31, 3 channels of uint8, box (clip)" in cli(*command).out
    said = cli(*command, "--json").json
    assert (said["shape"], said["dtype"], said["alpha"]) == ([31, 23, 3], "uint8", False)


def test_an_image_is_turned_upright(cli: Cli, target: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((4, 6), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # held a quarter turn to the side
    image.save(tmp_path / "in.jpg", exif=exif)
    cli("filter", tmp_path / "in.jpg", "--kernel", "box", "-o", tmp_path / "out.png", "--target", target)
    with Image.open(tmp_path / "out.png") as written:
        assert written.size == (4, 6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["missing.png", "box", "out.png"], "cannot read {}/missing.png: No such file or directory"),
        (["text.png", "box", "out.png"], "{}/text.png is no image of a format that can be read here"),
        (["deep.tif", "box", "out.png"], "an image of mode F has 32 bits per pixel"),
        (["good.png", "blur", "out.png"], "--kernel must be sobel-x, sobel-y, gaussian, sharpen, box"),
        (["good.png", "{}/missing.npy", "out.png"], "cannot read {}/missing.npy: No such file or directory"),
        (["good.png", "{}/text.npy", "out.png"], "cannot read {}/text.npy: it is no .npy file of numbers"),
        (["good.png", "{}/cube.npy", "out.png"], "a kernel is a matrix (kh, kw) of real numbers"),
        (["good.png", "{}/nan.npy", "out.png"], "a kernel's weights must be finite in float32"),
        (["good.png", "box", "out.xyz"], "cannot write {}/out.xyz: its name says no known image format"),
        (["good.png", "box", "no/out.png"], "cannot write {}/no/out.png: No such file or directory"),
    ],
)
def test_what_a_user_may_get_wrong(
    cli: Cli, target: str, tmp_path: Path, names: Sequence[str], message: str
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "good.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "deep.tif")
    image, kernel, output = names
    files = [tmp_path / image, "--kernel", kernel.format(tmp_path), "-o", tmp_path / output]
    ended = cli("filter", *files, "--target", target)
    assert ended.status == 2
    assert message.format(tmp_path) in ended.err
    assert ended.err.count("\n") == 1
