// CUDA's vector types, with their alignments.
#pragma once

#define CUDA_ON_CPU_VECTOR2(name, element, bytes)     \
  struct alignas(bytes) name##2 { element x, y; };    \
  static inline name##2 make_##name##2(element x, element y) { return {x, y}; }
#define CUDA_ON_CPU_VECTOR4(name, element, bytes)           \
  struct alignas(bytes) name##4 { element x, y, z, w; };    \
  static inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTOR2(char, signed char, 2)
CUDA_ON_CPU_VECTOR4(char, signed char, 4)
CUDA_ON_CPU_VECTOR2(uchar, unsigned char, 2)
CUDA_ON_CPU_VECTOR4(uchar, unsigned char, 4)
CUDA_ON_CPU_VECTOR2(short, short, 4)
CUDA_ON_CPU_VECTOR4(short, short, 8)
CUDA_ON_CPU_VECTOR2(ushort, unsigned short, 4)
CUDA_ON_CPU_VECTOR4(ushort, unsigned short, 8)
CUDA_ON_CPU_VECTOR2(int, int, 8)
CUDA_ON_CPU_VECTOR4(int, int, 16)
CUDA_ON_CPU_VECTOR2(uint, unsigned, 8)
CUDA_ON_CPU_VECTOR4(uint, unsigned, 16)
CUDA_ON_CPU_VECTOR2(float, float, 8)
CUDA_ON_CPU_VECTOR4(float, float, 16)
CUDA_ON_CPU_VECTOR2(longlong, long long, 16)
CUDA_ON_CPU_VECTOR2(ulonglong, unsigned long long, 16)
CUDA_ON_CPU_VECTOR2(double, double, 16)
struct float3 { float x, y, z; };
struct int3 { int x, y, z; };
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
static inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
