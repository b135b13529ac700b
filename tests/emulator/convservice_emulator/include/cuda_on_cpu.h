// CUDA C++ on the processor: put before a kernel's source, this header makes it C++17 that g++ compiles and that runs
// thread by thread.
//
// It gives the words of the language, the variables and functions that are built in, and for what kernels do with
// PTX functions of the same names (kernels guard theirs with `#ifndef CUDA_ON_CPU`). `CUDA_ON_CPU_EXPORT` behind the
// source makes the function that launches a grid. It cannot show speed, bank conflicts, weak memory order, or
// blocks at work at the same time.
#pragma once
#define CUDA_ON_CPU 1

#include "copies.h"
#include "fibers.h"
#include "numbers.h"
#include "scheduler.h"
#include "vectors.h"
#include "warp.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // AddressSanitizer guards no variable that is in a section of its own
#else
#define __shared__ static __attribute__((section("cuda_shared")))
#endif
// Dynamic shared memory, as kernels/shared.cuh has it for a GPU.
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_on_cpu::dynamic_shared)

#define threadIdx (cuda_on_cpu::this_thread())
#define blockIdx (cuda_on_cpu::this_block())
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)

#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
static inline void __trap() {
  cuda_on_cpu::fail("__trap");
  cuda_on_cpu::give_up();
}

// The function that launches `KERNEL` over a grid, with one structure by value. It returns 0, or 1 with the reason
// in `message`.
#define CUDA_ON_CPU_EXPORT(ARGUMENTS)                                                                             \
  static const ARGUMENTS* cuda_on_cpu_arguments;                                                                  \
  static void cuda_on_cpu_body() {                                                                                \
    KERNEL(*cuda_on_cpu_arguments);                                                                               \
    cuda_on_cpu::disturb();                                                                                       \
  }                                                                                                               \
  extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_launch(                                       \
      const void* arguments, const unsigned* grid, unsigned dynamic_bytes, int order, unsigned seed,              \
      char* message, unsigned room) {                                                                             \
    cuda_on_cpu_arguments = static_cast<const ARGUMENTS*>(arguments);                                             \
    const bool done = cuda_on_cpu::run_grid(dim3(grid[0], grid[1], grid[2]), dim3(THREADS), dynamic_bytes, order, \
                                            seed, cuda_on_cpu_body);                                              \
    snprintf(message, room, "%s", cuda_on_cpu::failure);                                                          \
    return done ? 0 : 1;                                                                                          \
  }
