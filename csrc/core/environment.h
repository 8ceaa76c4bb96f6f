#pragma once

#include <string>

namespace modeltorch {

/// The environment variables that this library reads, once each, at first use. docs/contract.md lists them.
struct Environment {
  bool trace = false;  ///< MODELTORCH_TRACE=1: print node, shapes and microseconds to standard error
  bool blocking =
      false;  ///< MODELTORCH_BLOCKING=1: on CUDA wait for every node and report its faults at once
  std::string cpu_level;  ///< MODELTORCH_CPU_LEVEL: a name of core/cpu_level.h; empty takes the best

  // Of Ascend alone, by the names that callers of this interface know (docs/ascend.md).
  std::string execute_async;     ///< ATB_OPERATION_EXECUTE_ASYNC: 0, 1 or 2
  bool launch_blocking = false;  ///< ASCEND_LAUNCH_BLOCKING=1: launch in line and wait for every node
  bool task_queue = true;        ///< TASK_QUEUE_ENABLE=0: launch in line, not through torch_npu's queue
};

const Environment& environment();

}  // namespace modeltorch
