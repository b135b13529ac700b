// Dynamic shared memory, under one name on a GPU and on the processor.
//
// DYNAMIC_SHARED(type, name); in a kernel's body makes `name` point at the block's dynamic shared memory, which begins
// at a multiple of 16 bytes. On the processor the host header brings a macro of the same meaning.
#pragma once

#ifndef CUDA_ON_CPU
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif
