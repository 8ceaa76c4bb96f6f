#pragma once

// wgmma, the matrix units of Hopper as four warps use them together, with both operands in shared memory as
// boxes of 128-byte rows in the 128-byte swizzle.

#include "ops/decode_ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace modeltorch::ptx {

/// A box of rows for the matrix units: eight rows are 1024 bytes apart from the next eight. `address` is a
/// multiple of 1024, plus 32 bytes for every 16 columns to skip.
__device__ __forceinline__ uint64_t box_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 >> 4} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kStride | kUnused | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void warpgroup_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// d (+)= a . b^T for 64 rows of a, 8 * kTiles rows of b and 16 columns. Warp w of the four holds rows 16 * w
/// to 16 * w + 15 as mma.m16n8 does, d[j] its tile of b's rows 8 * j to 8 * j + 7.
template <class T, int kTiles>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[kTiles][4], uint64_t a, uint64_t b,
                                                   int accumulate);

#define MODELTORCH_OUT(tile) "+f"(tile[0]), "+f"(tile[1]), "+f"(tile[2]), "+f"(tile[3])

template <>
__device__ __forceinline__ void warpgroup_multiply<__nv_bfloat16, 2>(float (&d)[2][4], uint64_t a, uint64_t b,
                                                                     int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %10, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7 "
      "}, %8, %9, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__half, 2>(float (&d)[2][4], uint64_t a, uint64_t b,
                                                              int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %10, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7 "
      "}, %8, %9, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__nv_bfloat16, 4>(float (&d)[4][4], uint64_t a, uint64_t b,
                                                                     int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %18, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15 "
      "}, %16, %17, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1]), MODELTORCH_OUT(d[2]), MODELTORCH_OUT(d[3])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__half, 4>(float (&d)[4][4], uint64_t a, uint64_t b,
                                                              int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %18, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15 "
      "}, %16, %17, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1]), MODELTORCH_OUT(d[2]), MODELTORCH_OUT(d[3])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__nv_bfloat16, 8>(float (&d)[8][4], uint64_t a, uint64_t b,
                                                                     int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
      "}, %32, %33, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1]), MODELTORCH_OUT(d[2]), MODELTORCH_OUT(d[3]),
        MODELTORCH_OUT(d[4]), MODELTORCH_OUT(d[5]), MODELTORCH_OUT(d[6]), MODELTORCH_OUT(d[7])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__half, 8>(float (&d)[8][4], uint64_t a, uint64_t b,
                                                              int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
      "}, %32, %33, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1]), MODELTORCH_OUT(d[2]), MODELTORCH_OUT(d[3]),
        MODELTORCH_OUT(d[4]), MODELTORCH_OUT(d[5]), MODELTORCH_OUT(d[6]), MODELTORCH_OUT(d[7])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__nv_bfloat16, 16>(float (&d)[16][4], uint64_t a,
                                                                      uint64_t b, int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1]), MODELTORCH_OUT(d[2]), MODELTORCH_OUT(d[3]),
        MODELTORCH_OUT(d[4]), MODELTORCH_OUT(d[5]), MODELTORCH_OUT(d[6]), MODELTORCH_OUT(d[7]),
        MODELTORCH_OUT(d[8]), MODELTORCH_OUT(d[9]), MODELTORCH_OUT(d[10]), MODELTORCH_OUT(d[11]),
        MODELTORCH_OUT(d[12]), MODELTORCH_OUT(d[13]), MODELTORCH_OUT(d[14]), MODELTORCH_OUT(d[15])
      : "l"(a), "l"(b), "r"(accumulate));
}
template <>
__device__ __forceinline__ void warpgroup_multiply<__half, 16>(float (&d)[16][4], uint64_t a, uint64_t b,
                                                               int accumulate) {
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, add, 1, 1, 0, 0;\n\t}"
      : MODELTORCH_OUT(d[0]), MODELTORCH_OUT(d[1]), MODELTORCH_OUT(d[2]), MODELTORCH_OUT(d[3]),
        MODELTORCH_OUT(d[4]), MODELTORCH_OUT(d[5]), MODELTORCH_OUT(d[6]), MODELTORCH_OUT(d[7]),
        MODELTORCH_OUT(d[8]), MODELTORCH_OUT(d[9]), MODELTORCH_OUT(d[10]), MODELTORCH_OUT(d[11]),
        MODELTORCH_OUT(d[12]), MODELTORCH_OUT(d[13]), MODELTORCH_OUT(d[14]), MODELTORCH_OUT(d[15])
      : "l"(a), "l"(b), "r"(accumulate));
}

#undef MODELTORCH_OUT

}  // namespace modeltorch::ptx

#endif
