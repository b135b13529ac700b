"""The emulator's roundings and its operations of whole warps, against NumPy and the PTX manual's tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from convservice_emulator.build import Compiler
from tests.kernels.probes import Array, lanes, probe

EVERY_HALF = np.arange(65536, dtype=np.uint16)


@pytest.fixture(scope="module", params=[(), ("-mno-f16c",)], ids=["as here", "in integers"])
def numbers(request: pytest.FixtureRequest, compiler: Compiler) -> Compiler:
    """Compilers for a processor that rounds to half, and for one that does not."""
    return Compiler(flags=request.param)


def floats_to_round(rng: np.random.Generator) -> Array:
    """Every half, the middles between neighbours, what lies next to those, and any bits."""
    with np.errstate(invalid="ignore"):
        halves = EVERY_HALF.view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    largest = np.array([65519.99, 65520, 65520.01, np.inf, -np.inf, 1e38, -0.0], np.float32)
    any_bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    near = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (1, -1)]
    return np.concatenate([halves, middles, *near, largest, any_bits])


def test_every_half_is_widened(numbers: Compiler) -> None:
    found = probe(
        numbers,
        "for (int i = thread; i < a.count; i += THREADS) out[i] = widened_half(given[i]);",
        EVERY_HALF,
        lanes(EVERY_HALF.size, "float32"),
    )
    expected = EVERY_HALF.view(np.float16).astype(np.float32)
    real = ~np.isnan(expected)
    assert np.array_equal(found[real].view(np.uint32), expected[real].view(np.uint32))
    assert np.isnan(found[~real]).all()


def test_floats_are_rounded_to_half(numbers: Compiler, rng: np.random.Generator) -> None:
    values = floats_to_round(rng)
    found = probe(
        numbers,
        "for (int i = thread; i < a.count; i += THREADS) out[i] = rounded_half(given[i]);",
        values,
        lanes(values.size, "uint16"),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    real = ~np.isnan(values)
    assert np.array_equal(found[real], expected[real].view(np.uint16))
    assert (found[~real] == 0x7FFF).all()


def test_floats_are_rounded_to_tf32_with_ties_away_from_zero(
    compiler: Compiler, rng: np.random.Generator
) -> None:
    values = np.concatenate(
        [
            rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32),
            np.array([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 1.0, np.inf, -np.inf, 0.0, -0.0], np.float32),
        ]
    )
    found = probe(
        compiler,
        "for (int i = thread; i < a.count; i += THREADS) out[i] = rounded_tf32(given[i]);",
        values,
        lanes(values.size, "uint32"),
    ).view(np.float32)
    finite = np.isfinite(values)
    magnitude = np.abs(values[finite].astype(np.float64))
    _, exponent = np.frexp(magnitude)
    step = np.ldexp(1.0, np.maximum(exponent, -125) - 11)
    expected = np.sign(values[finite]) * np.floor(magnitude / step + 0.5) * step
    with np.errstate(over="ignore"):
        assert np.array_equal(found[finite], expected.astype(np.float32))
    assert np.array_equal(found[np.isinf(values)], values[np.isinf(values)])
    assert np.isnan(found[np.isnan(values)]).all()


def fragment_a(matrix: Array, lane: int) -> list[Array]:
    """A lane's elements of A, 16 x K: PTX's tables for .tf32 m16n8k8 (K = 8) and .f16 m16n8k16 (K = 16)."""
    group, in_group = lane >> 2, lane % 4
    if matrix.shape[1] == 8:
        return [matrix[group + 8 * (i in (1, 3)), in_group + 4 * (i >= 2)] for i in range(4)]
    return [
        matrix[group if i in (0, 1, 4, 5) else group + 8, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(8)
    ]


def fragment_b(matrix: Array, lane: int) -> list[Array]:
    """A lane's elements of B, K x 8."""
    group, in_group = lane >> 2, lane % 4
    if matrix.shape[0] == 8:
        return [matrix[in_group + 4 * i, group] for i in range(2)]
    return [matrix[in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(4)]


def fragment_c(matrix: Array, lane: int) -> list[Array]:
    """A lane's elements of C and D, 16 x 8."""
    return [matrix[(lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)] for i in range(4)]


def as_words(values: list[Array], kind: str) -> Array:
    """Elements as the registers that hold them."""
    floats = np.array(values, np.float32)
    if kind in {"tf32", "float32"}:
        return floats.view(np.uint32)
    halves = floats.astype(np.float16).view(np.uint16) if kind == "half" else floats.view(np.uint32) >> 16
    return np.ascontiguousarray(halves.astype(np.uint16)).view(np.uint32)


@pytest.mark.parametrize("name", ["mma_m16n8k8_tf32", "mma_m16n8k16_half", "mma_m16n8k16_bfloat16"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_matrix_products(compiler: Compiler, rng: np.random.Generator, name: str, order: int) -> None:
    kind, depth = name.rsplit("_", 1)[1], int(name.split("_")[1].split("k")[1])
    a, b = rng.integers(-8, 9, (16, depth)), rng.integers(-8, 9, (depth, 8))
    c = rng.integers(-99, 99, (16, 8))
    warps = 3  # each with its own share of the sum
    words = np.array(
        [
            [
                *as_words(fragment_a(a, lane), kind),
                *as_words(fragment_b(b, lane), kind),
                *as_words(fragment_c(c * (warp + 1), lane), "float32"),
            ]
            for warp in range(warps)
            for lane in range(32)
        ],
        np.uint32,
    )
    body = f"""
      unsigned a_[4], b_[2];
      float d[4];
      for (int i = 0; i < 4; i++) a_[i] = given[10 * thread + i];
      for (int i = 0; i < 2; i++) b_[i] = given[10 * thread + 4 + i];
      for (int i = 0; i < 4; i++) d[i] = __uint_as_float(given[10 * thread + 6 + i]);
      for (int times = 0; times < 2; times++) {name}(d, a_, b_);
      for (int i = 0; i < 4; i++) out[4 * thread + i] = d[i];
    """
    out = lanes(4 * 32 * warps, "float32")
    found = probe(compiler, body, words.reshape(-1), out, threads=32 * warps, order=order).reshape(-1, 4)
    for warp in range(warps):
        expected = c * (warp + 1) + 2 * (a @ b)
        for lane in range(32):
            assert found[32 * warp + lane].tolist() == fragment_c(expected, lane)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded(compiler: Compiler, transposed: bool) -> None:
    name = "load_matrix_x4_transposed" if transposed else "load_matrix_x4"
    body = f"""
      __shared__ __align__(16) unsigned short rows[32][24];
      for (int i = 0; i < 8; i++) rows[thread][i] = given[8 * thread + i];
      __syncwarp();
      unsigned r[4];
      {name}(r, rows[thread]);
      for (int i = 0; i < 4; i++) out[4 * thread + i] = r[i];
    """
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    found = probe(compiler, body, matrices.reshape(-1), lanes(32 * 4, "uint32")).view(np.uint16)
    read = matrices.transpose(0, 2, 1) if transposed else matrices
    for lane in range(32):
        expected = [read[i, lane // 4, lane % 4 * 2 + part] for i in range(4) for part in (0, 1)]
        assert found.reshape(32, -1)[lane].tolist() == expected


SHUFFLES: dict[str, Callable[[int], int]] = {
    "__shfl_sync(~0u, value, 5)": lambda lane: 5,
    "__shfl_sync(~0u, value, thread / 2)": lambda lane: lane // 2,
    "__shfl_sync(~0u, value, 3, 8)": lambda lane: lane // 8 * 8 + 3,
    "__shfl_xor_sync(~0u, value, 9)": lambda lane: lane ^ 9,
    "__shfl_down_sync(~0u, value, 4)": lambda lane: lane + 4 if lane < 28 else lane,
    "__shfl_down_sync(~0u, value, 4, 16)": lambda lane: lane + 4 if lane % 16 < 12 else lane,
    "__shfl_up_sync(~0u, value, 1)": lambda lane: max(lane - 1, 0),
}
"""A call to the lane whose value a lane gets by it."""


@pytest.mark.parametrize("call", SHUFFLES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_shuffles(compiler: Compiler, call: str, order: int) -> None:
    given = np.arange(100, 132, dtype=np.int32)
    body = f"int value = given[thread]; value = {call}; out[thread] = value;"
    found = probe(compiler, body, given, lanes(32, "int32"), order=order)
    assert found.tolist() == [100 + SHUFFLES[call](lane) for lane in range(32)]


def test_votes(compiler: Compiler) -> None:
    body = """
      const bool vote = given[thread] > 0;
      out[3 * thread] = __ballot_sync(~0u, vote);
      out[3 * thread + 1] = __any_sync(~0u, vote);
      out[3 * thread + 2] = __all_sync(~0u, vote);
    """
    given = (np.arange(32) % 3 == 0).astype(np.int32)
    found = probe(compiler, body, given, lanes(96, "uint32")).reshape(32, 3)
    assert (found == [sum(1 << lane for lane in range(0, 32, 3)), 1, 0]).all()
