#include "graph/packing.h"

#include <map>
#include <mutex>
#include <utility>

namespace modeltorch {
namespace {

struct PackerRegistry {
  std::mutex mutex;
  std::map<std::pair<std::string, DeviceType>, WeightPacker> packers;
};

PackerRegistry& registry() {
  static PackerRegistry instance;
  return instance;
}

}  // namespace

bool register_packer(std::string_view operation, DeviceType device, const WeightPacker& packer) {
  PackerRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.packers.emplace(std::pair{std::string(operation), device}, packer).second;
}

const WeightPacker* find_packer(std::string_view operation, DeviceType device) {
  PackerRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  const auto found = known.packers.find(std::pair{std::string(operation), device});
  return found == known.packers.end() ? nullptr : &found->second;
}

}  // namespace modeltorch
