// Those of CUDA's vector types that kernels use, with their alignments.
#pragma once

#define CUDA_ON_CPU_VECTOR2(name, element, bytes)     \
  struct alignas(bytes) name##2 { element x, y; };    \
  static inline name##2 make_##name##2(element x, element y) { return {x, y}; }
#define CUDA_ON_CPU_VECTOR4(name, element, bytes)           \
  struct alignas(bytes) name##4 { element x, y, z, w; };    \
  static inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTOR2(int, int, 8)
CUDA_ON_CPU_VECTOR4(int, int, 16)
CUDA_ON_CPU_VECTOR2(uint, unsigned, 8)
CUDA_ON_CPU_VECTOR4(uint, unsigned, 16)
CUDA_ON_CPU_VECTOR2(float, float, 8)
CUDA_ON_CPU_VECTOR4(float, float, 16)
