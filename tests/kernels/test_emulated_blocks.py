"""How the emulator runs blocks: orders, unwritten memory, copies under way, threads that would hang."""

from __future__ import annotations

import numpy as np
import pytest

from convservice_emulator.build import Compiler, LaunchFailed
from tests.kernels.probes import Array, lanes, probe

NOTHING: Array = np.zeros(1, np.float32)
ORDERS = [0, 1, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_of_every_block_runs_once(compiler: Compiler, order: int) -> None:
    grid, threads = (5, 3, 2), 48
    out = np.zeros(30 * threads, np.int32)
    body = """
      const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      __syncthreads();
      out[block * blockDim.x + thread] += 1;
    """
    probe(compiler, body, NOTHING, out, threads=threads, grid=grid, order=order)
    assert (out == 1).all()


def test_the_orders_differ(compiler: Compiler) -> None:
    body = """
      out[blockIdx.x * THREADS + thread] = turn++;
      __syncthreads();
      out[(gridDim.x + blockIdx.x) * THREADS + thread] = turn++;
    """
    seen: set[tuple[int, ...]] = set()
    for order in ORDERS:
        out = lanes(2 * 3 * 64, "int32")
        grid = (3, 1, 1)
        probe(compiler, body, NOTHING, out, before="static int turn;", threads=64, grid=grid, order=order)
        seen.add(tuple(np.argsort(out)))
    assert len(seen) == len(ORDERS)


def test_shared_memory_is_not_a_number_at_first(compiler: Compiler) -> None:
    body = """
      __shared__ float fixed[32];
      DYNAMIC_SHARED(float, dynamic);
      out[64 * blockIdx.x + thread] = fixed[thread];
      out[64 * blockIdx.x + 32 + thread] = dynamic[thread];
      fixed[thread] = dynamic[thread] = 1;
    """
    out = lanes(2 * 64, "float32")
    probe(compiler, body, NOTHING, out, grid=(2, 1, 1), dynamic_bytes=128)
    assert np.isnan(out).all()


COPY = """
  __shared__ __align__(16) float target[4 * THREADS];
  float* const own = target + 4 * thread;
  const float* const from = given + 4 * thread;
"""


@pytest.mark.parametrize("nbytes", [4, 8, 16])
def test_a_copy_is_there_when_it_has_been_waited_for(compiler: Compiler, nbytes: int) -> None:
    body = (
        COPY
        + f"""
      for (int i = 0; i < 4; i++) own[i] = -1;
      copy_async_{nbytes}(own, from, thread % 2 == 0);
      copy_async_commit();
      for (int i = 0; i < 4; i++) out[8 * thread + i] = own[i];
      copy_async_wait<0>();
      for (int i = 0; i < 4; i++) out[8 * thread + 4 + i] = own[i];
    """
    )
    given = np.arange(1, 129, dtype=np.float32)
    found = probe(compiler, body, given, lanes(256, "float32")).reshape(32, 2, 4)
    count = nbytes // 4
    assert np.isnan(found[:, 0, :count]).all()
    assert (found[:, :, count:] == -1).all()
    assert np.array_equal(found[::2, 1, :count], given.reshape(32, 4)[::2, :count])
    assert (found[1::2, 1, :count] == 0).all()


def test_a_copy_reads_its_source_when_it_is_waited_for(compiler: Compiler) -> None:
    body = (
        COPY
        + """
      float* const source = out + 32 + 4 * thread;
      copy_async_16(own, source, true);
      copy_async_commit();
      source[1] = 5;
      copy_async_wait<0>();
      out[thread] = own[1];
    """
    )
    assert (probe(compiler, body, NOTHING, lanes(160, "float32"))[:32] == 5).all()


def test_a_wait_leaves_the_latest_groups_under_way(compiler: Compiler) -> None:
    body = (
        COPY
        + """
      for (int i = 0; i < 3; i++) {
        copy_async_4(own + i, from + i, true);
        copy_async_commit();
      }
      copy_async_4(own + 3, from + 3, true);
      copy_async_wait<1>();
      for (int i = 0; i < 4; i++) out[4 * thread + i] = own[i];
    """
    )
    given = np.arange(1, 129, dtype=np.float32)
    found = probe(compiler, body, given, lanes(128, "float32")).reshape(32, 4)
    assert np.array_equal(found[:, :2], given.reshape(32, 4)[:, :2])
    assert np.isnan(found[:, 2:]).all()


def test_a_copy_under_way_may_land_later(compiler: Compiler) -> None:
    body = (
        COPY
        + """
      copy_async_4(own, from, true);
      copy_async_commit();
      own[0] = 3;
      __syncthreads();
      out[thread] = own[0];
    """
    )
    given = np.arange(1, 129, dtype=np.float32)
    assert np.isnan(probe(compiler, body, given, lanes(32, "float32"))).all()


FAILING = {
    "a barrier that half the threads reach": (
        "if (thread < 32) __syncthreads();",
        "32 of 64 threads never reach the barrier",
    ),
    "a barrier behind a return": ("if (thread == 3) return; __syncthreads();", "1 of 64 threads never reach"),
    "two barriers": (
        "if (thread < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        "at different barriers, lines",
    ),
    "a shuffle of half a warp": (
        "if (thread % 32 < 16) out[0] = __shfl_xor_sync(~0u, thread, 1);",
        "16 of 32 lanes never reach it",
    ),
    "a warp in two places": (
        "if (thread % 2) {\n__syncwarp();\n} else {\nout[0] = __shfl_xor_sync(~0u, thread, 1);\n}",
        "lanes of a warp are in different operations",
    ),
    "a copy to an odd place": (
        "__shared__ float target[128]; copy_async_16(target + 1, given, true);",
        "an asynchronous copy of 16 bytes goes from or to an address that is no multiple of that",
    ),
    "a matrix at an odd place": (
        "__shared__ float target[128]; unsigned r[4]; load_matrix_x4(r, target + 1);",
        "not at a multiple of 16 bytes",
    ),
    "a trap": ("if (thread == 5) __trap();", "__trap"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", FAILING)
def test_what_a_gpu_would_not_survive_fails_the_launch(compiler: Compiler, what: str, order: int) -> None:
    body, message = FAILING[what]
    for _ in range(2):  # a failed launch leaves nothing behind
        with pytest.raises(LaunchFailed, match=message):
            probe(compiler, body, NOTHING, lanes(64, "float32"), threads=64, order=order)


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1, 1, 65536)])
def test_grids_beyond_what_hardware_takes(compiler: Compiler, grid: tuple[int, int, int]) -> None:
    with pytest.raises(LaunchFailed, match="a grid may not have"):
        probe(compiler, "", NOTHING, lanes(1, "float32"), grid=grid)


def test_more_shared_memory_than_there_is(compiler: Compiler) -> None:
    with pytest.raises(LaunchFailed, match="232448 at most"):
        probe(compiler, "", NOTHING, lanes(1, "float32"), dynamic_bytes=232_449)
