#include "graph/session.h"

#include <map>
#include <mutex>

#include "graph/plan.h"
#include "graph/trace.h"

namespace modeltorch {
namespace {

struct SessionRegistry {
  std::mutex mutex;
  std::map<DeviceType, SessionFactory> factories;
};

SessionRegistry& registry() {
  static SessionRegistry instance;
  return instance;
}

}  // namespace

void DeviceSession::run(Plan& plan, const StepInfo& step) {
  const NodeLaunch launch{.step = &step, .stream = nullptr, .traced = tracing()};
  for (size_t index = 0; index < plan.node_count(); ++index) plan.run_node(index, launch);
}

bool register_session(DeviceType type, SessionFactory factory) {
  SessionRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.factories.emplace(type, factory).second;
}

std::unique_ptr<DeviceSession> make_session(Device device) {
  SessionFactory factory = nullptr;
  {
    SessionRegistry& known = registry();
    const std::lock_guard lock(known.mutex);
    const auto found = known.factories.find(device.type);
    if (found != known.factories.end()) factory = found->second;
  }
  return factory == nullptr ? std::make_unique<DeviceSession>(device) : factory(device);
}

}  // namespace modeltorch
