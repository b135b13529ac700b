"""The README's examples run, in order, and print what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_code_runs(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where it writes its files
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("localhost:50051", target), str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("[[12. 12. 17.]\n [10. 17. 19.]\n [ 9.  6. 14.]]\n(300, 256, 8)\n(4, 20, 25)\n")
    assert printed.endswith("the input has 4 channels in 1 group\nCHANNEL_MISMATCH\n")
    table = str(names["images"].summary((1, 32, 32)))
    assert table in printed
    assert f"```\n{table}\n```" in README.read_text()
    assert names["images"].receptive_field((0, 0), (1, 32, 32)).inside == ((0, 14), (0, 14))
    shapes = {"classes": (4, 10), "mask": (4, 1, 16, 16)}
    assert names["heads"].output_shape((4, 3, 32, 32)) == shapes
    assert names["layer"].output_shape((1, 5, 5)) == (1, 3, 3)
    assert names["layer"].receptive_field((1, 0), (1, 5, 5)).inside == ((1, 4), (0, 3))


def test_the_readmes_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
