// Asynchronous copies into shared memory: what they write is NaN until waited for, and they read only then.
//
// That is the worst that a GPU may do: a kernel that reads too early, waits for too few groups, or changes a
// source under way gets wrong values here every time.
#pragma once
#include "scheduler.h"

namespace cuda_on_cpu {

CUDA_ON_CPU_QUIET static void ask_for_copy(void* target, const void* source, int nbytes) {
  Thread& thread = threads[current];
  if (thread.copy_count == thread.copy_room) {
    thread.copy_room = thread.copy_room ? 2 * thread.copy_room : 16;
    thread.copies = static_cast<Copy*>(realloc(thread.copies, thread.copy_room * sizeof(Copy)));
  }
  thread.copies[thread.copy_count++] = {target, source, nbytes, thread.copy_groups};
}

// Takes the oldest copy out that belongs to a group before `group`; false where there is none.
CUDA_ON_CPU_QUIET static bool next_copy(int group, int& at, Copy& copy) {
  Thread& thread = threads[current];
  if (at == thread.copy_count || thread.copies[at].group >= group) {
    thread.copy_count -= at;
    memmove(thread.copies, thread.copies + at, thread.copy_count * sizeof(Copy));
    return false;
  }
  copy = thread.copies[at++];
  return true;
}

template <int NBYTES> static inline void copy_async(void* shared, const void* global, bool present) {
  const uintptr_t target = reinterpret_cast<uintptr_t>(shared), source = reinterpret_cast<uintptr_t>(global);
  if (target % NBYTES || (present && source % NBYTES)) {
    fail("an asynchronous copy of %d bytes goes from or to an address that is no multiple of that", NBYTES);
    give_up();
  }
  memset(shared, 0xff, NBYTES);
  ask_for_copy(shared, present ? global : nullptr, NBYTES);
}

// What is still under way may land at any moment. Called where the block meets and where a thread ends: whatever was
// put in its place meanwhile is lost.
CUDA_ON_CPU_QUIET static int copies_under_way() { return threads[current].copy_count; }
CUDA_ON_CPU_QUIET static Copy copy_under_way(int at) { return threads[current].copies[at]; }

static inline void disturb() {
  for (int at = 0; at < copies_under_way(); at++) {
    const Copy copy = copy_under_way(at);
    memset(copy.target, 0xff, copy.nbytes);
  }
}

static inline void barrier(int line) {
  disturb();
  wait(AT_BARRIER, "__syncthreads", line);
  disturb();
}

CUDA_ON_CPU_QUIET static int committed_groups() { return threads[current].copy_groups; }

static inline void wait_for_copies(int still_under_way) {
  Copy copy;
  for (int at = 0; next_copy(committed_groups() - still_under_way, at, copy);)
    if (copy.source) {
      memcpy(copy.target, copy.source, copy.nbytes);
    } else {
      memset(copy.target, 0, copy.nbytes);
    }
}

}  // namespace cuda_on_cpu

// ---- the functions that kernels/ptx.cuh has for a GPU

static inline void copy_async_16(void* shared, const void* global, bool present) {
  cuda_on_cpu::copy_async<16>(shared, global, present);
}
static inline void copy_async_8(void* shared, const void* global, bool present) {
  cuda_on_cpu::copy_async<8>(shared, global, present);
}
static inline void copy_async_4(void* shared, const void* global, bool present) {
  cuda_on_cpu::copy_async<4>(shared, global, present);
}
CUDA_ON_CPU_QUIET static inline void copy_async_commit() { cuda_on_cpu::threads[cuda_on_cpu::current].copy_groups++; }
template <int STILL_UNDER_WAY> static inline void copy_async_wait() { cuda_on_cpu::wait_for_copies(STILL_UNDER_WAY); }
