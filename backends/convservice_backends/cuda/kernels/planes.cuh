// Planes: how kernels that compute one output a thread deal out their threads.
//
// A plane is what a launch computes of one map: the positions of one sample and one channel. A block has `lanes`
// threads for a plane, a power of two, so that small planes share a block; along x the grid runs over a plane's
// items, along y over planes, each thread taking every so many-th of them.
#pragma once
#include "common.cuh"

struct Planes {
  unsigned item;    // the thread's place in each of its planes; it may lie beyond the last
  int first, step;  // its first plane, and how far on the next one is

  __device__ __forceinline__ explicit Planes(unsigned items) {
    int bits = 0;
    while (1u << bits < items && 1u << bits < THREADS) bits++;
    item = (blockIdx.x << bits) + (threadIdx.x & ((1u << bits) - 1));
    first = (int)((blockIdx.y * THREADS + threadIdx.x) >> bits);
    step = (int)(gridDim.y * THREADS >> bits);
  }
};
