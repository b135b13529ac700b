// fold: adds the parts of a reduction to its running sums, in their order, and finishes them.
//
// The second half of global_pool and linear: one thread an output. Where `output` is given no more is to come: the sums
// are divided, a threshold is added, and the activation follows with one rounding.
#include "types.cuh"

struct FoldArguments {
  const void* parts;       // (count, samples, outputs) in the type of the sums
  void* sums;              // (samples, outputs), so far
  const void* thresholds;  // (outputs,) in the type of the sums; null where there are none
  void* output;            // null where more is to come
  long long output_sample, output_channel;  // elements between neighbours
  int samples, outputs;
  int count;               // parts
  int begins;              // whether there are no sums yet
  int maximum;             // whether the larger one is kept, not the sum
  int activation;          // as in ConvArguments
  double divisor, slope;
};

static_assert(sizeof(FoldArguments) == FOLD_ARGUMENTS_BYTES, "cuda/arguments.py and fold.cu differ");

__device__ __forceinline__ Sum joined(Sum a, Sum b, int maximum) {
  if (maximum) return b > a || b != b ? b : a;
  return a + b;
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const FoldArguments a) {
  const long long maps = (long long)a.samples * a.outputs;
  for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < maps; i += (long long)gridDim.x * THREADS) {
    Sum* kept = static_cast<Sum*>(a.sums) + i;
    const Sum* part = static_cast<const Sum*>(a.parts) + i;
    Sum sum = a.begins ? *part : *kept;
#pragma unroll 4
    for (int n = a.begins; n < a.count; n++) sum = joined(sum, part[n * maps], a.maximum);
    if (a.output == 0) {
      *kept = sum;
      continue;
    }
    const int sample = (int)(i / a.outputs), channel = (int)(i % a.outputs);
    if (a.divisor != 1.0) sum /= Sum(a.divisor);
    if (a.thresholds) sum += static_cast<const Sum*>(a.thresholds)[channel];
    Output* place = static_cast<Output*>(a.output) + sample * a.output_sample + channel * a.output_channel;
    store(place, activated(sum, a.activation, a.slope));
  }
}
