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
      .blocking = read("MODELTORCH_BLOCKING") == "1",
      .cpu_level = read("MODELTORCH_CPU_LEVEL"),
      .execute_async = read("ATB_OPERATION_EXECUTE_ASYNC"),
      .launch_blocking = read("ASCEND_LAUNCH_BLOCKING") == "1",
      .task_queue = read("TASK_QUEUE_ENABLE") != "0",
  };
  return instance;
}

}  // namespace modeltorch
