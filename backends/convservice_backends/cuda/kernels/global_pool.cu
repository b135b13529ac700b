// global_pool: the parts of a channel's sum, or of its largest value, over whole blocks of rows.
//
// MAXIMUM chooses. A warp for each part of each channel of each sample: a lane takes every 32nd element in four turns,
// the four meet, then the lanes. Parts are at most TERMS elements. An empty part gives 0, or -inf.
#include "parts.cuh"

constexpr int TURNS = 4;

__device__ __forceinline__ Sum joined(Sum a, Sum b) { return MAXIMUM ? larger(a, b) : a + b; }

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const PartsArguments a) {
  const unsigned warp = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const unsigned maps = a.samples * a.channels;
  if (warp >= maps * a.parts_at_all) return;
  const int sample = warp % maps / a.channels, channel = warp % a.channels;
  const Part part(a, warp / maps, 1);
  const Input* from =
      static_cast<const Input*>(a.input) + sample * a.input_sample + channel * a.input_channel + part.first;

  const Sum nothing = MAXIMUM ? -Sum(__uint_as_float(0x7f800000u)) : Sum(0);
  Sum found[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) found[turn] = nothing;
  for (int i = part.begin + lane; i < part.end; i += TURNS * LANES)
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
      if (i + turn * LANES < part.end) found[turn] = joined(found[turn], Sum(widened(from[i + turn * LANES])));
  Sum all = joined(joined(found[0], found[1]), joined(found[2], found[3]));
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) all = joined(all, __shfl_xor_sync(0xffffffffu, all, apart));
  if (lane == 0) static_cast<Sum*>(a.parts)[warp] = all;
}
