#pragma once

#include <string>

namespace modeltorch {

/// The environment variables that this library reads, once each, at first use. docs/contract.md lists them.
struct Environment {
  bool trace = false;  ///< MODELTORCH_TRACE=1: print node, shapes and microseconds to standard error
  std::string
      cpu_level;  ///< MODELTORCH_CPU_LEVEL: generic, avx2 or avx512; empty takes the best of the machine
};

const Environment& environment();

}  // namespace modeltorch
