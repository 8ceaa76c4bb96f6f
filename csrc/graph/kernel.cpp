#include "graph/kernel.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace modeltorch {
namespace {

struct KernelRegistry {
  std::mutex mutex;
  std::map<std::pair<std::string, DeviceType>, KernelFactory> factories;
};

KernelRegistry& registry() {
  static KernelRegistry instance;
  return instance;
}

}  // namespace

bool register_kernel(std::string_view operation, DeviceType device, KernelFactory factory) {
  KernelRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.factories.emplace(std::pair{std::string(operation), device}, factory).second;
}

KernelFactory find_kernel(std::string_view operation, DeviceType device) {
  KernelRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  const auto found = known.factories.find(std::pair{std::string(operation), device});
  return found == known.factories.end() ? nullptr : found->second;
}

}  // namespace modeltorch
