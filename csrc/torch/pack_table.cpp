#include "torch/pack_table.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "core/check.h"
#include "core/host_buffer.h"
#include "torch/tensors.h"

namespace modeltorch {
namespace {

struct Entry {
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
  std::weak_ptr<const PackedWeight> packed;

  bool is_alive() const {
    const bool all =
        std::all_of(storages.begin(), storages.end(), [](const auto& s) { return !s.expired(); });
    return all && !packed.expired();
  }
};

struct PackTable {
  std::mutex mutex;
  std::map<std::string, Entry> entries;
};

PackTable& table() {
  static PackTable instance;
  return instance;
}

std::string key_of(const std::vector<at::Tensor>& tensors, const std::string& format) {
  std::string key = format;
  for (const at::Tensor& tensor : tensors) {
    const int64_t version = tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
    key += concat("|", tensor.storage().unsafeGetStorageImpl(), " ", tensor.storage_offset(), " ",
                  tensor.sizes(), " ", tensor.strides(), " ", tensor.scalar_type(), " ", tensor.device(), " ",
                  version);
  }
  return key;
}

}  // namespace

PackedWeightPtr shared_packed_weight(const std::vector<at::Tensor>& tensors, const std::string& format,
                                     const std::function<PackedWeightPtr()>& make) {
  PackTable& known = table();
  const std::lock_guard lock(known.mutex);
  std::erase_if(known.entries, [](const auto& item) { return !item.second.is_alive(); });
  const std::string key = key_of(tensors, format);
  const auto found = known.entries.find(key);
  if (found != known.entries.end()) return found->second.packed.lock();
  if (make == nullptr) return nullptr;
  PackedWeightPtr packed = make();
  Entry& entry = known.entries[key];
  for (const at::Tensor& tensor : tensors) {
    entry.storages.emplace_back(
        c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(tensor.storage().unsafeGetStorageImpl()));
  }
  entry.packed = packed;
  return packed;
}

namespace {

PackedWeightPtr pack(const GraphRunner& runner, const GraphRunner::PackRequest& request,
                     const std::vector<at::Tensor>& tensors, PackStore& store) {
  const Operation& operation = runner.operation(request.node);
  std::function<PackedWeightPtr()> make;
  if (request.packer->layout != nullptr) {
    make = [&] {
      const std::vector<TensorView> views = views_of(describe(tensors));
      PackedWeightPtr packed = store.get(*request.packer, operation, views);
      for (const TensorView& view : views) advise_unused(view.data, view.bytes());
      return packed;
    };
  }
  return shared_packed_weight(tensors, request.packer->format(operation), make);
}

// What a request takes, in bytes to pack.
double effort(const GraphRunner::PackRequest& request, const std::vector<at::Tensor>& weights) {
  double bytes = 0.0;
  for (const int32_t slot : request.slots) bytes += static_cast<double>(weights[slot].nbytes());
  return request.packer->layout == nullptr ? 0.0 : bytes;
}

}  // namespace

void pack_weights(GraphRunner& runner, std::vector<at::Tensor>& weights, PackStore& store,
                  const std::function<void(double)>& progress) {
  std::vector<GraphRunner::PackRequest> requests = runner.pack_requests();
  // The largest first: what is packed and what it is packed from are never both in memory but for one weight,
  // and it is a small one by the time that most are packed. Those that only share stay last.
  std::stable_sort(requests.begin(), requests.end(),
                   [&](const auto& a, const auto& b) { return effort(a, weights) > effort(b, weights); });
  double whole = 0.0;
  for (const GraphRunner::PackRequest& request : requests) whole += effort(request, weights);
  double done = 0.0;
  for (const GraphRunner::PackRequest& request : requests) {
    std::vector<at::Tensor> tensors;
    for (const int32_t slot : request.slots) tensors.push_back(weights[slot]);
    PackedWeightPtr packed = pack(runner, request, tensors, store);
    if (packed != nullptr) runner.bind_packed(request, std::move(packed));
    done += effort(request, weights);
    if (whole > 0.0) progress(done / whole);
  }
  for (size_t slot = 0; slot < weights.size(); ++slot) {
    if (!runner.reads_weight(static_cast<int32_t>(slot))) weights[slot].reset();
  }
}

}  // namespace modeltorch
