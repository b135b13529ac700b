// winograd: F(2x2, 3x3): four outputs of a 3x3 filter from 16 products instead of 36. float32, 2-D, stride 1.
//
// Compared to `implicit_gemm`, which it resembles: the sum over channels is 16 matrix products, one for each element
// of a transformed 4x4 tile of inputs, with 2.25 times fewer multiplications in all; input and output transforms are
// fused into the one kernel, so that no transformed tile goes through device memory.
//
//   V = B^T d B for a tile d of each channel,  M = sum over channels of U * V element by element,  Y = A^T M A
//
//   B^T = 1  0 -1  0    A^T = 1  1  1  0    U = G g G^T, by the host, in float64, rounded once
//         0  1  1  0          0  1 -1 -1
//         0 -1  1  0
//         0  1  0 -1
//
// Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016 (arXiv:1509.09308), section 4.1.
//
// A block computes 32 filters of one group and TILES tiles (neighbouring ones, over all samples) by 8 * TILES threads;
// a warp has 16 / warps elements, a lane 64 sums of M. TILES does not change bits: every sum runs over the channels in
// ascending order. Tiles begin at even rows of the feature map, which is where runs begin.
//
// An output that is not finite (an input that is not may lie in its tile but outside its receptive field, or a sum of
// large inputs have overflowed) is computed once more, as `direct` does. The host sees to it that all of U is finite.
//
// Filters are first U: (groups, ceil(group_out / 32), ceil(group_in / 8) * 8, 16, 32), filled up with zeros; then as
// they came: (groups * group_out, group_in, 9).
#include "common.cuh"
#include "ptx.cuh"
#include "shared.cuh"

constexpr int DEPTH = 8;                        // channels of a step
constexpr int FILTERS = 32;                     // of a block
constexpr int ELEMENTS = 16;                    // of a transformed tile
constexpr int OWN = ELEMENTS * 32 / THREADS;    // elements of a warp
constexpr int ACROSS = TILES / 8;               // sums of M of a lane along tiles; along filters they are 8
constexpr int STEP_FILTERS = DEPTH * ELEMENTS * FILTERS;  // elements of U in a step
constexpr int COPIES = STEP_FILTERS / 4 / THREADS;        // quads of it that a thread copies

static_assert(THREADS == DEPTH * TILES, "a thread reads one tile of one channel in a step");

// Operands of one step in shared memory, which holds two: while one is multiplied, the next is filled.
struct alignas(16) Stage {
  float u[DEPTH][ELEMENTS][FILTERS];
  float v[DEPTH][ELEMENTS][TILES];
};

static_assert(2 * sizeof(Stage) == STAGES_BYTES, "algorithms/winograd.py asks for another amount");

// In the end M is handed from those who summed it to those who transform it, 8 filters at a time.
typedef float Exchange[ELEMENTS][8][TILES];

static_assert(sizeof(Exchange) <= sizeof(Stage), "sums are exchanged where operands were");

struct alignas(16) Quad { float at[4]; };
struct alignas(8) Pair { float at[2]; };

// The tile that a thread reads and, at the end, writes.
struct Tile {
  int sample, row, column;  // of its first output; a sample of -1 for none
};

__device__ __forceinline__ Tile tile_of(const ConvArguments& a, int number) {
  const int across = (a.axes[2].count + 1) / 2, down = (a.axes[1].count + 1) / 2;
  Tile tile;
  tile.column = number % across * 2;
  tile.row = number / across % down * 2;
  tile.sample = number / across / down;
  if (tile.sample >= a.samples) tile.sample = -1;
  return tile;
}

// ---- inputs

// What a thread reads of its tile of the present channel: element (i, j) where bit 4 * i + j of `real` is set, else 0.
// MAPPED is for padding that reads elements elsewhere: the element is at rows[i] + columns[j] of the sample; else it
// is at `corner`, i rows and j columns on. Columns go on with the channel, so that the sums of rows and columns are
// not kept, all sixteen, in registers from step to step.
template <bool MAPPED> struct Reader {
  const float* corner;
  int rows[4], columns[4];
  unsigned real;
  int channel;
};

// Where the four places of a tile along an axis read; -1 where they read 0: in padding, and beyond all that the
// outputs wanted look at, where nothing need be held.
__device__ __forceinline__ void places(const ConvArguments& a, const Axis& axis, int first, int (&at)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int from = coordinate(axis, first, i);
    const int real = from <= coordinate(axis, axis.count - 1, 2) ? real_coordinate(axis, from, a.padding) : -1;
    at[i] = real < 0 ? -1 : real * (int)axis.step;
  }
}

template <bool MAPPED>
__device__ __forceinline__ Reader<MAPPED> reader_of(const ConvArguments& a, const Tile& tile, int first, int channel) {
  Reader<MAPPED> reader;
  places(a, a.axes[1], tile.row, reader.rows);
  places(a, a.axes[2], tile.column, reader.columns);
  reader.real = 0;
#pragma unroll
  for (int i = 0; i < 16; i++)
    if (reader.rows[i / 4] >= 0 && reader.columns[i % 4] >= 0) reader.real |= 1u << i;
  if (tile.sample < 0 || channel >= a.group_in) reader.real = 0;
  reader.corner = static_cast<const float*>(a.input) + (tile.sample < 0 ? 0 : tile.sample) * a.input_sample;
  const long long plane = (first + channel) * a.input_channel;
  if (MAPPED) {
#pragma unroll
    for (int j = 0; j < 4; j++) reader.columns[j] += (int)plane;
  } else {
    const long long row = coordinate(a.axes[1], tile.row, 0) * a.axes[1].step;
    reader.corner += plane + row + coordinate(a.axes[2], tile.column, 0);
  }
  reader.channel = channel;
  return reader;
}

// Reads the tile, and goes on to the next step's channel.
template <bool MAPPED>
__device__ __forceinline__ void read_tile(const ConvArguments& a, Reader<MAPPED>& reader, float (&d)[4][4]) {
  const float* row = reader.corner;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      d[i][j] = 0.0f;
      if (reader.real >> (4 * i + j) & 1u) d[i][j] = row[MAPPED ? reader.rows[i] + reader.columns[j] : j];
    }
    if (!MAPPED) row += a.axes[1].step;
  }
  if (MAPPED) {
#pragma unroll
    for (int j = 0; j < 4; j++) reader.columns[j] += DEPTH * (int)a.input_channel;
  } else {
    reader.corner += DEPTH * a.input_channel;
  }
  reader.channel += DEPTH;
  if (reader.channel >= a.group_in) reader.real = 0;
}

// Has a step's part of U copied, a quad after the other.
__device__ __forceinline__ void copy_filters(const float* u, Stage& stage, int thread) {
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    const int at = 4 * (thread + i * THREADS);
    copy_async_16(&stage.u[0][0][0] + at, u + at, true);
  }
  copy_async_commit();
}

// V = B^T d B, to shared memory.
__device__ __forceinline__ void store_transformed(const float (&d)[4][4], float (&v)[ELEMENTS][TILES], int tile) {
  float half[4][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    half[0][j] = d[0][j] - d[2][j];
    half[1][j] = d[1][j] + d[2][j];
    half[2][j] = d[2][j] - d[1][j];
    half[3][j] = d[1][j] - d[3][j];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[4 * i + 0][tile] = half[i][0] - half[i][2];
    v[4 * i + 1][tile] = half[i][1] + half[i][2];
    v[4 * i + 2][tile] = half[i][2] - half[i][1];
    v[4 * i + 3][tile] = half[i][1] - half[i][3];
  }
}

// ---- products

// Filters 4 * (lane / 8) + 0..3 and 16 beyond, tiles 4 * (lane % 8) + 0..3 and, where there are 64, 32 beyond.
__device__ __forceinline__ void multiply(const Stage& stage, int warp, int lane, float (&sums)[OWN][8][ACROSS]) {
#pragma unroll
  for (int k = 0; k < DEPTH; k++)
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      float u[8], v[ACROSS];
#pragma unroll
      for (int q = 0; q < 2; q++)
        *reinterpret_cast<Quad*>(u + 4 * q) =
            *reinterpret_cast<const Quad*>(&stage.u[k][warp * OWN + e][16 * q + lane / 8 * 4]);
#pragma unroll
      for (int q = 0; q < ACROSS / 4; q++)
        *reinterpret_cast<Quad*>(v + 4 * q) =
            *reinterpret_cast<const Quad*>(&stage.v[k][warp * OWN + e][32 * q + lane % 8 * 4]);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++) sums[e][i][j] = fmaf(u[i], v[j], sums[e][i][j]);
    }
}

// All sums of a block: operands of the next step are on their way while one step is multiplied.
template <bool MAPPED>
__device__ __forceinline__ void add_channels(const ConvArguments& a, const float* u, const Tile& tile, int group,
                                             Stage* stages, float (&sums)[OWN][8][ACROSS]) {
  const int thread = threadIdx.x, steps = (a.group_in + DEPTH - 1) / DEPTH;
  Reader<MAPPED> reader = reader_of<MAPPED>(a, tile, group * a.group_in, thread / TILES);
  float d[4][4];
  copy_filters(u, stages[0], thread);
  read_tile(a, reader, d);
  store_transformed(d, stages[0].v[thread / TILES], thread % TILES);
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<0>();
    __syncthreads();
    Stage& next = stages[(step + 1) % 2];
    const bool more = step + 1 < steps;
    if (more) {
      u += STEP_FILTERS;
      copy_filters(u, next, thread);
      read_tile(a, reader, d);
    }
    multiply(stages[step % 2], thread / 32, thread % 32, sums);
    if (more) store_transformed(d, next.v[thread / TILES], thread % TILES);
  }
  __syncthreads();
}

// ---- outputs

// The sum of one output's own products, as `direct` adds them.
__device__ __forceinline__ float direct_sum(const ConvArguments& a, const float* filters, int filter, int sample,
                                            int row, int column) {
  const int group = filter / a.group_out;
  const float* plane = static_cast<const float*>(a.input) + sample * a.input_sample +
                       (long long)group * a.group_in * a.input_channel;
  const float* weight = filters + (long long)filter * a.group_in * 9;
  float sum = 0.0f;
#pragma unroll 1
  for (int channel = 0; channel < a.group_in; channel++, plane += a.input_channel)
#pragma unroll 1
    for (int i = 0; i < 3; i++) {
      const int x1 = real_coordinate(a.axes[1], coordinate(a.axes[1], row, i), a.padding);
#pragma unroll 1
      for (int j = 0; j < 3; j++, weight++) {
        const int x2 = real_coordinate(a.axes[2], coordinate(a.axes[2], column, j), a.padding);
        sum = fmaf(*weight, x1 < 0 || x2 < 0 ? 0.0f : plane[x1 * a.axes[1].step + x2 * a.axes[2].step], sum);
      }
    }
  return sum;
}

__device__ __forceinline__ bool finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// Y = A^T M A of one filter and tile; threshold and activation; stored.
__device__ __forceinline__ void finish_tile(const ConvArguments& a, const float* filters, const Tile& tile, int filter,
                                            const float (&m)[ELEMENTS]) {
  float half[2][4], y[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    half[0][j] = m[j] + m[4 + j] + m[8 + j];
    half[1][j] = m[4 + j] - m[8 + j] - m[12 + j];
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    y[2 * i] = half[i][0] + half[i][1] + half[i][2];
    y[2 * i + 1] = half[i][1] - half[i][2] - half[i][3];
  }
  const int rows = a.axes[1].count, columns = a.axes[2].count;
  if (a.activation <= 1 && finite(y[0]) && finite(y[1]) && finite(y[2]) && finite(y[3])) {
    const float bias = threshold(a, filter);
    float* place = static_cast<float*>(a.output) + tile.sample * a.output_sample + filter * a.output_channel +
                   tile.row * columns + tile.column;
#pragma unroll
    for (int i = 0; i < 2; i++, place += columns) {
      Pair pair;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float sum = y[2 * i + j] + bias;
        pair.at[j] = a.activation ? activated(sum, 1, 0.0) : sum;
      }
      if (tile.row + i >= rows) continue;
      if (tile.column + 1 < columns && (unsigned long long)place % sizeof(Pair) == 0) {
        *reinterpret_cast<Pair*>(place) = pair;
      } else {
        place[0] = pair.at[0];
        if (tile.column + 1 < columns) place[1] = pair.at[1];
      }
    }
    return;
  }
#pragma unroll 1
  for (int o = 0; o < 4; o++) {
    const int row = tile.row + o / 2, column = tile.column + o % 2;
    if (row < rows && column < columns) {
      float sum = y[0];
      if (!finite(sum)) sum = direct_sum(a, filters, filter, tile.sample, row, column);
      finish(a, tile.sample, filter, row * columns + column, sum);
    }
    y[0] = y[1], y[1] = y[2], y[2] = y[3];  // in place of an index, for which they would have to leave registers
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const ConvArguments a) {
  DYNAMIC_SHARED(Stage, stages);
  const int blocks = (a.group_out + FILTERS - 1) / FILTERS;
  const int group = blockIdx.y / blocks, block = blockIdx.y % blocks;
  const int steps = (a.group_in + DEPTH - 1) / DEPTH;
  const int thread = threadIdx.x, mine = thread % TILES;
  const float* packed = static_cast<const float*>(a.filters);
  const float* u = packed + (long long)blockIdx.y * steps * STEP_FILTERS;

  const Tile tile = tile_of(a, (int)blockIdx.x * TILES + mine);
  float sums[OWN][8][ACROSS];
#pragma unroll
  for (int e = 0; e < OWN; e++)
#pragma unroll
    for (int i = 0; i < 8 * ACROSS; i++) sums[e][i / ACROSS][i % ACROSS] = 0.0f;
  if (a.padding == ZEROS) add_channels<false>(a, u, tile, group, stages, sums);
  else add_channels<true>(a, u, tile, group, stages, sums);

  // Eight filters at a time: those of one quad and one half of it, two for each of the four rows of lanes.
  Exchange& exchange = reinterpret_cast<Exchange&>(stages[0]);
  const float* raw = packed + (long long)a.groups * blocks * steps * STEP_FILTERS;
#pragma unroll
  for (int part = 0; part < 4; part++) {
#pragma unroll
    for (int e = 0; e < OWN; e++)
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int q = 0; q < ACROSS / 4; q++) {
          Quad quad;
#pragma unroll
          for (int j = 0; j < 4; j++) quad.at[j] = sums[e][2 * part + i][4 * q + j];
          *reinterpret_cast<Quad*>(
              &exchange[thread / 32 * OWN + e][thread % 32 / 8 * 2 + i][32 * q + thread % 8 * 4]) = quad;
        }
    __syncthreads();
    const int slot = thread / TILES;  // of the eight filters
    const int filter = block * FILTERS + part / 2 * 16 + slot / 2 * 4 + part % 2 * 2 + slot % 2;
    float m[ELEMENTS];
#pragma unroll
    for (int e = 0; e < ELEMENTS; e++) m[e] = exchange[e][slot][mine];
    if (tile.sample >= 0 && filter < a.group_out) finish_tile(a, raw, tile, group * a.group_out + filter, m);
    __syncthreads();
  }
}
