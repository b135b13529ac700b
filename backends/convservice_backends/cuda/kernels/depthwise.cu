// depthwise: groups of few channels, bound by memory; a thread computes a small tile of neighbouring outputs.
//
// `direct` reads one input and one weight for every product. Here a thread owns FILTERS filters of a group, ROWS rows
// and COLUMNS columns of outputs: it keeps the weights of a channel in registers, reads each row of the tile's inputs
// once, in quads where rows are aligned, and adds a row to all outputs that look at it. The products of a sum are
// added in the order of `direct` (channel, then weight, ascending, fused), so that both give the same bits.
//
// SIZE is the kernel along both axes of a 2-D layer without dilation, STRIDE its stride along both. SIZE 0 is the
// general form for every other layer of any rank: one row of outputs, weights read as they are needed.
//
// Filters are (groups * group_out / FILTERS, group_in, taps, FILTERS), of the type of the sums. Threads are dealt out
// to planes: the maps of one sample and one filter (FILTERS of them). A block has `lanes` threads for a plane, a power
// of two, so that small planes share a block; along x the grid runs over a plane's tiles, along y over planes.
#include "common.cuh"

constexpr int TILE = FILTERS * ROWS * COLUMNS;

template <typename Value> struct alignas(sizeof(Value) < 4 ? 4 * sizeof(Value) : 16) Quad { Value at[4]; };

// One thread's tile.
struct Place {
  int sample, filter;      // the first of its filters, numbered over all groups
  int outer, row, column;  // its first output
};

// Threads of a block for one plane, as a power of two: the smallest that holds its tiles, or all.
__device__ __forceinline__ int plane_lane_bits(int tiles) {
  int bits = 0;
  while (1 << bits < tiles && 1 << bits < THREADS) bits++;
  return bits;
}

// ---- the epilogue

// Applies an activation to all sums. The costly ones are in the code once: sums go round through the first place.
__device__ __forceinline__ void activate(const ConvArguments& a, Sum (&sums)[TILE]) {
  if (a.activation == 0) return;
  if (a.activation == 1) {
#pragma unroll
    for (int i = 0; i < TILE; i++) sums[i] = activated(sums[i], 1, 0.0);
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < TILE; turn++) {
    const Sum done = activated(sums[0], a.activation, a.slope);
#pragma unroll
    for (int i = 0; i + 1 < TILE; i++) sums[i] = sums[i + 1];
    sums[TILE - 1] = done;
  }
}

// Threshold, activation, one rounding; quads are stored as such where they are whole and aligned.
__device__ __forceinline__ void finish_tile(const ConvArguments& a, const Place& at, Sum (&sums)[TILE]) {
#pragma unroll
  for (int f = 0; f < FILTERS; f++) {
    const Sum bias = threshold(a, at.filter + f);
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; i++) sums[f * ROWS * COLUMNS + i] += bias;
  }
  activate(a, sums);

  const int width = a.axes[2].count, columns = width - at.column, rows = a.axes[1].count - at.row;
  Output* plane = static_cast<Output*>(a.output) + at.sample * a.output_sample + at.filter * a.output_channel +
                  (at.outer * a.axes[1].count + at.row) * width + at.column;
#pragma unroll
  for (int f = 0; f < FILTERS; f++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= rows) continue;
      Output* place = plane + f * a.output_channel + r * width;
#pragma unroll
      for (int c = 0; c < COLUMNS; c += 4) {
        Quad<Output> quad;
#pragma unroll
        for (int e = 0; e < 4; e++) store(&quad.at[e], sums[(f * ROWS + r) * COLUMNS + c + e]);
        if (columns >= c + 4 && (unsigned long long)(place + c) % sizeof(Quad<Output>) == 0) {
          *reinterpret_cast<Quad<Output>*>(place + c) = quad;
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (c + e < columns) place[c + e] = quad.at[e];
        }
      }
    }
}

#if SIZE > 0
// ---- the forms for one size and stride

constexpr int TILE_ROWS = (ROWS - 1) * STRIDE + SIZE;    // of inputs
constexpr int WINDOW = (COLUMNS - 1) * STRIDE + SIZE;    // inputs of a row that a tile looks at
constexpr int LEAD = (SIZE - 1) / 2;                     // of them before the first aligned quad
constexpr int FIRST_QUAD = LEAD ? -1 : 0, LAST_QUAD = (WINDOW - 1 - LEAD) / 4;

// Elements of a window that are in a quad.
__device__ constexpr int quad_use(int quad) {
  const int first = LEAD + 4 * quad, last = first + 4;
  return (last < WINDOW ? last : WINDOW) - (first > 0 ? first : 0);
}

// The element that reads a coordinate, -1 where it reads 0. What lies beyond all that the outputs wanted look at is
// not read, since rows there need not be held.
__device__ __forceinline__ int looked_at(const ConvArguments& a, const Axis& axis, int at) {
  const int last = coordinate(axis, axis.count - 1, axis.kernel - 1);
  return real_coordinate(axis, at < last ? at : last, a.padding);
}

// Whether all of a launch may read quads: each lies, aligned, wholly in a row or wholly in padding that is 0. In other
// padding single elements alone are read, so that all quads must be whole ones in a row.
__device__ __forceinline__ bool reads_quads(const ConvArguments& a) {
  const Axis& axis = a.axes[2];
  const int last_tile = axis.start + LEAD + (axis.count - 1) / COLUMNS * COLUMNS * STRIDE;
  const bool whole = quad_use(FIRST_QUAD) % 4 <= 1 && quad_use(LAST_QUAD) % 4 <= 1;
  const bool real = a.padding == ZEROS || (whole && axis.start + LEAD >= axis.low &&
                                           last_tile + (WINDOW - LEAD) / 4 * 4 <= axis.high);
  const long long steps = a.input_sample | a.input_channel | a.axes[1].step | axis.low | axis.high;
  return real && (steps & 3) == 0 && ((axis.start + LEAD) & 3) == 0 &&
         (unsigned long long)a.input % sizeof(Quad<Input>) == 0;
}

// The inputs of one row of the tile, from column `first` on; 0 where a column or the row lies in padding.
template <bool QUADS>
__device__ __forceinline__ void read_row(const ConvArguments& a, const Input* row, bool inside, int first,
                                         const int (&columns)[WINDOW], Sum (&x)[WINDOW]) {
#pragma unroll
  for (int q = FIRST_QUAD; q <= LAST_QUAD; q++) {
    if (QUADS && quad_use(q) > 1) {
      const int at = first + LEAD + 4 * q;
      Quad<Input> quad = {};
      if (inside && at >= a.axes[2].low && at < a.axes[2].high) quad = *reinterpret_cast<const Quad<Input>*>(row + at);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (LEAD + 4 * q + e >= 0 && LEAD + 4 * q + e < WINDOW) x[LEAD + 4 * q + e] = Sum(widened(quad.at[e]));
    } else {
#pragma unroll
      for (int n = LEAD + 4 * q; n < LEAD + 4 * q + 4; n++)
        if (n >= 0 && n < WINDOW) {
          Input value = {};
          if (inside && columns[n] >= 0) value = row[columns[n]];
          x[n] = Sum(widened(value));
        }
    }
  }
}

template <bool QUADS>
__device__ __forceinline__ void compute_tile(const ConvArguments& a, const Place& at) {
  const int first = coordinate(a.axes[2], at.column, 0);
  int columns[WINDOW], rows[TILE_ROWS];
#pragma unroll
  for (int n = 0; n < WINDOW; n++) columns[n] = looked_at(a, a.axes[2], first + n);
#pragma unroll
  for (int i = 0; i < TILE_ROWS; i++) {
    const int row = looked_at(a, a.axes[1], coordinate(a.axes[1], at.row, 0) + i);
    rows[i] = row < 0 ? -1 : row * (int)a.axes[1].step;
  }
  const int group = at.filter / a.group_out;
  const Input* plane =
      static_cast<const Input*>(a.input) + at.sample * a.input_sample + group * a.group_in * a.input_channel;
  const Sum* filter = static_cast<const Sum*>(a.filters) + (long long)at.filter * a.group_in * (SIZE * SIZE);

  Sum sums[TILE];
#pragma unroll
  for (int i = 0; i < TILE; i++) sums[i] = Sum(0);
#pragma unroll 1
  for (int channel = 0; channel < a.group_in; channel++, plane += a.input_channel, filter += SIZE * SIZE * FILTERS) {
    Sum weight[SIZE * SIZE][FILTERS];
#pragma unroll
    for (int k = 0; k < SIZE * SIZE; k++) {
      if (FILTERS == 4) {
        const Quad<Sum> quad = *reinterpret_cast<const Quad<Sum>*>(filter + 4 * k);
#pragma unroll
        for (int f = 0; f < FILTERS; f++) weight[k][f] = quad.at[f];
      } else {
        weight[k][0] = filter[k];
      }
    }
#pragma unroll
    for (int i = 0; i < TILE_ROWS; i++) {
      Sum x[WINDOW];
      read_row<QUADS>(a, plane + (rows[i] < 0 ? 0 : rows[i]), rows[i] >= 0, first, columns, x);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int k = i - r * STRIDE;
        if (k < 0 || k >= SIZE) continue;
#pragma unroll
        for (int t = 0; t < SIZE; t++)
#pragma unroll
          for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
              Sum& sum = sums[(f * ROWS + r) * COLUMNS + c];
              sum = fused_multiply_add(weight[k * SIZE + t][f], x[c * STRIDE + t], sum);
            }
      }
    }
  }
  finish_tile(a, at, sums);
}

#else
// ---- the general form

__device__ __forceinline__ bool reads_quads(const ConvArguments&) { return false; }

// The input at a coordinate of the innermost axis, whose elements are neighbours. Where not all that a tile looks at
// is real, it is 0 where it or the row lies in padding; `last` is the last coordinate that an output wanted looks at.
template <bool REAL>
__device__ __forceinline__ Sum read(const ConvArguments& a, const Input* row, bool inside, int coordinate, int last) {
  if (REAL) return Sum(widened(row[coordinate]));
  const Axis& axis = a.axes[2];
  const int wanted = min(coordinate, last), nearest = min(max(wanted, axis.low), axis.high - 1);
  const int at = a.padding == REFLECT ? 2 * nearest - wanted : nearest;
  Input value = {};
  if (inside && (a.padding != ZEROS || nearest == wanted)) value = row[at];
  return Sum(widened(value));
}

// Adds the products of one row of weights. Where stride and dilation agree, neighbouring outputs look at the same
// inputs: weight k of output c at that of weight k + 1 of output c - 1.
template <bool REAL>
__device__ __forceinline__ void add_row(const ConvArguments& a, const Input* row, bool inside, int first, int last,
                                        const Sum* weight, Sum (&sums)[TILE]) {
  const Axis& axis = a.axes[2];
  Sum x[COLUMNS];
  if (axis.stride == axis.dilation) {
#pragma unroll
    for (int c = 1; c < COLUMNS; c++) x[c] = read<REAL>(a, row, inside, first + (c - 1) * axis.stride, last);
#pragma unroll 4
    for (int k = 0; k < axis.kernel; k++) {
#pragma unroll
      for (int c = 0; c + 1 < COLUMNS; c++) x[c] = x[c + 1];
      x[COLUMNS - 1] = read<REAL>(a, row, inside, first + (COLUMNS - 1 + k) * axis.stride, last);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) sums[c] = fused_multiply_add(weight[k], x[c], sums[c]);
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < axis.kernel; k++)
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        const Sum value = read<REAL>(a, row, inside, first + c * axis.stride + k * axis.dilation, last);
        sums[c] = fused_multiply_add(weight[k], value, sums[c]);
      }
  }
}

template <bool QUADS>
__device__ __forceinline__ void compute_tile(const ConvArguments& a, const Place& at) {
  const Axis& outer = a.axes[0];
  const Axis& middle = a.axes[1];
  const Axis& inner = a.axes[2];
  const int first = coordinate(inner, at.column, 0), last = coordinate(inner, inner.count - 1, inner.kernel - 1);
  const int far = coordinate(inner, at.column + COLUMNS - 1, inner.kernel - 1);
  const bool real = first >= inner.low && far < inner.high && far <= last;
  const int group = at.filter / a.group_out;
  const Input* plane =
      static_cast<const Input*>(a.input) + at.sample * a.input_sample + group * a.group_in * a.input_channel;
  const Sum* weight = static_cast<const Sum*>(a.filters) + (long long)at.filter * a.group_in * a.taps;

  Sum sums[TILE];
#pragma unroll
  for (int c = 0; c < TILE; c++) sums[c] = Sum(0);
  for (int channel = 0; channel < a.group_in; channel++, plane += a.input_channel)
    for (int i = 0; i < outer.kernel; i++) {
      const int x0 = real_coordinate(outer, coordinate(outer, at.outer, i), a.padding);
      for (int j = 0; j < middle.kernel; j++, weight += inner.kernel) {
        const int x1 = real_coordinate(middle, coordinate(middle, at.row, j), a.padding);
        const bool inside = x0 >= 0 && x1 >= 0;
        const Input* row = plane + (inside ? x0 * outer.step + x1 * middle.step : 0);
        if (real && inside) add_row<true>(a, row, true, first, last, weight, sums);
        else add_row<false>(a, row, inside, first, last, weight, sums);
      }
    }
  finish_tile(a, at, sums);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) KERNEL(const ConvArguments a) {
  const int across = (a.axes[2].count + COLUMNS - 1) / COLUMNS;
  const int down = (a.axes[1].count + ROWS - 1) / ROWS;
  const int tiles = across * down * a.axes[0].count;
  const int bits = plane_lane_bits(tiles);
  const int tile = ((int)blockIdx.x << bits) + ((int)threadIdx.x & ((1 << bits) - 1));
  if (tile >= tiles) return;

  const int banks = a.groups * a.group_out / FILTERS, planes = a.samples * banks;
  const int first = (int)threadIdx.x >> bits, step = THREADS >> bits;
  const bool quads = reads_quads(a);
  Place at;
  at.column = tile % across * COLUMNS;
  at.row = tile / across % down * ROWS;
  at.outer = tile / across / down;
  for (int plane = (int)blockIdx.y * step + first; plane < planes; plane += (int)gridDim.y * step) {
    at.sample = plane / banks;
    at.filter = plane % banks * FILTERS;
    if (quads) compute_tile<true>(a, at);
    else compute_tile<false>(a, at);
  }
}
