#include <cmath>
#include <numeric>

#include "ops/paged_attention.h"
#include "ops/self_attention.h"
#include "tensors.h"

using namespace modeltorch;
using namespace test;

namespace {

// {heads, kv_heads, head_size}: every head size of the contract, one key head, as many key heads as heads,
// groups of 7 and of more than the 64 rows that share a pass.
constexpr int64_t kShapes[][3] = {{1, 1, 2},   {4, 4, 64}, {7, 1, 80}, {14, 2, 96}, {6, 3, 128},
                                  {2, 1, 256}, {3, 3, 6},  {64, 1, 2}, {130, 2, 4}, {5, 1, 34}};

AttentionShape shape_of(const int64_t (&sizes)[3]) {
  return {.heads = sizes[0], .kv_heads = sizes[1], .head_size = sizes[2], .scale = 0.3f};
}

// softmax(scale * q . k^T) . v for one query and `keys` rows, found at row_of(j) of k and v.
template <class RowOf>
void attend(const AttentionShape& shape, const double* q, int64_t head, const std::vector<double>& k,
            const std::vector<double>& v, int64_t keys, RowOf&& row_of, double* out) {
  const int64_t d = shape.head_size;
  const int64_t kv_head = head / (shape.heads / shape.kv_heads);
  std::vector<double> scores(keys);
  for (int64_t j = 0; j < keys; ++j) {
    const double* key = k.data() + (row_of(j) * shape.kv_heads + kv_head) * d;
    scores[j] = shape.scale * std::inner_product(q, q + d, key, 0.0);
  }
  const double most = keys == 0 ? 0.0 : *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  for (double& score : scores) sum += score = std::exp(score - most);
  std::fill(out, out + d, 0.0);
  for (int64_t j = 0; j < keys; ++j) {
    const double* value = v.data() + (row_of(j) * shape.kv_heads + kv_head) * d;
    for (int64_t i = 0; i < d; ++i) out[i] += scores[j] / sum * value[i];
  }
}

std::vector<double> self_attention_of(const AttentionShape& shape, const Tensor& q, const Tensor& k,
                                      const Tensor& v, const std::vector<int64_t>& lengths) {
  const std::vector<double> queries = q.values(), keys = k.values(), values = v.values();
  std::vector<double> expected(q.count());
  int64_t start = 0;
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t head = 0; head < shape.heads; ++head) {
        const int64_t at = ((start + i) * shape.heads + head) * shape.head_size;
        attend(
            shape, &queries[at], head, keys, values, i + 1, [&](int64_t j) { return start + j; },
            &expected[at]);
      }
    }
    start += length;
  }
  return expected;
}

Tensor int32s(const std::vector<int64_t>& values) {
  return Tensor::of(DType::kInt32, {static_cast<int64_t>(values.size())}, {values.begin(), values.end()});
}

void check_self_attention(Random& random, DType dtype, const AttentionShape& shape,
                          const std::vector<int64_t>& lengths) {
  const int64_t n = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const Tensor q = Tensor::random(random, dtype, {n, shape.heads, shape.head_size}, -2.0, 2.0);
  const Tensor k = Tensor::random(random, dtype, {n, shape.kv_heads, shape.head_size});
  const Tensor v = Tensor::random(random, dtype, {n, shape.kv_heads, shape.head_size});
  const Tensor seq_len = int32s(lengths);
  const Tensor out = std::move(run_operation(SelfAttention(shape), {&q, &k, &v, &seq_len})[0]);
  expect(out.dims() == Dims{n, shape.heads * shape.head_size}, "shape ", out.view());
  expect_close(out, self_attention_of(shape, q, k, v, lengths), shape.head_size, "self attention, ",
               shape.heads, "/", shape.kv_heads, " heads of ", shape.head_size, ", ", lengths.size(),
               " sequences, first ", lengths.empty() ? 0 : lengths[0]);
}

// A paged cache whose rows are NaN until somebody writes them, and the tables that point into it.
struct PagedCase {
  AttentionShape shape;
  Tensor k_cache;
  Tensor v_cache;
  Tensor tables;
  Tensor seq_len;
  Tensor q;
  std::vector<std::vector<int64_t>> blocks;  ///< of each sequence
  std::vector<int64_t> contexts;

  PagedCase(Random& random, DType dtype, const AttentionShape& shape, int64_t block_size,
            const std::vector<std::vector<int64_t>>& blocks, const std::vector<int64_t>& contexts)
      : shape(shape),
        k_cache(dtype, {kBlocks, block_size, shape.kv_heads, shape.head_size}),
        v_cache(dtype, k_cache.dims()),
        tables(DType::kInt32, {static_cast<int64_t>(contexts.size()), kWidth}),
        seq_len(int32s(contexts)),
        q(Tensor::random(random, dtype, {static_cast<int64_t>(contexts.size()), shape.heads, shape.head_size},
                         -2.0, 2.0)),
        blocks(blocks),
        contexts(contexts) {
    for (size_t b = 0; b < contexts.size(); ++b) {
      // Entries that are not in use may be anything: these would lead far outside the cache.
      for (int64_t i = 0; i < kWidth; ++i) tables.set(b * kWidth + i, i % 2 == 0 ? 2e9 : -7.0);
      for (size_t i = 0; i < blocks[b].size(); ++i)
        tables.set(b * kWidth + i, static_cast<double>(blocks[b][i]));
      for (int64_t j = 0; j < contexts[b]; ++j) write_row(random, row_of(b, j));
    }
  }

  int64_t row_of(size_t sequence, int64_t j) const {
    const int64_t block_size = k_cache.dims()[1];
    return blocks[sequence][j / block_size] * block_size + j % block_size;
  }

  void write_row(Random& random, int64_t row) {
    std::uniform_real_distribution<double> distribution(-1.0, 1.0);
    const int64_t size = shape.kv_heads * shape.head_size;
    for (int64_t i = row * size; i < (row + 1) * size; ++i) {
      k_cache.set(i, distribution(random));
      v_cache.set(i, distribution(random));
    }
  }

  void check() const {
    const Tensor out =
        std::move(run_operation(PagedAttention(shape), {&q, &k_cache, &v_cache, &tables, &seq_len})[0]);
    const std::vector<double> queries = q.values(), keys = k_cache.values(), values = v_cache.values();
    std::vector<double> expected(q.count());
    for (size_t b = 0; b < contexts.size(); ++b) {
      for (int64_t head = 0; head < shape.heads; ++head) {
        const int64_t at = (static_cast<int64_t>(b) * shape.heads + head) * shape.head_size;
        attend(
            shape, &queries[at], head, keys, values, contexts[b], [&](int64_t j) { return row_of(b, j); },
            &expected[at]);
      }
    }
    expect_close(out, expected, shape.head_size, "paged attention, ", shape.heads, "/", shape.kv_heads,
                 " heads of ", shape.head_size, ", blocks of ", k_cache.dims()[1], ", ", contexts.size(),
                 " sequences");
  }

  static constexpr int64_t kBlocks = 12;
  static constexpr int64_t kWidth = 11;
};

}  // namespace

TEST(self_attention_of_one_sequence) {
  Random random(31);
  for (const DType dtype : kFloats) {
    for (const int64_t length : {1, 63, 64, 65, 130}) {
      for (const int which : {0, 2, 5, 9}) {
        check_self_attention(random, dtype, shape_of(kShapes[which]), {length});
      }
    }
  }
}

TEST(self_attention_of_packed_sequences) {
  Random random(32);
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const auto& sizes : kShapes) {
        check_self_attention(random, dtype, shape_of(sizes), {3, 64, 1, 65, 130, 2, 63});
        check_self_attention(random, dtype, shape_of(sizes), {});
      }
    }
  });
}

// What comes later must not change a bit of what came before.
TEST(self_attention_is_causal_to_the_bit) {
  Random random(33);
  const AttentionShape shape = shape_of(kShapes[3]);
  // Queries are taken 9 at a time from the end: token 40 shares its block, and a tile, with earlier ones.
  const int64_t n = 100, late = 40, size = shape.kv_heads * shape.head_size;
  for (const DType dtype : kFloats) {
    const Tensor q = Tensor::random(random, dtype, {n, shape.heads, shape.head_size});
    Tensor k = Tensor::random(random, dtype, {n, shape.kv_heads, shape.head_size});
    Tensor v = Tensor::random(random, dtype, {n, shape.kv_heads, shape.head_size});
    const Tensor seq_len = int32s({n});
    const Tensor before = std::move(run_operation(SelfAttention(shape), {&q, &k, &v, &seq_len})[0]);
    // As large as the type allows: a weight that is next to nothing, but not nothing, would show.
    const double huge = dtype == DType::kFloat16 ? 6e4 : 3e38;
    for (int64_t i = late * size; i < n * size; ++i) {
      k.set(i, 9.0);
      v.set(i, -huge);
    }
    const Tensor after = std::move(run_operation(SelfAttention(shape), {&q, &k, &v, &seq_len})[0]);
    const int64_t row = shape.heads * shape.head_size;
    expect(before.bits(0, late * row) == after.bits(0, late * row), "earlier tokens changed in ", dtype);
    expect(before.bits(late * row, row) != after.bits(late * row, row), "the changed token did not change");
  }
}

// Scores of +-1000, exact in float32, that grow or shrink along the keys: a softmax that does not follow the
// largest score overflows, or loses what it had.
TEST(attention_follows_the_largest_score) {
  const AttentionShape shape{.heads = 2, .kv_heads = 1, .head_size = 2, .scale = 1.0f};
  const int64_t n = 200;
  for (const DType dtype : kFloats) {
    for (const double direction : {1.0, -1.0}) {
      Tensor q(dtype, {n, 2, 2}), k(dtype, {n, 1, 2}), v(dtype, {n, 1, 2});
      for (int64_t i = 0; i < n; ++i) {
        for (const int64_t head : {0, 1}) {
          q.set((i * 2 + head) * 2, head == 0 ? 8.0 : 0.0625);
          q.set((i * 2 + head) * 2 + 1, 0.0);
        }
        k.set(2 * i, direction * static_cast<double>(i - 100));
        k.set(2 * i + 1, 5.0);
        v.set(2 * i, static_cast<double>(i % 17) - 8.0);
        v.set(2 * i + 1, static_cast<double>(i % 5) + 1.0);
      }
      const Tensor seq_len = int32s({n});
      const Tensor out = std::move(run_operation(SelfAttention(shape), {&q, &k, &v, &seq_len})[0]);
      expect_close(out, self_attention_of(shape, q, k, v, {n}), 2, "direction ", direction);
    }
  }
}

TEST(self_attention_keeps_nans_in_their_sequence) {
  Random random(34);
  const AttentionShape shape = shape_of(kShapes[2]);
  const int64_t row = shape.heads * shape.head_size;
  for (const DType dtype : kFloats) {
    const Tensor q = Tensor::random(random, dtype, {30, shape.heads, shape.head_size});
    Tensor k = Tensor::random(random, dtype, {30, shape.kv_heads, shape.head_size});
    const Tensor v = Tensor::random(random, dtype, {30, shape.kv_heads, shape.head_size});
    k.set(10 * shape.head_size + 79, std::nan(""));  // the first token of the second sequence
    const Tensor seq_len = int32s({10, 10, 10});
    const std::vector<double> out = run_operation(SelfAttention(shape), {&q, &k, &v, &seq_len})[0].values();
    for (int64_t i = 0; i < 30 * row; ++i) {
      expect(std::isnan(out[i]) == (i >= 10 * row && i < 20 * row), "element ", i % row, " of token ",
             i / row);
    }
  }
}

TEST(paged_attention_reads_its_blocks) {
  Random random(41);
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const auto& sizes : kShapes) {
        const AttentionShape shape = shape_of(sizes);
        // Out of order, with a prefix that two sequences share and a block that stands twice in a table.
        PagedCase(random, dtype, shape, 16, {{3}, {7}, {11, 0}, {11, 5, 2}, {9, 9, 1}}, {1, 15, 17, 48, 33})
            .check();
        PagedCase(random, dtype, shape, 128, {{2}, {4, 0}, {4, 11}}, {128, 129, 130}).check();
      }
    }
  });
}

TEST(paged_attention_of_odd_block_sizes) {
  Random random(42);
  const AttentionShape shape = shape_of(kShapes[3]);
  for (const DType dtype : kFloats) {
    PagedCase(random, dtype, shape, 1, {{6}, {10, 8, 6, 4, 2, 0, 1, 3}}, {1, 8}).check();
    PagedCase(random, dtype, shape, 5, {{1, 0, 2}, {6, 5, 3}}, {11, 15}).check();
    PagedCase(random, dtype, shape, 64, {{8}, {7, 6}, {5, 4}}, {63, 64, 65}).check();
    PagedCase(random, dtype, shape, 130, {{0, 3}}, {259}).check();
    PagedCase(random, dtype, shape, 16, {}, {}).check();
  }
}

TEST(paged_attention_over_no_keys_gives_zeros) {
  Random random(43);
  for (const DType dtype : kFloats)
    PagedCase(random, dtype, shape_of(kShapes[2]), 16, {{4}, {}}, {3, 0}).check();
}
