#include "ops/few_row_linear.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/few_row_linear_direct.cuh"
#include "ops/few_row_linear_simple.cuh"
#include "ops/few_row_linear_stream.cuh"
#include "ops/launch.cuh"
#include "ops/norm_rows.h"
#include "ops/row_tile_linear.h"

namespace modeltorch {
namespace {

constexpr int kMaxRows = 128;
constexpr int kStreamRows = 8;  // more of them on Hopper: row_tile_linear
// Deep enough that most of a block's weights are on their way before the kernel in front is done.
constexpr int kSharedBytes = 200 * 1024;
constexpr int kStageBytes = 32 * 1024;  // of weights, about
constexpr int kResidentBytes = 40 * 1024;
constexpr int kDirectColumns = 20 * 256;

int64_t weight_rows(const FewRowLinear& linear) {
  int64_t n = 0;
  for (int i = 0; i < linear.part_count; ++i) n += linear.parts[i].n;
  return n;
}

/// x in registers, and its norm in the kernel.
bool direct(const FewRowLinear& linear) {
  return linear.rows <= 8 && linear.k <= kDirectColumns;
}

/// x as a whole in shared memory, and its norm there.
bool resident(const FewRowLinear& linear) {
  return linear.rows <= 8 && linear.rows * linear.k * 2 <= kResidentBytes;
}

bool norm_apart(const FewRowLinear& linear) {
  return linear.gamma && !(current_cuda_device().hopper && (direct(linear) || resident(linear)));
}

struct PartTable {
  const void* weight[3] = {};
  const void* bias[3] = {};
  int begin[3] = {0, INT_MAX, INT_MAX};
};

/// The parts by the first unit of each; a packed gate_up becomes two parts.
PartTable part_table(const FewRowLinear& linear) {
  PartTable table;
  int64_t begin = 0;
  for (int i = 0; i < linear.part_count; ++i) {
    table.weight[i] = linear.parts[i].weight;
    table.bias[i] = linear.parts[i].bias;
    table.begin[i] = static_cast<int>(begin);
    begin += linear.parts[i].n;
  }
  if (linear.swiglu && linear.part_count == 1) {
    const int64_t half = linear.parts[0].n / 2;
    table.weight[1] = static_cast<const char*>(table.weight[0]) + half * linear.k * 2;
    if (table.bias[0]) table.bias[1] = static_cast<const char*>(table.bias[0]) + half * 2;
  }
  return table;
}

void normalise(const FewRowLinear& linear, void* stream) {
  norm_rows({.dtype = linear.dtype,
             .rows = linear.rows,
             .size = linear.k,
             .x = linear.x,
             .gamma = linear.gamma,
             .epsilon = linear.epsilon,
             .y = linear.workspace},
            stream);
}

void launch_simple(const FewRowLinear& linear, const void* x, void* stream) {
  const PartTable parts = part_table(linear);
  SimpleLinearParams params{};
  for (int i = 0; i < 3; ++i) {
    params.weight[i] = parts.weight[i];
    params.bias[i] = parts.bias[i];
    params.part_begin[i] = parts.begin[i];
  }
  params.x = x;
  params.residual = linear.residual;
  params.y = linear.y;
  params.k = static_cast<int>(linear.k);
  params.rows = static_cast<int>(linear.rows);
  params.swiglu = linear.swiglu;
  params.units = static_cast<int>(weight_rows(linear) / (linear.swiglu ? 2 : 1));
  const auto kernel =
      linear.dtype == DType::kBFloat16 ? few_row_linear_simple<__nv_bfloat16> : few_row_linear_simple<__half>;
  launch_kernel(kernel, {dim3(divide_up(params.units, 8)), 256}, stream, "few_row_linear", params);
}

/// Gives each part a share of the clusters, so that the most units that any cluster has are few.
void share_groups(StreamParams& p, const FewRowLinear& linear) {
  int64_t units[3] = {p.units, 0, 0};
  const int parts = p.swiglu ? 1 : linear.part_count;
  for (int i = 0; i < parts && !p.swiglu; ++i) units[i] = linear.parts[i].n;
  int groups[3] = {1, parts > 1, parts > 2};
  p.groups = std::clamp(current_cuda_device().multiprocessors / p.cluster, parts, std::max(p.units, parts));
  const auto load = [&](int i) { return groups[i] ? divide_up(units[i], groups[i]) : 0; };
  for (int given = parts; given < p.groups; ++given) {
    int most = 0;
    for (int i = 1; i < parts; ++i) {
      if (load(i) > load(most)) most = i;
    }
    ++groups[most];
  }
  int64_t group_units = 0;
  p.groups = 0;
  for (int i = 0; i < 3; ++i) {
    groups[i] = static_cast<int>(std::min<int64_t>(groups[i], units[i]));
    p.group_begin[i] = i < parts ? p.groups : INT_MAX;
    p.groups += groups[i];
    group_units = std::max(group_units, load(i));
  }
  p.tile_units = static_cast<int>(group_units);
}

template <class Shape>
constexpr bool kDirect = false;
template <int kGroups>
constexpr bool kDirect<DirectShape<kGroups>> = true;

/// How many blocks share k. More of them make the range of units of a cluster wider, so that x, which every
/// tile reads as a whole, is read fewer times; but their sums must meet.
template <class Shape>
int cluster_size(const StreamParams& p) {
  const int sides = p.swiglu ? 2 : 1;
  const auto x_reads = [&](int cluster) {
    const int64_t units =
        divide_up(p.units, std::clamp(current_cuda_device().multiprocessors / cluster, 1, p.units));
    return static_cast<double>(divide_up(units * sides, Shape::kM)) / cluster;
  };
  int best = 1;
  for (int cluster = 2; cluster <= 8 && !Shape::kResident && p.k >= cluster * kStreamBox; cluster *= 2) {
    const double weights =
        static_cast<double>(p.units) * sides / current_cuda_device().multiprocessors;  // read likewise
    if (x_reads(best) * p.rows > 0.6 * weights && x_reads(cluster) < 0.7 * x_reads(best)) best = cluster;
  }
  return best;
}

/// Fills in how the work is cut and where everything lies in shared memory. Returns the bytes of shared
/// memory.
template <class Shape>
int plan_stream(StreamParams& p, const FewRowLinear& linear) {
  const int sides = p.swiglu ? 2 : 1;
  p.cluster = cluster_size<Shape>(p);
  share_groups(p, linear);
  const int64_t tiles = divide_up(p.tile_units, Shape::kM / sides);  // of the cluster with the most units
  p.tile_units = static_cast<int>(divide_up(p.tile_units, tiles));
  p.slice = static_cast<int>(round_up(divide_up(p.k, p.cluster), kStreamBox));

  int64_t bytes = kStreamHeaderBytes;
  const auto place = [&](int64_t size) {
    const int64_t at = bytes;
    bytes = round_up(bytes + size, 128);
    return static_cast<int>(at);
  };
  p.x_pitch = p.slice * 2 + 16;
  p.red_offset = place(Shape::red_bytes(p.rows));
  p.x_offset = place(kDirect<Shape> ? 0 : Shape::kResident ? p.rows * p.x_pitch : 0);
  p.gamma_offset = place(p.gamma ? p.k * 2 : 0);
  bytes = round_up(bytes, 1024);
  p.ring_offset = static_cast<int>(bytes);

  constexpr int kSwizzleBytes = 1024;
  p.box_bytes = static_cast<int>(round_up(p.tile_units * kStreamBox * 2, kSwizzleBytes));
  p.x_box_bytes = static_cast<int>(Shape::kResident ? 0 : round_up(p.rows * kStreamBox * 2, kSwizzleBytes));
  const int64_t column_bytes = sides * p.box_bytes + p.x_box_bytes;  // of kStreamBox columns
  const int64_t room = std::max<int64_t>(kSharedBytes - bytes, 0);
  const int64_t most =
      std::max<int64_t>(std::min<int64_t>(kStageBytes / (sides * p.box_bytes), room / 3 / column_bytes), 1);
  const int64_t boxes = divide_up(p.slice, kStreamBox);
  const int64_t boxes_a_stage = round_up(divide_up(boxes, divide_up(boxes, most)), kDirect<Shape> ? 4 : 1);
  p.chunk = static_cast<int>(boxes_a_stage * kStreamBox);
  p.stage_bytes = static_cast<int>(boxes_a_stage * column_bytes);
  const int64_t items = divide_up(boxes, boxes_a_stage) * tiles;
  p.stages =
      static_cast<int>(std::min(std::clamp<int64_t>(room / p.stage_bytes, 2, kStreamMaxStages), items));
  return static_cast<int>(bytes + static_cast<int64_t>(p.stages) * p.stage_bytes);
}

/// Describes a row-major [rows, k] matrix of 16-bit elements to the copy engine, in boxes of [box_rows,
/// kStreamBox].
CUtensorMap tensor_map(DType dtype, const void* data, int64_t rows, int64_t k, int64_t box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &found),
               "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      fail(ErrorKind::kRuntime, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(k * 2)};
  const cuuint32_t box[] = {kStreamBox, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const auto type =
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status = encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    fail(ErrorKind::kRuntime, "cuTensorMapEncodeTiled: error ", static_cast<int>(status));
  return map;
}

template <class T, class Shape>
void launch_shape(StreamParams& p, const FewRowLinear& linear, const PartTable& parts, void* stream) {
  const int bytes = plan_stream<Shape>(p, linear);
  const int sides = p.swiglu ? 2 : 1;
  for (int i = 0; i < std::max(sides, linear.part_count); ++i) {
    const int64_t rows = p.swiglu ? p.units : linear.parts[i].n;
    p.weight[i] = tensor_map(linear.dtype, parts.weight[i], rows, p.k, p.tile_units);
  }
  p.x_map = tensor_map(linear.dtype, p.x, p.rows, p.k, p.rows);
  void (*kernel)(StreamParams);
  if constexpr (kDirect<Shape>) {
    kernel = few_row_linear_direct<T, Shape>;
  } else {
    kernel = few_row_linear_stream<T, Shape>;
  }
  allow_shared_memory(kernel, 227 * 1024);
  const LaunchShape shape{dim3(p.cluster * p.groups), kStreamThreads, static_cast<size_t>(bytes), p.cluster};
  launch_kernel(kernel, shape, stream, "few_row_linear", p);
}

template <class T>
void launch_stream(const FewRowLinear& linear, const void* x, const void* gamma, void* stream) {
  const PartTable parts = part_table(linear);
  StreamParams p{};
  for (int i = 0; i < 3; ++i) {
    p.bias[i] = parts.bias[i];
    p.part_begin[i] = i == 0 || !linear.swiglu ? parts.begin[i] : INT_MAX;
  }
  p.x = x;
  p.gamma = gamma;
  p.residual = linear.residual;
  p.y = linear.y;
  p.epsilon = linear.epsilon;
  p.k = static_cast<int>(linear.k);
  p.rows = static_cast<int>(linear.rows);
  p.swiglu = linear.swiglu;
  p.units = static_cast<int>(weight_rows(linear) / (linear.swiglu ? 2 : 1));
  if (direct(linear)) {
    if (p.k <= 4 * 256) return launch_shape<T, DirectShape<4>>(p, linear, parts, stream);
    if (p.k <= 8 * 256) return launch_shape<T, DirectShape<8>>(p, linear, parts, stream);
    if (p.k <= 14 * 256) return launch_shape<T, DirectShape<14>>(p, linear, parts, stream);
    return launch_shape<T, DirectShape<20>>(p, linear, parts, stream);
  }
  if (resident(linear)) return launch_shape<T, StreamShape<2, 1, 1, 1, true>>(p, linear, parts, stream);
  return launch_shape<T, StreamShape<2, 1, 1, 1, false>>(p, linear, parts, stream);
}

}  // namespace

bool few_row_linear_fits(const FewRowLinear& linear) {
  if (linear.dtype != DType::kBFloat16 && linear.dtype != DType::kFloat16) return false;
  if (linear.rows < 1 || linear.rows > kMaxRows || linear.k < 8 || linear.k % 8 != 0) return false;
  if (linear.k > (1 << 20) || weight_rows(linear) > (1 << 24)) return false;
  if (linear.part_count < 1 || linear.part_count > 3 || weight_rows(linear) < 1) return false;
  if (linear.swiglu) {
    if (linear.part_count > 2 || linear.parts[0].n < 1) return false;
    if (linear.part_count == 1 && linear.parts[0].n % 2 != 0) return false;
    if (linear.part_count == 2 && linear.parts[0].n != linear.parts[1].n) return false;
  }
  for (int i = 0; i < linear.part_count; ++i) {
    if (linear.parts[i].n < 1 || !is_aligned(linear.parts[i].weight)) return false;
  }
  if (!is_aligned(linear.x) || !is_aligned(linear.gamma)) return false;
  return linear.rows <= kStreamRows || !current_cuda_device().hopper || row_tile_linear_fits(linear);
}

size_t few_row_linear_workspace(const FewRowLinear& linear) {
  return norm_apart(linear) ? static_cast<size_t>(linear.rows * linear.k * 2) : 0;
}

void few_row_linear(const FewRowLinear& linear, void* stream) {
  check(few_row_linear_fits(linear), "few_row_linear: rows ", linear.rows, ", k ", linear.k, " does not fit");
  const bool apart = norm_apart(linear);
  const void* x = apart ? linear.workspace : linear.x;
  const void* gamma = apart ? nullptr : linear.gamma;
  if (apart) normalise(linear, stream);
  if (!current_cuda_device().hopper) return launch_simple(linear, x, stream);
  if (linear.rows > kStreamRows) return row_tile_linear(linear, x, stream);
  if (linear.dtype == DType::kBFloat16) return launch_stream<__nv_bfloat16>(linear, x, gamma, stream);
  return launch_stream<__half>(linear, x, gamma, stream);
}

}  // namespace modeltorch
