#pragma once

#include <string>

namespace modeltorch {

/// The environment variables that this library reads, once each, at first use. docs/contract.md lists them.
struct Environment {
  bool trace = false;     ///< MODELTORCH_TRACE=1: print node, shapes and microseconds to standard error
  std::string cpu_level;  ///< MODELTORCH_CPU_LEVEL: a name of core/cpu_level.h; empty takes the best
};

const Environment& environment();

}  // namespace modeltorch
