#include "core/warn.h"

#include <cstdio>

namespace modeltorch {
namespace {

WarningHandler installed_handler = [](const std::string& message) {
  std::fprintf(stderr, "modeltorch: %s\n", message.c_str());
};

}  // namespace

void set_warning_handler(WarningHandler handler) {
  installed_handler = handler;
}

void warn(const std::string& message) {
  installed_handler(message);
}

}  // namespace modeltorch
