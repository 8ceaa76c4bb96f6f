#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace modeltorch {

/// A 128-bit name of some bytes.
struct Digest {
  uint64_t high = 0;
  uint64_t low = 0;

  bool operator==(const Digest&) const = default;

  /// 32 hexadecimal digits.
  std::string hex() const;
};

/// Hashes bytes, their number included. Not cryptographic: it tells chance changes apart, not forgeries.
///
/// The round is that of XXH64 (Y. Collet, xxHash) on words of 128 bits: the state grows by a multiple of the
/// word, is rotated and multiplied. Both constants are odd, so a round is a bijection of the state, and of
/// the word: a difference in one word of a lane is never lost, one in several is with a chance of 2^-128.
/// Bytes are cut into parts of 1 MiB that threads share; the result does not depend on the threads. It does
/// depend on the byte order of the processor.
Digest content_hash(const void* data, size_t bytes);

}  // namespace modeltorch
