#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <ostream>

#include "core/check.h"

namespace modeltorch {

/// The sizes of a tensor: up to 8 of them, held in place.
class Dims {
 public:
  static constexpr int kMaxRank = 8;

  Dims() = default;

  Dims(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) push_back(size);
  }

  void push_back(int64_t size) {
    check(rank_ < kMaxRank, "a tensor has at most ", kMaxRank, " dimensions");
    sizes_[rank_++] = size;
  }

  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return sizes_[axis]; }
  int64_t& operator[](int axis) { return sizes_[axis]; }
  int64_t back() const { return sizes_[rank_ - 1]; }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + rank_; }

  /// Number of elements; 1 for a scalar.
  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : *this) product *= size;
    return product;
  }

  friend bool operator==(const Dims& a, const Dims& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

  friend std::ostream& operator<<(std::ostream& out, const Dims& dims) {
    out << '[';
    for (int axis = 0; axis < dims.rank_; ++axis) out << (axis ? ", " : "") << dims.sizes_[axis];
    return out << ']';
  }

 private:
  std::array<int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

}  // namespace modeltorch
