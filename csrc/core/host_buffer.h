#pragma once

#include <cstddef>
#include <memory>

namespace modeltorch {

/// Bytes that somebody owns: memory of our own, or a mapped file.
using HostBytes = std::shared_ptr<const std::byte>;

/// Host memory for data that is read from end to end in every step: aligned to a huge page and advised to use
/// them.
class HostBuffer {
 public:
  explicit HostBuffer(size_t bytes);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

/// Tells the operating system that these pages will not be read soon: pages that a file backs leave this
/// process, and come back when they are read again. Nobody may write to them during the call; contents do not
/// change.
void advise_unused(const void* data, size_t bytes);

}  // namespace modeltorch
