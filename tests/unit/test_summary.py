"""A network as a table."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from convservice import (
    Activation,
    Add,
    AvgPool,
    Conv,
    Flatten,
    InvalidRequest,
    Linear,
    MaxPool,
    Network,
    Node,
)
from convservice.tables import html_table, plain_table


def zeros(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.zeros(shape, np.float32)


@pytest.fixture
def lenet() -> Network:
    """LeNet-5 with full connectivity between its maps; the figures are those of every textbook."""
    return Network(
        [
            Conv(zeros(6, 1, 5, 5), zeros(6), activation="tanh"),
            AvgPool(2),
            Conv(zeros(16, 6, 5, 5), zeros(16), activation="tanh"),
            AvgPool(2),
            Flatten(),
            Linear(zeros(120, 400), zeros(120), activation="tanh"),
            Linear(zeros(84, 120), zeros(84), activation="tanh"),
            Linear(zeros(10, 84), zeros(10)),
        ]
    )


TABLE = """\
input (1, 32, 32)
layer   type           output shape  parameters  unshared  neurons  connections  receptive field  connected to
------  -------------  ------------  ----------  --------  -------  -----------  ---------------  ------------
layer0  Conv (tanh)    (6, 28, 28)          156   122,304    4,704      117,600  5 x 5            input
layer1  AvgPool        (6, 14, 14)            0         0    1,176        4,704  6 x 6            layer0
layer2  Conv (tanh)    (16, 10, 10)       2,416   241,600    1,600      240,000  14 x 14          layer1
layer3  AvgPool        (16, 5, 5)             0         0      400        1,600  16 x 16          layer2
layer4  Flatten        (400,)                 0         0      400          400  16 x 16          layer3
layer5  Linear (tanh)  (120,)            48,120    48,120      120       48,000  32 x 32          layer4
layer6  Linear (tanh)  (84,)             10,164    10,164       84       10,080  32 x 32          layer5
layer7  Linear         (10,)                850       850       10          840  32 x 32          layer6

parameters 61,706 (246,824 bytes); 423,038 if no neuron shared any
neurons 8,494, connections 423,224
outputs: output (layer layer7)"""


def test_the_table(lenet: Network) -> None:
    summary = lenet.summary((1, 32, 32))
    assert str(summary) == repr(summary) == TABLE
    assert str(lenet.summary((8, 1, 32, 32))) == TABLE


def test_the_rows_and_totals(lenet: Network) -> None:
    summary = lenet.summary((1, 32, 32))
    assert summary.parameter_count == lenet.parameter_count == 61_706
    assert summary.neuron_count == sum(row.neuron_count for row in summary.rows) == 8_494
    assert summary.rows[2].output_shape == (16, 10, 10)
    assert summary.rows[2].receptive_field == (14, 14)


def test_branches_heads_and_vectors() -> None:
    weight = zeros(1, 1, 3, 3)
    network = Network(
        [
            Node("trunk", Conv(weight, padding=1)),
            Node("again", Conv(weight, padding=1), ("trunk",)),
            Node("sum", Add(Activation("leaky_relu", 0.1)), ("again", "trunk", "input")),
            Node("low", MaxPool(2), ("sum",)),
        ],
        {"whole": "sum", "small": "low"},
    )
    summary = network.summary((1, 8, 6))
    total = summary.rows[2]
    assert (total.type, total.inputs) == ("Add (leaky_relu)", ("again", "trunk", "input"))
    assert total.connection_count == 3 * total.neuron_count
    assert "again, trunk, input" in str(summary)
    assert str(summary).endswith("outputs: whole (layer sum), small (layer low)")
    assert (summary.parameter_count, summary.weight_bytes) == (18, 36), "one tensor, in two layers"
    vectors = Network([Linear(zeros(3, 7)), Activation("relu")]).summary((7,))
    assert [row.receptive_field for row in vectors.rows] == [(7,), (7,)]
    assert vectors.rows[1].type == "Activation (relu)"


class Cells(HTMLParser):
    """The rows of a table's texts."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_notebook_shows_the_same(lenet: Network) -> None:
    summary: Any = lenet.summary((1, 32, 32))
    html: str = summary._repr_html_()
    cells = Cells()
    cells.feed(html)
    expected = [re.split(r"  +", line) for line in TABLE.splitlines()[1:11] if not line.startswith("---")]
    assert cells.rows == expected
    assert "61,706" in html


def test_texts_are_escaped() -> None:
    html = html_table("a <b>", ("x<", "y "), [("<script>", "&")], ["<i>"])
    assert "<script>" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;" in html
    assert 'style="text-align: right">&amp;</td>' in html


def test_a_table_without_rows() -> None:
    assert plain_table("", ("one", "two "), []) == "one  two\n---  ---"


def test_an_input_that_does_not_fit(lenet: Network) -> None:
    with pytest.raises(
        InvalidRequest, match=r"layer 5 \(Linear, id 'layer5'\): weight has 400 input features"
    ):
        lenet.summary((1, 28, 28))
