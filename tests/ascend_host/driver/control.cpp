// What tests steer and read through ctypes: faults, counters, the progress of streams.

#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "control.h"
#include "host_driver.h"

namespace ascend_host {
namespace {

struct Fault {
  int64_t skip = 0;   // calls that still succeed
  int64_t times = 0;  // failures that are left
};

struct Control {
  std::mutex mutex;
  std::map<std::string, Fault> faults;
  std::map<std::string, int64_t> counters;
  bool paused = false;
  std::set<std::string> held;  // calls of the vendor's library that do not return yet
  int64_t delay_us = 0;
  std::condition_variable changed;
};

// ASCEND_HOST_INJECT="execute 12 1" injects a fault into a process that no test can reach.
Control* make_control() {
  auto* made = new Control;
  const char* text = std::getenv("ASCEND_HOST_INJECT");
  if (text == nullptr) return made;
  std::istringstream words(text);
  std::string fault;
  Fault amount;
  if (words >> fault >> amount.skip >> amount.times) made->faults[fault] = amount;
  return made;
}

// Never destroyed: stream threads may still use it while the process ends.
Control& control() {
  static Control& instance = *make_control();
  return instance;
}

thread_local std::string recent_message;

}  // namespace

aclError take_fault(const std::string& name, aclError code) {
  Control& state = control();
  const std::lock_guard lock(state.mutex);
  const auto found = state.faults.find(name);
  if (found == state.faults.end() || found->second.times == 0) return ACL_SUCCESS;
  if (found->second.skip-- > 0) return ACL_SUCCESS;
  found->second.skip = 0;
  --found->second.times;
  recent_message = "EZ9999: the stand-in was told to fail here (" + name + ")";
  return code;
}

void count(const std::string& name, int64_t amount) {
  Control& state = control();
  const std::lock_guard lock(state.mutex);
  state.counters[name] += amount;
}

void set_message(std::string message) {
  recent_message = std::move(message);
}

void wait_for_permission() {
  Control& state = control();
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return !state.paused; });
  const int64_t delay = state.delay_us;
  lock.unlock();
  if (delay > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay));
}

void wait_while_held(const std::string& call) {
  Control& state = control();
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return !state.held.contains(call); });
}

}  // namespace ascend_host

using ascend_host::control;

extern "C" {

/// Lets `skip` calls pass and the `times` after them fail. Faults: malloc, setup, execute, kernel,
/// event_record, event_wait, event_timeout.
void ascend_host_inject(const char* fault, int64_t skip, int64_t times) {
  const std::lock_guard lock(control().mutex);
  control().faults[fault] = {skip, times};
}

/// Failures of `fault` that have not fired.
int64_t ascend_host_pending(const char* fault) {
  const std::lock_guard lock(control().mutex);
  return control().faults[fault].times;
}

int64_t ascend_host_count(const char* name) {
  const std::lock_guard lock(control().mutex);
  return control().counters[name];
}

/// Writes every counter as "name value" lines into `text`; returns the length that all of them need.
int64_t ascend_host_counters(char* text, int64_t capacity) {
  std::string all;
  {
    const std::lock_guard lock(control().mutex);
    for (const auto& [name, value] : control().counters) all += name + " " + std::to_string(value) + "\n";
  }
  if (static_cast<int64_t>(all.size()) < capacity) all.copy(text, all.size());
  return static_cast<int64_t>(all.size());
}

/// Stops every stream before its next task, or lets them go on.
void ascend_host_pause(int32_t paused) {
  const std::lock_guard lock(control().mutex);
  control().paused = paused != 0;
  control().changed.notify_all();
}

/// Keeps every call of the vendor's setup or execute, or of the driver's cast, from returning, or lets them
/// go on.
void ascend_host_hold(const char* call, int32_t held) {
  const std::lock_guard lock(control().mutex);
  if (held != 0) {
    control().held.insert(call);
  } else {
    control().held.erase(call);
  }
  control().changed.notify_all();
}

/// Makes every task wait first, so that whoever does not synchronise is too early.
void ascend_host_delay(int64_t microseconds) {
  const std::lock_guard lock(control().mutex);
  control().delay_us = microseconds;
}

const char* aclGetRecentErrMsg() {
  // The caller copies the text; the next call on this thread starts with an empty one.
  static thread_local std::string handed_out;
  handed_out = std::exchange(ascend_host::recent_message, {});
  return handed_out.c_str();
}

}  // extern "C"
