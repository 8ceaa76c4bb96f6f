#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/check.h"

/// What Hopper adds: bulk tensor copies that report to barriers in shared memory, matrix products of a
/// warpgroup that read shared memory, and registers that warps hand to each other. PTX ISA, "wgmma",
/// "cp.async.bulk.tensor".
namespace modeltorch::hopper {

/// A tensor in device memory as the copy engine reads it: sizes and box from the innermost dimension out,
/// strides in bytes without the innermost, which is dense. The innermost box is 128 bytes: shared memory is
/// swizzled.
template <int kRank>
struct TensorBox {
  const void* data;
  bool bfloat16;
  uint64_t sizes[kRank];
  uint64_t strides[kRank - 1];
  uint32_t box[kRank];
};

/// The tensor map of a box. The driver's function is looked up, so that nothing links to libcuda.
template <int kRank>
CUtensorMap tensor_map(const TensorBox<kRank>& tensor) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || found == nullptr) {
      fail(ErrorKind::kRuntime, "this CUDA driver has no cuTensorMapEncodeTiled: 12.0 or newer is needed");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const uint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map, tensor.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             kRank, const_cast<void*>(tensor.data), tensor.sizes, tensor.strides, tensor.box, ones,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(ErrorKind::kRuntime, "cuTensorMapEncodeTiled failed with CUresult ", static_cast<int>(result));
  }
  return map;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A place in a ring of buffers and the parity of its barriers.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

/// Makes initialised barriers visible to the copy engine; a __syncthreads follows.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Arrives and announces the bytes that copies will bring.
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

/// Waits until the phase of this parity is over. A new barrier is in phase 0: parity 1 does not wait.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void named_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Orders ordinary writes to shared memory before reads by the tensor cores or the copy engine.
__device__ inline void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kCount>
__device__ inline void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ inline void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

/// Which warpgroup this is, known to the compiler as the same for the whole warp.
__device__ inline int warpgroup() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
}

/// The place of this block in its cluster.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of a cluster meet; what they wrote to shared memory before is seen after.
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Arrives at the barrier that lies at the same place in block `rank` of the cluster. For readers that give a
/// buffer back: a release at cluster scope, which stores would need, costs a fence of the whole device.
__device__ inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

/// As copy_box, to the same place in every block of the cluster that `blocks` has a bit for.
__device__ inline void copy_box_to_all(void* to, const CUtensorMap* map, uint64_t* barrier, int x0, int x1,
                                       uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "h"(blocks)
      : "memory");
}

/// Starts the copy of a box at these coordinates, innermost first; its bytes are counted by the barrier.
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x0, int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1)
      : "memory");
}

__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x0, int x1, int x2,
                                int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

/// Boxes of what is read once: L2 may drop them first.
__device__ inline uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// As copy_box, for what is read once.
__device__ inline void stream_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x0, int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "l"(read_once())
      : "memory");
}

__device__ inline void stream_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x0, int x1, int x2,
                                  int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "l"(read_once())
      : "memory");
}

/// Writes 16 bytes to block `rank` of the cluster, at the address that the place has in this block; the
/// barrier there counts them.
__device__ inline void send(uint32_t to, const uint64_t* barrier, uint32_t rank, float4 value) {
  asm volatile(
      "{\n.reg .b32 there, counted;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counted, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, "
      "[counted];\n}" ::"r"(to),
      "r"(shared_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

/// Transposes an 8 x 8 matrix of 16-bit elements over a warp: lane l holds two columns, from l % 4 * 2 on, of
/// row l / 4.
__device__ inline uint32_t transpose_halves(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `kPending` groups of products are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving reads and writes of accumulators over this point.
template <int kCount>
__device__ inline void wgmma_pin(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

/// How wgmma finds an operand of 128-byte rows in shared memory, swizzled by the copy engine. Eight rows are
/// 1024 bytes. For rows that lie across the summed dimension, `leading` is the distance in bytes from one run
/// of 64 columns to the next; others do not use it. Steps are added to a descriptor in units of 16 bytes.
__device__ inline uint64_t operand(const void* data, int leading = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | static_cast<uint64_t>(leading >> 4) << 16 |
         (shared_address(data) & 0x3ffff) >> 4;
}

#define MODELTORCH_SUMS_8(i)                                                                              \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define MODELTORCH_SUMS_16(i) MODELTORCH_SUMS_8(i), MODELTORCH_SUMS_8(i + 8)
#define MODELTORCH_SUMS_32(i) MODELTORCH_SUMS_16(i), MODELTORCH_SUMS_16(i + 16)
#define MODELTORCH_SUMS_64 MODELTORCH_SUMS_32(0), MODELTORCH_SUMS_32(32)
#define MODELTORCH_SUMS_96 MODELTORCH_SUMS_64, MODELTORCH_SUMS_32(64)
#define MODELTORCH_SUMS_112 MODELTORCH_SUMS_96, MODELTORCH_SUMS_8(96), MODELTORCH_SUMS_8(104)
#define MODELTORCH_SUMS_128 MODELTORCH_SUMS_112, MODELTORCH_SUMS_8(112), MODELTORCH_SUMS_8(120)
#define MODELTORCH_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MODELTORCH_NAMES_16 MODELTORCH_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MODELTORCH_NAMES_32 \
  MODELTORCH_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MODELTORCH_NAMES_64                                                            \
  MODELTORCH_NAMES_32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MODELTORCH_NAMES_96                                                            \
  MODELTORCH_NAMES_64                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MODELTORCH_NAMES_112 \
  MODELTORCH_NAMES_96        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define MODELTORCH_NAMES_128 \
  MODELTORCH_NAMES_112       \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MODELTORCH_WGMMA(kColumns, kNames, kSums, type, a_at, b_at, flag_at)                          \
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %" flag_at                                        \
               ", 0; wgmma.mma_async.sync.aligned.m64n" kColumns "k16.f32." type "." type " {" kNames \
               "}, %" a_at ", %" b_at ", keep, 1, 1, 0, 0;}"                                          \
               : kSums                                                                                \
               : "l"(a), "l"(b), "r"(accumulate))

/// sum [64, N] = or += a . b^T over 16 summands: a [64, 16] and b [N, 16] in shared memory, rows along the
/// summed dimension. A lane holds of sum what it holds of an mma.sync accumulator, eight columns in four
/// floats.
template <class T, int kCount>
__device__ inline void wgmma(float (&sum)[kCount], uint64_t a, uint64_t b, int accumulate) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kCount == 8 && kBFloat16) {
    MODELTORCH_WGMMA("16", MODELTORCH_NAMES_8, MODELTORCH_SUMS_8(0), "bf16", "8", "9", "10");
  } else if constexpr (kCount == 8) {
    MODELTORCH_WGMMA("16", MODELTORCH_NAMES_8, MODELTORCH_SUMS_8(0), "f16", "8", "9", "10");
  } else if constexpr (kCount == 16 && kBFloat16) {
    MODELTORCH_WGMMA("32", MODELTORCH_NAMES_16, MODELTORCH_SUMS_16(0), "bf16", "16", "17", "18");
  } else if constexpr (kCount == 16) {
    MODELTORCH_WGMMA("32", MODELTORCH_NAMES_16, MODELTORCH_SUMS_16(0), "f16", "16", "17", "18");
  } else if constexpr (kCount == 32 && kBFloat16) {
    MODELTORCH_WGMMA("64", MODELTORCH_NAMES_32, MODELTORCH_SUMS_32(0), "bf16", "32", "33", "34");
  } else if constexpr (kCount == 32) {
    MODELTORCH_WGMMA("64", MODELTORCH_NAMES_32, MODELTORCH_SUMS_32(0), "f16", "32", "33", "34");
  } else if constexpr (kCount == 64 && kBFloat16) {
    MODELTORCH_WGMMA("128", MODELTORCH_NAMES_64, MODELTORCH_SUMS_64, "bf16", "64", "65", "66");
  } else if constexpr (kCount == 64) {
    MODELTORCH_WGMMA("128", MODELTORCH_NAMES_64, MODELTORCH_SUMS_64, "f16", "64", "65", "66");
  } else if constexpr (kCount == 96 && kBFloat16) {
    MODELTORCH_WGMMA("192", MODELTORCH_NAMES_96, MODELTORCH_SUMS_96, "bf16", "96", "97", "98");
  } else if constexpr (kCount == 96) {
    MODELTORCH_WGMMA("192", MODELTORCH_NAMES_96, MODELTORCH_SUMS_96, "f16", "96", "97", "98");
  } else if constexpr (kCount == 112 && kBFloat16) {
    MODELTORCH_WGMMA("224", MODELTORCH_NAMES_112, MODELTORCH_SUMS_112, "bf16", "112", "113", "114");
  } else if constexpr (kCount == 112) {
    MODELTORCH_WGMMA("224", MODELTORCH_NAMES_112, MODELTORCH_SUMS_112, "f16", "112", "113", "114");
  } else if constexpr (kCount == 128 && kBFloat16) {
    MODELTORCH_WGMMA("256", MODELTORCH_NAMES_128, MODELTORCH_SUMS_128, "bf16", "128", "129", "130");
  } else {
    static_assert(kCount == 128);
    MODELTORCH_WGMMA("256", MODELTORCH_NAMES_128, MODELTORCH_SUMS_128, "f16", "128", "129", "130");
  }
}

#define MODELTORCH_WGMMA_ACROSS(kColumns, kNames, kSums, type, a0, a1, a2, a3, b_at, flag_at)         \
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %" flag_at                                        \
               ", 0; wgmma.mma_async.sync.aligned.m64n" kColumns "k16.f32." type "." type " {" kNames \
               "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_at ", keep, 1, 1, 1;}"                  \
               : kSums                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

/// sum [64, N] = or += a . b over 16 summands: a [64, 16] in registers, as mma.sync takes it, and b [16, N]
/// in shared memory, rows across the summed dimension.
template <class T, int kCount>
__device__ inline void wgmma_across(float (&sum)[kCount], const uint32_t (&a)[4], uint64_t b,
                                    int accumulate) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kCount == 32 && kBFloat16) {
    MODELTORCH_WGMMA_ACROSS("64", MODELTORCH_NAMES_32, MODELTORCH_SUMS_32(0), "bf16", "32", "33", "34", "35",
                            "36", "37");
  } else if constexpr (kCount == 32) {
    MODELTORCH_WGMMA_ACROSS("64", MODELTORCH_NAMES_32, MODELTORCH_SUMS_32(0), "f16", "32", "33", "34", "35",
                            "36", "37");
  } else if constexpr (kBFloat16) {
    static_assert(kCount == 64);
    MODELTORCH_WGMMA_ACROSS("128", MODELTORCH_NAMES_64, MODELTORCH_SUMS_64, "bf16", "64", "65", "66", "67",
                            "68", "69");
  } else {
    static_assert(kCount == 64);
    MODELTORCH_WGMMA_ACROSS("128", MODELTORCH_NAMES_64, MODELTORCH_SUMS_64, "f16", "64", "65", "66", "67",
                            "68", "69");
  }
}

#undef MODELTORCH_WGMMA
#undef MODELTORCH_WGMMA_ACROSS

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace modeltorch::hopper
