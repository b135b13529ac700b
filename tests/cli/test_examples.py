"""The examples and the streaming benchmark run, small, as users start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    printed = run(tmp_path, ROOT / "examples" / "demo.py")
    assert "  0  0  1  3  1  *  2  2  0  =  10  17  19" in printed
    assert "feature maps (6, 600, 512) float32" in printed
    with Image.open(tmp_path / "demo-output" / "feature-maps.png") as image:
        assert image.width > 1000


def test_the_pipeline(target: str, tmp_path: Path) -> None:
    stripes = np.zeros((40, 60, 3), np.uint8)
    stripes[:, ::8] = 255
    Image.fromarray(stripes).save(tmp_path / "fence.png")
    Image.fromarray(stripes.swapaxes(0, 1)).save(tmp_path / "shelves.png")
    drawn = tmp_path / "edges"
    drawn.mkdir()
    printed = run(tmp_path, ROOT / "examples" / "pipeline.py", target, tmp_path, "--output", drawn)
    assert "fence.png: (40, 60, 4), edges mostly vertical" in printed
    assert "shelves.png: (60, 40, 4), edges mostly horizontal" in printed
    with Image.open(drawn / "fence.png") as image:
        edges = np.asarray(image)
    assert edges.shape == (40, 60)
    assert (edges[0] == edges).all(), "the fence's edges are the same in every row"
    assert edges.max() > 128 > edges.min()


def test_the_stream(target: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / "stream_larger_than_memory.py"
    printed = run(tmp_path, script, target, "--height", 40)
    assert "row 40 of 40" in printed


def test_the_streaming_benchmark(tmp_path: Path) -> None:
    printed = run(ROOT, "-m", "benchmarks.stream", "--gib", "0.03", "--output", tmp_path / "stream.md")
    assert "server, peak above idle" in printed
    assert "| sent when the first row came back |" in (tmp_path / "stream.md").read_text()
