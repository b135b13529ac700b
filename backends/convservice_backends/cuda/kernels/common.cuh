// What every kernel of a convolution shares: its arguments, where a window looks, the epilogue.
//
// Given to every kernel is one `ConvArguments` by value, filled in by `cuda/arguments.py`: the two must agree in
// every field; the size is checked when a kernel is compiled.
#pragma once
#include "types.cuh"

enum PaddingMode { ZEROS = 0, REFLECT = 1, REPLICATE = 2 };

// One spatial axis of the positions that a launch computes. All coordinates count from the first element held.
struct Axis {
  int count;       // outputs along the axis
  int start;       // where the first output's first weight looks; negative in the padding before
  int low, high;   // the real elements are low <= coordinate < high
  int kernel;      // weights
  int stride;      // step between neighbouring outputs
  int dilation;    // step between neighbouring weights
  int unused;
  long long step;  // elements between neighbouring coordinates
};

struct ConvArguments {
  const void* input;        // (samples, groups * group_in, *held)
  const void* filters;      // as the algorithm packs them
  const void* thresholds;   // (groups * group_out,) in the type of the sums; null where there are none
  void* output;             // (samples, groups * group_out, *counts), positions contiguous
  void* scratch;            // working memory, where the algorithm asked for it
  long long input_sample, input_channel;     // elements between neighbours
  long long output_sample, output_channel;
  Axis axes[3];             // the last is the innermost; missing ones come first, with one output and one weight
  int samples, groups;
  int group_in, group_out;  // channels of one group
  int taps;                 // weights of one filter on one channel: the product of the kernel sizes
  int positions;            // outputs of one channel: the product of the counts
  int padding;              // a PaddingMode
  int activation;           // 0 linear, 1 relu, 2 leaky_relu, 3 sigmoid, 4 tanh, 5 gelu, 6 silu
  int filter_stride;        // elements between rows of the packed filters
  int splits, split_depth;  // parts of the sum over K computed apart, and terms in each
  int unused;
  double slope;             // of leaky_relu
};

static_assert(sizeof(ConvArguments) == CONV_ARGUMENTS_BYTES, "cuda/arguments.py and common.cuh differ");

// ---- where a window looks

// The element that reads a coordinate of an axis; -1 where it reads the value 0.
__device__ __forceinline__ int real_coordinate(const Axis& axis, int coordinate, int padding) {
  if (coordinate >= axis.low && coordinate < axis.high) return coordinate;
  if (padding == REFLECT)
    return coordinate < axis.low ? 2 * axis.low - coordinate : 2 * (axis.high - 1) - coordinate;
  if (padding == REPLICATE) return coordinate < axis.low ? axis.low : axis.high - 1;
  return -1;
}

// The coordinate that weight `tap` of output `index` looks at.
__device__ __forceinline__ int coordinate(const Axis& axis, int index, int tap) {
  return axis.start + index * axis.stride + tap * axis.dilation;
}

// ---- the epilogue: threshold, activation, one rounding

// The threshold of a filter, numbered over all groups.
__device__ __forceinline__ Sum threshold(const ConvArguments& a, int filter) {
  return a.thresholds ? static_cast<const Sum*>(a.thresholds)[filter] : Sum(0);
}

// Adds the threshold, applies the activation, rounds once and stores.
__device__ __forceinline__ void finish(const ConvArguments& a, int sample, int filter, int position, Sum sum) {
  Output* place = static_cast<Output*>(a.output) + sample * a.output_sample + filter * a.output_channel + position;
  store(place, activated(sum + threshold(a, filter), a.activation, a.slope));
}
