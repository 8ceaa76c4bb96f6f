#include "ops/many_row_linear.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/launch.cuh"
#include "ops/many_row_linear_sm90.cuh"

namespace modeltorch {

namespace {

using many_rows::Tile;
using many_rows::Work;

/// Rounds that the clusters of `processors` need for tiles of `columns` columns of y.
int64_t rounds(const ManyRowLinear& linear, int columns, int processors) {
  const int64_t pairs = divide_up(linear.rows, 256);
  const int64_t tiles = divide_up(linear.n, columns);
  return divide_up(pairs * tiles, processors / 2);
}

/// The width of tile, in columns of y, that keeps the card busiest, widest first.
int best_columns(const ManyRowLinear& linear, int processors) {
  const int wide = linear.up == nullptr ? 256 : 128, narrow = linear.up == nullptr ? 224 : 96;
  // A narrow tile multiplies a little more slowly for its width: it must save a twentieth.
  return rounds(linear, narrow, processors) * narrow * 20 < rounds(linear, wide, processors) * wide * 19
             ? narrow
             : wide;
}

/// Boxes of 64 columns and `box` rows of a dense matrix [rows, k].
CUtensorMap matrix_map(const ManyRowLinear& linear, const void* data, int64_t rows, int box) {
  return hopper::tensor_map<2>({data,
                                linear.dtype == DType::kBFloat16,
                                {static_cast<uint64_t>(linear.k), static_cast<uint64_t>(rows)},
                                {static_cast<uint64_t>(linear.k) * 2},
                                {64, static_cast<uint32_t>(box)}});
}

template <class Tile>
void launch(const ManyRowLinear& linear, cudaStream_t stream, int processors) {
  const auto kernel = many_rows::linear_kernel<Tile>;
  allow_shared_memory(kernel, Tile::kBytes);
  Work work{};
  work.x = matrix_map(linear, linear.x, linear.rows, Tile::kRows);
  work.weights[0] = matrix_map(linear, linear.weight, linear.n, Tile::kWide / 2);
  work.weights[1] =
      linear.up == nullptr ? work.weights[0] : matrix_map(linear, linear.up, linear.n, Tile::kWide / 2);
  work.pairs = static_cast<int>(divide_up(linear.rows, 256));
  work.tiles = static_cast<int>(divide_up(linear.n, Tile::kColumns));
  work.band = 8;
  work.steps = static_cast<int>(divide_up(linear.k, Tile::kDepth));
  work.rows = static_cast<int>(linear.rows);
  work.columns = static_cast<int>(linear.n);
  work.residual = linear.residual;
  work.y = linear.y;
  const int clusters = std::min(work.pairs * work.tiles, processors / 2);
  const LaunchShape shape{dim3(2 * clusters), Tile::kThreads, Tile::kBytes, 2};
  launch_kernel(kernel, shape, stream, "many_row_linear", work);
}

template <class T>
void launch_best(const ManyRowLinear& linear, cudaStream_t stream) {
  const int processors = current_cuda_device().multiprocessors;
  switch (best_columns(linear, processors)) {
    case 256:
      return launch<Tile<T, false, 256, 4>>(linear, stream, processors);
    case 224:
      return launch<Tile<T, false, 224, 5>>(linear, stream, processors);
    case 128:
      return launch<Tile<T, true, 256, 4>>(linear, stream, processors);
    default:
      return launch<Tile<T, true, 192, 5>>(linear, stream, processors);
  }
}

}  // namespace

bool many_row_linear_fits(const ManyRowLinear& linear) {
  return (linear.dtype == DType::kBFloat16 || linear.dtype == DType::kFloat16) && linear.n > 0 &&
         linear.n % 8 == 0 && linear.n < 1 << 28 && linear.k > 0 && linear.k % 8 == 0 &&
         linear.rows < 1 << 28 && is_aligned(linear.x) && is_aligned(linear.weight) &&
         is_aligned(linear.up) && is_aligned(linear.residual) && is_aligned(linear.y) &&
         (linear.up == nullptr || linear.residual == nullptr) && current_cuda_device().hopper;
}

double many_row_linear_yield(const ManyRowLinear& linear) {
  const int processors = current_cuda_device().multiprocessors;
  const int columns = best_columns(linear, processors);
  return static_cast<double>(linear.rows) * linear.n /
         (static_cast<double>(rounds(linear, columns, processors)) * (processors / 2) * 256 * columns);
}

void many_row_linear(const ManyRowLinear& linear, void* stream) {
  if (linear.rows == 0) return;
  if (linear.dtype == DType::kBFloat16) {
    launch_best<__nv_bfloat16>(linear, static_cast<cudaStream_t>(stream));
  } else {
    launch_best<__half>(linear, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace modeltorch
