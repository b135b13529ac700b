from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from convservice.dtypes import DTYPES, DType, dtype_of, dtype_of_wire
from convservice.errors import InvalidRequest
from convservice.v1 import conv_pb2 as pb

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
def test_a_dtype_is_found_by_every_spelling(dtype: DType) -> None:
    array = np.zeros(1, dtype.numpy)
    for spelling in (dtype, dtype.name, dtype.numpy, array.dtype, array.dtype.type, dtype.packed):
        assert dtype_of(spelling) is dtype
    assert dtype_of_wire(dtype.wire, "data_type") is dtype


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.name != "bfloat16" and d.itemsize > 1], ids=str)
def test_big_endian_arrays_have_the_same_dtype(dtype: DType) -> None:
    assert dtype_of(dtype.numpy.newbyteorder(">")) is dtype


@each_dtype
def test_the_wire_number_is_the_contracts(dtype: DType) -> None:
    assert pb.DataType.Name(pb.DataType.ValueType(dtype.wire)) == f"DATA_TYPE_{dtype.name.upper()}"


def test_every_wire_number_but_the_unspecified_one_has_a_dtype() -> None:
    assert {dtype.wire for dtype in DTYPES} == set(pb.DataType.values()) - {0}


@each_dtype
def test_sizes_and_constants_are_those_of_the_type(dtype: DType) -> None:
    assert dtype.itemsize == dtype.numpy.itemsize == dtype.packed.itemsize
    if not dtype.is_float:
        assert (dtype.roundoff, dtype.smallest_normal) == (0, 0)
        return
    finfo: Any = ml_dtypes.finfo
    info: Any = finfo(dtype.numpy)
    assert dtype.roundoff == float(info.eps) / 2
    assert dtype.smallest_normal == float(info.smallest_normal)
    assert dtype.accumulator.name == ("float32" if dtype.itemsize < 4 else dtype.name)
    assert dtype.accumulator.roundoff <= dtype.roundoff


@pytest.mark.parametrize(
    "value", ["int32", "float128", np.int64, "complex64", bool, "U5", object, "no such type"]
)
def test_other_dtypes_are_refused_with_their_name(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not supported; the service takes float32") as caught:
        dtype_of(value)
    assert caught.value.reason == "UNKNOWN_DATA_TYPE"
    assert caught.value.metadata["data_type"]


@pytest.mark.filterwarnings("ignore:Data type alias:DeprecationWarning")
@given(st.text(max_size=12))
@example(",")
def test_any_text_is_a_dtype_or_refused(text: str) -> None:
    try:
        found = dtype_of(text)
    except InvalidRequest:
        return
    assert found in DTYPES


@pytest.mark.parametrize("number", [0, -1, 9, 2**31 - 1])
def test_unknown_wire_numbers_are_refused_with_their_field(number: int) -> None:
    with pytest.raises(InvalidRequest, match=f"data_type is {number}") as caught:
        dtype_of_wire(number, "data_type")
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_DATA_TYPE", "data_type")
