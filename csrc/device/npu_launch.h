#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "core/check.h"

namespace modeltorch {

/// How far the launches of one step are. Shared by the caller, the thread that sets nodes up and the task
/// queue.
class NpuLaunch {
 public:
  /// Nodes 0 to `count` - 1 are set up.
  void set_prepared(size_t count) {
    const std::lock_guard lock(mutex_);
    prepared_ = count;
    changed_.notify_all();
  }

  /// Waits until node `index` is set up; false if something failed before that.
  bool wait_prepared(size_t index) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return prepared_ > index || error_.has_value(); });
    return prepared_ > index;
  }

  /// The task queue took the launches and will not run them: it has stopped.
  void drop() {
    fail(Error(ErrorKind::kRuntime,
               "torch_npu's task queue, which an earlier error has stopped, dropped the step"));
    const std::lock_guard lock(mutex_);
    dropped_ = true;
  }

  bool dropped() {
    const std::lock_guard lock(mutex_);
    return dropped_;
  }

  /// Keeps the first error.
  void fail(const Error& error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = error;
    changed_.notify_all();
  }

  /// No thread but the caller's will touch the step any more.
  void end_stage() {
    const std::lock_guard lock(mutex_);
    --stages_;
    changed_.notify_all();
  }

  void begin_stage() {
    const std::lock_guard lock(mutex_);
    ++stages_;
  }

  /// Waits until every stage has ended; returns the first error.
  std::optional<Error> wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stages_ == 0; });
    return error_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t prepared_ = 0;
  int stages_ = 0;
  bool dropped_ = false;
  std::optional<Error> error_;
};

/// One thread's part in a launch. It also ends if it goes away without having run: a task queue that has
/// stopped drops its tasks.
class NpuStage {
 public:
  explicit NpuStage(std::shared_ptr<NpuLaunch> launch) : launch_(std::move(launch)) {
    launch_->begin_stage();
  }

  ~NpuStage() {
    if (ran_) return;
    launch_->drop();
    launch_->end_stage();
  }

  NpuStage(const NpuStage&) = delete;
  NpuStage& operator=(const NpuStage&) = delete;

  /// Runs `body`, whose errors the launch keeps.
  template <class Body>
  void run(Body&& body) {
    ran_ = true;
    try {
      body(*launch_);
    } catch (const Error& error) {
      launch_->fail(error);
    } catch (const std::exception& error) {
      launch_->fail(Error(ErrorKind::kRuntime, error.what()));
    }
    launch_->end_stage();
  }

 private:
  std::shared_ptr<NpuLaunch> launch_;
  bool ran_ = false;
};

}  // namespace modeltorch
