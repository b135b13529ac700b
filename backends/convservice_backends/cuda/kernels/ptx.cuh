// Instructions that CUDA C++ has no words for, one small function each.
//
// Asynchronous copies (cp.async), matrix loads (ldmatrix), matrix products (mma.sync) and the rounding to TF32, after
// the PTX ISA manual, sections 9.7.9.25 and 9.7.14. On the processor a host header brings functions of the same names
// and meanings. sm_75 has no asynchronous copies (here they are loads and stores that are done at once, and waiting
// is for nothing) and multiplies half by 8 terms an instruction (here two of them follow each other). It has neither
// bfloat16 nor TF32 products: kernels that call those are for sm_80 and later.
#pragma once

#ifndef CUDA_ON_CPU
// ---- copies from global to shared memory, which zero-fill where the source is not present (and do not read it)

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return (unsigned)__cvta_generic_to_shared(shared);
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(present ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(present ? 4 : 0)
               : "memory");
}

// The copies asked for since the last commit are a group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most so many of this thread's latest groups are under way; other threads' need a barrier besides.
template <int STILL_UNDER_WAY> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(STILL_UNDER_WAY) : "memory");
}
#else
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool present) {
  *static_cast<uint4*>(shared) = present ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool present) {
  *static_cast<uint2*>(shared) = present ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool present) {
  *static_cast<unsigned*>(shared) = present ? *static_cast<const unsigned*>(global) : 0;
}
__device__ __forceinline__ void copy_async_commit() {}
template <int STILL_UNDER_WAY> __device__ __forceinline__ void copy_async_wait() {}
#endif

// ---- matrices of 8 rows of 16 bytes: lane 8 * i + r gives the address of row r of matrix i; lane l is given the four
// bytes l % 4 of row l / 4 of each (transposed: of column l / 4 of 16-bit elements, those of rows 2 * (l % 4) and next)

__device__ __forceinline__ void load_matrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- d += a b, of 16 x k and k x 8 elements, in float32

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int part = 0; part < 2; part++)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * part]), "r"(a[2 * part + 1]), "r"(b[part]));
#endif
}

// To nearest, ties away from zero; the low 13 bits are zero.
__device__ __forceinline__ unsigned rounded_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
#endif
