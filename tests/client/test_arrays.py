"""What the client knows to be wrong, before anything is sent; and what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from convservice import Activation, Conv, ConvClient, InvalidRequest, Network
from tests.client.fake import FakeService, relu

X = np.zeros((2, 3, 8, 9), "float32")
W = np.zeros((4, 3, 3, 3), "float32")


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        (X[0, 0], W, {}, r"bare x \(H, W\) with a bare weight \(kh, kw\); x has shape \(8, 9\)"),
        (X, W[0, 0], {}, r"weight has shape \(3, 3\)"),
        (X, W[0], {}, r"weight has shape \(3, 3, 3\)"),
        (X[None], W, {}, r"x has 5 axes, \(1, 2, 3, 8, 9\); it must be \(N, C, H, W\) or \(C, H, W\)"),
        (X[:, :2], W, {}, "weight has 3 input channels per group, the input has 2 channels in 1 group"),
        (X, W, {"groups": 2}, "weight has 3 input channels per group, the input has 3 channels in 2 groups"),
        (X, W, {"groups": 3}, "out_channels must be divisible by groups: weight has 4 filters, groups is 3"),
        (X, W, {"stride": 0}, "stride must be an integer from 1"),
        (X, W, {"stride": -1}, "stride must be an integer from 1"),
        (X, W, {"stride": 1.5}, r"stride must be an integer from 1 to 2147483647, not 1.5"),
        (X, W, {"stride": float("nan")}, "stride must be an integer .* not nan"),
        (X, W, {"stride": (1, 2, 3)}, "stride must be one integer or one for each of the 2 spatial axes"),
        (X, W, {"dilation": 0}, "dilation must be an integer from 1"),
        (X, W, {"dilation": 5}, r"the output would be empty: spatial axis 0 has size 8.*spans 11"),
        (X, W, {"padding": -1}, "padding must be an integer from 0"),
        (X, W, {"padding": "full"}, "padding must be 'same', 'valid', an integer"),
        (X, W, {"padding": 9, "padding_mode": "reflect"}, "reflect padding must be smaller than the input"),
        (X, W, {"padding_mode": "wrap"}, "padding_mode must be one of zeros, reflect, replicate, not 'wrap'"),
        (X, W, {"activation": "softmax"}, "activation must be one of linear, relu"),
        (X, W, {"bias": np.zeros(3, "float32")}, r"bias must have shape \(4,\)"),
        (
            X,
            W,
            {"data_format": "NHWC"},
            "data_format must be one of channels_first, channels_last, not 'NHWC'",
        ),
        (X, W, {"precision": "low"}, "precision must be one of high, fast, not 'low'"),
        (X, W, {"backend": ""}, "backend must be a backend's name"),
        (X, W, {"timeout": float("nan")}, "timeout must be seconds above 0"),
        (X, W, {"out_dtype": "int32"}, "dtype int32 is not supported"),
        (
            X.astype("float64"),
            W,
            {},
            r"x is float64 and weight is float32; .* x.astype\('float32'\)",
        ),
        (X, W.astype("float64"), {}, r"convert one, for example weight.astype\('float32'\)"),
        (X, W.astype("float16"), {}, r"convert one, for example weight.astype\('float32'\)"),
        (X[0, 0], [[0.0, 1.0]], {}, r"x is float32 and weight is float64; .*weight.astype\('float32'\)"),
        (X.astype("float64"), W, {"out_dtype": "float64"}, "x is float64 and weight is float32"),
        (X.astype("int64"), W, {}, r"x: dtype int64 is not supported.*x.astype\('float32'\)"),
        (X.astype(bool), W, {}, "x: dtype bool is not supported"),
        (X.astype(complex), W, {}, "x: dtype complex128 is not supported"),
        ([["a"]], W[0, 0], {}, "dtype"),
        (X, W.astype("uint8"), {}, r"filters .* are of a float dtype; .*weight.astype\('float32'\)"),
        (X, W.astype("int64"), {}, r"weight: dtype int64 is not .*; .*weight.astype\('float32'\)"),
        (X[0, 0], [[0, 1], [1, 0]], {}, r"weight: dtype int64 is not .*; .*weight.astype\('float32'\)"),
        (X, W, {"bias": [1, 2, 3, 4]}, r"bias: dtype int64 is not .*; .*bias.astype\('float32'\)"),
        (
            np.ma.masked_equal([[1.0, 2.0]], 2),
            W[0, 0],
            {},
            "x is a masked array, 1 of its 2 values",
        ),
        (X, np.ma.masked_less(W, 1), {}, "weight is a masked array, 108 of its 108 values are masked"),
        (X, W, {"bias": np.ma.masked_less(W[:, 0, 0, 0], 1)}, "bias is a masked array"),
        (X[..., :0], W, {}, r"channels and spatial sizes must be at least 1, the input has \(2, 3, 8, 0\)"),
        (X, W[:, :, :0], {}, "weight has shape .* every size must be at least 1"),
        (X, [[1.0, float("nan")], [2.0]], {}, "weight"),
    ],
)
def test_what_is_wrong_is_said_before_sending(
    fake: FakeService, client: ConvClient, *, x: Any, weight: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        client.conv2d(x, weight, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.method is None
    assert not fake.requests


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_photograph_taken_as_channels_first_is_told(client: ConvClient, rank: int) -> None:
    weight = np.zeros((4, 3, *[1] * rank), "float32")
    photograph = np.zeros((*[8, 9, 7][:rank], 3), "uint8")
    convolve = getattr(client, f"conv{rank}d")
    with pytest.raises(InvalidRequest, match="pass data_format='channels_last'"):
        convolve(photograph, weight)
    with pytest.raises(InvalidRequest, match="leave out data_format='channels_last'"):
        convolve(np.moveaxis(photograph, -1, 0), weight, data_format="channels_last")


def test_a_wrong_number_of_channels_is_not_blamed_on_the_format(client: ConvClient) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.conv2d(np.zeros((5, 8, 9), "float32"), W)
    assert "data_format" not in caught.value.message


@pytest.mark.parametrize("layer", [object(), "conv", None, [Conv(W)]])
def test_what_is_no_network_is_refused(client: ConvClient, layer: Any) -> None:
    with pytest.raises(InvalidRequest, match="network must be a Network"):
        client.run(layer, X)


def test_a_network_that_takes_any_rank_needs_samples(client: ConvClient) -> None:
    with pytest.raises(InvalidRequest, match=r"\(N, C, \*spatial\) with at most 3 spatial axes"):
        client.run(Activation("relu"), X[0, 0, 0])


LAYOUTS = [
    (layout, dtype, rows)
    for layout in ("plain", "read-only", "strided", "fortran", "big-endian")
    for dtype in ("float32", "float64", "float16", "bfloat16", "int8", "uint16")
    for rows in (6, 70_000)
    if (layout, dtype) != ("big-endian", "bfloat16")  # NumPy has none
] + [("list", "float64", 6)]


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize(("layout", "dtype", "rows"), LAYOUTS)
def test_any_layout_is_taken_and_left_alone(
    client: ConvClient, data_format: str, dtype: str, layout: str, rows: int
) -> None:
    from convservice.dtypes import dtype_of

    values = np.random.default_rng(5).integers(-9, 9, (2, 3, rows, 5)).astype(dtype_of(dtype).numpy)
    given: Any = values
    if layout == "read-only":
        given = values.copy()
        given.flags.writeable = False
    elif layout == "strided":
        given = np.repeat(values, 2, axis=3)[..., ::2]
    elif layout == "fortran":
        given = np.asfortranarray(values)
    elif layout == "big-endian":
        given = values.astype(values.dtype.newbyteorder(">"))
    elif layout == "list":
        given = values.tolist()
    before = np.array(given, copy=True)
    network = Network([relu(), Activation("relu")])
    found = client.run(network, given, data_format=data_format, out_dtype=dtype)
    assert np.array_equal(found, np.maximum(values, 0))
    assert found.dtype == dtype_of(dtype).numpy
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert np.array_equal(np.asarray(given), before)


def test_a_masked_array_with_nothing_masked_is_an_array(client: ConvClient) -> None:
    assert not client.run(relu(), np.ma.masked_greater(X, 1)).any()


def test_an_announced_dtype_that_the_weights_do_not_share(client: ConvClient) -> None:
    with pytest.raises(InvalidRequest, match=r"for example weight.astype\('float16'\)"):
        client.stream(Network([Conv(W)]), [], shape=(3, None, 9), dtype="float16")


def test_an_empty_batch_gives_an_empty_result(client: ConvClient) -> None:
    assert client.run(relu(), X[:0]).shape == (0, 3, 8, 9)
