#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>

#include "core/dims.h"
#include "core/dtype.h"

namespace modeltorch {

/// Which count of a run dimension 0 of a tensor follows.
///
/// A plan is made for a bucket of sizes; a run brings the true ones. Only dimension 0 ever differs between
/// the two, so one tag a tensor is all the symbolic shape arithmetic that the runner needs.
enum class Rows : uint8_t {
  kFixed,      ///< dimension 0 is the same in every run
  kTokens,     ///< tokens of the step, n
  kSequences,  ///< sequences of the step, B
  kLogits,     ///< rows that the lm_head computes
};

/// Shape and element type, without memory.
struct TensorDesc {
  DType dtype = DType::kFloat32;
  Dims dims;
  Rows rows = Rows::kFixed;

  size_t bytes() const { return static_cast<size_t>(dims.count()) * dtype_size(dtype); }

  friend bool operator==(const TensorDesc& a, const TensorDesc& b) {
    return a.dtype == b.dtype && a.dims == b.dims && a.rows == b.rows;
  }

  friend std::ostream& operator<<(std::ostream& out, const TensorDesc& desc) {
    return out << desc.dtype << desc.dims;
  }
};

/// How the elements of a tensor lie in memory.
enum class Format : uint8_t {
  kPlain,      ///< row-major
  kFractalNz,  ///< Ascend: matrices in tiles of 16 rows by 32 bytes, column of tiles by column of tiles
};

/// A contiguous tensor in memory that somebody else owns.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Dims dims;
  Format format = Format::kPlain;

  size_t bytes() const { return static_cast<size_t>(dims.count()) * dtype_size(dtype); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  friend std::ostream& operator<<(std::ostream& out, const TensorView& view) {
    return out << view.dtype << view.dims;
  }
};

}  // namespace modeltorch
