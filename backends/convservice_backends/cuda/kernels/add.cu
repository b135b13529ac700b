// add: the sum of several arrays of one shape, in their order, activated and rounded once.
//
// A channel's rows are contiguous in every array; channels and samples lie any distance apart. More arrays than one
// launch takes are added by several: sums in between are kept in `sums`, packed, in the type of the sums.
#include "types.cuh"

struct Addend {
  const void* input;
  long long sample, channel;  // elements between neighbours
};

struct AddArguments {
  Addend addends[ADDENDS];
  void* sums;
  void* output;
  long long output_sample, output_channel;
  long long elements;   // of one channel
  int samples, channels;
  int count;            // addends of this launch
  int begins, ends;     // whether there are none before them, and none behind
  int activation;       // as in ConvArguments
  double slope;
};

static_assert(sizeof(AddArguments) == ADD_ARGUMENTS_BYTES, "cuda/arguments.py and add.cu differ");

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const AddArguments a) {
  const long long first = (long long)blockIdx.x * THREADS + threadIdx.x;
  const long long step = (long long)gridDim.x * THREADS;
  for (int sample = blockIdx.z; sample < a.samples; sample += gridDim.z)
    for (int channel = blockIdx.y; channel < a.channels; channel += gridDim.y) {
      Sum* kept = static_cast<Sum*>(a.sums) + ((long long)sample * a.channels + channel) * a.elements;
      Output* to = static_cast<Output*>(a.output) + sample * a.output_sample + channel * a.output_channel;
      for (long long i = first; i < a.elements; i += step) {
        Sum sum = a.begins ? Sum(0) : kept[i];
        for (int n = 0; n < a.count; n++) {
          const Addend& addend = a.addends[n];
          const Input* from =
              static_cast<const Input*>(addend.input) + sample * addend.sample + channel * addend.channel;
          const Sum value = Sum(widened(from[i]));
          sum = n == 0 && a.begins ? value : sum + value;  // not 0 + value: -0 stays
        }
        if (a.ends) store(to + i, activated(sum, a.activation, a.slope));
        else kept[i] = sum;
      }
    }
}
