// implicit_gemm: the convolution as a matrix product, a tile of filters times a tile of positions a block.
//
// For one group: (filters, terms) x (terms, samples * positions), where a term is a channel and a weight's place. The
// second matrix is never written out: `gather.cuh` reads it from the rows. `direct` reads two elements for every
// product; here a thread keeps THREAD_M x THREAD_N sums in registers and reads THREAD_M + THREAD_N elements from
// shared memory for each term, a block each element of a tile once from global memory. While one tile of DEPTH terms
// is multiplied, the next is on its way into registers, then into the other half of shared memory: one barrier a tile.
//
// Filters are packed (groups, terms, filters of a group), both rounded up with zeros: terms to a multiple of DEPTH,
// filters to a multiple of TILE_M, so that they are read 16 bytes at a time without looking. The order of the terms is
// the gather's. Every sum is taken term by term in that order, whatever the tile: all tiles give the same bits.
// With splits, blocks along y each sum `split_depth` terms into `scratch` (splits, samples, filters, positions), and
// `reduce` adds the parts in order.
//
// Threads as in Scott Gray's maxas SGEMM: a warp is LANES_M x LANES_N threads whose sums lie in blocks of VECTOR x
// VECTOR, the blocks of a thread LANES_M and LANES_N blocks apart. Neighbouring lanes read the same inputs, lanes two
// apart the same filters, so that shared memory answers half a warp's 16-byte loads at once, without bank conflicts.
#include "gather.cuh"

constexpr int LANES_M = 4, LANES_N = 8;
constexpr int PARTS_M = THREAD_M / VECTOR, PARTS_N = THREAD_N / VECTOR;   // blocks of sums of a thread
constexpr int WARP_M = LANES_M * THREAD_M, WARP_N = LANES_N * THREAD_N;   // what a warp computes
constexpr int WARPS_M = TILE_M / WARP_M, WARPS_N = TILE_N / WARP_N;
static_assert(WARPS_M * WARPS_N * 32 == THREADS && WARPS_M * WARP_M == TILE_M && WARPS_N * WARP_N == TILE_N, "tile");

constexpr int STAGE = DEPTH * (TILE_M + TILE_N);                     // elements of shared memory of one tile
constexpr int FILTER_LOADS = DEPTH * TILE_M / VECTOR;                // 16-byte loads of one tile of filters
constexpr int FILTER_COUNT = (FILTER_LOADS + THREADS - 1) / THREADS; // of one thread

// Rows of the output that pass through shared memory at once: of each of a warp's rows of lanes so many.
constexpr int ROOM = 2 * STAGE / (TILE_N * WARPS_M * LANES_M);
constexpr int ROWS_A_LANE = ROOM < VECTOR ? ROOM : VECTOR;
constexpr int ROWS_AT_ONCE = ROWS_A_LANE * WARPS_M * LANES_M;
static_assert(ROWS_A_LANE > 0 && VECTOR % ROWS_A_LANE == 0, "rows of the output at once");

// Blocks are numbered filters first, so that those that read the same inputs run at the same time.
__device__ __forceinline__ Place place_of(const ConvArguments& a) {
  const unsigned tiles = (a.group_out + TILE_M - 1) / TILE_M;
  const unsigned further = blockIdx.x / tiles;
  const long long column = (long long)(further / a.groups) * TILE_N;
  const int sample = (int)(column / a.positions);
  return {(int)(further % a.groups), (int)(blockIdx.x % tiles) * TILE_M, sample,
          (int)(column - (long long)sample * a.positions)};
}

struct Filters {
  const Vector* next;
  int row_apart;  // Vectors between two rows of the packed filters

  __device__ Filters(const ConvArguments& a, const Place& place, int terms, int first_term) {
    const Sum* packed = static_cast<const Sum*>(a.filters) +
                        ((long long)place.group * terms + first_term) * a.filter_stride + place.filter;
    next = reinterpret_cast<const Vector*>(packed);
    row_apart = a.filter_stride / VECTOR;
  }

  // Reads the next tile.
  __device__ __forceinline__ void load(Vector (&held)[FILTER_COUNT]) {
#pragma unroll
    for (int i = 0; i < FILTER_COUNT; i++) {
      const int load = threadIdx.x + i * THREADS;
      if (FILTER_LOADS % THREADS == 0 || load < FILTER_LOADS)
        held[i] = next[load / (TILE_M / VECTOR) * row_apart + load % (TILE_M / VECTOR)];
    }
    next += DEPTH * row_apart;
  }

  // Puts what was read into shared memory: `tile` is the first load's place in a tile of (DEPTH, TILE_M).
  __device__ __forceinline__ static void put(Sum* tile, const Vector (&held)[FILTER_COUNT]) {
#pragma unroll
    for (int i = 0; i < FILTER_COUNT; i++)
      if (FILTER_LOADS % THREADS == 0 || threadIdx.x + i * THREADS < FILTER_LOADS)
        reinterpret_cast<Vector*>(tile)[i * THREADS] = held[i];
  }
};

// Where a thread is in its warp, and where its sums begin in the tile.
__device__ __forceinline__ int lane_m() { return threadIdx.x % 32 / 16 * 2 + threadIdx.x % 2; }
__device__ __forceinline__ int lane_n() { return threadIdx.x % 16 / 2; }
__device__ __forceinline__ int own_m() { return threadIdx.x / 32 / WARPS_N * WARP_M + lane_m() * VECTOR; }
__device__ __forceinline__ int own_n() { return threadIdx.x / 32 % WARPS_N * WARP_N + lane_n() * VECTOR; }

// Adds the products of one tile, term by term.
__device__ __forceinline__ void multiply(const Sum* filters, const Sum* inputs, Sum (&sums)[THREAD_M][THREAD_N]) {
#pragma unroll
  for (int term = 0; term < DEPTH; term++) {
    Vector w[PARTS_M], x[PARTS_N];
#pragma unroll
    for (int i = 0; i < PARTS_M; i++)
      w[i] = *reinterpret_cast<const Vector*>(filters + term * TILE_M + i * LANES_M * VECTOR);
#pragma unroll
    for (int j = 0; j < PARTS_N; j++)
      x[j] = *reinterpret_cast<const Vector*>(inputs + term * TILE_N + j * LANES_N * VECTOR);
#pragma unroll
    for (int m = 0; m < THREAD_M; m++)
#pragma unroll
      for (int n = 0; n < THREAD_N; n++)
        sums[m][n] =
            fused_multiply_add(w[m / VECTOR].lane[m % VECTOR], x[n / VECTOR].lane[n % VECTOR], sums[m][n]);
  }
}

// ---- the sums leave through shared memory, so that neighbouring threads store neighbouring positions

// Rows pass `turn` by `turn`; those of a lane lie side by side. The row of the tile that lies in row `row`:
__device__ __forceinline__ int passing_row(int turn, int row) {
  const int lane_row = row / ROWS_A_LANE, first = turn * ROWS_A_LANE;
  return lane_row / LANES_M * WARP_M + first / VECTOR * (LANES_M * VECTOR) + lane_row % LANES_M * VECTOR +
         first % VECTOR + row % ROWS_A_LANE;
}

// Where a column lies in a row: those of every other lane are 64 bytes off, against bank conflicts.
__device__ __forceinline__ int passing_column(int lane_row, int n) {
  return n ^ (lane_row % 2 ? 64 / (int)sizeof(Sum) : 0);
}

// Puts the rows of one turn into shared memory, (ROWS_AT_ONCE, TILE_N).
__device__ __forceinline__ void pass(Sum* rows, const Sum (&sums)[THREAD_M][THREAD_N], int turn) {
  const int lane_row = threadIdx.x / 32 / WARPS_N * LANES_M + lane_m();
#pragma unroll
  for (int m = 0; m < THREAD_M; m++)
    if (m / ROWS_A_LANE == turn)
#pragma unroll
      for (int j = 0; j < PARTS_N; j++) {
        Vector part;
#pragma unroll
        for (int lane = 0; lane < VECTOR; lane++) part.lane[lane] = sums[m][j * VECTOR + lane];
        Sum* row = rows + (lane_row * ROWS_A_LANE + m % ROWS_A_LANE) * TILE_N;
        *reinterpret_cast<Vector*>(row + passing_column(lane_row, own_n() + j * LANES_N * VECTOR)) = part;
      }
}

struct alignas(sizeof(Output) * VECTOR) OutputVector { Output lane[VECTOR]; };

// Whether all runs of VECTOR positions from a multiple of VECTOR on may be stored at once.
__device__ __forceinline__ bool whole_vectors(const ConvArguments& a) {
  const unsigned long long places = (unsigned long long)a.positions | a.output_sample | a.output_channel;
  return places % VECTOR == 0 && reinterpret_cast<unsigned long long>(a.output) % sizeof(OutputVector) == 0;
}

// Stores rows from shared memory: with threshold and activation, or as they are where the sum has further splits.
__device__ __forceinline__ void store_rows(const ConvArguments& a, const Place& place, const Sum* rows, int turn) {
  const long long all = (long long)a.groups * a.group_out;
  const bool wide = a.splits == 1 && whole_vectors(a);
  const int width = wide ? VECTOR : 1;
  const int threads_a_row = TILE_N / width;
  const int n = threadIdx.x % threads_a_row * width;
  const Column column = column_at(a, place, n);
  if (!column.real) return;
#pragma unroll 1
  for (int row = threadIdx.x / threads_a_row; row < ROWS_AT_ONCE; row += THREADS / threads_a_row) {
    const int own_filter = place.filter + passing_row(turn, row);
    if (own_filter >= a.group_out) continue;
    const int filter = place.group * a.group_out + own_filter;
    const Sum* from = rows + row * TILE_N + passing_column(row / ROWS_A_LANE, n);
    if (wide) {
      const Vector given = *reinterpret_cast<const Vector*>(from);
      const Sum added = threshold(a, filter);
      OutputVector out;
#pragma unroll
      for (int lane = 0; lane < VECTOR; lane++)
        store(&out.lane[lane], activated(given.lane[lane] + added, a.activation, a.slope));
      Output* to = static_cast<Output*>(a.output) + column.sample * a.output_sample + filter * a.output_channel;
      *reinterpret_cast<OutputVector*>(to + column.position) = out;
    } else if (a.splits == 1) {
      finish(a, column.sample, filter, column.position, *from);
    } else {
      const long long map = ((long long)blockIdx.y * a.samples + column.sample) * all + filter;
      static_cast<Sum*>(a.scratch)[map * a.positions + column.position] = *from;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) KERNEL(const ConvArguments a) {
  __shared__ Vector memory[2 * STAGE / VECTOR];
  __shared__ Place place;  // in no register while the tiles are multiplied
  __shared__ Listed list[LISTED];
  Sum* const shared = memory[0].lane;

  if (threadIdx.x == 0) place = place_of(a);
  __syncthreads();
  const int terms = (a.group_in * a.taps + DEPTH - 1) / DEPTH * DEPTH;
  const int first_term = blockIdx.y * a.split_depth;
  int tiles = min(terms - first_term, a.split_depth) / DEPTH;

  Filters filters(a, place, terms, first_term);
  const Sum* table = static_cast<const Sum*>(a.filters) + (long long)a.groups * terms * a.filter_stride;
  Gather gather(a, place, first_term, table, list);

  Vector held_filters[FILTER_COUNT];
  Fetched held_inputs[COUNT];
  Sum sums[THREAD_M][THREAD_N] = {};

  filters.load(held_filters);
  gather.load(a, held_inputs);
  Filters::put(shared + threadIdx.x * VECTOR, held_filters);
  put(shared + DEPTH * TILE_M + threadIdx.x * WIDE, held_inputs);
  __syncthreads();

  int half = 0;  // of shared memory, with the tile at hand
#pragma unroll 1
  while (--tiles > 0) {
    filters.load(held_filters);
    gather.load(a, held_inputs);
    multiply(shared + half + own_m(), shared + half + DEPTH * TILE_M + own_n(), sums);
    half ^= STAGE;
    Filters::put(shared + half + threadIdx.x * VECTOR, held_filters);
    put(shared + half + DEPTH * TILE_M + threadIdx.x * WIDE, held_inputs);
    __syncthreads();
  }
  multiply(shared + half + own_m(), shared + half + DEPTH * TILE_M + own_n(), sums);

#pragma unroll 1
  for (int turn = 0; turn < THREAD_M / ROWS_A_LANE; turn++) {
    __syncthreads();
    pass(shared, sums, turn);
    __syncthreads();
    store_rows(a, place, shared, turn);
  }
}
