#include "graph/fusion.h"

#include <map>
#include <mutex>
#include <string>

#include "graph/kernel.h"

namespace modeltorch {
namespace {

struct FusionRegistry {
  std::mutex mutex;
  std::map<std::string, FusionPass> passes;  // by name, so that the order is the same in every build
};

FusionRegistry& registry() {
  static FusionRegistry instance;
  return instance;
}

}  // namespace

bool register_fusion(std::string_view fused_operation, FusionPass pass) {
  FusionRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.passes.emplace(fused_operation, pass).second;
}

void fuse(Graph& graph, DeviceType device) {
  std::map<std::string, FusionPass> passes;
  {
    const std::lock_guard lock(registry().mutex);
    passes = registry().passes;
  }
  bool changed = true;
  while (changed) {
    changed = false;
    for (const auto& [name, pass] : passes) {
      if (find_kernel(name, device) != nullptr && pass(graph)) changed = true;
    }
  }
}

}  // namespace modeltorch
