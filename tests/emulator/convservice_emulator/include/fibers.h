// Fibers: each CUDA thread of a block has a stack of its own, and hands the processor on where it waits.
//
// On x86-64 a switch is a dozen instructions; elsewhere, and where a sanitizer watches, it is `swapcontext` with
// the sanitizer told about it. The scheduler itself runs on the caller's stack.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdlib>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUDA_ON_CPU_QUIET __attribute__((noinline, no_sanitize("thread")))
#else
#define CUDA_ON_CPU_QUIET
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASSEMBLY 1
// Saves the registers that a function must keep, changes the stack, takes that stack's registers back.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(".text\n"
    ".hidden cuda_on_cpu_switch\n.globl cuda_on_cpu_switch\n.type cuda_on_cpu_switch,@function\n"
    "cuda_on_cpu_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".size cuda_on_cpu_switch,.-cuda_on_cpu_switch\n");
#endif

namespace cuda_on_cpu {

static const int MOST_THREADS = 1024;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
static const size_t STACK_BYTES = 256 << 10;
#else
// Not a power of two, so that the threads' frames do not fall on the same lines of the cache.
static const size_t STACK_BYTES = (64 << 10) + 4096 + 832;
#endif

struct Fiber {
  char* stack;
#ifdef CUDA_ON_CPU_ASSEMBLY
  void* pointer;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_THREAD__)
  void* watched;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
};

static char* stacks;                     // MOST_THREADS of them
static int free_stacks[MOST_THREADS];    // a pile: the one used last is still in the cache
static int free_stack_count = -1;
#ifdef CUDA_ON_CPU_ASSEMBLY
static void* scheduler_pointer;
#else
static ucontext_t scheduler_context;
#endif
#if defined(__SANITIZE_THREAD__)
static void* scheduler_watched;
#endif

// Makes all stacks free; what was on them is given up.
CUDA_ON_CPU_QUIET static bool reset_stacks() {
  if (!stacks) {
    void* memory = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    stacks = static_cast<char*>(memory);
  }
  for (int i = 0; i < MOST_THREADS; i++) free_stacks[i] = MOST_THREADS - 1 - i;
  free_stack_count = MOST_THREADS;
  return true;
}

// Makes a fiber that begins with `entry`, which never returns.
CUDA_ON_CPU_QUIET static void begin(Fiber& fiber, void (*entry)()) {
  fiber.stack = stacks + free_stacks[--free_stack_count] * STACK_BYTES;
#ifdef CUDA_ON_CPU_ASSEMBLY
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 1;
  *--top = reinterpret_cast<void*>(entry);
  fiber.pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  if (!fiber.watched) fiber.watched = __tsan_create_fiber(0);  // kept from block to block: it costs much to make
#endif
#if defined(__SANITIZE_ADDRESS__)
  fiber.fake_stack = nullptr;
#endif
}

// Ends a fiber that has left for good. ThreadSanitizer would take two threads on one stack for a race.
CUDA_ON_CPU_QUIET static void end(Fiber& fiber) {
#if !defined(__SANITIZE_THREAD__)
  free_stacks[free_stack_count++] = static_cast<int>((fiber.stack - stacks) / STACK_BYTES);
#endif
}

// From the scheduler into a fiber; returns when the fiber leaves.
CUDA_ON_CPU_QUIET static void enter(Fiber& fiber) {
#if defined(__SANITIZE_THREAD__)
  scheduler_watched = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.watched, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK_BYTES);
#endif
#ifdef CUDA_ON_CPU_ASSEMBLY
  cuda_on_cpu_switch(&scheduler_pointer, fiber.pointer);
#else
  swapcontext(&scheduler_context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
static const void* scheduler_stack;
static size_t scheduler_stack_bytes;
#endif

// What a fiber does first.
CUDA_ON_CPU_QUIET static void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// From a fiber to the scheduler; returns when the scheduler enters it again.
CUDA_ON_CPU_QUIET static void leave(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler_watched, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
#else
  (void)for_good;
#endif
#ifdef CUDA_ON_CPU_ASSEMBLY
  cuda_on_cpu_switch(&fiber.pointer, scheduler_pointer);
#else
  swapcontext(&fiber.context, &scheduler_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace cuda_on_cpu
