// Columns of the product: what a block computes, and how its tile of inputs comes into shared memory.
//
// Two ways, of the same terms in the same order. `StagedColumns`, for every window, copies chunks of rows that `stage`
// has put channels-last: a tile is (TILE_N columns, ROW chunks). `RowColumns`, for 1x1 windows on 16-bit rows, copies
// the rows as they are, chunks of neighbouring positions of one channel: a tile is (ROW * CHUNK terms, TILE_N / 8
// chunks), which ldmatrix turns round.
#pragma once
#include "common.cuh"
#include "ptx.cuh"

struct alignas(16) Chunk { unsigned word[4]; };

constexpr int CHUNK = 16 / (int)sizeof(Input);  // elements
constexpr int ROW = 4;                          // chunks of a row of a tile; an instruction multiplies two
constexpr int ROWS_APART = THREADS / ROW;       // rows that the threads copy at once

// What a block computes. Blocks are numbered filters first: those that read the same rows run at the same time.
struct Place {
  int group, filter;  // the first filter, within the group
  long long column;   // the first position, numbered over all samples

  __device__ explicit Place(const ConvArguments& a) {
    const unsigned tiles = (a.group_out + TILE_M - 1) / TILE_M, further = blockIdx.x / tiles;
    group = further % a.groups;
    filter = blockIdx.x % tiles * TILE_M;
    column = (long long)(further / a.groups) * TILE_N;
  }
};

constexpr int BEYOND = -2147483647 - 1;  // as a first coordinate: the column is beyond the last, and reads 0

// The columns of the tile: where their output lies, and where their windows begin.
struct Columns {
  int2 output[TILE_N];  // sample and position; sample -1 beyond the last
  int4 origin[TILE_N];  // coordinates of the first weight, from the first real ones on, and the chunk that lies there

  __device__ void find(const ConvArguments& a, const Place& place) {
    const int n = threadIdx.x;
    if (n >= TILE_N) return;
    const long long column = place.column + n;
    const int sample = (int)(column / a.positions), position = (int)(column - (long long)sample * a.positions);
    const int x2 = coordinate(a.axes[2], position % a.axes[2].count, 0);
    const int x1 = coordinate(a.axes[1], position / a.axes[2].count % a.axes[1].count, 0);
    const int x0 = coordinate(a.axes[0], position / a.axes[2].count / a.axes[1].count, 0);
    const long long first = sample * a.input_sample + place.group * ((a.group_in + CHUNK - 1) / CHUNK) +
                            x0 * a.axes[0].step + x1 * a.axes[1].step + x2 * a.axes[2].step;
    const bool real = sample < a.samples;
    output[n] = make_int2(real ? sample : -1, position);
    origin[n] = make_int4(real ? x0 - a.axes[0].low : BEYOND, x1 - a.axes[1].low, x2 - a.axes[2].low, (int)first);
  }
};

// Rows that were put channels-last. A thread copies one chunk of every 32nd column.
class StagedColumns {
  static constexpr int COUNT = TILE_N / ROWS_APART;
  int channel, chunks;  // its next chunk of the tap at hand; chunks of a tap
  int tap[3];
  int from[COUNT];  // where the tap's chunks begin; -1 where the window looks at the value 0

  __device__ __forceinline__ static unsigned real_size(const Axis& axis) {
    return (unsigned)axis.high - (unsigned)axis.low;
  }

  // How far, in elements, the real element lies that a coordinate (from the first real one on) reads.
  __device__ __forceinline__ static int moved(const Axis& axis, int at, int padding) {
    const int last = axis.high - axis.low - 1, edge = at < 0 ? -at : at > last ? last - at : 0;
    return padding == REFLECT ? 2 * edge : edge;
  }

  // Finds what the columns' windows see at this tap.
  __device__ __forceinline__ void look(const ConvArguments& a, const Columns& columns) {
    const int t0 = tap[0] * a.axes[0].dilation, t1 = tap[1] * a.axes[1].dilation, t2 = tap[2] * a.axes[2].dilation;
    const int step0 = (int)a.axes[0].step, step1 = (int)a.axes[1].step, step2 = (int)a.axes[2].step;
    const int further = t0 * step0 + t1 * step1 + t2 * step2;
    const unsigned size0 = tap[0] < a.axes[0].kernel ? real_size(a.axes[0]) : 0;  // 0: behind the last tap
    const unsigned size1 = real_size(a.axes[1]), size2 = real_size(a.axes[2]);
    const int4* origins = columns.origin + threadIdx.x / ROW;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int4 origin = origins[i * ROWS_APART];
      const unsigned x0 = origin.x + t0, x1 = origin.y + t1, x2 = origin.z + t2;
      from[i] = x0 < size0 && x1 < size1 && x2 < size2 ? origin.w + further : -1;
    }
    if (a.padding == ZEROS || size0 == 0) return;
#pragma unroll 1
    for (int i = 0; i < COUNT; i++) {
      const int4 origin = origins[i * ROWS_APART];
      const int place = origin.w + further + moved(a.axes[0], origin.x + t0, a.padding) * step0 +
                        moved(a.axes[1], origin.y + t1, a.padding) * step1 +
                        moved(a.axes[2], origin.z + t2, a.padding) * step2;
#pragma unroll
      for (int j = 0; j < COUNT; j++)
        if (j == i && origin.x != BEYOND) from[j] = place;
    }
  }

 public:
  __device__ StagedColumns(const ConvArguments& a, const Place&, const Columns& columns, int first) {
    chunks = (a.group_in + CHUNK - 1) / CHUNK;
    const int chunk = first + threadIdx.x % ROW, taps = chunk / chunks;
    channel = chunk % chunks;
    tap[2] = taps % a.axes[2].kernel;
    tap[1] = taps / a.axes[2].kernel % a.axes[1].kernel;
    tap[0] = taps / a.axes[2].kernel / a.axes[1].kernel;
    look(a, columns);
  }

  // Asks for the next tile.
  __device__ __forceinline__ void copy(const ConvArguments& a, const Columns& columns, Chunk* tile) {
    const Chunk* input = static_cast<const Chunk*>(a.input) + channel;
    Chunk* own = tile + (threadIdx.x ^ threadIdx.x / (2 * ROW) % ROW);
#pragma unroll
    for (int i = 0; i < COUNT; i++) copy_async_16(own + i * THREADS, input + max(from[i], 0), from[i] >= 0);
    channel += ROW;
    if (channel < chunks) return;
#pragma unroll 1
    do {
      channel -= chunks;
      const bool row = ++tap[2] == a.axes[2].kernel;
      if (row) tap[2] = 0;
      const bool plane = (tap[1] += row) == a.axes[1].kernel;
      if (plane) tap[1] = 0;
      tap[0] += plane;
    } while (channel >= chunks);
    look(a, columns);
  }

  // Two chunks of terms of sixteen columns, as two right operands of mma.sync.
  __device__ __forceinline__ static void load(unsigned (&x)[4], const Chunk* tile, int column, int step) {
    const int lane = threadIdx.x % 32, row = column + lane / 16 * 8 + lane % 8;
    load_matrix_x4(x, tile + row * ROW + ((step + lane / 8 % 2) ^ (lane / 2 % ROW)));
  }
};

// Rows as they are, where a channel's positions follow one another. A thread copies eight neighbouring columns of every
// TERMS_APART-th channel: at once, or by fours where eight may be in two samples or begin anywhere.
class RowColumns {
  static constexpr int ROW_CHUNKS = TILE_N / 8;             // chunks of a row of a tile
  static constexpr int TERMS_APART = THREADS / ROW_CHUNKS;  // rows that the threads copy at once
  static constexpr int COUNT = ROW * CHUNK / TERMS_APART;
  const Input* from[2];  // its next channel's columns, four and four
  bool real[2], whole;
  int left;              // channels from its next on

 public:
  __device__ RowColumns(const ConvArguments& a, const Place& place, const Columns& columns, int first) {
    const int channel = first * CHUNK + threadIdx.x / ROW_CHUNKS;
    left = a.group_in - channel;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int2 at = columns.output[threadIdx.x % ROW_CHUNKS * 8 + half * 4];
      real[half] = at.x >= 0;
      from[half] = static_cast<const Input*>(a.input);
      if (real[half])
        from[half] += at.x * a.input_sample + (place.group * a.group_in + channel) * a.input_channel + at.y;
    }
    const unsigned long long places = (unsigned long long)a.positions | a.input_sample | a.input_channel;
    whole = places % 8 == 0 && reinterpret_cast<unsigned long long>(a.input) % sizeof(Chunk) == 0;
  }

  // Asks for the next tile.
  __device__ __forceinline__ void copy(const ConvArguments& a, const Columns&, Chunk* tile) {
    // Chunk c of row r lies at c ^ (r % 8): eight rows that ldmatrix reads at one c hit all 32 banks.
    const int row = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS ^ row % 8;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const bool present = i * TERMS_APART < left;
      const long long skipped = present ? i * TERMS_APART * a.input_channel : 0;
      Chunk* own = tile + (row + i * TERMS_APART) * ROW_CHUNKS + chunk;
      if (whole) {
        copy_async_16(own, from[0] + skipped, present && real[0]);
      } else {
        copy_async_8(own, from[0] + skipped, present && real[0]);
        copy_async_8(&own->word[2], from[1] + skipped, present && real[1]);
      }
    }
    left -= ROW * CHUNK;
    from[0] += ROW * CHUNK * a.input_channel;
    from[1] += ROW * CHUNK * a.input_channel;
  }

  // Two chunks of terms of sixteen columns, as two right operands of mma.sync.
  __device__ __forceinline__ static void load(unsigned (&x)[4], const Chunk* tile, int column, int step) {
    const int lane = threadIdx.x % 32, row = step * CHUNK + lane % 16;
    load_matrix_x4_transposed(x, tile + row * ROW_CHUNKS + ((column / 8 + lane / 16) ^ lane % 8));
  }
};
