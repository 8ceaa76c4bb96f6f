#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/model.h"

namespace modeltorch {

using ModelFactory = std::unique_ptr<Model> (*)(const std::string& parameters);

/// Makes a model known under `key`. A key that is taken keeps its first owner: a warning, and false.
bool register_model(const std::string& key, ModelFactory factory);

/// Another name for a registered model, which asks for one value of a boolean parameter.
struct ModelAlias {
  std::string name;       ///< "qwen_PAModel"
  std::string target;     ///< "qwen_DecoderModel"
  std::string parameter;  ///< "isFA"
  bool value = false;
};
bool register_alias(const ModelAlias& alias);

/// Makes the model `key` (a registered key or an alias) and lets it parse its JSON parameters. Throws Error
/// listing the known names.
std::unique_ptr<Model> make_model(const std::string& key, const std::string& parameters);

/// Every registered key and alias, sorted.
std::vector<std::string> registered_models();

/// Registers class ns::Class under the key "ns_Class". Use it once, at namespace scope, where ns is visible.
#define REGISTER_MODEL(ns, Class)                                                                 \
  [[maybe_unused]] static const bool registered_##ns##_##Class = ::modeltorch::register_model(    \
      #ns "_" #Class, [](const std::string& parameters) -> std::unique_ptr<::modeltorch::Model> { \
        return std::make_unique<ns::Class>(parameters);                                           \
      })

}  // namespace modeltorch
