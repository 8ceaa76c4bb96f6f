#pragma once

#include <condition_variable>
#include <string>

namespace ascend_host {

/// Blocks a stream's thread before a task while tests hold the streams back.
void wait_for_permission();

}  // namespace ascend_host
