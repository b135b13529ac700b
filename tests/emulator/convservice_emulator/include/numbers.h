// Numbers: CUDA's functions on them that C has not, and the roundings that kernels have PTX for.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {
template <typename To, typename From> static inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the bits of one are the bits of the other");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuda_on_cpu

static inline float __uint_as_float(unsigned bits) { return cuda_on_cpu::same_bits<float>(bits); }
static inline unsigned __float_as_uint(float value) { return cuda_on_cpu::same_bits<unsigned>(value); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }

static inline int min(int a, int b) { return b < a ? b : a; }
static inline int max(int a, int b) { return a < b ? b : a; }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

#if defined(__F16C__)
namespace cuda_on_cpu {
// What the compiler's own header of such functions wraps; to include it takes longer than to compile a kernel.
typedef short Shorts __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
}  // namespace cuda_on_cpu
#endif

// cvt.f32.f16
static inline float widened_half(unsigned short bits) {
#if defined(__F16C__)
  const cuda_on_cpu::Shorts halves = {(short)bits};
  return __builtin_ia32_vcvtph2ps(halves)[0];
#else
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = (float)fraction * 0x1p-24f;
  return sign ? -small : small;
#endif
}

// cvt.rn.f16.f32: to nearest and to even; the one NaN that PTX gives is 0x7fff.
static inline unsigned short rounded_half(float value) {
  if (value != value) return 0x7fff;
#if defined(__F16C__)
  const cuda_on_cpu::Floats floats = {value};
  const int to_nearest = 0;
  return (unsigned short)__builtin_ia32_vcvtps2ph(floats, to_nearest)[0];
#else
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // from 65520 on
  if (magnitude < 0x38800000u) {                                         // below 2**-14, a multiple of 2**-24
    const float scaled = rintf(__uint_as_float(magnitude) * 0x1p24f);
    return (unsigned short)(sign | (unsigned)scaled);
  }
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return (unsigned short)(sign | ((rounded >> 13) - (112u << 10)));
#endif
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
static inline unsigned rounded_tf32(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7fffffffu;
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

namespace cuda_on_cpu {
// What a tensor core reads of a register: TF32 without its low 13 bits, 16-bit types whole.
static inline float read_tf32(unsigned bits) { return __uint_as_float(bits & ~0x1fffu); }
static inline float read_bfloat16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
}  // namespace cuda_on_cpu
