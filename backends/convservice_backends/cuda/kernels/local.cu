// local: a locally connected layer, every output position with weights of its own.
//
// The weights are by far the most that is read, and each is used once a sample. Weights are (groups * group_out,
// group_in, taps, positions of the whole map), of the type of the rows: threads beside each other read weights beside
// each other. A thread computes one output of up to SAMPLES samples, reading a weight once for all of them, and asks
// for AHEAD weights before it uses the first. Products are added in the order of `direct` (channel, then weight,
// ascending, fused), so that equal weights at every position give the same bits as a convolution.
//
// `filters` and `thresholds`, (groups * group_out, positions of the whole map), point at what the first position that a
// launch computes has; `filter_stride` is the number of positions of the whole map.
#include "planes.cuh"

// As in direct.cu: the element that weight `tap` of output `index` looks at; -1 where it reads the value 0.
__device__ __forceinline__ long long element_at(const Axis& axis, int index, int tap, int padding) {
  const long long at = axis.start + (long long)index * axis.stride + (long long)tap * axis.dilation;
  if (at >= axis.low && at < axis.high) return at;
  const long long low = axis.low, last = (long long)axis.high - 1;
  if (padding == REFLECT) return at < low ? 2 * low - at : 2 * last - at;
  if (padding == REPLICATE) return at < low ? low : last;
  return -1;
}

// Where a window looks, one weight after the other, channel by channel. All threads are at the same weight.
struct Walk {
  int outer, middle, inner;  // the output
  int tap0, tap1, tap2;
  long long channel;         // elements before the channel at hand
  long long row;             // elements before the row that is looked at; -1 where that is padding

  __device__ __forceinline__ Walk(const ConvArguments& a, int position) {
    inner = position % a.axes[2].count;
    middle = position / a.axes[2].count % a.axes[1].count;
    outer = position / a.axes[2].count / a.axes[1].count;
    tap0 = tap1 = tap2 = 0;
    channel = 0;
    look(a);
  }

  __device__ __forceinline__ void look(const ConvArguments& a) {
    const long long x0 = element_at(a.axes[0], outer, tap0, a.padding);
    const long long x1 = element_at(a.axes[1], middle, tap1, a.padding);
    row = x0 < 0 || x1 < 0 ? -1 : channel + x0 * a.axes[0].step + x1 * a.axes[1].step;
  }

  // Elements before the one that is looked at; -1 where it is padding.
  __device__ __forceinline__ long long element(const ConvArguments& a) const {
    const long long x2 = element_at(a.axes[2], inner, tap2, a.padding);
    return row < 0 || x2 < 0 ? -1 : row + x2 * a.axes[2].step;
  }

  __device__ __forceinline__ void next(const ConvArguments& a) {
    if (++tap2 < a.axes[2].kernel) return;
    tap2 = 0;
    if (++tap1 == a.axes[1].kernel) {
      tap1 = 0;
      if (++tap0 == a.axes[0].kernel) tap0 = 0, channel += a.input_channel;
    }
    look(a);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 6) KERNEL(const ConvArguments a) {
  const Planes planes(a.positions);
  if (planes.item >= (unsigned)a.positions) return;
  const int position = (int)planes.item, terms = a.group_in * a.taps;
  const int filters = a.groups * a.group_out, turns = (a.samples + SAMPLES - 1) / SAMPLES;

  for (int number = planes.first; number < filters * turns; number += planes.step) {
    const int filter = number % filters, first = number / filters * SAMPLES;
    const Input* input = static_cast<const Input*>(a.input) + first * a.input_sample +
                         filter / a.group_out * a.group_in * a.input_channel;
    const Input* weight =
        static_cast<const Input*>(a.filters) + position + (long long)filter * terms * a.filter_stride;
    Walk walk(a, position);
    Sum sums[SAMPLES];
#pragma unroll
    for (int s = 0; s < SAMPLES; s++) sums[s] = Sum(0);
#pragma unroll 1
    for (int term = 0; term < terms; term += AHEAD) {
      Input factors[AHEAD];
#pragma unroll
      for (int e = 0; e < AHEAD; e++, weight += a.filter_stride) {
        factors[e] = {};
        if (term + e < terms) factors[e] = *weight;
      }
#pragma unroll
      for (int e = 0; e < AHEAD; e++) {
        if (term + e >= terms) continue;
        const long long at = walk.element(a);
#pragma unroll
        for (int s = 0; s < SAMPLES; s++) {
          Input value = {};
          if (at >= 0 && first + s < a.samples) value = input[s * a.input_sample + at];
          sums[s] = fused_multiply_add(Sum(widened(factors[e])), Sum(widened(value)), sums[s]);
        }
        walk.next(a);
      }
    }
    Sum threshold = Sum(0);
    if (a.thresholds)
      threshold = static_cast<const Sum*>(a.thresholds)[(long long)filter * a.filter_stride + position];
#pragma unroll
    for (int s = 0; s < SAMPLES; s++) {
      if (first + s >= a.samples) continue;
      Output* place = static_cast<Output*>(a.output) + (first + s) * a.output_sample + filter * a.output_channel;
      store(place + position, activated(sums[s] + threshold, a.activation, a.slope));
    }
  }
}
