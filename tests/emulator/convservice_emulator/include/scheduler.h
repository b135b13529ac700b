// The scheduler: runs the blocks of a grid one after the other, and a block's threads until each of them waits.
//
// Given are a grid, a body to run once a thread, and an order: 0 ascending, 1 descending in every other pass,
// 2 shuffled anew in every pass; blocks follow the order too. A barrier that some threads never reach, and an
// operation of a whole warp that some lanes never reach, end the launch with a message instead of hanging.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "fibers.h"

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

static const int WARP = 32;
static const int DYNAMIC_SHARED_BYTES = 227 << 10;  // of a block, at most, on sm_90

enum State { READY, AT_BARRIER, IN_WARP, FINISHED };

// One asynchronous copy that has been asked for.
struct Copy {
  void* target;
  const void* source;  // null for zeros
  int nbytes, group;
};

struct Thread {
  Fiber fiber;
  bool begun;
  State state;
  const char* operation;  // what it waits in
  int line;               // where
  unsigned barriers, exchanges;
  Copy* copies;
  int copy_count, copy_room, copy_groups;
};

// What the lanes of a warp hand to each other in one operation. Two a warp, used in turn: no lane can post to one
// again before all lanes have read it, since they all have posted to the other in between.
struct Exchange {
  uint32_t words[WARP][12];
  const void* rows[WARP];
  float results[WARP][4];
  bool computed;
};

static Thread threads[MOST_THREADS];
static Exchange exchanges[MOST_THREADS / WARP][2];
static int thread_count, current;
static uint3 thread_index, block_index;
static dim3 block_size, grid_size;
static void (*body)();
static char failure[512];
static unsigned random_state;
alignas(1024) static char dynamic_shared[DYNAMIC_SHARED_BYTES];
#if defined(__SANITIZE_THREAD__)
static char barrier_key[2], warp_key[MOST_THREADS / WARP][2], block_key;
#endif

CUDA_ON_CPU_QUIET static void fail(const char* format, ...) {
  if (failure[0]) return;
  va_list values;
  va_start(values, format);
  int used = vsnprintf(failure, sizeof failure, format, values);
  va_end(values);
  if (used > 0 && used < (int)sizeof failure)
    snprintf(failure + used, sizeof failure - used, " (block %u,%u,%u)", block_index.x, block_index.y, block_index.z);
}

CUDA_ON_CPU_QUIET static unsigned random_below(unsigned bound) {
  random_state = random_state * 1664525u + 1013904223u;
  return (unsigned)((uint64_t)random_state * bound >> 32);
}

// ---- what threads call

CUDA_ON_CPU_QUIET static uint3 this_thread() { return thread_index; }
CUDA_ON_CPU_QUIET static uint3 this_block() { return block_index; }
CUDA_ON_CPU_QUIET static int this_lane() { return current % WARP; }

CUDA_ON_CPU_QUIET static void wait(State state, const char* operation, int line) {
  Thread& thread = threads[current];
  thread.state = state;
  thread.operation = operation;
  thread.line = line;
#if defined(__SANITIZE_THREAD__)
  void* key = state == AT_BARRIER ? &barrier_key[thread.barriers++ & 1]
                                  : &warp_key[current / WARP][thread.exchanges & 1];
  __tsan_release(key);
#endif
  leave(thread.fiber, false);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(key);
#endif
}

// The place where this operation of the warp exchanges values.
CUDA_ON_CPU_QUIET static Exchange& exchange() { return exchanges[current / WARP][threads[current].exchanges & 1]; }

// Waits until all lanes of the warp have come to the same operation.
CUDA_ON_CPU_QUIET static void meet(const char* operation, int line) {
  Thread& thread = threads[current];
  exchange().computed = false;
  wait(IN_WARP, operation, line);
  thread.exchanges++;
}

// Ends the launch from within a thread.
CUDA_ON_CPU_QUIET static void give_up() {
  leave(threads[current].fiber, false);
  abort();  // never entered again
}

// ---- what runs them

CUDA_ON_CPU_QUIET static void thread_entry() {
  arrived();
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&block_key);
#endif
  body();
  threads[current].state = FINISHED;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&block_key);
#endif
  leave(threads[current].fiber, true);
  abort();
}

CUDA_ON_CPU_QUIET static void resume(int index) {
  Thread& thread = threads[index];
  current = index;
  thread_index = {index % block_size.x, index / block_size.x % block_size.y, index / (block_size.x * block_size.y)};
  if (!thread.begun) {
    begin(thread.fiber, thread_entry);
    thread.begun = true;
  }
  enter(thread.fiber);
  if (thread.state == FINISHED) end(thread.fiber);
}

// Lets every warp go on that is wholly at one operation.
CUDA_ON_CPU_QUIET static bool release_warps() {
  bool any = false;
  for (int first = 0; first < thread_count; first += WARP) {
    const int lanes = thread_count - first < WARP ? thread_count - first : WARP;
    int waiting = 0;
    const Thread* leader = nullptr;
    for (int i = first; i < first + lanes; i++)
      if (threads[i].state == IN_WARP) {
        if (!leader) leader = &threads[i];
        if (leader->operation != threads[i].operation || leader->line != threads[i].line)
          fail("lanes of a warp are in different operations: %s at line %d and %s at line %d", leader->operation,
               leader->line, threads[i].operation, threads[i].line);
        waiting++;
      }
    if (!waiting) continue;
    if (waiting < lanes) {
      fail("%s at line %d is for the whole warp; %d of %d lanes never reach it", leader->operation, leader->line,
           lanes - waiting, lanes);
      return false;
    }
    for (int i = first; i < first + lanes; i++) threads[i].state = READY;
    any = true;
  }
  return any;
}

// Lets the block pass the barrier that all its threads are at; false where the block is done.
CUDA_ON_CPU_QUIET static bool release_block() {
  int waiting = 0;
  const Thread* leader = nullptr;
  for (int i = 0; i < thread_count; i++)
    if (threads[i].state == AT_BARRIER) {
      if (!leader) leader = &threads[i];
      if (leader->line != threads[i].line)
        fail("threads of a block are at different barriers, lines %d and %d", leader->line, threads[i].line);
      waiting++;
    }
  if (!waiting) return false;
  if (waiting < thread_count) {
    fail("%d of %d threads never reach the barrier at line %d", thread_count - waiting, thread_count, leader->line);
    return false;
  }
  for (int i = 0; i < thread_count; i++) threads[i].state = READY;
  return true;
}

CUDA_ON_CPU_QUIET static void run_block(int order) {
  int turns[MOST_THREADS];
  if (!reset_stacks()) return fail("there is no memory for the threads' stacks");
  for (int i = 0; i < thread_count; i++) {
    Thread& thread = threads[i];
    thread.begun = false;
    thread.state = READY;
    thread.barriers = thread.exchanges = 0;
    thread.copy_count = thread.copy_groups = 0;
    turns[i] = i;
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&block_key);
#endif
  for (int pass = 0;; pass++) {
    if (order == 2)
      for (int i = thread_count - 1; i > 0; i--) {
        const int other = (int)random_below(i + 1), kept = turns[i];
        turns[i] = turns[other];
        turns[other] = kept;
      }
    for (int i = 0; i < thread_count; i++) {
      const int index = turns[order == 1 && pass % 2 == 0 ? thread_count - 1 - i : i];
      if (threads[index].state != READY) continue;
      resume(index);
      if (failure[0]) return;
    }
    const bool any = release_warps();
    if (failure[0]) return;
    if (any) continue;
    if (!release_block() || failure[0]) break;
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&block_key);
#endif
}

// Shared memory holds anything when a block begins: here NaN.
extern "C" __attribute__((visibility("hidden"), weak)) char __start_cuda_shared[];
extern "C" __attribute__((visibility("hidden"), weak)) char __stop_cuda_shared[];

CUDA_ON_CPU_QUIET static void poison_shared(unsigned dynamic_bytes) {
  memset(dynamic_shared, 0xff, dynamic_bytes);
  if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
}

CUDA_ON_CPU_QUIET static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
  return b ? greatest_common_divisor(b, a % b) : a;
}

// Runs `run` once for every thread of the grid; false, with `failure` set, where that cannot be.
CUDA_ON_CPU_QUIET static bool run_grid(dim3 grid, dim3 block, unsigned dynamic_bytes, int order, unsigned seed,
                                       void (*run)()) {
  failure[0] = 0;
  block_index = {0, 0, 0};
  const uint64_t size = (uint64_t)block.x * block.y * block.z;
  if (!size || size > MOST_THREADS || block.z > 64) fail("a block may not have %ux%ux%u threads", block.x, block.y, block.z);
  if (!grid.x || grid.x > 0x7fffffffu || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535)
    fail("a grid may not have %ux%ux%u blocks", grid.x, grid.y, grid.z);
  if (dynamic_bytes > (unsigned)DYNAMIC_SHARED_BYTES)
    fail("a block may not have %u bytes of dynamic shared memory; %d at most", dynamic_bytes, DYNAMIC_SHARED_BYTES);
  if (failure[0]) return false;
  body = run;
  grid_size = grid;
  block_size = block;
  thread_count = (int)size;
  random_state = seed * 2654435761u + 12345u;
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  uint64_t step = 1, offset = 0;
  if (order == 1) step = blocks > 1 ? blocks - 1 : 1, offset = blocks - 1;
  if (order == 2) {
    offset = random_below((unsigned)(blocks < 0xffffffffu ? blocks : 0xffffffffu));
    for (step = blocks / 2 + 1; greatest_common_divisor(step, blocks) != 1;) step++;
  }
  for (uint64_t i = 0; i < blocks && !failure[0]; i++) {
    const uint64_t at = ((unsigned __int128)i * step + offset) % blocks;
    block_index = {(unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y)};
    poison_shared(dynamic_bytes);
    run_block(order);
  }
  return !failure[0];
}

}  // namespace cuda_on_cpu
