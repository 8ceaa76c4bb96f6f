#include "ops/panel_packing.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "core/parallel.h"
#include "ops/cpu_kernel.h"

namespace modeltorch {

std::vector<size_t> replaced_by_panels(const std::vector<TensorDesc>& inputs) {
  if (panel_kernels() == nullptr) return {};
  std::vector<size_t> positions;
  for (size_t position = 1; position < inputs.size(); ++position) {
    if (inputs[position].dtype != DType::kBFloat16) return {};
    positions.push_back(position);
  }
  const Dims& first = inputs[1].dims;  // [n, k] or [k, n]: what both sizes are serves either
  const auto fits = [](int64_t size) { return size > 0 && size % 2 == 0; };
  return fits(first[0]) && fits(first[1]) ? positions : std::vector<size_t>{};
}

std::string panel_format(const std::vector<LinearPart>& parts, PanelOrder order) {
  std::string format = order == PanelOrder::kGated ? "gated panels" : "panels";
  for (const LinearPart& part : parts) {
    format += std::string(part.transposed ? " nk" : " kn") + (part.has_bias ? "+bias" : "");
  }
  return format;
}

namespace {

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

  PanelParts(const std::vector<LinearPart>& given, const std::vector<TensorView>& replaced) {
    size_t at = 0;
    for (const LinearPart& part : given) {
      const TensorView& weight = replaced[at++];
      const int64_t rows = weight.dims[part.transposed ? 0 : 1];
      k = weight.dims[part.transposed ? 1 : 0];
      parts.push_back({weight.as<BFloat16>(), nullptr, part.transposed, n, rows});
      if (part.has_bias) parts.back().bias = replaced[at++].as<BFloat16>();
      has_bias = has_bias || part.has_bias;
      n += rows;
    }
  }

  bool is_gated(PanelOrder order) const {
    return order == PanelOrder::kGated && !has_bias && n % (2 * kPanelRows) == 0;
  }
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

}  // namespace

size_t panel_bytes(const std::vector<LinearPart>& parts, const std::vector<TensorView>& replaced) {
  const PanelParts whole(parts, replaced);
  return PanelWeight::bytes_for(whole.n, whole.k, whole.has_bias);
}

void pack_panels(const std::vector<LinearPart>& parts, PanelOrder order,
                 const std::vector<TensorView>& replaced, std::byte* out) {
  const PanelParts whole(parts, replaced);
  auto* panels = reinterpret_cast<BFloat16*>(out);
  const int64_t count = divide_up(whole.n, kPanelRows);
  const bool is_gated = whole.is_gated(order);
  parallel_for(count, grain_for(kPanelRows * whole.k / 8), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first =
          is_gated ? panel / 2 * kPanelRows + panel % 2 * (whole.n / 2) : panel * kPanelRows;
      pack_one_panel(whole, first, panels + panel * kPanelRows * whole.k);
    }
  });
  if (!whole.has_bias) return;
  BFloat16* bias = panels + panel_elements(whole.n, whole.k);
  std::fill_n(bias, whole.n, BFloat16(0.0f));
  for (const PanelParts::Part& part : whole.parts) {
    if (part.bias != nullptr) std::copy_n(part.bias, part.n, bias + part.first);
  }
}

PackedWeightPtr adopt_panels(const std::vector<LinearPart>& parts, PanelOrder order,
                             const std::vector<TensorView>& replaced, HostBytes packed) {
  const PanelParts whole(parts, replaced);
  return std::make_shared<PanelWeight>(whole.n, whole.k, whole.has_bias, whole.is_gated(order),
                                       std::move(packed));
}

}  // namespace modeltorch
