#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_buffer.h"

namespace modeltorch {

/// Memory that is read from end to end to see how fast this machine does it.
class ReadProbe {
 public:
  /// Throws Error for fewer than 1 byte or more than a terabyte; rounds up to whole lines of the cache.
  explicit ReadProbe(int64_t bytes);

  size_t bytes() const { return buffer_.bytes(); }

  /// Reads all of it once with every thread of the pool, each walking several streams side by side. Returns a
  /// value that depends on every byte, so that nothing is left out.
  uint64_t read() const;

 private:
  HostBuffer buffer_;
};

}  // namespace modeltorch
