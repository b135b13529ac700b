"""A client in a forked child: it opens a channel of its own, and the parent's goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import convservice
from tests.client.fake import FakeServer, relu

SCRIPT = """
import os, signal, sys
import numpy as np
import convservice

x = np.arange(-12, 12, dtype="float32").reshape(1, 2, 3, 4)
large = np.tile(x, (1, 1, 100, 600))
layer = convservice.Activation("relu")
client = convservice.connect(sys.argv[1])

def use():
    assert np.array_equal(client.run(layer, x), np.maximum(x, 0))
    assert np.array_equal(client.run(layer, large), np.maximum(large, 0))
    assert len(list(client.map(layer, [x] * 5))) == 5

use()
for kind in ("exit", "close and exit", "fork again"):
    child = os.fork()
    if not child:
        signal.alarm(60)
        use()
        if kind == "fork again":
            grandchild = os.fork()
            use()
            if grandchild:
                assert os.waitpid(grandchild, 0)[1] == 0
        elif kind == "close and exit":
            client.close()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0, kind
    use()
client.close()
print("done")
"""


@pytest.mark.parametrize("count", [1, 3])
def test_parent_child_and_grandchild_use_the_same_client(servers: list[FakeServer], count: int) -> None:
    root = Path(__file__).parents[2]
    target = ",".join(server.target for server in servers[:count])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, target],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=root,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    with convservice.connect(target) as client:
        client.run(relu(), [[[[1.0]]]])
