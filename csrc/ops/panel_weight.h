#pragma once

#include <memory>

#include "core/half_floats.h"
#include "graph/packing.h"
#include "ops/panels.h"

namespace modeltorch {

/// The weights of a linear map as panels (ops/panels.h): several parts are one matrix, one below the other.
/// The bias, if there is one, follows the last panel. Gated: the matrix is a gate and, below it, what the
/// gate lets through, and panels of the two lie in turn.
class PanelWeight final : public PackedWeight {
 public:
  PanelWeight(int64_t n, int64_t k, bool has_bias, bool is_gated, HostBytes packed)
      : n(n), k(k), has_bias(has_bias), is_gated(is_gated), packed_(std::move(packed)) {}

  static size_t bytes_for(int64_t n, int64_t k, bool has_bias) {
    return static_cast<size_t>(panel_elements(n, k) + (has_bias ? n : 0)) * sizeof(BFloat16);
  }

  size_t bytes() const override { return bytes_for(n, k, has_bias); }
  const BFloat16* data() const { return reinterpret_cast<const BFloat16*>(packed_.get()); }

  /// [n], or null.
  const BFloat16* bias() const { return has_bias ? data() + panel_elements(n, k) : nullptr; }

  const int64_t n;  ///< rows of the matrix
  const int64_t k;
  const bool has_bias;
  const bool is_gated;

 private:
  HostBytes packed_;
};

/// The name of the form of one [n, k] matrix without bias: what a word embedding can share with a tied
/// lm_head.
inline constexpr const char* kPlainPanelFormat = "panels nk";

}  // namespace modeltorch
