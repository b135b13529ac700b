// linear: the parts of a fully connected layer's sums over whole blocks of rows.
//
// The weights are most of what is read, and lie as the layer has them: (outputs, channels, rows, rest). A warp computes
// one part, at most TERMS products, of OUTPUTS neighbouring outputs for SAMPLES samples: a lane takes every 32nd product
// of the block in the order channel, row, rest, and then the lanes meet. Neither OUTPUTS nor SAMPLES changes an order.
#include "parts.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2) KERNEL(const PartsArguments a) {
  const unsigned warp = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const unsigned banks = (a.outputs + OUTPUTS - 1) / OUTPUTS;
  if (warp >= banks * a.parts_at_all) return;
  const int number = warp / banks, output = warp % banks * OUTPUTS;
  const Part part(a, number, a.channels);
  const Input* weights = static_cast<const Input*>(a.weights) + output * a.features + part.first;
  const int jump = LANES / part.size, left = LANES % part.size;  // how far a lane's next product lies

  for (int first = blockIdx.y * SAMPLES; first < a.samples; first += gridDim.y * SAMPLES) {
    const Input* input = static_cast<const Input*>(a.input) + first * a.input_sample + part.first;
    Sum sums[OUTPUTS][SAMPLES];
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
      for (int s = 0; s < SAMPLES; s++) sums[o][s] = Sum(0);
    int channel = (part.begin + lane) / part.size, at = (part.begin + lane) % part.size;
#pragma unroll 2
    for (int i = part.begin + lane; i < part.end; i += LANES) {
      Sum x[SAMPLES];
#pragma unroll
      for (int s = 0; s < SAMPLES; s++) {
        Input value = {};
        if (first + s < a.samples) value = input[s * a.input_sample + channel * a.input_channel + at];
        x[s] = Sum(widened(value));
      }
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++) {
        Input value = {};
        if (output + o < a.outputs) value = weights[o * a.features + channel * a.weight_channel + at];
        const Sum weight = Sum(widened(value));
#pragma unroll
        for (int s = 0; s < SAMPLES; s++) sums[o][s] = fused_multiply_add(weight, x[s], sums[o][s]);
      }
      channel += jump;
      at += left;
      if (at >= part.size) at -= part.size, channel++;
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
      for (int s = 0; s < SAMPLES; s++) {
        Sum sum = sums[o][s];
#pragma unroll
        for (int apart = LANES / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        if (lane == (o * SAMPLES + s) % LANES && output + o < a.outputs && first + s < a.samples)
          static_cast<Sum*>(a.parts)[((long long)number * a.samples + first + s) * a.outputs + output + o] = sum;
      }
  }
}
