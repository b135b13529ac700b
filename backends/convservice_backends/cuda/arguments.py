"""What kernels are given: the Python side of the structures in `kernels/*.cuh`.

The fields must agree with the CUDA side in order and type; every kernel checks the size when it is compiled.
"""

from __future__ import annotations

import ctypes


class AxisArguments(ctypes.Structure):
    """`Axis` of common.cuh: one spatial axis of the positions that a launch computes."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
        ("kernel", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("dilation", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("step", ctypes.c_int64),
    )


class ConvArguments(ctypes.Structure):
    """`ConvArguments` of common.cuh: one launch of a convolution."""

    _fields_ = (
        ("input", ctypes.c_uint64),
        ("filters", ctypes.c_uint64),
        ("thresholds", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("scratch", ctypes.c_uint64),
        ("input_sample", ctypes.c_int64),
        ("input_channel", ctypes.c_int64),
        ("output_sample", ctypes.c_int64),
        ("output_channel", ctypes.c_int64),
        ("axes", AxisArguments * 3),
        ("samples", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("group_in", ctypes.c_int32),
        ("group_out", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("positions", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("filter_stride", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("split_depth", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("slope", ctypes.c_double),
    )


class PoolArguments(ctypes.Structure):
    """`PoolArguments` of pool.cu: one launch of a pooling layer."""

    _fields_ = (
        ("window", ConvArguments),
        ("ends", ctypes.c_int32 * 3),
        ("counts_padding", ctypes.c_int32),
    )


class PartsArguments(ctypes.Structure):
    """`PartsArguments` of parts.cuh: blocks of rows of a layer that reduces a whole sample."""

    _fields_ = (
        ("input", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("parts", ctypes.c_uint64),
        ("input_sample", ctypes.c_int64),
        ("input_channel", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("weight_channel", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("samples", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("block_rows", ctypes.c_int32),
        ("block_parts", ctypes.c_int32),
        ("parts_at_all", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class FoldArguments(ctypes.Structure):
    """`FoldArguments` of fold.cu: parts of a reduction into its running sums, and the end of it."""

    _fields_ = (
        ("parts", ctypes.c_uint64),
        ("sums", ctypes.c_uint64),
        ("thresholds", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("output_sample", ctypes.c_int64),
        ("output_channel", ctypes.c_int64),
        ("samples", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("begins", ctypes.c_int32),
        ("maximum", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("divisor", ctypes.c_double),
        ("slope", ctypes.c_double),
    )


ADDENDS = 16
"""Arrays that one launch adds."""


class Addend(ctypes.Structure):
    """`Addend` of add.cu: one of the arrays that are added."""

    _fields_ = (
        ("input", ctypes.c_uint64),
        ("sample", ctypes.c_int64),
        ("channel", ctypes.c_int64),
    )


class AddArguments(ctypes.Structure):
    """`AddArguments` of add.cu: the sum of several arrays of one shape."""

    _fields_ = (
        ("addends", Addend * ADDENDS),
        ("sums", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("output_sample", ctypes.c_int64),
        ("output_channel", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("samples", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("begins", ctypes.c_int32),
        ("ends", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("slope", ctypes.c_double),
    )


class MapArguments(ctypes.Structure):
    """`MapArguments` of elementwise.cu: elements of one array into another of the same shape."""

    _fields_ = (
        ("input", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("input_sample", ctypes.c_int64),
        ("input_channel", ctypes.c_int64),
        ("output_sample", ctypes.c_int64),
        ("output_channel", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("samples", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("slope", ctypes.c_double),
    )
