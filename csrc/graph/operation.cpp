#include "graph/operation.h"

#include <cmath>
#include <mutex>

#include "core/check.h"

namespace modeltorch {
namespace {

struct OperationRegistry {
  std::mutex mutex;
  std::map<std::string, OperationFactory> factories;
};

OperationRegistry& registry() {
  static OperationRegistry instance;
  return instance;
}

}  // namespace

double OperationParameters::number(const std::string& name) const {
  const auto found = values_.find(name);
  check(found != values_.end(), "parameter ", name, " is required and missing");
  return found->second;
}

int64_t OperationParameters::integer(const std::string& name, int64_t least) const {
  constexpr double kMost = 1 << 20;
  const double value = number(name);
  check(value >= static_cast<double>(least) && value <= kMost && std::floor(value) == value, "parameter ",
        name, " must be a whole number in [", least, ", ", static_cast<int64_t>(kMost), "], got ", value);
  return static_cast<int64_t>(value);
}

bool register_operation(std::string_view name, OperationFactory factory) {
  OperationRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.factories.emplace(name, factory).second;
}

OperationPtr make_operation(const std::string& name, const OperationParameters& parameters) {
  OperationRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  const auto found = known.factories.find(name);
  if (found == known.factories.end()) {
    std::string names;
    for (const auto& [key, factory] : known.factories) names += (names.empty() ? "" : ", ") + key;
    fail(ErrorKind::kValue, "unknown operation ", name, "; known names: ", names);
  }
  return found->second(parameters);
}

}  // namespace modeltorch
