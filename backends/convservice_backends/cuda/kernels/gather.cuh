// gather: how implicit_gemm reads the inputs of one tile.
//
// The product's second matrix has one row for each term of the sums (k: a channel and a weight's place) and one
// column for each output position of every sample. It is nowhere in memory: `Gather` reads DEPTH rows of it at a
// time, TILE_N columns wide, from the rows where they lie. There are four, for what a layer's windows allow:
//
//   VECTORS  windows of one weight, stride 1, without padding, rows aligned: 16 bytes a load; k = channel
//   TAPS     channels of a group a multiple of DEPTH, at most 64 weights, zeros for padding: all DEPTH rows belong to
//            one weight's place; a bit says whether it is real, a pointer moves on; k = tap * group_in + channel
//   SHORT    at most SHORT_TERMS terms and 63 weights, zeros for padding: each block begins with a list of the terms'
//            places in memory; k = channel * taps + tap
//   TABLE    whatever else: each element's place is worked out by itself; k = channel * taps + tap
//
// SHORT and TABLE learn from a table behind the filters which channel and weight a term is. The bits of a sum depend
// on the order of k alone, so that a launch may take any gather that has its layer's order.
//
// A thread reads COUNT loads of one column (WIDE neighbouring ones with VECTORS), ROWS_APART rows apart, into
// registers, and later puts them into shared memory. Columns beyond the last, rows beyond the last term, and
// padding read the value 0.
#pragma once
#include "common.cuh"

#define VECTORS 1
#define TAPS 2
#define SHORT 3
#define TABLE 4

constexpr int DEPTH = 8;                   // terms of the sums between two barriers
constexpr int VECTOR = 16 / sizeof(Sum);   // elements of a 16-byte access

struct alignas(16) Vector { Sum lane[VECTOR]; };

// Where a block works.
struct Place {
  int group, filter;     // the first filter of its tile, within the group
  int sample, position;  // of its first column
};

// A column of the second matrix: one output position of one sample.
struct Column {
  int sample, position;
  bool real;  // false beyond the last sample
};

// The column `ahead` columns after a block's first.
__device__ __forceinline__ Column column_at(const ConvArguments& a, const Place& place, int ahead) {
  const unsigned position = (unsigned)place.position + (unsigned)ahead, positions = (unsigned)a.positions;
  const unsigned further = position / positions;
  const unsigned sample = (unsigned)place.sample + further;
  return {(int)sample, (int)(position - further * positions), sample < (unsigned)a.samples};
}

#if GATHER == VECTORS
typedef Vector Fetched;
#else
typedef Input Fetched;
#endif
constexpr int WIDE = GATHER == VECTORS ? VECTOR : 1;         // columns of one load
constexpr int ROWS_APART = THREADS / (TILE_N / WIDE);        // rows that a block reads at once
constexpr int COUNT = DEPTH / ROWS_APART;                    // loads of one thread
static_assert(ROWS_APART * (TILE_N / WIDE) == THREADS && COUNT * ROWS_APART == DEPTH, "threads and tile");

// What a thread reads of a tile: from which row of the tile on, and in which columns.
__device__ __forceinline__ int first_row() { return threadIdx.x / (TILE_N / WIDE); }
__device__ __forceinline__ int own_column() { return threadIdx.x % (TILE_N / WIDE) * WIDE; }

// Where the window of a column begins on each axis.
__device__ __forceinline__ void window_of(const ConvArguments& a, const Column& column, int (&origin)[3]) {
  const int inner = column.position % a.axes[2].count, rest = column.position / a.axes[2].count;
  origin[2] = coordinate(a.axes[2], inner, 0);
  origin[1] = coordinate(a.axes[1], rest % a.axes[1].count, 0);
  origin[0] = coordinate(a.axes[0], rest / a.axes[1].count, 0);
}

// For each weight's place a bit: whether a window with this origin has a real element there.
__device__ __forceinline__ unsigned long long looks(const ConvArguments& a, const int (&origin)[3]) {
  unsigned long long found = 0;
  int tap = 0;
#pragma unroll 1
  for (int i = 0; i < a.axes[0].kernel; i++)
#pragma unroll 1
    for (int j = 0; j < a.axes[1].kernel; j++)
#pragma unroll 1
      for (int k = 0; k < a.axes[2].kernel; k++, tap++) {
        const int x0 = origin[0] + i * a.axes[0].dilation;
        const int x1 = origin[1] + j * a.axes[1].dilation;
        const int x2 = origin[2] + k * a.axes[2].dilation;
        const bool real = x0 >= a.axes[0].low && x0 < a.axes[0].high && x1 >= a.axes[1].low &&
                          x1 < a.axes[1].high && x2 >= a.axes[2].low && x2 < a.axes[2].high;
        if (real) found |= 1ull << tap;
      }
  return found;
}

struct alignas(16) Term { int channel, places[3]; };  // the weight's place as steps of each axis; after the last, -1

constexpr int SHORT_TERMS = 512;
struct Listed { int place, tap; };  // elements behind the first channel under a window's origin; after the last, tap 63
constexpr int LISTED = GATHER == SHORT ? SHORT_TERMS : 1;  // terms that a block lists in shared memory

#if GATHER == SHORT
struct Gather {
  const Listed* term;         // of the next tile's element in the thread's first row
  const Input* first;         // channel 0 of the group under the window's origin, in the column's sample
  unsigned long long inside;  // a bit for each weight's place, set where it looks at a real element

  __device__ Gather(const ConvArguments& a, const Place& place, int first_term, const void* table, Listed* list) {
    const int terms = min((a.group_in * a.taps + DEPTH - 1) / DEPTH * DEPTH - first_term, a.split_depth);
    for (int i = threadIdx.x; i < terms; i += THREADS) {
      const Term here = static_cast<const Term*>(table)[first_term + i];
      const int within = here.places[0] * (int)a.axes[0].step + here.places[1] * (int)a.axes[1].step + here.places[2];
      list[i] = {here.channel * (int)a.input_channel + within,
                 here.channel < 0 ? 63 : first_term + i - here.channel * a.taps};
    }
    __syncthreads();
    const Column column = column_at(a, place, own_column());
    int origin[3];
    window_of(a, column, origin);
    inside = column.real ? looks(a, origin) : 0;
    first = static_cast<const Input*>(a.input) + column.sample * a.input_sample +
            (long long)place.group * a.group_in * a.input_channel + origin[0] * a.axes[0].step +
            origin[1] * a.axes[1].step + origin[2];
    term = list + first_row();
  }

  // Reads the next tile.
  __device__ __forceinline__ void load(const ConvArguments&, Input (&held)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const Listed here = term[i * ROWS_APART];
      const Input* place = first + here.place;
      held[i] = Input{};
      if (inside >> here.tap & 1) held[i] = *place;
    }
    term += DEPTH;
  }
};

#elif GATHER == TABLE
struct Gather {
  const Term* term;     // of the next tile's element in the thread's first row
  const Input* plane;   // channel 0 of the group, in the column's sample
  int origin[3];
  bool real;

  __device__ Gather(const ConvArguments& a, const Place& place, int first_term, const void* table, Listed*) {
    const Column column = column_at(a, place, own_column());
    window_of(a, column, origin);
    real = column.real;
    term = static_cast<const Term*>(table) + first_term + first_row();
    plane = static_cast<const Input*>(a.input) + column.sample * a.input_sample +
            (long long)place.group * a.group_in * a.input_channel;
  }

  // `real_coordinate` without branches: the coordinate, and whether there is an element at all.
  __device__ __forceinline__ static int looked_at(const Axis& axis, int coordinate, int padding, bool& inside) {
    const int nearest = min(max(coordinate, axis.low), axis.high - 1);
    inside = inside && (padding != ZEROS || nearest == coordinate);
    return padding == REFLECT ? 2 * nearest - coordinate : nearest;
  }

  // Reads the next tile.
  __device__ __forceinline__ void load(const ConvArguments& a, Input (&held)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const Term here = term[i * ROWS_APART];
      bool inside = real && here.channel >= 0;
      const int x0 = looked_at(a.axes[0], origin[0] + here.places[0], a.padding, inside);
      const int x1 = looked_at(a.axes[1], origin[1] + here.places[1], a.padding, inside);
      const int x2 = looked_at(a.axes[2], origin[2] + here.places[2], a.padding, inside);
      const int within = x0 * (int)a.axes[0].step + x1 * (int)a.axes[1].step + x2;
      const Input* place = plane + ((long long)here.channel * (int)a.input_channel + within);
      held[i] = inside ? *place : Input{};
    }
    term += DEPTH;
  }
};

#else
struct Gather {
  const Fetched* place;       // the next tile's element in the thread's first row
#if GATHER == TAPS
  unsigned long long inside;  // from the weight's place on: a bit for each, set where it looks at a real element
  int left;                   // terms until the next weight's place begins
  int tap1, tap2;             // the weight's place on the last two axes
#else
  bool real;
#endif

  __device__ Gather(const ConvArguments& a, const Place& where, int first_term, const void*, Listed*) {
    const Column column = column_at(a, where, own_column());
    const int channel = first_term % a.group_in;
    const Input* first = static_cast<const Input*>(a.input) + column.sample * a.input_sample +
                         ((long long)where.group * a.group_in + channel + first_row()) * a.input_channel;
    int origin[3];
    window_of(a, column, origin);
#if GATHER == TAPS
    const int tap = first_term / a.group_in;
    inside = column.real ? looks(a, origin) >> tap : 0;
    left = a.group_in - channel;
    tap2 = tap % a.axes[2].kernel;
    tap1 = tap / a.axes[2].kernel % a.axes[1].kernel;
    const int tap0 = tap / a.axes[2].kernel / a.axes[1].kernel;
    origin[0] += tap0 * a.axes[0].dilation;
    origin[1] += tap1 * a.axes[1].dilation;
    origin[2] += tap2 * a.axes[2].dilation;
#else
    real = column.real;
#endif
    first += origin[0] * a.axes[0].step + origin[1] * a.axes[1].step + origin[2];
    place = reinterpret_cast<const Fetched*>(first);
  }

#if GATHER == TAPS
  // Steps to the next weight's place, and back to the first channel.
  __device__ __forceinline__ void next_tap(const ConvArguments& a) {
    long long step = a.axes[2].dilation - a.group_in * a.input_channel;
    if (++tap2 == a.axes[2].kernel) {
      tap2 = 0;
      step += a.axes[1].dilation * a.axes[1].step - (long long)a.axes[2].kernel * a.axes[2].dilation;
      if (++tap1 == a.axes[1].kernel) {
        tap1 = 0;
        step += a.axes[0].dilation * a.axes[0].step - a.axes[1].kernel * a.axes[1].dilation * a.axes[1].step;
      }
    }
    place += step;
    inside >>= 1;
    left = a.group_in;
  }
#endif

  // Reads the next tile.
  __device__ __forceinline__ void load(const ConvArguments& a, Fetched (&held)[COUNT]) {
#if GATHER == TAPS
    if (left == 0) next_tap(a);
    const bool real = inside & 1;
    left -= DEPTH;
#endif
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      held[i] = Fetched{};
      if (real) held[i] = *place;
      place += a.input_channel * ROWS_APART / WIDE;
    }
  }
};
#endif

// Puts what a thread has read into shared memory: `tile` is its first element's place in a tile of (DEPTH, TILE_N).
__device__ __forceinline__ void put(Sum* tile, const Fetched (&held)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#if GATHER == VECTORS
    *reinterpret_cast<Vector*>(tile + i * ROWS_APART * TILE_N) = held[i];
#else
    tile[i * ROWS_APART * TILE_N] = Sum(widened(held[i]));
#endif
  }
}
