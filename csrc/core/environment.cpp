#include "core/environment.h"

#include <cstdlib>

namespace modeltorch {
namespace {

std::string read(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

const Environment& environment() {
  static const Environment instance{
      .trace = read("MODELTORCH_TRACE") == "1",
      .cpu_level = read("MODELTORCH_CPU_LEVEL"),
  };
  return instance;
}

}  // namespace modeltorch
