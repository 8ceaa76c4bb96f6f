#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/file_store.h"
#include "graph/packing.h"

namespace modeltorch {

/// Dtype, shape and a hash of the bytes of every weight: equal texts mean equal weights.
std::string contents_of(const std::vector<TensorView>& weights);

/// Makes packed weights, and keeps them in files if it has a folder.
///
/// A file is named by a hash of everything that decides its bytes: the bytes, shapes and dtypes of the
/// weights, the format and the layout. So it cannot be out of date, and processor levels that share a layout
/// share files. Nothing that is wrong with a folder or a file stops a model: what cannot be read is packed,
/// what cannot be written is told in one warning.
class PackStore {
 public:
  /// Without a folder ("") everything is packed into memory.
  explicit PackStore(const std::string& folder);

  /// The packed form of these weights, whose contents_of() is `contents`. The packer has a layout.
  PackedWeightPtr get(const WeightPacker& packer, const Operation& operation,
                      const std::vector<TensorView>& replaced, const std::string& contents);

  std::string folder() const { return files_ ? files_->folder() : ""; }
  int64_t files_read() const { return files_read_; }
  int64_t files_written() const { return files_written_; }

 private:
  void keep(const Digest& name, const std::byte* data, size_t bytes);

  std::optional<FileStore> files_;
  int64_t files_read_ = 0;
  int64_t files_written_ = 0;
  bool may_write_ = true;
};

}  // namespace modeltorch
