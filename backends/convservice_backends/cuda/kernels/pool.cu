// pool: the largest value of each window, or the average.
//
// MAXIMUM chooses. Only real elements are looked at: an axis' first and last real tap are found once a thread, so that
// nothing is compared inside the loops. A largest value is NaN where any is, and -inf where a window has none. An
// average is the sum in the order of the window, divided once: by the real elements, or, where padding counts, by all
// coordinates of the window before `ends`; a window without real elements gives 0. Channels are `groups`; each is
// pooled by itself.
#include "planes.cuh"

struct PoolArguments {
  ConvArguments window;
  int ends[3];         // an axis' first coordinate behind the padding that an average counts
  int counts_padding;  // whether an average counts padding
};

static_assert(sizeof(PoolArguments) == POOL_ARGUMENTS_BYTES, "cuda/arguments.py and pool.cu differ");

// What a window has of one axis.
struct Seen {
  long long first;  // the first real coordinate looked at
  int taps;         // real coordinates looked at
  int counted;      // coordinates that an average divides by

  // With 64 bits: strides, dilations and paddings may be as large as sizes.
  __device__ __forceinline__ Seen(const Axis& axis, int index, int end, int counts_padding) {
    const long long start = axis.start + (long long)index * axis.stride;
    const long long last = start + (long long)(axis.kernel - 1) * axis.dilation;
    int begin = 0, stop = axis.kernel;
    if (start < axis.low) begin = taps_before(axis.low - start, axis.dilation);
    if (last >= axis.high) stop = start >= axis.high ? 0 : taps_before(axis.high - start, axis.dilation);
    taps = stop > begin ? stop - begin : 0;
    first = start + (long long)begin * axis.dilation;
    const long long behind = last < end ? last + 1 : end;
    counted = counts_padding ? (int)(behind - start) : taps;
  }

  // Taps at less than `distance` from the first.
  __device__ __forceinline__ static int taps_before(long long distance, int dilation) {
    return (int)(((unsigned)distance - 1) / (unsigned)dilation + 1);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 8) KERNEL(const PoolArguments a) {
  const ConvArguments& w = a.window;
  const Planes planes(w.positions);
  if (planes.item >= (unsigned)w.positions) return;
  const int position = (int)planes.item;
  const int inner = position % w.axes[2].count;
  const int middle = position / w.axes[2].count % w.axes[1].count;
  const int outer = position / w.axes[2].count / w.axes[1].count;
  const Seen x0(w.axes[0], outer, a.ends[0], a.counts_padding);
  const Seen x1(w.axes[1], middle, a.ends[1], a.counts_padding);
  const Seen x2(w.axes[2], inner, a.ends[2], a.counts_padding);
  const bool empty = x0.taps == 0 || x1.taps == 0 || x2.taps == 0;
  const long long step0 = w.axes[0].dilation * w.axes[0].step, step1 = w.axes[1].dilation * w.axes[1].step;
  const long long step2 = w.axes[2].dilation * w.axes[2].step;
  const long long begin = x0.first * w.axes[0].step + x1.first * w.axes[1].step + x2.first * w.axes[2].step;

  for (int plane = planes.first; plane < w.samples * w.groups; plane += planes.step) {
    const int sample = plane / w.groups, channel = plane % w.groups;
    const Input* row0 =
        static_cast<const Input*>(w.input) + sample * w.input_sample + channel * w.input_channel + begin;
    Sum found = MAXIMUM ? -Sum(__uint_as_float(0x7f800000u)) : Sum(0);
    if (!empty)
      for (int i = 0; i < x0.taps; i++, row0 += step0) {
        const Input* row1 = row0;
        for (int j = 0; j < x1.taps; j++, row1 += step1) {
          const Input* at = row1;
#pragma unroll 4
          for (int k = 0; k < x2.taps; k++, at += step2) {
            const Sum value = Sum(widened(*at));
#if MAXIMUM
            if (value > found || value != value) found = value;
#else
            found += value;
#endif
          }
        }
      }
#if !MAXIMUM
    found = empty ? Sum(0) : found / (Sum(x0.counted) * Sum(x1.counted) * Sum(x2.counted));
#endif
    store(static_cast<Output*>(w.output) + sample * w.output_sample + channel * w.output_channel + position, found);
  }
}
