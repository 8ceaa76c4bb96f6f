#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

/// What the stand-in driver offers to the stand-in for the vendor's operations, beside the acl functions.
///
/// A stream is a thread with a queue: what is put on it runs later, in order, and beside the other streams.
namespace ascend_host {

/// A piece of device work. A code other than 0 puts the stream into an error that the next synchronisation
/// returns.
using Task = std::function<aclError()>;

/// Puts `task` at the end of a stream's queue.
void enqueue(aclrtStream stream, Task task);

/// True if [data, data + bytes) lies inside one live allocation of device memory.
bool is_device_memory(const void* data, size_t bytes);

/// The code that the fault `name` returns now, or 0 if it was not injected or has fired often enough.
aclError take_fault(const std::string& name, aclError code);

/// Blocks while tests hold calls of this name.
void wait_while_held(const std::string& call);

/// Adds to the counter that tests read by name.
void count(const std::string& name, int64_t amount = 1);

/// Keeps `message` as what aclGetRecentErrMsg returns next on this thread.
void set_message(std::string message);

}  // namespace ascend_host
