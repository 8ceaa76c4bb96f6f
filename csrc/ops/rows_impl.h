// The inner loops of rows.h for one processor level. The including file has defined, before its target
// pragma:
//   MODELTORCH_LEVEL  the namespace       MODELTORCH_LANES  floats in a vector
//   MODELTORCH_TILE   rows of x that a linear or attention tile holds in registers
// and has included every standard header. See vec.h for why no standard function is called here.

namespace modeltorch {
namespace MODELTORCH_LEVEL {

#include "ops/vec.h"

constexpr int64_t kTileRows = MODELTORCH_TILE;
constexpr int64_t kTileColumns = 4;

static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Calls step(offset, count) over n elements: whole vectors first (count == kLanes), then the rest.
template <class Step>
static inline void each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
  if (i < n) step(i, n - i);
}

template <class T>
static inline Vec load_up_to(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_some(p, count);
}

template <class T>
static inline void store_up_to(T* p, Vec value, int64_t count) {
  if (count == kLanes) {
    store(p, value);
  } else {
    store_some(p, value, count);
  }
}

template <class T>
static void rms_norm(const T* x, const T* gamma, float epsilon, int64_t n, T* y) {
  Vec squares{};
  each_vector(n, [&](int64_t i, int64_t count) {
    const Vec v = load_up_to(x + i, count);
    squares += v * v;
  });
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + epsilon);
  each_vector(n, [&](int64_t i, int64_t count) {
    store_up_to(y + i, load_up_to(x + i, count) * scale * load_up_to(gamma + i, count), count);
  });
}

template <class T>
static void add(const T* a, const T* b, int64_t n, T* y) {
  each_vector(n, [&](int64_t i, int64_t count) {
    store_up_to(y + i, load_up_to(a + i, count) + load_up_to(b + i, count), count);
  });
}

template <class T>
static void swiglu(const T* gate, const T* up, int64_t n, T* y) {
  each_vector(n, [&](int64_t i, int64_t count) {
    const Vec g = load_up_to(gate + i, count);
    store_up_to(y + i, g / (exp_of(-g) + 1.0f) * load_up_to(up + i, count), count);
  });
}

template <class T>
static void rope(const T* x, const T* cos, const T* sin, int64_t d, T* y) {
  const int64_t half = d / 2;
  each_vector(half, [&](int64_t i, int64_t count) {
    const Vec low = load_up_to(x + i, count);
    const Vec high = load_up_to(x + half + i, count);
    const Vec new_low = low * load_up_to(cos + i, count) - high * load_up_to(sin + i, count);
    const Vec new_high = high * load_up_to(cos + half + i, count) + low * load_up_to(sin + half + i, count);
    store_up_to(y + i, new_low, count);
    store_up_to(y + half + i, new_high, count);
  });
}

// acc[r][c] = dot of row r of `a` with row c of `b`, both with k elements.
template <int64_t R, int64_t C, class A, class B>
static inline void dot_tile(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t k,
                            Vec (&acc)[R][C]) {
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t c = 0; c < C; ++c) acc[r][c] = Vec{};
  }
  each_vector(k, [&](int64_t i, int64_t count) {
    Vec left[R];
    for (int64_t r = 0; r < R; ++r) left[r] = load_up_to(a + r * a_stride + i, count);
    for (int64_t c = 0; c < C; ++c) {
      const Vec right = load_up_to(b + c * b_stride + i, count);
      for (int64_t r = 0; r < R; ++r) acc[r][c] += left[r] * right;
    }
  });
}

// Writes sum(acc[c]) for C columns.
template <int64_t C>
static inline void tile_sums(const Vec (&acc)[C], float* out) {
  if constexpr (C % 4 == 0) {
    for (int64_t c = 0; c < C; c += 4) {
      const Vec4 four = sum_each(acc[c], acc[c + 1], acc[c + 2], acc[c + 3]);
      __builtin_memcpy(out + c, &four, sizeof(four));
    }
  } else {
    for (int64_t c = 0; c < C; ++c) out[c] = sum(acc[c]);
  }
}

// One float to T and back, without a function of another translation unit.
static inline void put(float* p, float value) {
  *p = value;
}
static inline float get(const float* p) {
  return *p;
}

template <class T>
static inline void put(T* p, float value) {
  store_some(p, splat(value), 1);
}

template <class T>
static inline float get(const T* p) {
  return load_some(p, 1)[0];
}

template <int64_t R, int64_t C, class T>
static inline void linear_nk_tile(const SmallLinear<T>& args, int64_t row, int64_t column) {
  Vec acc[R][C];
  dot_tile<R, C>(args.x + row * args.k, args.k, args.w + column * args.k, args.k, args.k, acc);
  for (int64_t r = 0; r < R; ++r) {
    float sums[C];
    tile_sums(acc[r], sums);
    for (int64_t c = 0; c < C; ++c) {
      const float bias = args.bias == nullptr ? 0.0f : get(args.bias + column + c);
      put(args.y + (row + r) * args.y_stride + column + c, sums[c] + bias);
    }
  }
}

template <int64_t C, class T>
static inline void linear_nk_columns(const SmallLinear<T>& args, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= args.m; row += kTileRows) linear_nk_tile<kTileRows, C>(args, row, column);
  for (; row < args.m; ++row) linear_nk_tile<1, C>(args, row, column);
}

template <class T>
static void linear_nk(const SmallLinear<T>& args, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + kTileColumns <= end; column += kTileColumns) linear_nk_columns<kTileColumns>(args, column);
  for (; column < end; ++column) linear_nk_columns<1>(args, column);
}

// R rows of y in V vectors of columns, of which the last holds `last` <= kLanes: y[r] += x[r][p] * w[p].
template <int64_t R, int64_t V, class T>
static inline void linear_kn_tile(const SmallLinear<T>& args, int64_t row, int64_t column, int64_t last) {
  Vec acc[R][V] = {};
  for (int64_t p = 0; p < args.k; ++p) {
    const T* w = args.w + p * args.n + column;
    float scale[R];
    for (int64_t r = 0; r < R; ++r) scale[r] = get(args.x + (row + r) * args.k + p);
    for (int64_t v = 0; v < V; ++v) {
      const Vec right = load_up_to(w + v * kLanes, v + 1 < V ? kLanes : last);
      for (int64_t r = 0; r < R; ++r) acc[r][v] += right * scale[r];
    }
  }
  for (int64_t v = 0; v < V; ++v) {
    const int64_t at = column + v * kLanes;
    const int64_t count = v + 1 < V ? kLanes : last;
    const Vec bias = args.bias == nullptr ? Vec{} : load_up_to(args.bias + at, count);
    for (int64_t r = 0; r < R; ++r)
      store_up_to(args.y + (row + r) * args.y_stride + at, acc[r][v] + bias, count);
  }
}

template <int64_t V, class T>
static inline void linear_kn_columns(const SmallLinear<T>& args, int64_t column, int64_t last) {
  int64_t row = 0;
  for (; row + kTileRows <= args.m; row += kTileRows) linear_kn_tile<kTileRows, V>(args, row, column, last);
  for (; row < args.m; ++row) linear_kn_tile<1, V>(args, row, column, last);
}

template <class T>
static void linear_kn(const SmallLinear<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kTileColumns * kLanes;
  int64_t column = begin;
  for (; column + kStep <= end; column += kStep) linear_kn_columns<kTileColumns>(args, column, kLanes);
  for (; column < end; column += kLanes) linear_kn_columns<1>(args, column, smaller(kLanes, end - column));
}

// The first of n elements that equals `value`, or that is NaN if `value` is; n if there is none.
template <class T>
static inline int64_t find(const T* x, int64_t n, float value) {
  int64_t i = 0;
  for (; i < n; ++i) {
    const float element = get(x + i);
    if (element == value || (element != element && value != value)) break;
  }
  return i;
}

// Finds the block of the largest element first, and then its place: the loop over all elements keeps no
// indices.
template <class T>
static int64_t argmax(const T* x, int64_t n) {
  constexpr int64_t kBlock = 32 * kLanes;
  float best = -__builtin_inff();
  int64_t best_block = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t count = smaller(kBlock, n - block);
    Vec top = splat(-__builtin_inff());
    VecInt is_nan{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec v = load(x + block + i);
      top = max_of(v, top);
      is_nan |= v != v;
    }
    float largest = max_lane(top);
    bool has_nan = false;
    for (; i < count; ++i) {
      const float element = get(x + block + i);
      largest = element > largest ? element : largest;
      has_nan = has_nan || element != element;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) has_nan = has_nan || is_nan[lane] != 0;
    if (has_nan) return block + find(x + block, count, __builtin_nanf(""));
    if (largest > best) {
      best = largest;
      best_block = block;
    }
  }
  return best_block + find(x + best_block, smaller(kBlock, n - best_block), best);
}

template <class T>
static void scale_to_float(const T* x, float scale, int64_t n, float* out) {
  each_vector(
      n, [&](int64_t i, int64_t count) { store_up_to(out + i, load_up_to(x + i, count) * scale, count); });
}

// scores[r][j] = queries[r] . keys[j]
template <int64_t R, class T>
static inline void score_rows(const AttentionState& state, const T* keys, int64_t stride, int64_t count,
                              int64_t row) {
  const int64_t d = state.head_size;
  const float* queries = state.queries + row * d;
  float* scores = state.scores + row * kKeyChunk;
  int64_t j = 0;
  for (; j + kTileColumns <= count; j += kTileColumns) {
    Vec acc[R][kTileColumns];
    dot_tile<R, kTileColumns>(queries, d, keys + j * stride, stride, d, acc);
    for (int64_t r = 0; r < R; ++r) tile_sums(acc[r], scores + r * kKeyChunk + j);
  }
  for (; j < count; ++j) {
    Vec acc[R][1];
    dot_tile<R, 1>(queries, d, keys + j * stride, stride, d, acc);
    for (int64_t r = 0; r < R; ++r) tile_sums(acc[r], scores + r * kKeyChunk + j);
  }
}

// Turns the scores of one row into weights exp(score - maximum), and rescales what the row has so far.
static inline void soften_row(const AttentionState& state, int64_t row, int64_t count) {
  float* scores = state.scores + row * kKeyChunk;
  for (int64_t j = count; j % kLanes != 0; ++j) scores[j] = -__builtin_inff();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  Vec best = splat(state.maxima[row]);
  for (int64_t j = 0; j < padded; j += kLanes) best = max_of(best, load(scores + j));
  const float maximum = max_lane(best);
  const float rescale = exp_of(splat(state.maxima[row] - maximum))[0];
  Vec total{};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = exp_of(load(scores + j) - maximum);
    store(scores + j, weight);
    total += weight;
  }
  state.maxima[row] = maximum;
  state.sums[row] = state.sums[row] * rescale + sum(total);
  float* out = state.out + row * state.head_size;
  each_vector(state.head_size, [&](int64_t i, int64_t lanes) {
    store_up_to(out + i, load_up_to(out + i, lanes) * rescale, lanes);
  });
}

// out[r][i] += sum_j scores[r][j] * values[j][i] for V vectors from column `at`, the last of `last` elements.
template <int64_t R, int64_t V, class T>
static inline void weigh_columns(const AttentionState& state, const T* values, int64_t stride, int64_t count,
                                 int64_t row, int64_t at, int64_t last) {
  const int64_t d = state.head_size;
  const auto width = [&](int64_t v) { return v + 1 < V ? kLanes : last; };
  float* out = state.out + row * d + at;
  Vec acc[R][V];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) acc[r][v] = load_up_to(out + r * d + v * kLanes, width(v));
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values + j * stride + at;
    for (int64_t v = 0; v < V; ++v) {
      const Vec right = load_up_to(value + v * kLanes, width(v));
      for (int64_t r = 0; r < R; ++r) acc[r][v] += right * state.scores[(row + r) * kKeyChunk + j];
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) store_up_to(out + r * d + v * kLanes, acc[r][v], width(v));
  }
}

template <int64_t R, class T>
static inline void weigh_rows(const AttentionState& state, const T* values, int64_t stride, int64_t count,
                              int64_t row) {
  constexpr int64_t kStep = kTileColumns * kLanes;
  const int64_t d = state.head_size;
  int64_t at = 0;
  for (; at + kStep <= d; at += kStep) {
    weigh_columns<R, kTileColumns>(state, values, stride, count, row, at, kLanes);
  }
  for (; at < d; at += kLanes) {
    weigh_columns<R, 1>(state, values, stride, count, row, at, smaller(kLanes, d - at));
  }
}

// R rows against one chunk. A row whose limit ends inside the chunk scores the rest as minus infinity.
template <int64_t R, class T>
static inline void attend_rows(const AttentionState& state, const KeyRun<T>& run, int64_t offset,
                               int64_t row) {
  int64_t limit = 0;
  for (int64_t r = 0; r < R; ++r) limit = state.limits[row + r] > limit ? state.limits[row + r] : limit;
  const int64_t count = smaller(smaller(kKeyChunk, run.count - offset), limit - run.first - offset);
  if (count <= 0) return;
  score_rows<R>(state, run.keys + offset * run.stride, run.stride, count, row);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t visible = state.limits[row + r] - run.first - offset;
    for (int64_t j = visible < 0 ? 0 : visible; j < count; ++j) {
      state.scores[(row + r) * kKeyChunk + j] = -__builtin_inff();
    }
    if (visible > 0) {
      soften_row(state, row + r, count);
    } else {
      __builtin_memset(state.scores + (row + r) * kKeyChunk, 0, static_cast<size_t>(count) * sizeof(float));
    }
  }
  weigh_rows<R>(state, run.values + offset * run.stride, run.stride, count, row);
}

template <class T>
static void attend(const AttentionState& state, const KeyRun<T>& run) {
  for (int64_t offset = 0; offset < run.count; offset += kKeyChunk) {
    int64_t row = 0;
    for (; row + kTileRows <= state.rows; row += kTileRows) attend_rows<kTileRows>(state, run, offset, row);
    for (; row < state.rows; ++row) attend_rows<1>(state, run, offset, row);
  }
}

template <class T>
static void finish_attention(const AttentionState& state, int64_t row, T* y) {
  const float scale = state.sums[row] > 0 ? 1.0f / state.sums[row] : 0.0f;
  const float* out = state.out + row * state.head_size;
  each_vector(state.head_size, [&](int64_t i, int64_t count) {
    store_up_to(y + i, load_up_to(out + i, count) * scale, count);
  });
}

template <class T>
extern const RowKernels<T> kRowKernels = {
    rms_norm<T>,  add<T>,    swiglu<T>,         rope<T>,   linear_nk<T>,
    linear_kn<T>, argmax<T>, scale_to_float<T>, attend<T>, finish_attention<T>,
};

template const RowKernels<float> kRowKernels<float>;
template const RowKernels<BFloat16> kRowKernels<BFloat16>;
template const RowKernels<Float16> kRowKernels<Float16>;

}  // namespace MODELTORCH_LEVEL
}  // namespace modeltorch
