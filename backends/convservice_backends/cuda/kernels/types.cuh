// Element types, their rounding, and activations: what kernels of every kind share.
//
// A kernel is compiled for the constants KERNEL (its name), THREADS (threads of a block), IN and OUT (element types
// of what it reads and writes, numbers of `ElementType`); it computes in `Sum`: double where either is float64, float
// for all else. Nothing here allocates, includes or diverges at a barrier, so that the same text runs on the
// processor, thread by thread.
#pragma once

// The numbers are those of `convservice.dtypes`.
enum ElementType { FLOAT32 = 1, FLOAT64 = 2, FLOAT16 = 3, BFLOAT16 = 4, UINT8 = 5, INT8 = 6, UINT16 = 7, INT16 = 8 };

struct half_bits { unsigned short bits; };
struct bfloat16_bits { unsigned short bits; };

template <int TYPE> struct Element;
template <> struct Element<FLOAT32> { typedef float type; };
template <> struct Element<FLOAT64> { typedef double type; };
template <> struct Element<FLOAT16> { typedef half_bits type; };
template <> struct Element<BFLOAT16> { typedef bfloat16_bits type; };
template <> struct Element<UINT8> { typedef unsigned char type; };
template <> struct Element<INT8> { typedef signed char type; };
template <> struct Element<UINT16> { typedef unsigned short type; };
template <> struct Element<INT16> { typedef short type; };

template <bool WIDE> struct Accumulator { typedef float type; };
template <> struct Accumulator<true> { typedef double type; };

typedef Element<IN>::type Input;
typedef Element<OUT>::type Output;
typedef Accumulator<IN == FLOAT64 || OUT == FLOAT64>::type Sum;

// ---- rounding, to nearest and to even, denormals kept

#ifndef CUDA_ON_CPU
__device__ __forceinline__ float widened_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ unsigned short rounded_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

__device__ __forceinline__ float widened_bfloat16(unsigned short bits) {
  return __uint_as_float((unsigned)bits << 16);
}

__device__ __forceinline__ unsigned short rounded_bfloat16(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)(bits >> 16 | 0x40u);  // NaN stays NaN
  return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <typename Value> __device__ __forceinline__ Value widened(Value value) { return value; }
__device__ __forceinline__ float widened(half_bits value) { return widened_half(value.bits); }
__device__ __forceinline__ float widened(bfloat16_bits value) { return widened_bfloat16(value.bits); }

__device__ __forceinline__ void store(float* place, float value) { *place = value; }
__device__ __forceinline__ void store(double* place, double value) { *place = value; }
__device__ __forceinline__ void store(half_bits* place, float value) { place->bits = rounded_half(value); }
__device__ __forceinline__ void store(bfloat16_bits* place, float value) { place->bits = rounded_bfloat16(value); }

// Rounds a double to the nearest float that is odd in its last place if inexact: a second rounding to a type of
// at most 22 digits is then as if it were the only one (Boldo, Melquiond: Emulation of FMA and correctly rounded
// sums, IEEE Transactions on Computers 57, 2008).
__device__ __forceinline__ float rounded_to_odd(double value) {
  float near = (float)value;
  if ((double)near == value || value != value) return near;
  unsigned bits = __float_as_uint(near);
  const bool beyond = (near < 0 ? -(double)near : (double)near) > (value < 0 ? -value : value);
  if (beyond) bits -= 1;  // towards zero, then odd
  return __uint_as_float(bits | 1u);
}

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// ---- activations

__device__ __forceinline__ float natural_exp(float x) { return expf(x); }
__device__ __forceinline__ double natural_exp(double x) { return exp(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
__device__ __forceinline__ float error_complement(float x) { return erfcf(x); }
__device__ __forceinline__ double error_complement(double x) { return erfc(x); }

// The numbers are the places in `convservice.layers.FUNCTIONS`. Keeps NaN.
template <typename Value>
__device__ __forceinline__ Value activated(Value x, int activation, double slope) {
  switch (activation) {
    case 1: return x > Value(0) ? x : (x != x ? x : Value(0));
    case 2: return x > Value(0) ? x : x * Value(slope);
    case 3: return Value(1) / (Value(1) + natural_exp(-x));
    case 4: return hyperbolic_tangent(x);
    case 5: return x * (error_complement(x * Value(-0.70710678118654752440)) * Value(0.5));
    case 6: return x * (Value(1) / (Value(1) + natural_exp(-x)));
    default: return x;
  }
}
