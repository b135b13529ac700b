"""The worked example, exact on every backend, dtype and rank."""

from __future__ import annotations

import numpy as np
import pytest

from convservice.dtypes import DTYPES, FLOAT32, DType
from convservice.layers import Conv
from convservice.network import Network
from convservice_backends.interface import Backend
from tests.helpers import compute, worked_example


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_it_is_exact(
    backend: Backend, rank: int, rows: int | None, input_dtype: DType, weight_dtype: DType
) -> None:
    x, weight, fm = worked_example(rank, input_dtype, weight_dtype)
    found = compute(backend, Network([Conv(weight, np.zeros(1, weight.dtype))]), x, rows=rows)["output"]
    assert found.dtype == weight_dtype.numpy
    assert found.tolist() == fm.tolist()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_it_is_exact_in_every_result_dtype(
    backend: Backend, out_dtype: DType, input_dtype: DType, weight_dtype: DType
) -> None:
    x, weight, fm = worked_example(2, input_dtype, weight_dtype)
    found = compute(backend, Network([Conv(weight)]), x, out_dtype=out_dtype)["output"]
    assert found.dtype == out_dtype.numpy
    assert found.tolist() == fm.tolist()


def test_the_neurons_of_a_deeper_network(backend: Backend) -> None:
    x, weight, _ = worked_example(2, FLOAT32, FLOAT32)
    found = compute(backend, Network([Conv(weight), Conv(weight, activation="relu")]), x)["output"]
    # 12 12 17 / 10 17 19 / 9 6 14 under the same weights: 1*12 + 2*17 + 2*10 + 2*17 + 1*6 + 2*14
    assert found.tolist() == [[[[134.0]]]]
