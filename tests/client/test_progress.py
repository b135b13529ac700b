"""Progress: a callback, or a bar."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest

from convservice import ConvClient, InvalidRequest, Progress
from tests.client.fake import relu

X = np.ones((1, 3, 500, 600), "float32")


def check(seen: list[Progress], total: int | None, size: int) -> None:
    assert all(now.total_bytes == now.received_total == total for now in seen)
    for before, now in itertools.pairwise(seen):
        assert before.sent_bytes <= now.sent_bytes
        assert before.received_bytes <= now.received_bytes
    assert (seen[-1].sent_bytes, seen[-1].received_bytes) == (size, size)


def test_a_large_tensor_tells_every_step(client: ConvClient) -> None:
    seen: list[Progress] = []
    client.run(relu(), X, progress=seen.append)
    assert len(seen) >= 6
    check(seen, X.nbytes, X.nbytes)


def test_a_small_tensor_tells_its_end(client: ConvClient) -> None:
    seen: list[Progress] = []
    client.run(relu(), X[..., :5], progress=seen.append)
    check(seen, X[..., :5].nbytes, X[..., :5].nbytes)


@pytest.mark.parametrize("height", [500, None])
def test_a_stream_tells_every_step(client: ConvClient, height: int | None) -> None:
    seen: list[Progress] = []
    bands = [X[0, :, i : i + 50] for i in range(0, 500, 50)]
    list(client.stream(relu(), bands, shape=(3, height, 600), dtype="float32", progress=seen.append))
    check(seen, X.nbytes if height else None, X.nbytes)


@pytest.mark.parametrize("x", [X, X[..., :5]])
def test_a_callback_that_fails_comes_out(client: ConvClient, x: Any) -> None:
    def fail(now: Progress) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        client.run(relu(), x, progress=fail)
    assert client.run(relu(), x).shape == x.shape


def test_a_bar_is_drawn_on_standard_error(client: ConvClient, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="the bar is drawn with the package rich")
    client.run(relu(), X, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sent" in printed.err
    assert "received" in printed.err


def test_a_bar_without_rich_says_what_to_install(client: ConvClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidRequest, match=r"pip install 'convservice\[cli\]'"):
        client.run(relu(), X, progress=True)
