// reduce: adds the parts of split sums, in order, and finishes them: threshold, activation, one rounding.
//
// The second pass of implicit_gemm's splits. `scratch` holds (splits, samples, groups * group_out, positions) in the
// type of the sums. One thread an output, neighbours side by side; no atomics, so that every run gives the same bits.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const ConvArguments a) {
  const long long maps = (long long)a.samples * a.groups * a.group_out;
  const long long all = maps * a.positions;
  for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < all; i += (long long)gridDim.x * THREADS) {
    const Sum* part = static_cast<const Sum*>(a.scratch) + i;
    Sum sum = *part;
    for (int split = 1; split < a.splits; split++) sum += *(part += all);
    const long long map = i / a.positions;
    const int channels = a.groups * a.group_out;
    finish(a, (int)(map / channels), (int)(map % channels), (int)(i - map * a.positions), sum);
  }
}
