#pragma once

#include <string>

namespace modeltorch {

using WarningHandler = void (*)(const std::string& message);

/// Installs what shows warnings to the user. Called once, at load; until then they go to standard error.
void set_warning_handler(WarningHandler handler);

/// Tells the user something that is not an error.
void warn(const std::string& message);

}  // namespace modeltorch
