// Parts: what kernels that reduce a whole sample share.
//
// A sample's rows come in blocks at absolute multiples of `block_rows`. What a block adds to an output is computed in
// one or several parts, each by one warp, whose lanes meet in a fixed tree; `fold` adds parts to the running sums in
// their order. So bits do not depend on how many blocks one launch has, and there are no atomics.
#pragma once
#include "types.cuh"

struct PartsArguments {
  const void* input;    // the first row of the launch: (samples, channels, rows, *rest), a channel's rows contiguous
  const void* weights;  // (outputs, features) of the type of the rows, from the launch's first row of channel 0 on
  void* parts;          // (parts, samples, outputs) in the type of the sums
  long long input_sample, input_channel;  // elements between neighbours
  long long features, weight_channel;     // elements between weights of neighbouring outputs, and of channels
  long long row;                          // elements of a row of one channel
  int samples, channels, outputs;
  int rows;                               // of the launch
  int block_rows;
  int block_parts;                        // parts of one block
  int parts_at_all;                       // of the launch: its blocks times those
  int unused;
};

static_assert(sizeof(PartsArguments) == PARTS_ARGUMENTS_BYTES, "cuda/arguments.py and parts.cuh differ");

constexpr int LANES = 32;

// Which elements a part's block has of every channel, and which of the block's terms, channel by channel, are its own.
struct Part {
  long long first;  // of a channel's elements in the launch, where the block begins
  int size;         // elements of one channel in the block
  int begin, end;   // terms

  __device__ __forceinline__ Part(const PartsArguments& a, int part, int channels) {
    const int row = part / a.block_parts * a.block_rows;
    first = row * a.row;
    size = (int)(min(a.rows - row, a.block_rows) * a.row);
    begin = part % a.block_parts * TERMS;
    end = min(TERMS, size * channels - begin) + begin;
  }
};

// The larger of two; NaN where either is.
__device__ __forceinline__ Sum larger(Sum a, Sum b) { return b > a || b != b ? b : a; }
