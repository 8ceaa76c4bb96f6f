#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/half_floats.h"
#include "core/host_buffer.h"
#include "graph/packing.h"
#include "ops/panels.h"

namespace modeltorch {

/// The weights of a linear map as panels (ops/panels.h): several parts are one matrix, one below the other.
class PanelWeight final : public PackedWeight {
 public:
  PanelWeight(int64_t n, int64_t k)
      : n(n), k(k), panels_(static_cast<size_t>(panel_elements(n, k)) * sizeof(BFloat16)) {}

  size_t bytes() const override { return panels_.bytes() + bias.size() * sizeof(BFloat16); }
  BFloat16* data() const { return static_cast<BFloat16*>(panels_.data()); }

  const int64_t n;  ///< rows of the matrix, columns of the result
  const int64_t k;
  std::vector<BFloat16> bias;  ///< [n], or empty

 private:
  HostBuffer panels_;
};

/// The name of the form of one [n, k] matrix without bias: what a word embedding can share with a tied
/// lm_head.
inline constexpr const char* kPlainPanelFormat = "panels nk";

}  // namespace modeltorch
