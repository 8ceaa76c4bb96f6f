// Vectors of floats for the level that is being compiled. Included only by rows_impl.h, after the level's
// macros and target pragma: everything here lives in the level's own namespace, so that the linker can never
// put one level's code in the place of another's. For the same reason nothing from the standard library is
// called.
// MODELTORCH_NATIVE_BFLOAT16 says that the level has AVX-512 BF16, and that <immintrin.h> is included.

typedef float Vec __attribute__((vector_size(4 * MODELTORCH_LANES)));
typedef float VecUnaligned __attribute__((vector_size(4 * MODELTORCH_LANES), aligned(4), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(4 * MODELTORCH_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * MODELTORCH_LANES)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * MODELTORCH_LANES)));
typedef uint16_t VecHalfUnaligned __attribute__((vector_size(2 * MODELTORCH_LANES), aligned(2), may_alias));
typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));

constexpr int64_t kLanes = MODELTORCH_LANES;

static inline Vec splat(float value) {
  return value - Vec{};
}

static inline Vec load(const float* p) {
  return *reinterpret_cast<const VecUnaligned*>(p);
}

static inline Vec widen(VecHalf bits) {
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, VecBits) << 16);
}

static inline Vec load(const BFloat16* p) {
  return widen(*reinterpret_cast<const VecHalfUnaligned*>(p));
}

static inline Vec load(const Float16* p) {
  const VecBits bits = __builtin_convertvector(*reinterpret_cast<const VecHalfUnaligned*>(p), VecBits);
  const VecBits shifted = (bits & 0x7fffu) << 13;
  const VecBits scaled = reinterpret_cast<VecBits>(reinterpret_cast<Vec>(shifted) * 0x1p112f);
  const VecBits special = reinterpret_cast<VecBits>(shifted >= 0x0f800000u);
  return reinterpret_cast<Vec>((special & (shifted | 0x7f800000u)) | (~special & scaled) |
                               ((bits & 0x8000u) << 16));
}

static inline void store(float* p, Vec value) {
  *reinterpret_cast<VecUnaligned*>(p) = value;
}

static inline void store(BFloat16* p, Vec value) {
#ifdef MODELTORCH_NATIVE_BFLOAT16
  *reinterpret_cast<VecHalfUnaligned*>(p) =
      reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
#else
  const VecBits word = reinterpret_cast<VecBits>(value);
  const VecBits rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const VecBits is_nan = reinterpret_cast<VecBits>((word & 0x7fffffffu) > 0x7f800000u);
  const VecBits chosen = (is_nan & 0x7fc0u) | (~is_nan & rounded);
  *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(chosen, VecHalf);
#endif
}

// The vector form of Float16(float): see core/half_floats.h.
static inline void store(Float16* p, Vec value) {
  const VecBits word = reinterpret_cast<VecBits>(value);
  const VecBits magnitude = word & 0x7fffffffu;
  const VecBits too_large = reinterpret_cast<VecBits>(magnitude >= 0x47800000u);
  const VecBits is_nan = reinterpret_cast<VecBits>(magnitude > 0x7f800000u);
  const VecBits subnormal = reinterpret_cast<VecBits>(magnitude < 0x38800000u);
  const VecBits special = (is_nan & 0x0200u) | 0x7c00u;
  const VecBits small = reinterpret_cast<VecBits>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  const VecBits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecBits half = (too_large & special) | (subnormal & small) | (~(too_large | subnormal) & normal);
  *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(half | ((word >> 16) & 0x8000u), VecHalf);
}

// The first `count` < kLanes elements; the other lanes are zero, or are not written.
template <class T>
static inline Vec load_some(const T* p, int64_t count) {
  T lanes[kLanes];
  __builtin_memset(lanes, 0, sizeof(lanes));
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
static inline void store_some(T* p, Vec value, int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

static inline Vec4 fold(Vec v) {
#if MODELTORCH_LANES == 16
  const Vec8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif MODELTORCH_LANES == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// {sum(a), sum(b), sum(c), sum(d)}
static inline Vec4 sum_each(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  const Vec4 ab = __builtin_shufflevector(fa, fb, 0, 4, 1, 5) + __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
  const Vec4 cd = __builtin_shufflevector(fc, fd, 0, 4, 1, 5) + __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

static inline float sum(Vec v) {
  const Vec4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

static inline Vec max_of(Vec a, Vec b) {
  return a > b ? a : b;
}

static inline float max_lane(Vec v) {
  float best = v[0];
  for (int64_t i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x), relative error below 2e-7; below -87.3 it is 0, above 88.3 infinite. Cephes' polynomial (Moshier).
static inline Vec exp_of(Vec x) {
  const Vec low = splat(-87.33654f);
  const Vec high = splat(88.37626f);
  const VecInt underflow = x < low;
  const Vec clipped = x > high ? high : (x < low ? low : x);
  const Vec shifted = clipped * 1.44269504088896341f + (splat(12582912.0f));  // rounds to an integer
  const Vec n = shifted - splat(12582912.0f);
  const Vec r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  const Vec mantissa = p * r * r + r + splat(1.0f);
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  const Vec result = mantissa * reinterpret_cast<Vec>(exponent);
  return underflow ? Vec{} : (x > high ? splat(__builtin_inff()) : result);
}

#ifdef MODELTORCH_NATIVE_BFLOAT16

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 127, relative error below 3e-6: enough for what is rounded to bfloat16. Below -126 it is 0.
static inline Vec exp2_of(Vec x) {
  const __m512 exponent = reinterpret_cast<__m512>(x);
  const __m512 whole = _mm512_roundscale_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = x - reinterpret_cast<Vec>(whole);
  Vec p = splat(9.570080979504889e-3f);
  p = p * f + splat(5.591785867416516e-2f);
  p = p * f + splat(2.4024745344745108e-1f);
  p = p * f + splat(6.93121815043511e-1f);
  p = p * f + splat(9.999992612901327e-1f);
  const __mmask16 above = _mm512_cmp_ps_mask(exponent, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(above, reinterpret_cast<__m512>(p), whole));
}

// silu(gate) * up, to the accuracy of exp2_of. Where 1 + exp(-gate) is no longer finite, silu is 0.
static inline Vec swiglu_of(Vec gate, Vec up) {
  const __m512 most = _mm512_set1_ps(126.0f);  // so that the sum below is finite
  const __m512 exponent = reinterpret_cast<__m512>(gate * splat(-kLog2E));
  const Vec divisor = exp2_of(reinterpret_cast<Vec>(_mm512_min_ps(most, exponent))) + 1.0f;
  const Vec guess = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(divisor)));
  const __mmask16 counts = _mm512_cmp_ps_mask(exponent, most, _CMP_NGT_UQ);
  const Vec share = guess * (2.0f - divisor * guess);
  return reinterpret_cast<Vec>(
             _mm512_maskz_mul_ps(counts, reinterpret_cast<__m512>(gate), reinterpret_cast<__m512>(share))) *
         up;
}

// Pairs (value j, value j + 1) of 16 columns; the second is zero past the last key.
static inline __m512bh pair_values(const BFloat16* value, int64_t stride, bool has_second) {
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value));
  __m512i pairs = _mm512_cvtepu16_epi32(first);
  if (has_second) {
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + stride));
    pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
  }
  return reinterpret_cast<__m512bh>(pairs);
}

#endif
