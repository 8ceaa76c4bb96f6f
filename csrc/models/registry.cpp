#include "models/registry.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "core/check.h"
#include "core/warn.h"
#include "models/parameters.h"

namespace modeltorch {
namespace {

struct ModelRegistry {
  std::mutex mutex;
  std::map<std::string, ModelFactory> factories;
  std::map<std::string, ModelAlias> aliases;
};

ModelRegistry& registry() {
  static ModelRegistry instance;
  return instance;
}

}  // namespace

bool register_model(const std::string& key, ModelFactory factory) {
  ModelRegistry& known = registry();
  bool inserted = false;
  {
    const std::lock_guard lock(known.mutex);
    inserted = known.factories.emplace(key, factory).second;
  }
  if (!inserted) warn(concat("model ", key, " is registered twice: the first registration stays"));
  return inserted;
}

bool register_alias(const ModelAlias& alias) {
  ModelRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  return known.aliases.emplace(alias.name, alias).second;
}

std::vector<std::string> registered_models() {
  ModelRegistry& known = registry();
  const std::lock_guard lock(known.mutex);
  std::vector<std::string> keys;
  for (const auto& [key, factory] : known.factories) keys.push_back(key);
  for (const auto& [key, alias] : known.aliases) keys.push_back(key);
  std::sort(keys.begin(), keys.end());
  return keys;
}

namespace {

void check_alias(const ModelAlias& alias, const std::string& parameters) {
  const nlohmann::json object = parse_object(parameters, "the parameter of set_param");
  const auto found = object.find(alias.parameter);
  const bool fits = found == object.end() || !found->is_boolean() || found->get<bool>() == alias.value;
  check(fits, "model ", alias.name, " needs ", alias.parameter, " = ", alias.value ? "true" : "false",
        ", got ", alias.value ? "false" : "true", "; ", alias.target, " takes either");
}

}  // namespace

std::unique_ptr<Model> make_model(const std::string& key, const std::string& parameters) {
  ModelFactory factory = nullptr;
  ModelAlias alias;
  {
    ModelRegistry& known = registry();
    const std::lock_guard lock(known.mutex);
    const auto other_name = known.aliases.find(key);
    if (other_name != known.aliases.end()) alias = other_name->second;
    const auto found = known.factories.find(alias.target.empty() ? key : alias.target);
    if (found != known.factories.end()) factory = found->second;
  }
  if (factory == nullptr) {
    std::string names;
    for (const std::string& name : registered_models()) names += (names.empty() ? "" : ", ") + name;
    fail(ErrorKind::kValue, "unknown model name ", key, "; known names: ", names);
  }
  if (!alias.target.empty()) check_alias(alias, parameters);
  return factory(parameters);
}

}  // namespace modeltorch
