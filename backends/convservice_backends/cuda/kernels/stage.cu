// stage: puts the rows of a run channels-last, for tensor_core.
//
// Given are rows (sample, channel, x0, x1, x2); written are chunks (sample, x0, x1, x2, group, chunk), a chunk being 16
// bytes of neighbouring channels, the last of a group filled up with zeros. Only what a run reads is staged: `input` is
// its first element, `axes` hold its counts and the steps between its elements, `output_sample` counts chunks. float32
// is rounded to TF32 here, once, and not at every tap. It is a transposition; `pack` does the same to the filters.
// MERGED, for few channels: the innermost coordinate is an output's, and the elements of its chunks are the channels at
// all weights along that axis, weight by weight (padding included): 7 x 3 elements take three chunks instead of seven.
//
// A thread reads a chunk's channels at one position, its warp's lanes side by side, and puts the chunk into shared
// memory, from where neighbouring threads write neighbouring chunks. A chunk's place in the `width` of its position is
// XORed by the position, so that eight lanes that write eight positions, or read eight chunks, hit all 32 banks.
#include "common.cuh"
#include "ptx.cuh"

constexpr int CHUNK = 16 / (int)sizeof(Input);  // elements
constexpr int WARPS = THREADS / 32;
static_assert(WARPS == 8, "a block has one warp for each of up to eight chunks");

struct alignas(16) Chunk { Input element[CHUNK]; };

template <typename Value> __device__ __forceinline__ Value staged(Value value) { return value; }
template <> __device__ __forceinline__ float staged(float value) { return __uint_as_float(rounded_tf32(value)); }

// Reads the elements of a chunk: `count` from `first` on, of a group at one place; the others are zero.
__device__ __forceinline__ void read(const ConvArguments& a, const Input* from, int x2, int first, int count,
                                     Chunk& chunk) {
  int channel = MERGED ? first % a.group_in : first, tap = MERGED ? first / a.group_in : 0;
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    const int at = MERGED ? real_coordinate(a.axes[2], coordinate(a.axes[2], x2, tap), a.padding) : x2;
    Input element = {};
    if (i < count && at >= 0) element = staged(from[channel * a.input_channel + at * a.axes[2].step]);
    chunk.element[i] = element;
    if (++channel == a.group_in && MERGED) channel = 0, tap++;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) KERNEL(const ConvArguments a) {
  __shared__ Chunk tile[2][THREADS];
  const int elements = MERGED ? a.group_in * a.axes[2].kernel : a.group_in;  // of a group at one place
  const int group_chunks = (elements + CHUNK - 1) / CHUNK, chunks = a.groups * group_chunks;
  const int width = chunks > 4 ? 8 : chunks > 2 ? 4 : chunks;  // chunks of a tile: 1, 2, 4 or 8
  const int wide = THREADS / width;                            // positions of a tile
  const int first_chunk = blockIdx.y * width;
  const long long first_position = (long long)blockIdx.x * wide;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = first_chunk + warp % width, column = warp / width * 32 + lane;
  const int first = chunk % group_chunks * CHUNK;
  const int count = chunk < chunks && first_position + column < a.positions ? min(elements - first, CHUNK) : 0;
  const int position = (int)first_position + column;
  const int x2 = position % a.axes[2].count, x1 = position / a.axes[2].count % a.axes[1].count;
  const int x0 = position / a.axes[2].count / a.axes[1].count;
  const Input* from = static_cast<const Input*>(a.input) + chunk / group_chunks * a.group_in * a.input_channel +
                      x0 * a.axes[0].step + x1 * a.axes[1].step;
  const int put = column * width + (warp % width ^ column * width / 8 & (width - 1));

  const int own = threadIdx.x / width, part = threadIdx.x % width;  // what it writes
  const int take = own * width + (part ^ own * width / 8 & (width - 1));
  const bool writes = first_position + own < a.positions && first_chunk + part < chunks;
  Chunk* to = static_cast<Chunk*>(a.output) + (first_position + own) * chunks + first_chunk + part;

  // The next sample's chunk is on its way while this one's is written; two tiles, so that one barrier is enough.
  Chunk held;
  read(a, from + blockIdx.z * a.input_sample, x2, first, count, held);
  for (int sample = blockIdx.z, now = 0; sample < a.samples; sample += gridDim.z, now ^= 1) {
    tile[now][put] = held;
    __syncthreads();
    const int next = sample + gridDim.z;
    if (next < a.samples) read(a, from + next * a.input_sample, x2, first, count, held);
    if (writes) to[sample * a.output_sample] = tile[now][take];
  }
}
