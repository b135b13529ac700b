from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from convservice.dtypes import FLOAT32, DType
from convservice.errors import InvalidRequest, NetworkNotFound
from convservice.tensors import Tensor, as_bytes


def test_the_digest_is_the_one_the_contract_states() -> None:
    values = np.array([[1.5, -2.0, 0.25]], np.float32)
    text = (
        b"convservice.tensor.v1\0float32\0"
        + bytes.fromhex("02000000" + "0100000000000000" + "0300000000000000")  # rank, sizes
        + bytes.fromhex("0000c03f" + "000000c0" + "0000803e")  # 1.5, -2, 0.25
    )
    assert Tensor.of(values).digest == hashlib.sha256(text).digest()
    assert (
        Tensor.of(values).digest.hex() == "b32ba04dc67ec389b67b81451135d0b58ea53f08f15796c3dee8abf8bfea7ac1"
    )


def test_a_tensor_is_a_copy_that_nobody_can_change(float_dtype: DType) -> None:
    given = np.arange(6).reshape(2, 3).astype(float_dtype.numpy)
    tensor = Tensor.of(given)
    given[:] = 0
    assert tensor.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not tensor.array.flags.writeable
    assert tensor.dtype is float_dtype
    assert tensor.nbytes == 6 * float_dtype.itemsize == len(tensor.packed())


def test_tensors_are_equal_by_content() -> None:
    values = np.arange(4.0)
    assert Tensor.of(values) == Tensor.of(values.astype(">f8"))
    assert len({Tensor.of(values), Tensor.of(values[::-1][::-1])}) == 1
    assert Tensor.of(values) != Tensor.of(values.reshape(2, 2))
    assert Tensor.of(values) != Tensor.of(values.astype(np.float32))
    assert Tensor.of(values) != "something else"


def test_a_reference_has_no_values() -> None:
    whole = Tensor.of(np.ones(3, np.float32))
    reference = Tensor.reference(whole.digest, FLOAT32, (3,))
    assert reference == whole
    with pytest.raises(NetworkNotFound, match=whole.digest.hex()) as caught:
        _ = reference.array
    assert caught.value.reason == "WEIGHTS_MISSING"


@pytest.mark.parametrize("array", [np.zeros(3, np.int16), np.zeros((2, 0)), np.array(["a"])])
def test_what_is_no_weight_is_refused(array: Any) -> None:
    with pytest.raises(InvalidRequest):
        Tensor.of(array)


def test_bytes_are_a_view() -> None:
    array = np.arange(3, dtype=np.uint16)
    view = as_bytes(array)
    array[0] = 0x0102
    assert bytes(view[:2]) == b"\x02\x01"
