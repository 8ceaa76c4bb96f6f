#include "graph/fusion.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "graph/kernel.h"

namespace modeltorch {
namespace {

struct FusionRegistry {
  std::mutex mutex;
  // By (-rank, name), so that the order is the same in every build.
  std::map<std::pair<int, std::string>, FusionPass> passes;
};

FusionRegistry& registry() {
  static FusionRegistry instance;
  return instance;
}

}  // namespace

bool register_fusion(std::string_view fused_operation, FusionPass pass, int rank) {
  FusionRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.passes.emplace(std::pair{-rank, std::string(fused_operation)}, pass).second;
}

void fuse(Graph& graph, DeviceType device) {
  std::map<std::pair<int, std::string>, FusionPass> passes;
  {
    const std::lock_guard lock(registry().mutex);
    passes = registry().passes;
  }
  bool changed = true;
  while (changed) {
    changed = false;
    for (const auto& [key, pass] : passes) {
      if (find_kernel(key.second, device) != nullptr && pass(graph)) changed = true;
    }
  }
}

}  // namespace modeltorch
