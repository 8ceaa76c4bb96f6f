#pragma once

// How the blocks of decode_stack hand results to one another: through memory that is all ones where nothing
// has been written yet. Readers load the data itself until none of it is all ones any more: no flag and no
// fence lies between a result and its use. Halves and floats of all ones are NaNs that arithmetic does not
// make: what it makes of a NaN is 0x7fff or 0x7fffffff. A block takes back what it wrote (writes ones) when
// all that read it have handed on results made of it.

#include "ops/ptx.cuh"

namespace modeltorch::exchange {

inline constexpr uint32_t kNothing = 0xffffffffu;

__device__ __forceinline__ uint4 load(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_pair(const void* from) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store(void* to, uint16_t value) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(value) : "memory");
}
__device__ __forceinline__ void store(void* to, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store(void* to, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

template <class T>
__device__ __forceinline__ void publish(T* to, float value) {
  const T rounded = ptx::from_float<T>(value);
  store(to, *reinterpret_cast<const uint16_t*>(&rounded));
}

/// Between what a block takes back and what it hands on later: who sees that sees that this is gone. PTX
/// would promise it if the same thread did both and the reader fenced too. What it rests on is how Hopper
/// does it: these loads and stores go to the second-level cache, a thread that has fenced has had its stores
/// acknowledged there, and a load behind a branch on a polled value is issued after that value came.
__device__ __forceinline__ void settle() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

/// Not 0: one of the two halves of `word` is all ones.
__device__ __forceinline__ uint32_t empty_half(uint32_t word) {
  return ~(word + 0x00010001u) & word & 0x80008000u;
}

__device__ __forceinline__ bool has_empty_half(const uint4& v) {
  return (empty_half(v.x) | empty_half(v.y) | empty_half(v.z) | empty_half(v.w)) != 0;
}

__device__ __forceinline__ bool has_empty_word(const uint4& v) {
  return v.x == kNothing || v.y == kNothing || v.z == kNothing || v.w == kNothing;
}

/// Counts the loads of a wait. One that can never end, which only a fault of the device could bring about, is
/// cut off: the launch fails instead of standing still.
struct Patience {
  int left = 1 << 19;

  __device__ __forceinline__ void spend() {
    if (--left == 0) __trap();
  }
};

/// Loads eight halves that another block hands over.
__device__ __forceinline__ uint4 wait_for(const void* from) {
  Patience patience;
  uint4 v = load(from);
  while (has_empty_half(v)) {
    patience.spend();
    v = load(from);
  }
  return v;
}

}  // namespace modeltorch::exchange
