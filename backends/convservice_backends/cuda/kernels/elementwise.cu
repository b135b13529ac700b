// elementwise: elements of one array, activated and rounded once, into another of the same shape.
//
// Copies rows between buffers, widens integers, rounds results to their type, computes activation layers. A
// channel's rows are contiguous on both sides; channels and samples lie any distance apart. Integers are rounded
// half to even and saturated; NaN becomes 0.
#include "types.cuh"

struct MapArguments {
  const void* input;
  void* output;
  long long input_sample, input_channel;  // elements between neighbours
  long long output_sample, output_channel;
  long long elements;                     // of one channel
  int samples, channels;
  int activation;                         // as in ConvArguments
  int unused;
  double slope;
};

static_assert(sizeof(MapArguments) == MAP_ARGUMENTS_BYTES, "cuda/arguments.py and elementwise.cu differ");

template <typename Value>
__device__ __forceinline__ Value saturated(Value value, Value low, Value high) {
  if (value != value) return Value(0);
  return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ float to_integer(float value) { return rintf(value); }
__device__ __forceinline__ double to_integer(double value) { return rint(value); }

__device__ __forceinline__ void put(float* place, float value) { *place = value; }
__device__ __forceinline__ void put(float* place, double value) { *place = (float)value; }
__device__ __forceinline__ void put(double* place, double value) { *place = value; }
__device__ __forceinline__ void put(half_bits* place, float value) { place->bits = rounded_half(value); }
__device__ __forceinline__ void put(half_bits* place, double value) { place->bits = rounded_half(rounded_to_odd(value)); }
__device__ __forceinline__ void put(bfloat16_bits* place, float value) { place->bits = rounded_bfloat16(value); }
__device__ __forceinline__ void put(bfloat16_bits* place, double value) {
  place->bits = rounded_bfloat16(rounded_to_odd(value));
}
__device__ __forceinline__ void put(unsigned char* place, Sum value) {
  *place = (unsigned char)saturated(to_integer(value), Sum(0), Sum(255));
}
__device__ __forceinline__ void put(signed char* place, Sum value) {
  *place = (signed char)saturated(to_integer(value), Sum(-128), Sum(127));
}
__device__ __forceinline__ void put(unsigned short* place, Sum value) {
  *place = (unsigned short)saturated(to_integer(value), Sum(0), Sum(65535));
}
__device__ __forceinline__ void put(short* place, Sum value) {
  *place = (short)saturated(to_integer(value), Sum(-32768), Sum(32767));
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const MapArguments a) {
  const long long first = (long long)blockIdx.x * THREADS + threadIdx.x;
  const long long step = (long long)gridDim.x * THREADS;
  for (int sample = blockIdx.z; sample < a.samples; sample += gridDim.z)
    for (int channel = blockIdx.y; channel < a.channels; channel += gridDim.y) {
      const Input* from = static_cast<const Input*>(a.input) + sample * a.input_sample + channel * a.input_channel;
      Output* to = static_cast<Output*>(a.output) + sample * a.output_sample + channel * a.output_channel;
      for (long long i = first; i < a.elements; i += step) {
#if COPY
        to[i] = from[i];
#else
        put(to + i, activated(Sum(widened(from[i])), a.activation, a.slope));
#endif
      }
    }
}
