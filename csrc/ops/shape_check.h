#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "core/tensor_view.h"

namespace modeltorch {

/// Throws unless `inputs` holds `count` tensors.
inline void check_count(const std::vector<TensorDesc>& inputs, size_t count) {
  check(inputs.size() == count, "expected ", count, " inputs, got ", inputs.size());
}

/// Throws unless `desc` has this rank.
inline void check_rank(std::string_view tensor, const TensorDesc& desc, int rank) {
  check(desc.dims.rank() == rank, tensor, " must have ", rank, " dimensions, got ", desc);
}

/// Throws unless `desc` has these sizes and this element type.
inline void check_tensor(std::string_view tensor, const TensorDesc& desc, const Dims& dims, DType dtype) {
  check(desc.dims == dims && desc.dtype == dtype, tensor, " must be ", TensorDesc{dtype, dims}, ", got ",
        desc);
}

/// Throws unless every one of `count` indices is in [low, high).
template <class T>
void check_range(std::string_view tensor, const T* indices, int64_t count, int64_t low, int64_t high) {
  for (int64_t at = 0; at < count; ++at) {
    check(indices[at] >= low && indices[at] < high, tensor, " holds ", indices[at], " at ", at, ", outside [",
          low, ", ", high, ")");
  }
}

}  // namespace modeltorch
