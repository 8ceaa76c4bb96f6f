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

struct PackTable {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<const PackedWeight>> entries;
};

PackTable& table() {
  static PackTable instance;
  return instance;
}

}  // namespace

PackedWeightPtr shared_packed_weight(const std::string& key, const std::function<PackedWeightPtr()>& make) {
  PackTable& known = table();
  const std::lock_guard lock(known.mutex);
  std::erase_if(known.entries, [](const auto& item) { return item.second.expired(); });
  std::weak_ptr<const PackedWeight>& entry = known.entries[key];
  PackedWeightPtr packed = entry.lock();
  if (packed == nullptr && make != nullptr) entry = packed = make();
  return packed;
}

namespace {

// The bytes of the tensors decide, not where they lie: a tensor may be written to without torch's knowledge,
// and a copy of it shares the form.
PackedWeightPtr pack(const GraphRunner& runner, const GraphRunner::PackRequest& request,
                     const std::vector<at::Tensor>& tensors, PackStore& store) {
  const Operation& operation = runner.operation(request.node);
  const std::vector<TensorView> views = views_of(describe(tensors));
  const std::string contents = contents_of(views);
  std::function<PackedWeightPtr()> make;
  if (request.packer->layout != nullptr) {
    make = [&] { return store.get(*request.packer, operation, views, contents); };
  }
  const std::string key = concat(store.folder(), "|", request.packer->format(operation), contents);
  PackedWeightPtr packed = shared_packed_weight(key, make);
  for (const TensorView& view : views) advise_unused(view.data, view.bytes());
  return packed;
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
