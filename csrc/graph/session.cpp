#include "graph/session.h"

#include <map>
#include <mutex>

#include "graph/plan.h"
#include "graph/trace.h"

namespace modeltorch {
namespace {

struct KnownDevice {
  SessionFactory factory = nullptr;
  DeviceTraits traits;
};

struct SessionRegistry {
  std::mutex mutex;
  std::map<DeviceType, KnownDevice> devices;
};

SessionRegistry& registry() {
  static SessionRegistry instance;
  return instance;
}

KnownDevice find_device(DeviceType type) {
  SessionRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  const auto found = known.devices.find(type);
  return found == known.devices.end() ? KnownDevice{} : found->second;
}

}  // namespace

void DeviceSession::run(Plan& plan, const StepInfo& step) {
  const NodeLaunch launch{.step = &step, .stream = nullptr, .traced = tracing()};
  for (size_t index = 0; index < plan.node_count(); ++index) plan.run_node(index, launch);
}

bool register_session(DeviceType type, SessionFactory factory, const DeviceTraits& traits) {
  SessionRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.devices.emplace(type, KnownDevice{factory, traits}).second;
}

void check_dtype(DeviceType type, DType dtype) {
  const DeviceTraits traits = find_device(type).traits;
  if (traits.check_dtype != nullptr) traits.check_dtype(dtype);
}

bool has_tiled_caches(DeviceType type) {
  const DeviceTraits traits = find_device(type).traits;
  return traits.has_tiled_caches != nullptr && traits.has_tiled_caches();
}

std::unique_ptr<DeviceSession> make_session(Device device) {
  const SessionFactory factory = find_device(device.type).factory;
  return factory == nullptr ? std::make_unique<DeviceSession>(device) : factory(device);
}

}  // namespace modeltorch
