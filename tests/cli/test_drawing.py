"""Pictures of neurons and feature maps: sizes, frames, colours, numbers, and what a newcomer gets wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import convservice
from convservice import (
    AvgPool,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    Linear,
    LocallyConnected,
    MaxPool,
    Network,
)
from convservice.cli.drawing import FIELD, NEURON, TIMES
from tests.cli.conftest import Cli


def share(image: Image.Image, colour: str) -> float:
    """How much of an image has a colour, of the whole."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    found: Any = (np.abs(pixels - wanted) <= 4).all(axis=-1)
    return float(found.mean())


def test_a_picture_has_the_field_and_the_neuron(cli: Cli, target: str, tmp_path: Path) -> None:
    path = tmp_path / "neuron.png"
    ended = cli("explain", "--target", target, "--neuron", "1,0", "-o", path)
    assert (ended.status, ended.out, ended.err) == (0, f"{path}: 1 neuron of Conv\n", "")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == pytest.approx((818, 572), abs=2)
        field, neuron = share(image, FIELD), share(image, NEURON)
    assert 7 < field / neuron < 11, "nine cells, less the numbers in them, beside one"
    first = path.read_bytes()
    cli("explain", "--target", target, "--neuron", "1,0", "-o", path)
    assert path.read_bytes() == first, "the same every time"


def test_an_svg_has_the_numbers_as_texts(cli: Cli, target: str, tmp_path: Path) -> None:
    path = tmp_path / "neuron.svg"
    assert cli("explain", "--target", target, "--neuron", "0,0", "--padding", "1", "-o", path).status == 0
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert sorted(one for one in shown if one.startswith(TIMES)) == sorted(
        f"{TIMES}{weight}" for weight in (0, 1, 2, 2, 2, 0, 0, 1, 2)
    )
    assert "Conv, neuron (0, 0) of channel 0" in shown
    assert any(one.endswith(" = 6") for one in shown)
    assert 'fill="url(#' in text or "pattern" in text, "padding is hatched"


def test_an_animation_has_a_frame_for_every_neuron(cli: Cli, target: str, tmp_path: Path) -> None:
    path = tmp_path / "neurons.gif"
    ended = cli("explain", "--target", target, "-o", path, "--json")
    assert [one["neuron"] for one in ended.json["neurons"]] == [[i, j] for i in range(3) for j in range(3)]
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 9
        assert image.info["loop"] == 0
        places: list[Any] = []
        for frame in range(9):
            image.seek(frame)
            pixels = np.asarray(image.convert("RGB")).astype(int)
            blue = (np.abs(pixels - [0xA5, 0xD8, 0xFF]) <= 6).all(axis=-1)
            places.append(tuple(int(at.mean()) for at in np.nonzero(blue)))
    assert len(set(places)) == 9, "the neuron moves"
    assert places == sorted(places)


def test_every_neuron_as_pages(cli: Cli, target: str) -> None:
    ended = cli("explain", "--target", target, "--every")
    assert ended.status == 0
    assert ended.out.count("the same") == 9


LAYERS: dict[str, tuple[convservice.Layer, tuple[int, ...], str, str]] = {
    "max": (MaxPool(2, padding=1), (2, 5, 4), "1,1", "largest of 4"),
    "corner": (AvgPool(2, padding=1), (2, 5, 4), "0,0", "sum of 1 over 4"),
    "average": (AvgPool(2, padding=1, count_include_pad=False), (2, 5, 4), "0,1", "sum of 2 over 2"),
    "global max": (GlobalMaxPool(), (2, 3, 4), "0,0", "largest of 12"),
    "global average": (GlobalAvgPool(), (2, 3, 4), "0,0", "sum of 12 over 12"),
    "line": (MaxPool(3, dilation=2), (2, 9), "1", "in steps of 2"),
    "volume": (AvgPool(2), (1, 4, 4, 4), "1,0,1", "sum of 8 over 8"),
    "unshared": (
        LocallyConnected(
            np.arange(2 * 1 * 2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 1, 2, 3, 2, 2), groups=2
        ),
        (2, 3, 4),
        "1,2",
        "sum of the 4 products",
    ),
    "transposed": (
        ConvTranspose(
            np.arange(4 * 2 * 3 * 3, dtype=np.float32).reshape(4, 2, 3, 3),
            np.arange(4, dtype=np.float32),
            stride=2,
            padding=1,
            groups=2,
            activation="relu",
        ),
        (4, 3, 3),
        "1,2",
        "sum of the 4 products",
    ),
    "none": (ConvTranspose(np.ones((1, 1, 1, 1), np.float32), stride=2), (1, 3, 3), "1,1", "no rows"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("suffix", [".svg", ".gif"])
def test_every_layer_with_windows(cli: Cli, target: str, tmp_path: Path, name: str, suffix: str) -> None:
    rng = np.random.default_rng(3)
    layer, shape, neuron, line = LAYERS[name]
    network, x = tmp_path / "one.safetensors", tmp_path / "x.npy"
    convservice.save(layer, network)
    np.save(x, rng.integers(-9, 9, (1, *shape)).astype(np.float32))
    command = ["explain", "--target", target, "--network", network, "--input", x]
    page = cli(*command, "--neuron", neuron)
    assert (page.status, page.err) == (0, "")
    assert line in page.out
    assert "  the same" in page.out.splitlines()[-1]
    everything = cli(*command, "--every", "--json").json["neurons"]
    assert all(one["agree"] for one in everything)
    one = ["--neuron", neuron] if suffix == ".svg" else []
    drawn = cli(*command, *one, "-o", tmp_path / f"picture{suffix}")
    assert (drawn.status, drawn.err) == (0, "")


def saved(path: Path, rng: np.random.Generator) -> Network:
    """A small network for grey images, in a file."""
    network = Network(
        [
            Conv(rng.normal(size=(3, 1, 3, 3)).astype(np.float32), padding=1, activation="relu"),
            MaxPool(2),
            Conv(rng.normal(size=(20, 3, 3, 3)).astype(np.float32)),
            GlobalAvgPool(),
            Flatten(),
            Linear(rng.normal(size=(5, 20)).astype(np.float32)),
        ]
    )
    convservice.save(network, path)
    return network


def test_a_layer_within_a_network(cli: Cli, target: str, tmp_path: Path, rng: np.random.Generator) -> None:
    network, x = tmp_path / "net.safetensors", tmp_path / "x.npy"
    saved(network, rng)
    np.save(x, rng.normal(size=(1, 40, 30)).astype(np.float32))
    command = ["explain", "--target", target, "--network", network, "--input", x]
    assert cli(*command, "--json").json["input_channels"] == [0, 1], "the first convolution"
    ended = cli(*command, "--layer", "layer2", "--channel", "7", "--neuron", "9,9", "-o", tmp_path / "a.png")
    assert (ended.status, ended.out) == (0, f"{tmp_path / 'a.png'}: 1 neuron of layer2 (Conv)\n")
    wrong: list[tuple[list[Any], str]] = [
        (["--layer", "layer4"], "--layer must name a convolution or pooling of"),
        (["--stride", "2"], "have their own weights and geometry: it takes no --stride"),
        (["--every"], "the feature map has 40x30 neurons; at most 400 are shown in turn"),
    ]
    for options, message in wrong:
        ended = cli(*command, *options)
        assert (ended.status, message in ended.err) == (2, True), ended.err
    ended = cli("explain", "--network", network)
    assert (ended.status, "--network needs --input" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "picture.bmp"], "-o must end with .png, .svg, .gif, not 'picture.bmp'"),
        (["-o", "picture"], "-o must end with .png, .svg, .gif, not 'picture'"),
        (["-o", "picture.png", "--every"], "give -o a name that ends with .gif"),
        (["--every", "--neuron", "1,1"], "--every is for all neurons and --neuron for one"),
        (["--layer", "layer0"], "it needs --network"),
        (["--network", "missing.safetensors", "--input", "x.npy"], "cannot read missing.safetensors"),
    ],
)
def test_what_a_newcomer_gets_wrong(cli: Cli, options: list[str], message: str) -> None:
    ended = cli("explain", *options)
    assert ended.status == 2
    assert message in ended.err


def test_a_folder_that_is_not_there(cli: Cli, target: str, tmp_path: Path) -> None:
    ended = cli("explain", "--target", target, "-o", tmp_path / "nowhere" / "a.png")
    assert (ended.status, "cannot write" in ended.err) == (2, True)


def test_without_matplotlib_it_says_what_to_install(
    cli: Cli, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = cli("explain", "--target", target, "-o", tmp_path / "a.png")
    assert ended.status == 1
    assert "pip install 'convservice[cli]'" in ended.err


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_maps_of_every_layer(cli: Cli, target: str, tmp_path: Path, mode: str, suffix: str) -> None:
    rng = np.random.default_rng(3)
    saved(tmp_path / "net.safetensors", rng)
    image, output = tmp_path / "image.png", tmp_path / f"maps{suffix}"
    Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).convert(mode).save(image)
    command = [
        "show-maps",
        image,
        "--network",
        tmp_path / "net.safetensors",
        "--target",
        target,
        "-o",
        output,
    ]
    ended = cli(*command)
    assert (ended.status, ended.out, ended.err) == (0, f"{output}: the feature maps of 6 layers\n", "")
    assert cli(*command, "--json").json["layers"] == {
        "layer0": [3, 24, 20],
        "layer1": [3, 12, 10],
        "layer2": [20, 10, 8],
        "layer3": [20, 1, 1],
        "layer4": [20],
        "layer5": [5],
    }
    if suffix == ".svg":
        text = output.read_text(encoding="utf-8")
        assert "layer0   Conv (relu)   3 x 24 x 20" in text
        assert "layer2   Conv   20 x 10 x 8, the first 16" in text
        assert text.count("<image") == 3 + 3 + 16 + 3
    else:
        with Image.open(output) as written:
            assert written.size == pytest.approx((1180, 984), abs=3)


def test_the_maps_of_a_registered_network(
    cli: Cli, target: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    network, image = saved(tmp_path / "net.safetensors", rng), tmp_path / "image.png"
    Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8)).save(image)
    with convservice.connect(target) as client:
        name = client.register(network).name
        before = client.networks()
        command = ["show-maps", image, "--network", name, "-o", tmp_path / "maps.png"]
        assert cli(*command, "--target", target).status == 0
        assert set(client.networks()) <= set(before), "nothing more is registered than before"
        client.unregister(name)
    ended = cli(*command)
    assert (ended.status, "needs --target HOST:PORT" in ended.err) == (2, True)


def test_an_image_that_a_network_does_not_take(cli: Cli, target: str, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    wrong: dict[str, tuple[convservice.Layer, str]] = {
        "five": (Conv(np.ones((1, 5, 3, 3), np.float32)), "the network takes 5 channels, the image has 3"),
        "line": (Conv(np.ones((1, 3, 3), np.float32)), "an image has 2 spatial axes, the network's input 1"),
        "large": (Conv(np.ones((1, 3, 30, 3), np.float32)), "the output would be empty"),
    }
    for name, (layer, message) in wrong.items():
        convservice.save(layer, tmp_path / name)
        ended = cli("show-maps", image, "--network", tmp_path / name, "--target", target)
        assert (ended.status, message in ended.err) == (2, True), ended.err
    ended = cli("show-maps", image, "--network", tmp_path / "five", "-o", "maps.bmp")
    assert (ended.status, "-o must end with .png, .svg, .pdf, not 'maps.bmp'" in ended.err) == (2, True)
