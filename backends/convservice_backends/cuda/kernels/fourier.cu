// fourier: convolution by the discrete Fourier transform in float64, tile by tile (overlap-save); four kernels.
//
// Compared to `direct`, which takes `taps` products for each output and channel, a tile takes a number that hardly
// grows with the filter: it pays for large filters. Overlap-save (Oppenheim and Schafer, "Discrete-Time Signal
// Processing", 3rd ed., section 8.7.3): tiles of inputs overlap, and of each the outputs are taken in which nothing
// wraps around. One of the macros GATHER, SURVEY, MULTIPLY and FINISH says which kernel the text is; between them
// a library transforms:
//   GATHER    a tile of inputs of all channels as float64, with what is to be known of it
//   SURVEY    where the next input that is not 0 lies, along each row of a tile
//   (forward transform of each channel's tile)
//   MULTIPLY  by the conjugate transforms of the filters, summed over the channels of a group, in ascending order
//   (inverse transform of each filter's tile)
//   FINISH    scale; round to an integer where all is integer; what the error bound does not cover, and all of a
//             tile that is not finite, is 0 where the window is, else computed from its own products; threshold,
//             activation, rounding
//
// Stride and dilation are 1. axes[1] and axes[2] are the tile's axes: `unused` is the tile's size along each, ROWS and
// COLUMNS in what follows, of which `size - kernel + 1` outputs are valid; `splits` is the number of tiles transformed
// at once, `split_depth` the first of them. Tiles are numbered by sample, row of tiles, column of tiles.
//
// `scratch` is six parts, one after the other:
//   (tiles, chunks) Statistics, filled up to a multiple of 256 bytes
//   (tiles, ROWS, COLUMNS) uint16: column of the next input that is not 0 in any channel, COLUMNS where there is none
//   (tiles, ROWS, COLUMNS) bytes: 1 where an input is not 0 in any channel; filled up likewise
//   (tiles, max(channels, filters), ROWS, COLUMNS) doubles: inputs, then sums
//   (tiles, channels, ROWS, COLUMNS / 2 + 1) complex: transformed inputs
//   (tiles, filters, ROWS, COLUMNS / 2 + 1) complex: transformed sums
// `filters` is doubles: the transforms (filters, group_in, ROWS, COLUMNS / 2 + 1) complex; the bound of each filter's
// error for inputs of norm 1; 1 for each filter of integers, else 0; the filters (filters, group_in, taps).
#include "common.cuh"

const int NOT_FINITE = 1, NOT_INTEGER = 2;
const int WARP_LANES = 32;
const unsigned ALL_LANES = 0xffffffffu;

struct __align__(16) Complex {
  double real, imaginary;
};

// What is known of THREADS inputs of a tile, in all channels.
struct Statistics {
  double squares;   // the sum of their squares; of no use where one is not finite
  long long flags;
};

// Sizes that follow from the arguments.
struct Layout {
  int rows, columns;    // of a tile
  int down, across;     // valid outputs of a tile along both axes
  int channels, filters;
  int chunks;           // of THREADS inputs, in a tile
  long long elements, frequencies;  // of one channel's tile

  __device__ __forceinline__ explicit Layout(const ConvArguments& a)
      : rows(a.axes[1].unused), columns(a.axes[2].unused),
        down(rows - a.axes[1].kernel + 1), across(columns - a.axes[2].kernel + 1),
        channels(a.groups * a.group_in), filters(a.groups * a.group_out) {
    elements = (long long)rows * columns;
    frequencies = (long long)rows * (columns / 2 + 1);
    chunks = (int)((elements + THREADS - 1) / THREADS);
  }

  __device__ __forceinline__ Statistics* statistics(const ConvArguments& a) const {
    return static_cast<Statistics*>(a.scratch);
  }
  __device__ __forceinline__ unsigned short* next(const ConvArguments& a) const {
    const long long bytes = (long long)a.splits * chunks * sizeof(Statistics);
    return reinterpret_cast<unsigned short*>(static_cast<char*>(a.scratch) + (bytes + 255) / 256 * 256);
  }
  __device__ __forceinline__ unsigned char* marks(const ConvArguments& a) const {
    return reinterpret_cast<unsigned char*>(next(a) + a.splits * elements);
  }
  __device__ __forceinline__ double* tiles(const ConvArguments& a) const {
    return reinterpret_cast<double*>(reinterpret_cast<char*>(next(a)) + (3 * a.splits * elements + 255) / 256 * 256);
  }
  __device__ __forceinline__ Complex* spectra(const ConvArguments& a) const {
    return reinterpret_cast<Complex*>(tiles(a) + a.splits * (long long)max(channels, filters) * elements);
  }
  __device__ __forceinline__ Complex* products(const ConvArguments& a) const {
    return spectra(a) + a.splits * channels * frequencies;
  }
  __device__ __forceinline__ const double* bounds(const ConvArguments& a) const {
    return static_cast<const double*>(a.filters) + 2 * (long long)filters * a.group_in * frequencies;
  }
};

// Where a tile is.
struct Tile {
  int sample, row, column;  // of its first output; a sample beyond the last where there is no such tile

  __device__ __forceinline__ Tile(const ConvArguments& a, const Layout& layout, int number) {
    const int below = (a.axes[1].count + layout.down - 1) / layout.down;
    const int beside = (a.axes[2].count + layout.across - 1) / layout.across;
    sample = number / (below * beside);
    row = number / beside % below * layout.down;
    column = number % beside * layout.across;
  }
};

// The element of a channel under an input of a tile; -1 where that is the value 0: padding, or beyond what the last
// valid output of a short tile looks at.
__device__ __forceinline__ long long place_of(const ConvArguments& a, int row, int column) {
  const Axis &down = a.axes[1], &across = a.axes[2];
  if (row >= down.count + down.kernel - 1 || column >= across.count + across.kernel - 1) return -1;
  const int y = real_coordinate(down, down.start + row, a.padding);
  const int x = real_coordinate(across, across.start + column, a.padding);
  return y < 0 || x < 0 ? -1 : y * down.step + x * across.step;
}

#ifdef GATHER

// One thread an input of a tile, in all channels; blocks are chunks of a tile along x, tiles along y.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const ConvArguments a) {
  const Layout layout(a);
  const Tile tile(a, layout, a.split_depth + blockIdx.y);
  const long long element = (long long)blockIdx.x * THREADS + threadIdx.x;
  double* target = layout.tiles(a) + blockIdx.y * (long long)layout.channels * layout.elements + element;
  double squares = 0;
  int flags = 0;
  if (element < layout.elements) {
    const int row = (int)(element / layout.columns), column = (int)(element % layout.columns);
    bool mark = false;
    long long place = -1;
    if (tile.sample < a.samples) place = place_of(a, tile.row + row, tile.column + column);
    const Input* source = static_cast<const Input*>(a.input) + (place < 0 ? 0 : tile.sample * a.input_sample + place);
    for (int channel = 0; channel < layout.channels; channel++, source += a.input_channel, target += layout.elements) {
      double value = place < 0 ? 0.0 : (double)widened(*source);
      mark |= value != 0;
      if (value - value != 0) {
        flags |= NOT_FINITE;
        value = 0;  // nothing that is not finite reaches a transform
      }
      if (value != rint(value)) flags |= NOT_INTEGER;
      squares = fma(value, value, squares);
      *target = value;
    }
    layout.marks(a)[blockIdx.y * layout.elements + element] = mark;
  }
  __shared__ double sums[THREADS];
  __shared__ int seen[THREADS];
  const int thread = threadIdx.x;
  sums[thread] = squares;
  seen[thread] = flags;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sums[thread] += sums[thread + half];
      seen[thread] |= seen[thread + half];
    }
  }
  if (thread == 0) {
    const Statistics found = {sums[0], seen[0]};
    layout.statistics(a)[blockIdx.y * (long long)layout.chunks + blockIdx.x] = found;
  }
}

#endif
#ifdef SURVEY

// One warp a row, from its end; blocks are rows along x, tiles along y.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const ConvArguments a) {
  const Layout layout(a);
  const int lane = threadIdx.x % WARP_LANES, row = (blockIdx.x * THREADS + threadIdx.x) / WARP_LANES;
  if (row >= layout.rows) return;  // the whole warp
  const long long place = blockIdx.y * layout.elements + row * (long long)layout.columns;
  const unsigned char* marks = layout.marks(a) + place;
  int next = layout.columns;  // of all that is behind
  for (int begin = layout.columns - WARP_LANES; begin >= 0; begin -= WARP_LANES) {
    const unsigned found = __ballot_sync(ALL_LANES, marks[begin + lane] != 0);
    const unsigned behind = found >> lane;
    layout.next(a)[place + begin + lane] = (unsigned short)(behind ? begin + lane + __ffs(behind) - 1 : next);
    if (found) next = begin + __ffs(found) - 1;
  }
}

#endif
#ifdef MULTIPLY

const int OWN_FILTERS = 4, OWN_TILES = 2;

// One thread a frequency of OWN_FILTERS filters and OWN_TILES tiles; blocks are frequencies along x, filters of one
// group along y, tiles along z.
extern "C" __global__ void __launch_bounds__(THREADS, 2) KERNEL(const ConvArguments a) {
  const Layout layout(a);
  const long long frequency = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (frequency >= layout.frequencies) return;
  const int parts = (a.group_out + OWN_FILTERS - 1) / OWN_FILTERS;
  const int group = blockIdx.y / parts, first = blockIdx.y % parts * OWN_FILTERS;
  const int first_tile = blockIdx.z * OWN_TILES;
  // What is beyond the last filter or tile is computed as the last, and not stored.
  const Complex* input[OWN_TILES];
  const Complex* weight[OWN_FILTERS];
#pragma unroll
  for (int t = 0; t < OWN_TILES; t++) {
    const long long tile = min(first_tile + t, a.splits - 1);
    input[t] = layout.spectra(a) + (tile * layout.channels + group * a.group_in) * layout.frequencies + frequency;
  }
#pragma unroll
  for (int f = 0; f < OWN_FILTERS; f++) {
    const long long filter = group * a.group_out + min(first + f, a.group_out - 1);
    weight[f] = static_cast<const Complex*>(a.filters) + filter * a.group_in * layout.frequencies + frequency;
  }
  Complex sum[OWN_TILES][OWN_FILTERS] = {};
  for (long long channel = 0; channel < a.group_in; channel++) {
    Complex x[OWN_TILES];
#pragma unroll
    for (int t = 0; t < OWN_TILES; t++) x[t] = input[t][channel * layout.frequencies];
#pragma unroll
    for (int f = 0; f < OWN_FILTERS; f++) {
      const Complex w = weight[f][channel * layout.frequencies];
#pragma unroll
      for (int t = 0; t < OWN_TILES; t++) {  // x times the conjugate of w
        Complex& s = sum[t][f];
        s.real = fma(x[t].imaginary, w.imaginary, fma(x[t].real, w.real, s.real));
        s.imaginary = fma(-x[t].real, w.imaginary, fma(x[t].imaginary, w.real, s.imaginary));
      }
    }
  }
#pragma unroll
  for (int t = 0; t < OWN_TILES; t++)
#pragma unroll
    for (int f = 0; f < OWN_FILTERS; f++) {
      if (first_tile + t >= a.splits || first + f >= a.group_out) continue;
      const long long map = (first_tile + t) * (long long)layout.filters + group * a.group_out + first + f;
      layout.products(a)[map * layout.frequencies + frequency] = sum[t][f];
    }
}

#endif
#ifdef FINISH

const double ROUNDOFF = 0x1p-24, SMALLEST_NORMAL = 0x1p-126;  // of the sums' type, float

// Statistics of a whole tile, by a warp: the same in every lane.
__device__ __forceinline__ Statistics statistics_of(const ConvArguments& a, const Layout& layout, int tile) {
  const Statistics* chunk = layout.statistics(a) + tile * (long long)layout.chunks;
  Statistics all = {0, 0};
  for (int i = threadIdx.x % WARP_LANES; i < layout.chunks; i += WARP_LANES) {
    all.squares += chunk[i].squares;
    all.flags |= chunk[i].flags;
  }
  for (int mask = WARP_LANES / 2; mask > 0; mask /= 2) {
    all.squares += __shfl_xor_sync(ALL_LANES, all.squares, mask);
    all.flags |= __shfl_xor_sync(ALL_LANES, all.flags, mask);
  }
  return all;
}

// Whether all inputs under the window of an output of a tile are 0.
__device__ __forceinline__ bool sees_zeros(const ConvArguments& a, const Layout& layout, int tile, int row,
                                           int column) {
  const unsigned short* next = layout.next(a) + tile * layout.elements + row * (long long)layout.columns + column;
  for (int i = 0; i < a.axes[1].kernel; i++, next += layout.columns)
    if (*next < column + a.axes[2].kernel) return false;
  return true;
}

// The sum of an output's own products, in double, by a warp: the same in every lane, whatever the warp.
__device__ __forceinline__ double own_products(const ConvArguments& a, const Layout& layout, int sample, int filter,
                                               int row, int column) {
  const int width = a.axes[2].kernel, terms = a.group_in * a.taps;
  const Input* source = static_cast<const Input*>(a.input) + sample * a.input_sample +
                        filter / a.group_out * a.group_in * a.input_channel;
  const double* weight = layout.bounds(a) + 2 * layout.filters + (long long)filter * terms;
  double sum = 0;
  for (int term = threadIdx.x % WARP_LANES; term < terms; term += WARP_LANES) {
    const int tap = term % a.taps;
    const long long place = place_of(a, row + tap / width, column + tap % width);
    const long long at = place < 0 ? 0 : place + term / a.taps * a.input_channel;
    const double value = place < 0 ? 0.0 : (double)widened(source[at]);
    sum = fma(value, weight[term], sum);
  }
  for (int mask = WARP_LANES / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
  return sum;
}

// One thread an output; blocks are outputs of a tile along x, filters along y, tiles along z.
extern "C" __global__ void __launch_bounds__(THREADS, 4) KERNEL(const ConvArguments a) {
  const Layout layout(a);
  const Tile tile(a, layout, a.split_depth + blockIdx.z);
  if (tile.sample >= a.samples) return;  // the whole block
  const Statistics statistics = statistics_of(a, layout, blockIdx.z);
  const int filter = blockIdx.y;
  // sqrt and the sum under it have roundings of their own.
  const double error = layout.bounds(a)[filter] * sqrt(statistics.squares) * (1 + 1e-9);
  const bool integers = layout.bounds(a)[layout.filters + filter] != 0 && !(statistics.flags & NOT_INTEGER);

  const int lane = threadIdx.x % WARP_LANES, output = blockIdx.x * THREADS + threadIdx.x;
  const int row = output / layout.across, column = output % layout.across;
  const bool wanted = row < min(layout.down, a.axes[1].count - tile.row) && column < a.axes[2].count - tile.column;
  double sum = 0;
  bool doubted = false;
  if (wanted) {
    const double* sums = layout.tiles(a) + (blockIdx.z * (long long)layout.filters + filter) * layout.elements;
    sum = sums[row * (long long)layout.columns + column] * (1.0 / layout.elements);  // a power of two
    if (statistics.flags & NOT_FINITE) {
      doubted = true;
    } else if (integers) {
      doubted = !(error < 0.5);
      sum = rint(sum);
    } else {
      // The promise allows (K + 3) u (|x|*|w|) + K eta, and |x|*|w| is at least what the sum certainly is. Half of
      // the part with K is taken here: what is left pays for two roundings to float.
      const double certain = max(fabs(sum) - error, 0.0);
      doubted = !(error <= 0.5 * a.group_in * a.taps * (ROUNDOFF * certain + SMALLEST_NORMAL));
    }
    if (doubted && sees_zeros(a, layout, blockIdx.z, row, column)) {
      sum = 0;
      doubted = false;
    }
  }
  for (unsigned left = __ballot_sync(ALL_LANES, doubted); left; left &= left - 1) {
    const int owner = __ffs(left) - 1, place = output - lane + owner;
    const double own = own_products(a, layout, tile.sample, filter, tile.row + place / layout.across,
                                    tile.column + place % layout.across);
    if (lane == owner) sum = own;
  }
  if (wanted)
    finish(a, tile.sample, filter, (tile.row + row) * a.axes[2].count + tile.column + column, Sum(sum));
}

#endif
