#pragma once

#include <cstddef>
#include <initializer_list>
#include <vector>

namespace atb {

template <class T>
class SVector {
 public:
  SVector() = default;
  SVector(std::initializer_list<T> items) : items_(items) {}

  void push_back(const T& item) { items_.push_back(item); }
  size_t size() const { return items_.size(); }
  const T& at(size_t index) const { return items_.at(index); }
  T& at(size_t index) { return items_.at(index); }
  const T* begin() const { return items_.data(); }
  const T* end() const { return items_.data() + items_.size(); }

 private:
  std::vector<T> items_;
};

}  // namespace atb
