// transposed: a transposed convolution, each output gathering its own products.
//
// Weight k of an axis takes input i to output i * stride + k * dilation - before. So an output looks at inputs at every
// stride / gcd(stride, dilation)-th weight, from a first one on that its phase, the output's place modulo stride,
// decides. Each thread sums the products of FILTERS filters at one output in the order channel, then weight, ascending;
// nothing is scattered and nothing added twice. Threads are numbered phase by phase along each axis: neighbours
// use the same weights on neighbouring inputs.
//
// `start` of an axis is before + the first output, from the first element held on, in steps of outputs: output `index`
// looks with weight k at the coordinate (start + index - k * dilation) / stride, where that is whole and real. Filters
// are (groups, group_out / FILTERS rounded up, group_in, taps, FILTERS), of the type of the sums, filled up with 0.
#include "planes.cuh"

struct alignas(FILTERS == 1 ? sizeof(Sum) : 16) Weights { Sum of[FILTERS]; };

// Threads along an axis: as many for each phase.
__device__ __forceinline__ unsigned phases(const Axis& axis) { return min(axis.stride, axis.count); }
__device__ __forceinline__ unsigned phase_outputs(const Axis& axis) {
  return (axis.count + phases(axis) - 1) / phases(axis);
}
__device__ __forceinline__ unsigned items(const Axis& axis) { return phases(axis) * phase_outputs(axis); }

// The output of a thread, given its number along an axis; it may lie beyond the last.
__device__ __forceinline__ unsigned output_at(const Axis& axis, unsigned item) {
  const unsigned outputs = phase_outputs(axis);
  return item / outputs + item % outputs * axis.stride;
}

// What an output looks at along one axis: inputs back from a first one, with weights up from a first one.
struct Looks {
  int weight, weight_step;
  int input, input_step;
  int count;

  __device__ __forceinline__ Looks(const Axis& axis, int index) {
    const int from = axis.start + index, turn = axis.dilation % axis.stride;
    int left = from % axis.stride;
    if (left < 0) left += axis.stride;
    weight = next_whole(axis, left, turn, 0);
    weight_step = 1, input = 0, input_step = 0, count = 0;
    if (weight >= axis.kernel) return;
    const int second = next_whole(axis, turn ? axis.stride - turn : 0, turn, weight + 1);
    int taps = 1;
    input = (from - weight * axis.dilation) / axis.stride;
    if (second < axis.kernel) {
      weight_step = second - weight;
      taps = (axis.kernel - 1 - weight) / weight_step + 1;
      input_step = weight_step * axis.dilation / axis.stride;
    }
    if (input >= axis.high) {  // weights that look behind the last real element
      const int skipped = input_step ? (input - axis.high) / input_step + 1 : taps;
      if (skipped >= taps) return;
      taps -= skipped;
      weight += skipped * weight_step;
      input -= skipped * input_step;
    }
    if (input < axis.low) return;
    const int most = input_step ? (input - axis.low) / input_step + 1 : taps;
    count = min(most, taps);
  }

  // The first weight from `k` on whose distance from the output, `left` modulo the stride at `k`, is whole.
  __device__ __forceinline__ static int next_whole(const Axis& axis, int left, int turn, int k) {
#pragma unroll 1
    while (left && k < axis.kernel) {
      left -= turn;
      if (left < 0) left += axis.stride;
      k++;
    }
    return left ? axis.kernel : k;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4) KERNEL(const ConvArguments a) {
  const unsigned items1 = items(a.axes[1]), items2 = items(a.axes[2]);
  const unsigned all = items(a.axes[0]) * items1 * items2;
  const Planes planes(all);
  if (planes.item >= all) return;
  const unsigned inner = output_at(a.axes[2], planes.item % items2);
  const unsigned middle = output_at(a.axes[1], planes.item / items2 % items1);
  const unsigned outer = output_at(a.axes[0], planes.item / items2 / items1);
  if (outer >= (unsigned)a.axes[0].count || middle >= (unsigned)a.axes[1].count ||
      inner >= (unsigned)a.axes[2].count)
    return;
  const int position = (int)((outer * a.axes[1].count + middle) * a.axes[2].count + inner);
  const Looks x0(a.axes[0], (int)outer), x1(a.axes[1], (int)middle), x2(a.axes[2], (int)inner);
  const long long begin = x0.input * a.axes[0].step + x1.input * a.axes[1].step + x2.input * a.axes[2].step;
  const long long back0 = x0.input_step * a.axes[0].step, back1 = x1.input_step * a.axes[1].step;
  const long long back2 = x2.input_step * a.axes[2].step;
  const bool none = x0.count == 0 || x1.count == 0 || x2.count == 0;

  const int banks = (a.group_out + FILTERS - 1) / FILTERS, all_banks = a.groups * banks;
  for (int plane = planes.first; plane < a.samples * all_banks; plane += planes.step) {
    const int sample = plane / all_banks, bank = plane % all_banks, group = bank / banks;
    const Input* channel_input =
        static_cast<const Input*>(a.input) + sample * a.input_sample + group * a.group_in * a.input_channel + begin;
    const Weights* channel_weights =
        static_cast<const Weights*>(a.filters) + (long long)bank * a.group_in * a.taps;
    Sum sums[FILTERS];
#pragma unroll
    for (int f = 0; f < FILTERS; f++) sums[f] = Sum(0);
    for (int channel = 0; channel < a.group_in && !none; channel++) {
      for (int i = 0; i < x0.count; i++) {
        const int k0 = (x0.weight + i * x0.weight_step) * a.axes[1].kernel;
        const Input* plane_input = channel_input - i * back0;
        for (int j = 0; j < x1.count; j++) {
          const int k1 = (k0 + x1.weight + j * x1.weight_step) * a.axes[2].kernel;
          const Input* at = plane_input - j * back1;
          const Weights* weights = channel_weights + k1 + x2.weight;
          for (int k = 0; k < x2.count; k++, at -= back2, weights += x2.weight_step) {
            const Weights weight = *weights;
            const Sum value = Sum(widened(*at));
#pragma unroll
            for (int f = 0; f < FILTERS; f++) sums[f] = fused_multiply_add(weight.of[f], value, sums[f]);
          }
        }
      }
      channel_input += a.input_channel;
      channel_weights += a.taps;
    }
    const int first = bank % banks * FILTERS;
#pragma unroll
    for (int f = 0; f < FILTERS; f++)
      if (first + f < a.group_out) finish(a, sample, group * a.group_out + first + f, position, sums[f]);
  }
}
