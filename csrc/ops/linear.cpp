#include "ops/linear.h"

#include <algorithm>

#include "core/gemm.h"
#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/panel_weight.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> Linear::infer_shape(const std::vector<TensorDesc>& inputs) const {
  size_t expected = 1;
  for (const LinearPart& part : parts) expected += part.has_bias ? 2 : 1;
  check_count(inputs, expected);
  const TensorDesc& x = inputs[0];
  check_rank("x", x, 2);
  int64_t columns = 0;
  size_t at = 1;
  for (const LinearPart& part : parts) {
    const TensorDesc& weight = inputs[at++];
    check_rank("weight", weight, 2);
    const int64_t n = weight.dims[part.transposed ? 0 : 1];
    const int64_t k = x.dims[1];
    check_tensor(part.transposed ? "weight [n, k]" : "weight [k, n]", weight,
                 part.transposed ? Dims{n, k} : Dims{k, n}, x.dtype);
    if (part.has_bias) check_tensor("bias", inputs[at++], {n}, x.dtype);
    columns += n;
  }
  return {{x.dtype, {x.dims[0], columns}, x.rows}};
}

Value linear(GraphBuilder& graph, std::string_view name, Value x, const std::vector<LinearWeight>& weights) {
  std::vector<Value> inputs{x};
  std::vector<LinearPart> parts;
  for (const LinearWeight& weight : weights) {
    inputs.push_back(weight.weight);
    if (weight.bias.id >= 0) inputs.push_back(weight.bias);
    parts.push_back({weight.transposed, weight.bias.id >= 0});
  }
  return graph.add(name, std::make_shared<Linear>(std::move(parts)), std::move(inputs))[0];
}

namespace {

// Up to this many rows our own loops read the weight once and beat a general matrix product (bench_ops
// linear).
constexpr int64_t kSmallRows = 8;

template <class T>
void run_small(const SmallLinear<T>& args, bool transposed) {
  const auto columns_of = transposed ? row_kernels<T>().linear_nk : row_kernels<T>().linear_kn;
  constexpr int64_t kColumnGroup = 64;
  const int64_t groups = (args.n + kColumnGroup - 1) / kColumnGroup;
  parallel_for(groups, grain_for(kColumnGroup * args.m * args.k / 8), [&](int64_t begin, int64_t end) {
    columns_of(args, begin * kColumnGroup, std::min(args.n, end * kColumnGroup));
  });
}

template <class T>
void run(const Linear& op, const KernelArgs& args) {
  const TensorView& x = args.in(0);
  const TensorView& y = args.out(0);
  const int64_t rows = x.dims[0];
  if (rows == 0) return;
  int64_t column = 0;
  size_t at = 1;
  for (const LinearPart& part : op.parts) {
    const TensorView& weight = args.in(at++);
    const T* bias = part.has_bias ? args.in(at++).template as<T>() : nullptr;
    const int64_t n = weight.dims[part.transposed ? 0 : 1];
    const int64_t k = x.dims[1];
    T* out = y.as<T>() + column;
    if (rows <= kSmallRows) {
      run_small<T>({x.as<T>(), weight.as<T>(), bias, out, rows, n, k, y.dims[1]}, part.transposed);
    } else {
      gemm({.dtype = x.dtype,
            .m = rows,
            .n = n,
            .k = k,
            .a = x.data,
            .a_stride = k,
            .b = weight.data,
            .b_transposed = part.transposed,
            .bias = bias,
            .c = out,
            .c_stride = y.dims[1]});
    }
    column += n;
  }
}

constexpr CpuFunctions<Linear> kFunctions{run<float>, run<BFloat16>, run<Float16>};

// ---- bfloat16 weights as panels, where the processor multiplies bfloat16
// -------------------------------------------

constexpr int64_t kGroupColumns = 4 * kPanelRows;  // columns that a thread computes at a time
constexpr int64_t kChunkRows = 192;                // rows of x that stay in the cache meanwhile
constexpr int64_t kMaxSummands = 5120;  // of a pass: four panels of this length fit the second-level cache

class PanelLinear final : public Kernel {
 public:
  explicit PanelLinear(std::shared_ptr<const PanelWeight> weight) : weight_(std::move(weight)) {}

  void run(const KernelArgs& args) override {
    const int64_t rows = args.in(0).dims[0];
    const BFloat16* x = args.in(0).as<BFloat16>();
    BFloat16* y = args.out(0).as<BFloat16>();
    const int64_t groups = (weight_->n + kGroupColumns - 1) / kGroupColumns;
    const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
    const int64_t work = kGroupColumns * std::min(rows, kChunkRows) * weight_->k / kOperationsPerStep;
    parallel_for(groups * chunks, grain_for(work), [&](int64_t begin, int64_t end) {
      if (chunks == 1) return multiply(x, rows, begin, end, y);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % chunks * kChunkRows;
        multiply(x + row * weight_->k, std::min(kChunkRows, rows - row), task / chunks, task / chunks + 1,
                 y + row * weight_->n);
      }
    });
  }

 private:
  static constexpr int64_t kOperationsPerStep = 32;  // that one instruction does

  // Groups [begin, end) of columns.
  void multiply(const BFloat16* x, int64_t rows, int64_t begin, int64_t end, BFloat16* y) const {
    const int64_t column = begin * kGroupColumns;
    const int64_t k = weight_->k;
    const PanelProduct product{.a = x,
                               .a_stride = k,
                               .m = rows,
                               .panels = weight_->data() + column * k,
                               .panel_stride = kPanelRows * k,
                               .k = k,
                               .n = std::min(weight_->n, end * kGroupColumns) - column};
    const BFloat16* bias = weight_->has_bias ? weight_->bias() + column : nullptr;
    if (k <= kMaxSummands || rows <= kSmallRows) {
      panel_kernels()->to_bfloat16(product, bias, y + column, weight_->n);
    } else {
      multiply_in_passes(product, bias, y + column);
    }
  }

  // Long sums: a pass over part of k at a time, sums kept in float32 between the passes.
  void multiply_in_passes(const PanelProduct& whole, const BFloat16* bias, BFloat16* y) const {
    alignas(64) float sums[kChunkRows * kGroupColumns];
    for (int64_t column = 0; column < whole.n; column += kGroupColumns) {
      PanelProduct part = whole;
      part.n = std::min(kGroupColumns, whole.n - column);
      for (int64_t from = 0; from < whole.k; from += kMaxSummands) {
        part.a = whole.a + from;
        part.panels = whole.panels + column * whole.k + from * kPanelRows;
        part.k = std::min(kMaxSummands, whole.k - from);
        panel_kernels()->to_float(part, from > 0, sums, kGroupColumns);
      }
      for (int64_t row = 0; row < whole.m; ++row) {
        for (int64_t j = 0; j < part.n; ++j) {
          const float shift = bias == nullptr ? 0.0f : static_cast<float>(bias[column + j]);
          y[row * weight_->n + column + j] = BFloat16(sums[row * kGroupColumns + j] + shift);
        }
      }
    }
  }

  std::shared_ptr<const PanelWeight> weight_;
};

std::vector<size_t> replaced_by_panels(const Operation&, const std::vector<TensorDesc>& inputs) {
  if (panel_kernels() == nullptr) return {};
  std::vector<size_t> positions;
  for (size_t position = 1; position < inputs.size(); ++position) {
    if (inputs[position].dtype != DType::kBFloat16) return {};
    positions.push_back(position);
  }
  const Dims& first = inputs[1].dims;  // [n, k] or [k, n]: both even serves either
  return first[0] % 2 == 0 && first[1] % 2 == 0 ? positions : std::vector<size_t>{};
}

std::string panel_format(const Operation& operation) {
  std::string format = "panels";
  for (const LinearPart& part : dynamic_cast<const Linear&>(operation).parts) {
    format += std::string(part.transposed ? " nk" : " kn") + (part.has_bias ? "+bias" : "");
  }
  return format;
}

// The matrix that the parts of a linear make, and what lies where in it.
struct PanelParts {
  struct Part {
    const BFloat16* weight = nullptr;
    const BFloat16* bias = nullptr;
    bool transposed = true;
    int64_t first = 0;  // row of the whole
    int64_t n = 0;
  };
  std::vector<Part> parts;
  int64_t n = 0;
  int64_t k = 0;
  bool has_bias = false;

  PanelParts(const Operation& operation, const std::vector<TensorView>& replaced) {
    size_t at = 0;
    for (const LinearPart& part : dynamic_cast<const Linear&>(operation).parts) {
      const TensorView& weight = replaced[at++];
      const int64_t rows = weight.dims[part.transposed ? 0 : 1];
      k = weight.dims[part.transposed ? 1 : 0];
      parts.push_back({weight.as<BFloat16>(), nullptr, part.transposed, n, rows});
      if (part.has_bias) parts.back().bias = replaced[at++].as<BFloat16>();
      has_bias = has_bias || part.has_bias;
      n += rows;
    }
  }

  size_t bytes() const { return PanelWeight::bytes_for(n, k, has_bias); }
};

void pack_one_panel(const PanelParts& whole, int64_t first, BFloat16* panel) {
  const BFloat16* rows[kPanelRows] = {};
  const PanelParts::Part* strided = nullptr;  // the last part here that is [k, n]
  for (const PanelParts::Part& part : whole.parts) {
    const int64_t begin = std::max(first, part.first);
    const int64_t end = std::min(first + kPanelRows, part.first + part.n);
    if (begin >= end) continue;
    if (!part.transposed) strided = &part;
    for (int64_t row = begin; part.transposed && row < end; ++row) {
      rows[row - first] = part.weight + (row - part.first) * whole.k;
    }
  }
  if (strided == nullptr) return pack_panel(rows, whole.k, panel);
  if (strided->first <= first && first + kPanelRows <= strided->first + strided->n) {
    return pack_columns(strided->weight + first - strided->first, strided->n, whole.k, panel);
  }
  pack_panel(rows, whole.k, panel);
  for (const PanelParts::Part& part : whole.parts) {
    const int64_t begin = std::max(first, part.first);
    const int64_t end = std::min(first + kPanelRows, part.first + part.n);
    for (int64_t j = 0; !part.transposed && j < whole.k; ++j) {
      for (int64_t row = begin; row < end; ++row) {
        panel[j / 2 * 2 * kPanelRows + (row - first) * 2 + j % 2] =
            part.weight[j * part.n + row - part.first];
      }
    }
  }
}

size_t packed_bytes(const Operation& operation, const std::vector<TensorView>& replaced) {
  return PanelParts(operation, replaced).bytes();
}

void pack_linear(const Operation& operation, const std::vector<TensorView>& replaced, std::byte* out) {
  const PanelParts whole(operation, replaced);
  auto* panels = reinterpret_cast<BFloat16*>(out);
  const int64_t count = (whole.n + kPanelRows - 1) / kPanelRows;
  parallel_for(count, grain_for(kPanelRows * whole.k / 8), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_one_panel(whole, panel * kPanelRows, panels + panel * kPanelRows * whole.k);
    }
  });
  if (!whole.has_bias) return;
  BFloat16* bias = panels + panel_elements(whole.n, whole.k);
  std::fill_n(bias, whole.n, BFloat16(0.0f));
  for (const PanelParts::Part& part : whole.parts) {
    if (part.bias != nullptr) std::copy_n(part.bias, part.n, bias + part.first);
  }
}

PackedWeightPtr adopt_panels(const Operation& operation, const std::vector<TensorView>& replaced,
                             HostBytes packed) {
  const PanelParts whole(operation, replaced);
  return std::make_shared<PanelWeight>(whole.n, whole.k, whole.has_bias, std::move(packed));
}

std::unique_ptr<Kernel> make(const KernelSetup& setup) {
  if (setup.packed != nullptr) {
    return std::make_unique<PanelLinear>(std::dynamic_pointer_cast<const PanelWeight>(setup.packed));
  }
  return make_cpu_kernel<Linear, kFunctions>(setup);
}

const bool registered = register_kernel(Linear::kName, DeviceType::kCpu, make);
const bool packer_registered = register_packer(Linear::kName, DeviceType::kCpu,
                                               {.replaces = replaced_by_panels,
                                                .format = panel_format,
                                                .layout = kPanelLayout,
                                                .bytes = packed_bytes,
                                                .pack = pack_linear,
                                                .adopt = adopt_panels});
const bool known =
    register_operation(Linear::kName, [](const OperationParameters& parameters) -> OperationPtr {
      const LinearPart part{parameters.integer("transposed", 0) != 0, parameters.integer("has_bias", 0) != 0};
      return std::make_shared<Linear>(std::vector<LinearPart>(parameters.integer("parts", 1), part));
    });

}  // namespace
}  // namespace modeltorch
