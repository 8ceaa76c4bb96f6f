// Streams and events: a thread and a queue for each stream, events that really wait.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "control.h"
#include "host_driver.h"

namespace {

using ascend_host::Task;

// Longer than any honest wait of a test, shorter than its patience.
constexpr std::chrono::seconds kEventPatience{20};

class Stream {
 public:
  ~Stream() { stop(); }

  void push(Task task) {
    const std::lock_guard lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }

  /// Waits for all tasks; returns the first error since the last call.
  aclError synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return tasks_.empty() && !busy_; });
    return std::exchange(error_, ACL_SUCCESS);
  }

  bool idle() {
    const std::lock_guard lock(mutex_);
    return tasks_.empty() && !busy_;
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const Task task = std::move(tasks_.front());
      tasks_.pop_front();
      busy_ = true;
      lock.unlock();
      ascend_host::wait_for_permission();
      const aclError code = task();
      lock.lock();
      if (error_ == ACL_SUCCESS) error_ = code;
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::thread thread_;
  aclError error_ = ACL_SUCCESS;
  bool busy_ = false;
  bool stopping_ = false;
};

struct EventState {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;   // records that were put on a stream
  uint64_t completed = 0;  // the last one that a stream reached
  int64_t awaited = 0;     // waits that were put on a stream and have not ended
  std::chrono::steady_clock::time_point time;
};
using Event = std::shared_ptr<EventState>;

struct Streams {
  std::mutex mutex;
  std::vector<Stream*> all;
  Stream* fallback = nullptr;  // what the null stream stands for
};

Streams& streams() {
  static Streams& instance = *new Streams;
  return instance;
}

Stream* create() {
  auto* stream = new Stream;
  const std::lock_guard lock(streams().mutex);
  streams().all.push_back(stream);
  return stream;
}

Stream& stream_of(aclrtStream handle) {
  if (handle != nullptr) return *static_cast<Stream*>(handle);
  static Stream* const fallback = create();
  return *fallback;
}

const Event& event_of(aclrtEvent handle) {
  return *static_cast<Event*>(handle);
}

aclError wait_for(EventState& event, uint64_t record) {
  std::unique_lock lock(event.mutex);
  const bool reached =
      event.changed.wait_for(lock, kEventPatience, [&] { return event.completed >= record; });
  --event.awaited;
  return reached ? ACL_SUCCESS : ACL_ERROR_RT_EVENT_SYNC_TIMEOUT;
}

aclError synchronize_all() {
  std::vector<Stream*> all;
  {
    const std::lock_guard lock(streams().mutex);
    all = streams().all;
  }
  aclError first = ACL_SUCCESS;
  for (Stream* stream : all) {
    const aclError code = stream->synchronize();
    if (first == ACL_SUCCESS) first = code;
  }
  return first;
}

}  // namespace

void ascend_host::enqueue(aclrtStream stream, Task task) {
  stream_of(stream).push(std::move(task));
}

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  *stream = create();
  return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  return aclrtCreateStream(stream);
}

aclError aclrtDestroyStream(aclrtStream handle) {
  auto* stream = static_cast<Stream*>(handle);
  {
    const std::lock_guard lock(streams().mutex);
    std::erase(streams().all, stream);
  }
  delete stream;
  return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream handle) {
  return aclrtDestroyStream(handle);
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  return stream_of(stream).synchronize();
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
  return stream_of(stream).synchronize();
}

aclError aclrtSynchronizeDevice() {
  return synchronize_all();
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) {
  return synchronize_all();
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  *status = stream_of(stream).idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
  *event = new Event(std::make_shared<EventState>());
  return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  return aclrtCreateEventExWithFlag(event, flag);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  {
    const std::lock_guard lock(event_of(event)->mutex);
    if (event_of(event)->awaited > 0) ascend_host::count("events_destroyed_early");
  }
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  ascend_host::count("event_records");
  if (const aclError code = ascend_host::take_fault("event_record", ACL_ERROR_RT_INTERNAL_ERROR)) return code;
  const Event event = event_of(handle);
  uint64_t record = 0;
  {
    const std::lock_guard lock(event->mutex);
    record = ++event->recorded;
  }
  ascend_host::enqueue(stream, [event, record]() -> aclError {
    const std::lock_guard lock(event->mutex);
    event->completed = std::max(event->completed, record);
    event->time = std::chrono::steady_clock::now();
    event->changed.notify_all();
    return ACL_SUCCESS;
  });
  return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  ascend_host::count("event_waits");
  if (const aclError code = ascend_host::take_fault("event_wait", ACL_ERROR_RT_WAIT_TIMEOUT)) return code;
  const Event event = event_of(handle);
  uint64_t record = 0;
  {
    const std::lock_guard lock(event->mutex);
    record = event->recorded;
    ++event->awaited;
  }
  const aclError injected = ascend_host::take_fault("event_timeout", ACL_ERROR_RT_EVENT_SYNC_TIMEOUT);
  ascend_host::enqueue(stream, [event, record, injected]() -> aclError {
    const aclError code = wait_for(*event, record);
    return injected != ACL_SUCCESS ? injected : code;
  });
  return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent, aclrtStream) {
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  const Event event = event_of(handle);
  uint64_t record = 0;
  {
    const std::lock_guard lock(event->mutex);
    record = event->recorded;
    ++event->awaited;
  }
  return wait_for(*event, record);
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  const Event event = event_of(handle);
  const std::lock_guard lock(event->mutex);
  *status = event->completed >= event->recorded ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                                : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent first, aclrtEvent last) {
  const std::chrono::duration<float, std::milli> passed = event_of(last)->time - event_of(first)->time;
  *milliseconds = passed.count();
  return ACL_SUCCESS;
}

aclError aclFinalize() {
  const std::lock_guard lock(streams().mutex);
  for (Stream* stream : streams().all) stream->stop();
  return ACL_SUCCESS;
}

}  // extern "C"
