"""The demonstration behind `make demo`: a server, the worked example, and a photograph.

Starts a server on a free port of this machine with the best backend available, sends it the worked example
and a photograph that matplotlib ships, prints what came back, writes a picture of the photograph beside its
feature maps to demo-output/feature-maps.png, and stops the server.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import image as mpl_image
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

import convservice
from convservice.cli.embedded import EmbeddedServer
from convservice.cli.kernels import KERNELS
from convservice.cli.output import byte_size
from convservice.worked_example import FEATURE_MAP, INPUT, WEIGHT

OUTPUT = Path("demo-output") / "feature-maps.png"

MAPS = {
    "sobel-x": "vertical edges",
    "sobel-y": "horizontal edges",
    "laplacian": "fine detail",
    "gaussian": "blurred",
    "box": "averaged",
    "sharpen": "sharpened",
}
"""The filters, each giving one feature map, and what it shows."""


def main() -> None:
    """Runs the demonstration."""
    with EmbeddedServer() as server, convservice.connect(server.target) as client:
        introduce(client)
        worked_example(client)
        photograph(client)
    print("\nserver stopped")


def introduce(client: convservice.ConvClient) -> None:
    """Prints where the server runs and what it computes on."""
    info = client.info()
    print(f"convservice {info.version}, server at {client.target}")
    for backend in info.backends:
        state = backend.device if backend.available else f"not available: {backend.reason}"
        print(f"  backend {backend.name}: {state}" + (" (used)" if backend.is_default else ""))


def worked_example(client: convservice.ConvClient) -> None:
    """Sends the 5x5 example with its 3x3 filter and prints the feature map."""
    reports: list[convservice.TensorReport] = []
    started = time.perf_counter()
    feature_map = client.conv2d(INPUT, WEIGHT, on_report=reports.append)
    elapsed = time.perf_counter() - started
    if not np.array_equal(feature_map, FEATURE_MAP):
        raise SystemExit(f"the feature map is wrong: {feature_map.tolist()}, not {FEATURE_MAP.tolist()}")
    print("\nworked example: nine neurons look at a 5x5 input with one 3x3 filter")
    for row in range(5):
        line = "  ".join(f"{value:g}" for value in INPUT[row])
        if row < 3:
            weights = "  ".join(f"{value:g}" for value in WEIGHT[row])
            sums = "  ".join(f"{value:2g}" for value in feature_map[row])
            line += f"{'  *  ' if row == 1 else '     '}{weights}{'  =  ' if row == 1 else '     '}{sums}"
        print(f"  {line}")
    describe(INPUT, WEIGHT, feature_map, reports[0], elapsed)


def photograph(client: convservice.ConvClient) -> None:
    """Sends a photograph through a bank of filters and draws the feature maps."""
    path = Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    colour = np.asarray(mpl_image.imread(path))
    grey = np.round(colour @ [0.299, 0.587, 0.114]).astype(np.uint8)
    bank = np.stack([centred(KERNELS[name]) for name in MAPS])[:, None]
    layer = convservice.Conv(bank, padding="same", padding_mode="replicate")

    reports: list[convservice.TensorReport] = []
    started = time.perf_counter()
    feature_maps = client.run(layer, grey[None], on_report=reports.append)
    elapsed = time.perf_counter() - started

    print(f"\nphotograph: {path.name}, {len(MAPS)} filters: {', '.join(MAPS)}")
    describe(grey[None], bank, feature_maps, reports[0], elapsed)
    draw(colour, feature_maps)
    print(f"  written to {OUTPUT}")


def centred(kernel: NDArray[np.float32], size: int = 5) -> NDArray[np.float32]:
    """The kernel in the middle of a square of `size`, so that all filters of the bank have one shape."""
    margin = (size - kernel.shape[0]) // 2
    return np.pad(kernel, margin)


def describe(
    x: NDArray[Any], weight: NDArray[Any], y: NDArray[Any], report: convservice.TensorReport, elapsed: float
) -> None:
    """Prints shapes, backend and times: on the server, and as the caller waited."""
    print(f"  input {x.shape} {x.dtype}, weight {weight.shape}, feature maps {y.shape} {y.dtype}")
    print(f"  computed by {report.backend} ({', '.join(report.algorithms.values())})", end="")
    print(f" with {byte_size(report.reserved_bytes)} of memory reserved")
    print(
        f"  {elapsed * 1e3:.1f} ms for the caller; {report.total * 1e3:.1f} ms on the server, of them"
        f" {report.compute * 1e3:.1f} ms computing"
    )


def draw(colour: NDArray[np.uint8], feature_maps: NDArray[np.float32]) -> None:
    """Draws the photograph beside its feature maps: (rows, columns, 3) and (filters, rows, columns)."""
    figure: Any = Figure(
        figsize=(15, 7.9), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor="white"
    )
    # Any: matplotlib's own annotations are partial.
    figure.suptitle(f"one convolutional layer, {len(MAPS)} filters, {len(MAPS)} feature maps", fontsize=16)
    panels = figure.subplot_mosaic([["photo", "photo", *range(3)], ["photo", "photo", *range(3, 6)]])
    panels["photo"].imshow(colour)
    panels["photo"].set_title("photograph", fontsize=14)
    for at, (name, shows) in enumerate(MAPS.items()):
        feature_map = feature_maps[at]
        if KERNELS[name].sum() == 0:  # either sign: grey is 0, white and black are the two directions
            reach = float(np.percentile(np.abs(feature_map), 98.5))
            panels[at].imshow(feature_map, cmap="gray", vmin=-reach, vmax=reach)
        else:
            panels[at].imshow(feature_map, cmap="gray", vmin=0, vmax=255)
        panels[at].set_title(f"{name}: {shows}", fontsize=12)
    for panel in panels.values():
        panel.set_axis_off()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
