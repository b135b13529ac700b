// tensor_core: the convolution as a matrix product on tensor cores, a tile of filters and positions a block.
//
// As implicit_gemm, its twin in plain float32: (filters, terms) x (terms, samples * positions) for every group. Here a
// warp multiplies 16 filters by 8 positions over 16 terms (float16, bfloat16; 8 of TF32) in one mma.sync, with float32
// accumulators, and the terms are ordered tap by tap, channels inside: `stage` has put the rows channels-last, so that
// the 16 bytes of a chunk (8 or 4 channels of one position) are copied at once, for every type in the same way. Forms
// with CHANNELS_FIRST compute 1x1 windows from 16-bit rows as they are: nothing is put anywhere first.
//
// Given: `input`, chunks (sample, x0, x1, x2, group, chunk), coordinates, steps and `input_sample` counting staged
// chunks (CHANNELS_FIRST: the first element read, a channel's positions following one another); `filters`, chunks
// (group, filters / 32, terms / ROW, 32 filters, ROW), filled up with zeros, so that what a block copies of 32 filters
// is one run of 2 KiB. `split_depth` counts chunks. With splits, either blocks along y sum a part each into `scratch`
// (splits, samples, filters, positions) for `reduce`, or, as a FOLD form, one block sums all parts, one after the
// other: the same additions in the same order, for launches that fill the device anyhow.
//
// STAGES tiles of ROW chunks are in shared memory or on their way there (cp.async, zero-filled where a window looks at
// the value 0), one barrier a tile. Every sum adds its products in the order of the terms, ROW / 2 instructions a tile,
// whatever the tile: all tiles give the same bits. Method: CUTLASS's multistage implicit GEMM, "Efficient GEMM".
//
// Banks: rows are 64 bytes, and chunk c of row r lies at c ^ (r / 2 % 4). The eight rows that ldmatrix reads at one c
// are then in eight different 16-byte columns of the 128 bytes that 32 banks serve; so is what eight threads copy.
#include "columns.cuh"
#include "shared.cuh"

constexpr int STAGE = (TILE_M + TILE_N) * ROW;  // chunks of a stage
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int PARTS_M = WARP_M / 16, PARTS_N = WARP_N / 8;
static_assert(WARPS_M * WARPS_N * 32 == THREADS && ROWS_APART == 32, "four warps");
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && TILE_M % 32 == 0 && TILE_N <= THREADS, "tile");
static_assert(TILE_M * TILE_N <= STAGE * STAGES * 4, "the sums leave through the stages' memory");

#if CHANNELS_FIRST
typedef RowColumns Gather;
#else
typedef StagedColumns Gather;
#endif

// Filters, of which a thread copies one chunk of every 32nd.
class Filters {
  const Chunk* next;  // of this thread
  int apart;          // chunks between two of its filters

 public:
  __device__ Filters(const ConvArguments& a, const Place& place, int row, int first) {
    apart = row * 32;
    const int block = place.group * (a.filter_stride / 32) + place.filter / 32;
    next = static_cast<const Chunk*>(a.filters) + (long long)block * apart + first * 32 + threadIdx.x;
  }

  // Asks for the next tile.
  __device__ __forceinline__ void copy(Chunk* tile) {
    Chunk* own = tile + (threadIdx.x ^ threadIdx.x / (2 * ROW) % ROW);
#pragma unroll
    for (int i = 0; i < TILE_M / ROWS_APART; i++)
      copy_async_16(own + i * THREADS, next + (long long)i * apart, true);
    next += 32 * ROW;
  }

  // Two chunks of terms of sixteen filters, as a left operand of mma.sync.
  __device__ __forceinline__ static void load(unsigned (&w)[4], const Chunk* tile, int filter, int step) {
    const int lane = threadIdx.x % 32, row = filter + lane % 16;
    load_matrix_x4(w, tile + row * ROW + ((step + lane / 16) ^ (lane / 2 % ROW)));
  }
};

__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&w)[4], const unsigned (&x)[2]) {
  if constexpr (IN == FLOAT16) mma_m16n8k16_half(d, w, x);
  if constexpr (IN == BFLOAT16) mma_m16n8k16_bfloat16(d, w, x);
  if constexpr (IN == FLOAT32) mma_m16n8k8_tf32(d, w, x);
}

struct Sums {
  float of[PARTS_M][PARTS_N][4];  // as mma.sync leaves them

  __device__ __forceinline__ void fill(float value) {
#pragma unroll
    for (int m = 0; m < PARTS_M; m++)
#pragma unroll
      for (int n = 0; n < PARTS_N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) of[m][n][i] = value;
  }

  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int m = 0; m < PARTS_M; m++)
#pragma unroll
      for (int n = 0; n < PARTS_N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) of[m][n][i] += other.of[m][n][i];
  }

  // Adds the products of two chunks of terms of a tile.
  __device__ __forceinline__ void multiply(const Chunk* stage, int step) {
    const int warp = threadIdx.x / 32, filter = warp / WARPS_N * WARP_M, column = warp % WARPS_N * WARP_N;
    unsigned w[PARTS_M][4], x[PARTS_N / 2][4];
#pragma unroll
    for (int m = 0; m < PARTS_M; m++) Filters::load(w[m], stage, filter + m * 16, step);
#pragma unroll
    for (int n = 0; n < PARTS_N / 2; n++) Gather::load(x[n], stage + TILE_M * ROW, column + n * 16, step);
#pragma unroll
    for (int m = 0; m < PARTS_M; m++)
#pragma unroll
      for (int n = 0; n < PARTS_N; n++) {
        const unsigned pair[2] = {x[n / 2][n % 2 * 2], x[n / 2][n % 2 * 2 + 1]};
        multiply_add(of[m][n], w[m], pair);
      }
  }
};

// ---- the sums leave through shared memory, (TILE_M, TILE_N): neighbouring threads store neighbouring positions

// Where the four positions from 4 * four on of a row lie. Half a warp writes pairs of four rows and sixteen positions:
// XORed by the row, they are in all 32 banks.
__device__ __forceinline__ int passing(int row, int four) { return row * TILE_N + 4 * (four ^ (row % 4 * 2)); }

__device__ __forceinline__ void pass(float* tile, const Sums& sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = warp / WARPS_N * WARP_M + lane / 4, column = warp % WARPS_N * WARP_N + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < PARTS_M; m++)
#pragma unroll
    for (int n = 0; n < PARTS_N; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float* place = tile + passing(first + m * 16 + half * 8, column / 4 + n * 2) + column % 4;
        *reinterpret_cast<float2*>(place) = make_float2(sums.of[m][n][2 * half], sums.of[m][n][2 * half + 1]);
      }
}

struct alignas(4 * sizeof(Output)) Four { Output element[4]; };

constexpr int RELU = 1;  // activations up to it are applied on the way out

// Adds thresholds and applies one of the slower activations, one element at a time: its code is there once.
__device__ __forceinline__ void activate(const ConvArguments& a, const Place& place, float* tile) {
  const int rows = min(TILE_M, a.group_out - place.filter);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * TILE_N; i += THREADS) {
    float* sum = tile + passing(i / TILE_N, i % TILE_N / 4) + i % 4;
    *sum = activated(*sum + threshold(a, place.group * a.group_out + place.filter + i / TILE_N), a.activation, a.slope);
  }
}

// Whether positions may be stored four at a time.
__device__ __forceinline__ bool by_fours(const ConvArguments& a) {
  const unsigned long long places = (unsigned long long)a.positions | a.output_sample | a.output_channel;
  return places % 4 == 0 && reinterpret_cast<unsigned long long>(a.output) % sizeof(Four) == 0;
}

// Stores the tile's part of the output, WIDTH positions a thread: finished, or as sums where there are further parts.
template <int WIDTH> __device__ __forceinline__ void store_tile(const ConvArguments& a, const Place& place,
                                                                const Columns& columns, const float* tile) {
  constexpr int THREADS_A_ROW = TILE_N / WIDTH;
  const int n = threadIdx.x % THREADS_A_ROW * WIDTH;
  const int2 at = columns.output[n];
  if (at.x < 0) return;
  const int channels = a.groups * a.group_out, rows = min(TILE_M, a.group_out - place.filter);
#pragma unroll 2
  for (int row = threadIdx.x / THREADS_A_ROW; row < rows; row += THREADS / THREADS_A_ROW) {
    const int filter = place.group * a.group_out + place.filter + row;
    float sums[4];
    if constexpr (WIDTH == 4) {
      const float4 four = *reinterpret_cast<const float4*>(tile + passing(row, n / 4));
      sums[0] = four.x, sums[1] = four.y, sums[2] = four.z, sums[3] = four.w;
    } else {
      sums[0] = tile[passing(row, n / 4) + n % 4];
    }
    if (gridDim.y > 1) {
      const long long map = ((long long)blockIdx.y * a.samples + at.x) * channels + filter;
      float* to = static_cast<float*>(a.scratch) + map * a.positions + at.y;
      if constexpr (WIDTH == 4) {
        *reinterpret_cast<float4*>(to) = make_float4(sums[0], sums[1], sums[2], sums[3]);
      } else {
        *to = sums[0];
      }
      continue;
    }
    if (a.activation <= RELU) {
      const float added = threshold(a, filter);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        sums[i] += added;
        if (a.activation == RELU) sums[i] = activated(sums[i], RELU, 0);
      }
    }
    Output* to = static_cast<Output*>(a.output) + at.x * a.output_sample + filter * a.output_channel + at.y;
    if constexpr (WIDTH == 4) {
      Four out;
#pragma unroll
      for (int i = 0; i < 4; i++) store(&out.element[i], sums[i]);
      *reinterpret_cast<Four*>(to) = out;
    } else {
      store(to, sums[0]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) KERNEL(const ConvArguments a) {
  DYNAMIC_SHARED(Chunk, memory);
  __shared__ Columns columns;
  const Place place(a);
  columns.find(a, place);
  __syncthreads();

  const int all = (a.taps * ((a.group_in + CHUNK - 1) / CHUNK) + ROW - 1) / ROW * ROW;  // chunks of a filter
  const int first = blockIdx.y * a.split_depth;
  const int tiles = (FOLD ? all : min(all - first, a.split_depth)) / ROW;
  Filters filters(a, place, all, first);
  Gather gather(a, place, columns, first);
  Sums sums, total;
  sums.fill(0);
  if (FOLD) total.fill(-0.0f);  // adding to -0 changes nothing, not even a zero's sign
  int left = a.split_depth / ROW;

  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) {
      filters.copy(memory + tile * STAGE);
      gather.copy(a, columns, memory + tile * STAGE + TILE_M * ROW);
    }
    copy_async_commit();
  }
  int reading = 0, writing = STAGES - 1;  // stages
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    sums.multiply(memory + reading * STAGE, 0);
    if (tile + STAGES - 1 < tiles) {
      filters.copy(memory + writing * STAGE);
      gather.copy(a, columns, memory + writing * STAGE + TILE_M * ROW);
    }
    copy_async_commit();
    sums.multiply(memory + reading * STAGE, 2);
    if (FOLD && --left == 0) {
      total.add(sums);
      sums.fill(0);
      left = a.split_depth / ROW;
    }
    reading = reading == STAGES - 1 ? 0 : reading + 1;
    writing = writing == STAGES - 1 ? 0 : writing + 1;
  }
  if (FOLD && left < a.split_depth / ROW) total.add(sums);

  copy_async_wait<0>();
  __syncthreads();
  float* passed = reinterpret_cast<float*>(memory);
  pass(passed, FOLD ? total : sums);
  __syncthreads();
  if (a.activation > RELU && gridDim.y == 1) {
    activate(a, place, passed);
    __syncthreads();
  }
  if (by_fours(a)) {
    store_tile<4>(a, place, columns, passed);
  } else {
    store_tile<1>(a, place, columns, passed);
  }
}
