#pragma once

#include <cstddef>
#include <string>

#include "core/content_hash.h"
#include "core/host_buffer.h"

namespace modeltorch {

/// Blocks of bytes by name, each a file in one folder, for any number of processes at once.
///
/// A file is written under a temporary name and renamed when it is whole, and never changed after that, so
/// that a reader sees all of it or nothing. It begins with a header that holds its name, its size and a hash
/// of its bytes; one that fits them in any way but all is as good as none. Blocks are mapped, read-only, so
/// that processes share the memory.
class FileStore {
 public:
  explicit FileStore(std::string folder) : folder_(std::move(folder)) {}

  /// The block of this name and size, checked; null if there is none.
  HostBytes find(const Digest& name, size_t bytes) const;

  /// Keeps a block; the folder is made if it is missing. Returns what went wrong, and then nothing is kept,
  /// or "".
  std::string keep(const Digest& name, const std::byte* data, size_t bytes);

  const std::string& folder() const { return folder_; }

 private:
  std::string path_of(const Digest& name) const;
  void remove_leftovers();

  const std::string folder_;
  bool looked_for_leftovers_ = false;
};

}  // namespace modeltorch
