from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convservice.bands import Band, DataFormat, TensorSpec, band_rows_for
from convservice.dtypes import FLOAT32, dtype_of
from convservice.errors import InvalidRequest
from convservice.geometry import SampleShape
from convservice.packing import BandPacker
from convservice.unpacking import BandUnpacker
from tests.helpers import Array, random_array
from tests.strategies import SEEDS, specs

UINT8 = dtype_of("uint8")


def tensor_for(spec: TensorSpec, seed: int, rows: int) -> Array:
    """A random tensor (samples, channels, rows, *rest)."""
    shape = (spec.samples, spec.sample.channels, rows, *spec.sample.rest)
    return random_array(np.random.default_rng(seed), shape, spec.dtype)


def packed_by_definition(x: Array, spec: TensorSpec) -> bytes:
    """The bytes of `x` as the contract describes them: sample after sample, band after band."""
    found = b""
    for sample in x:
        for first in range(0, x.shape[2], spec.band_rows):
            band = sample[:, first : first + spec.band_rows]
            if spec.data_format is DataFormat.CHANNELS_LAST:
                band = np.moveaxis(band, 0, -1)
            found += band.astype(spec.dtype.packed).tobytes()
    return found


def packed(spec: TensorSpec, arrays: list[Array], payload_bytes: int) -> list[bytes]:
    packer = BandPacker(spec, payload_bytes)
    return [*(data for array in arrays for data in packer.add(array)), *packer.finish()]


def unpacked(spec: TensorSpec, payloads: list[bytes]) -> list[Band]:
    unpacker, offset, bands = BandUnpacker(spec, "out"), 0, list[Band]()
    for data in payloads:
        bands += unpacker.feed(offset, data)
        offset += len(data)
        assert unpacker.offset == offset
    return [*bands, *unpacker.finish()]


def joined(bands: list[Band], like: Array) -> Array:
    """The tensor that bands are of; demands that they are in order and leave nothing out."""
    found, at = np.zeros_like(like), (0, 0)
    for band in bands:
        count, _, rows = band.array.shape[:3]
        assert (band.sample, band.first_row, band.output) == (*at, "out")
        assert count == 1 or rows == like.shape[2], "several samples only whole"
        assert band.array.flags.c_contiguous
        assert band.array.flags.aligned
        assert band.array.dtype == like.dtype
        found[band.sample : band.sample + count, :, band.first_row : band.first_row + rows] = band.array
        at = (
            (band.sample, band.first_row + rows)
            if band.first_row + rows < like.shape[2]
            else (band.sample + count, 0)
        )
    assert at == (like.shape[0], 0) or like.shape[0] == 0
    return found


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[TensorSpec, Array, list[Array]]:
    """A spec, a tensor of it, and the same tensor as arrays of any number of rows."""
    unknown = draw(st.booleans())
    spec = draw(specs(unknown_height=unknown))
    rows = draw(st.integers(1, 9)) if unknown else spec.sample.height
    x = tensor_for(spec, draw(SEEDS), rows)
    arrays: list[Array] = []
    sample = 0
    while sample < len(x):
        whole = draw(st.integers(0, len(x) - sample))
        if whole > 1 or (whole == 1 and draw(st.booleans())):
            arrays.append(x[sample : sample + whole])
            sample += whole
            continue
        first = 0
        while first < rows:
            last = draw(st.integers(first + 1, rows))
            arrays.append(x[sample : sample + 1, :, first:last])
            first = last
        sample += 1
    return spec, x, arrays


@given(cut_tensors(), st.integers(1, 64))
def test_rows_of_any_cut_become_the_bytes_of_the_contract(
    tensor: tuple[TensorSpec, Array, list[Array]], payload_bytes: int
) -> None:
    spec, x, arrays = tensor
    payloads = packed(spec, arrays, payload_bytes)
    assert b"".join(payloads) == packed_by_definition(x, spec)
    assert all(len(data) == payload_bytes for data in payloads[:-1])
    assert all(0 < len(data) <= payload_bytes for data in payloads)


@given(cut_tensors(), st.data())
def test_bytes_of_any_cut_become_the_tensor(
    tensor: tuple[TensorSpec, Array, list[Array]], data: st.DataObject
) -> None:
    spec, x, _ = tensor
    whole = packed_by_definition(x, spec)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    payloads = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    bands = unpacked(spec, payloads)
    assert joined(bands, x).tobytes() == np.ascontiguousarray(x).tobytes()


@given(cut_tensors())
def test_a_band_comes_as_soon_as_its_bytes_are_there(tensor: tuple[TensorSpec, Array, list[Array]]) -> None:
    spec, x, _ = tensor
    whole, unpacker, rows = packed_by_definition(x, spec), BandUnpacker(spec), 0
    for offset in range(len(whole)):
        for band in unpacker.feed(offset, whole[offset : offset + 1]):
            rows += band.array.shape[2]
        assert unpacker.rows == rows
        sample, within = divmod(offset + 1, x.shape[2] * spec.row_bytes)
        bands = within // (spec.band_rows * spec.row_bytes)
        assert rows == sample * x.shape[2] + bands * spec.band_rows or spec.sample.rows is None


@given(specs(), st.integers(1, 40), SEEDS)
def test_flush_hands_back_all_whole_bands(spec: TensorSpec, payload_bytes: int, seed: int) -> None:
    x = tensor_for(spec, seed, spec.sample.height)
    packer, sent = BandPacker(spec, payload_bytes), b""
    for sample in range(len(x)):
        for first in range(0, x.shape[2], spec.band_rows):
            rows = x[sample : sample + 1, :, first : first + spec.band_rows]
            sent += b"".join([*packer.add(rows), *packer.flush()])
            last = min(first + spec.band_rows, x.shape[2])
            assert len(sent) == (sample * x.shape[2] + last) * spec.row_bytes
    assert list(packer.finish()) == []
    assert sent == packed_by_definition(x, spec)


def test_the_given_array_is_never_changed_and_may_have_any_layout() -> None:
    spec = TensorSpec(FLOAT32, SampleShape(2, 4, (3,)), 1, 3)
    plain = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
    expected = packed_by_definition(plain, spec)
    wider = np.zeros((1, 2, 4, 6), np.float32)
    wider[..., ::2] = plain
    for array in (plain, np.asfortranarray(plain), plain.astype(">f4"), wider[..., ::2]):
        array.flags.writeable = False
        assert b"".join(packed(spec, [array], 7)) == expected
    assert packed_by_definition(plain, spec) == expected


def test_too_many_bytes_are_refused_when_they_come() -> None:
    spec = TensorSpec(UINT8, SampleShape(1, 2, (3,)), 2, 1)
    unpacker = BandUnpacker(spec)
    assert len(list(unpacker.feed(0, bytes(11)))) > 0
    with pytest.raises(InvalidRequest, match=r"the tensor has 12 bytes .*, at least 13 were sent") as caught:
        list(unpacker.feed(11, bytes(2)))
    assert caught.value.reason == "PAYLOAD_SIZE"
    assert caught.value.metadata == {"expected": "12", "bytes": "13"}


def test_an_empty_batch_has_no_bytes() -> None:
    spec = TensorSpec(UINT8, SampleShape(1, 2), 0, 1)
    assert spec.total_bytes == 0
    unpacker = BandUnpacker(spec)
    assert list(unpacker.feed(0, b"")) == []
    assert list(unpacker.finish()) == []
    with pytest.raises(InvalidRequest, match="has 0 bytes"):
        unpacker.feed(0, b"x")


def test_too_few_bytes_are_refused_at_the_end() -> None:
    spec = TensorSpec(UINT8, SampleShape(1, 2, (3,)), 1, 1)
    unpacker = BandUnpacker(spec)
    list(unpacker.feed(0, bytes(5)))
    with pytest.raises(InvalidRequest, match=r"has 6 bytes .*, 5 were sent") as caught:
        list(unpacker.finish())
    assert caught.value.reason == "PAYLOAD_SIZE"


def test_an_unknown_height_ends_after_a_whole_row() -> None:
    spec = TensorSpec(FLOAT32, SampleShape(2, None, (3,)), 1, 4)
    unpacker = BandUnpacker(spec)
    assert list(unpacker.feed(0, bytes(spec.row_bytes + 1))) == []
    with pytest.raises(InvalidRequest, match=f"no multiple of {spec.row_bytes}") as caught:
        list(unpacker.finish())
    assert caught.value.reason == "PAYLOAD_SIZE"


@pytest.mark.parametrize("offset", [0, 2, 4, 2**63])
def test_bytes_that_are_missing_or_repeated_are_refused(offset: int) -> None:
    unpacker = BandUnpacker(TensorSpec(UINT8, SampleShape(1, 9), 1, 2))
    list(unpacker.feed(0, bytes(3)))
    with pytest.raises(InvalidRequest, match=f"byte 3, not {offset}") as caught:
        list(unpacker.feed(offset, bytes(1)))
    assert (caught.value.reason, caught.value.field) == ("PAYLOAD_OFFSET", "byte_offset")


def test_a_spec_knows_its_sizes() -> None:
    spec = TensorSpec(FLOAT32, SampleShape(2, 10, (3,)), 5, 4)
    assert (spec.row_bytes, spec.band_bytes, spec.total_bytes) == (24, 96, 1200)
    assert spec.packed_shape(4) == (2, 4, 3)
    unknown = TensorSpec(FLOAT32, SampleShape(2, None, (3,)), 1, 4, DataFormat.CHANNELS_LAST)
    assert (unknown.band_bytes, unknown.total_bytes) == (96, None)
    assert unknown.packed_shape(4) == (4, 3, 2)
    assert TensorSpec(FLOAT32, SampleShape(1, 2), 1, 2**40).band_bytes == 8


def test_a_band_has_about_the_bytes_asked_for_and_at_least_a_row() -> None:
    assert band_rows_for(100, 1000) == 10
    assert band_rows_for(1001, 1000) == 1
    assert band_rows_for(0, 1000) == 1000
