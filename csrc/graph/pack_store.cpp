#include "graph/pack_store.h"

#include <utility>

#include "core/check.h"
#include "core/content_hash.h"
#include "core/warn.h"

namespace modeltorch {
namespace {

HostBytes pack_into_memory(const WeightPacker& packer, const Operation& operation,
                           const std::vector<TensorView>& replaced, size_t bytes) {
  const auto buffer = std::make_shared<HostBuffer>(bytes);
  auto* packed = static_cast<std::byte*>(buffer->data());
  packer.pack(operation, replaced, packed);
  return {buffer, packed};
}

}  // namespace

std::string contents_of(const std::vector<TensorView>& weights) {
  std::string text;
  for (const TensorView& weight : weights) {
    text += concat("|", weight, " ", content_hash(weight.data, weight.bytes()).hex());
  }
  return text;
}

PackStore::PackStore(const std::string& folder) {
  if (!folder.empty()) files_.emplace(folder);
}

PackedWeightPtr PackStore::get(const WeightPacker& packer, const Operation& operation,
                               const std::vector<TensorView>& replaced, const std::string& contents) {
  const size_t bytes = packer.bytes(operation, replaced);
  HostBytes packed;
  Digest name;
  if (files_) {
    const std::string text = concat(packer.layout, "|", packer.format(operation), contents);
    name = content_hash(text.data(), text.size());
    packed = files_->find(name, bytes);
  }
  if (packed != nullptr) {
    ++files_read_;
  } else {
    packed = pack_into_memory(packer, operation, replaced, bytes);
    if (files_) keep(name, packed.get(), bytes);
  }
  return packer.adopt(operation, replaced, std::move(packed));
}

void PackStore::keep(const Digest& name, const std::byte* data, size_t bytes) {
  if (!may_write_) return;
  const std::string problem = files_->keep(name, data, bytes);
  if (problem.empty()) {
    ++files_written_;
    return;
  }
  may_write_ = false;
  warn(concat("packed weights cannot be kept in ", files_->folder(), " (", problem,
              "): the model runs, and packs them again next time"));
}

}  // namespace modeltorch
