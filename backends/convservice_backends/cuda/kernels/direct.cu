// direct: one thread computes one output, product by product.
//
// The readable one. Every other algorithm sums the same products; this one does it as the formula is written:
// channel by channel, weight by weight, any rank, padding mode, stride, dilation and grouping. Filters are
// (groups * group_out, group_in, taps), of the type of the sums.
#include "common.cuh"

// The element that weight `tap` of output `index` looks at on an axis; -1 where it reads the value 0. With 64 bits:
// strides, dilations and paddings may be as large as sizes, and no other algorithm takes those.
__device__ __forceinline__ long long element_at(const Axis& axis, int index, int tap, int padding) {
  const long long at = axis.start + (long long)index * axis.stride + (long long)tap * axis.dilation;
  if (at >= axis.low && at < axis.high) return at;
  const long long low = axis.low, last = (long long)axis.high - 1;
  if (padding == REFLECT) return at < low ? 2 * low - at : 2 * last - at;
  if (padding == REPLICATE) return at < low ? low : last;
  return -1;
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) KERNEL(const ConvArguments a) {
  const unsigned at = blockIdx.x * THREADS + threadIdx.x;  // unsigned: it may pass 2^31 where positions do not
  if (at >= (unsigned)a.positions) return;
  const int position = (int)at;
  const int inner = position % a.axes[2].count;
  const int middle = position / a.axes[2].count % a.axes[1].count;
  const int outer = position / a.axes[2].count / a.axes[1].count;

  for (int sample = blockIdx.z; sample < a.samples; sample += gridDim.z)
    for (int filter = blockIdx.y; filter < a.groups * a.group_out; filter += gridDim.y) {
      const int first_channel = filter / a.group_out * a.group_in;
      const Input* plane =
          static_cast<const Input*>(a.input) + sample * a.input_sample + first_channel * a.input_channel;
      const Sum* weight = static_cast<const Sum*>(a.filters) + (long long)filter * a.group_in * a.taps;
      Sum sum = Sum(0);
      for (int channel = 0; channel < a.group_in; channel++, plane += a.input_channel)
        for (int i = 0; i < a.axes[0].kernel; i++) {
          const long long x0 = element_at(a.axes[0], outer, i, a.padding);
          for (int j = 0; j < a.axes[1].kernel; j++) {
            const long long x1 = element_at(a.axes[1], middle, j, a.padding);
            for (int k = 0; k < a.axes[2].kernel; k++, weight++) {
              const long long x2 = element_at(a.axes[2], inner, k, a.padding);
              const bool outside = x0 < 0 || x1 < 0 || x2 < 0;
              const long long at = x0 * a.axes[0].step + x1 * a.axes[1].step + x2 * a.axes[2].step;
              sum = fused_multiply_add(*weight, outside ? Sum(0) : Sum(widened(plane[at])), sum);
            }
          }
        }
      finish(a, sample, filter, position, sum);
    }
}
