// Operations of a whole warp: shuffles, votes, ldmatrix, mma.sync, as the PTX manual defines their fragments.
//
// Each lane posts its part, all meet, each takes its result. A matrix product is computed once, by the first lane
// that goes on: products of tensor cores are exact; here they are added in float32, in ascending order of K.
#pragma once
#include "numbers.h"
#include "scheduler.h"

namespace cuda_on_cpu {

// ---- shuffles and votes

CUDA_ON_CPU_QUIET static void post_words(const void* value, int words) {
  memcpy(exchange().words[this_lane()], value, 4 * words);
}
CUDA_ON_CPU_QUIET static void take_words(const Exchange& posted, int lane, void* value, int words) {
  memcpy(value, posted.words[lane], 4 * words);
}

template <typename Value> static inline Value from_lane(Value value, int lane, int line) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "shuffles move 4 or 8 bytes");
  Exchange& posted = exchange();
  post_words(&value, sizeof(Value) / 4);
  meet("shuffle", line);
  take_words(posted, lane, &value, sizeof(Value) / 4);
  return value;
}

template <typename Value> static inline Value shuffle(Value value, int source, int width, int line) {
  const int lane = this_lane(), base = lane & -width;
  return from_lane(value, base + (source & (width - 1)), line);
}
template <typename Value> static inline Value shuffle_xor(Value value, int mask, int width, int line) {
  const int lane = this_lane(), source = lane ^ mask;
  return from_lane(value, (source & -width) > (lane & -width) ? lane : source, line);
}
template <typename Value> static inline Value shuffle_down(Value value, unsigned delta, int width, int line) {
  const int lane = this_lane(), source = lane + (int)delta;
  return from_lane(value, (source & -width) == (lane & -width) ? source : lane, line);
}
template <typename Value> static inline Value shuffle_up(Value value, unsigned delta, int width, int line) {
  const int lane = this_lane(), source = lane - (int)delta;
  return from_lane(value, source >= (lane & -width) ? source : lane, line);
}

CUDA_ON_CPU_QUIET static unsigned ballot(bool vote, int line) {
  Exchange& posted = exchange();
  posted.words[this_lane()][0] = vote;
  meet("vote", line);
  unsigned votes = 0;
  const int first = current / WARP * WARP;
  for (int lane = 0; lane < WARP && first + lane < thread_count; lane++) votes |= posted.words[lane][0] << lane;
  return votes;
}

// ---- ldmatrix

// Matrix i is eight rows of eight 16-bit elements; lane 8 * i + r gives the address of its row r. Lane l is given
// the elements 2 * (l % 4) and the next of row l / 4, or, transposed, of column l / 4.
template <int COUNT, bool TRANSPOSED>
static inline void load_matrix(unsigned (&result)[COUNT], const void* row) {
  Exchange& posted = exchange();
  const int lane = this_lane();
  if (lane < 8 * COUNT && reinterpret_cast<uintptr_t>(row) % 16) {
    fail("ldmatrix: the row of lane %d is not at a multiple of 16 bytes", lane);
    give_up();
  }
  posted.rows[lane] = row;
  meet(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", COUNT);
  for (int i = 0; i < COUNT; i++) {
    unsigned short low, high;
    if (TRANSPOSED) {
      const int first = 8 * i + 2 * (lane % 4);
      low = static_cast<const unsigned short*>(posted.rows[first])[lane / 4];
      high = static_cast<const unsigned short*>(posted.rows[first + 1])[lane / 4];
    } else {
      const unsigned short* elements = static_cast<const unsigned short*>(posted.rows[8 * i + lane / 4]) + 2 * (lane % 4);
      low = elements[0];
      high = elements[1];
    }
    result[i] = low | (unsigned)high << 16;
  }
}

// ---- mma.sync: D (16 x 8) += A (16 x K) B (K x 8); lane l holds of D rows l / 4 and l / 4 + 8, columns 2 * (l % 4)
// and the next

template <int K> struct Operands {
  float a[16][K], b[K][8];
};

// a0 to a3 are (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b0 and b1 are (t, g), (t + 4, g), with g = lane / 4 and
// t = lane % 4.
CUDA_ON_CPU_QUIET static void unpack_tf32(const Exchange& posted, Operands<8>& out) {
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) out.a[g + i % 2 * 8][t + i / 2 * 4] = read_tf32(posted.words[lane][4 + i]);
    for (int i = 0; i < 2; i++) out.b[t + i * 4][g] = read_tf32(posted.words[lane][8 + i]);
  }
}

// Each register holds two neighbours along K, the lower half first: a0 to a3 are (g, 2t), (g + 8, 2t), (g, 2t + 8),
// (g + 8, 2t + 8); b0 and b1 are (2t, g), (2t + 8, g).
template <float (*WIDENED)(unsigned short)>
CUDA_ON_CPU_QUIET static void unpack_16(const Exchange& posted, Operands<16>& out) {
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int part = 0; part < 2; part++) {
      for (int i = 0; i < 4; i++)
        out.a[g + i % 2 * 8][2 * t + i / 2 * 8 + part] = WIDENED(posted.words[lane][4 + i] >> 16 * part & 0xffff);
      for (int i = 0; i < 2; i++)
        out.b[2 * t + i * 8 + part][g] = WIDENED(posted.words[lane][8 + i] >> 16 * part & 0xffff);
    }
  }
}

template <int K> CUDA_ON_CPU_QUIET static void multiply(Exchange& posted, const Operands<K>& of) {
  for (int row = 0; row < 16; row++) {
    float sums[8];
    for (int column = 0; column < 8; column++)
      memcpy(&sums[column], &posted.words[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2], 4);
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sums[column] += of.a[row][k] * of.b[k][column];
    for (int column = 0; column < 8; column++)
      posted.results[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] = sums[column];
  }
  posted.computed = true;
}

template <int K>
CUDA_ON_CPU_QUIET static void matrix_product(const char* operation, void (*unpack)(const Exchange&, Operands<K>&),
                                             float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Exchange& posted = exchange();
  const int lane = this_lane();
  if (thread_count % WARP) {
    fail("%s is for whole warps; a block has %d threads", operation, thread_count);
    give_up();
  }
  memcpy(&posted.words[lane][0], d, 16);
  memcpy(&posted.words[lane][4], a, 16);
  memcpy(&posted.words[lane][8], b, 8);
  meet(operation, 0);
  if (!posted.computed) {
    Operands<K> operands;
    unpack(posted, operands);
    multiply(posted, operands);
  }
  memcpy(d, posted.results[lane], 16);
}

}  // namespace cuda_on_cpu

#define __syncwarp(...) cuda_on_cpu::meet("__syncwarp", __LINE__)
#define __shfl_sync(mask, value, ...) CUDA_ON_CPU_SHUFFLE(shuffle, value, __VA_ARGS__, 32, 0)
#define __shfl_xor_sync(mask, value, ...) CUDA_ON_CPU_SHUFFLE(shuffle_xor, value, __VA_ARGS__, 32, 0)
#define __shfl_down_sync(mask, value, ...) CUDA_ON_CPU_SHUFFLE(shuffle_down, value, __VA_ARGS__, 32, 0)
#define __shfl_up_sync(mask, value, ...) CUDA_ON_CPU_SHUFFLE(shuffle_up, value, __VA_ARGS__, 32, 0)
#define CUDA_ON_CPU_SHUFFLE(name, value, place, width, ...) cuda_on_cpu::name(value, place, width, __LINE__)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(vote, __LINE__)
#define __any_sync(mask, vote) (cuda_on_cpu::ballot(vote, __LINE__) != 0)
#define __all_sync(mask, vote) (cuda_on_cpu::ballot(!(vote), __LINE__) == 0)

// ---- the functions that kernels/ptx.cuh has for a GPU

static inline void load_matrix_x4(unsigned (&r)[4], const void* row) { cuda_on_cpu::load_matrix<4, false>(r, row); }
static inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* row) {
  cuda_on_cpu::load_matrix<4, true>(r, row);
}
static inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuda_on_cpu::matrix_product<8>("mma.m16n8k8.tf32", cuda_on_cpu::unpack_tf32, d, a, b);
}
static inline void mma_m16n8k16_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuda_on_cpu::matrix_product<16>("mma.m16n8k16.f16", cuda_on_cpu::unpack_16<widened_half>, d, a, b);
}
static inline void mma_m16n8k16_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuda_on_cpu::matrix_product<16>("mma.m16n8k16.bf16", cuda_on_cpu::unpack_16<cuda_on_cpu::read_bfloat16>, d, a, b);
}
